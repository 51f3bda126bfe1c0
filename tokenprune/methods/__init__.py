"""One pruning method a file: `methods/NAME.py` registers the class called NAME. Methods know no model.

In: a `View` of images of one shape. Out: a `Selection`. A leading underscore marks what several methods share.
"""
