"""Numbers from answers alone: intervals, tests, how large a drop can still be. Knows no file and no model.

In: scores of the same samples. Out: floats.
"""
