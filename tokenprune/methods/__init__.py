"""One pruning method a file: `methods/NAME.py` registers the class called NAME."""
