"""What a prompt costs: FLOPs counted and measured, times against the unpruned and the ideal prompt.

In: a loaded model, or its config for estimates. Out: rows of costs.
"""
