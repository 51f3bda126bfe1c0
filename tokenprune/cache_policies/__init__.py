"""What stays in the KV cache, a policy a file: `cache_policies/NAME.py` registers the class called NAME.

In: query and keys of a decoder layer behind its attention. Out: which keys stay, and which of them steps read.
"""
