"""One change of attention a file: `interventions/NAME.py` registers the class called NAME.

In: query, key and value of a decoder layer, facts on keys. Out: the output of the rows that it replaces.
"""
