"""Signals, read off the model while it runs anyway: the vision tower, decoder attention, what layers do to tokens.

In: requests (`Signal`) and a block's projections. Out: one value a token, never a full attention matrix.
"""
