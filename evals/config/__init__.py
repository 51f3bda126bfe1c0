"""What a user writes for a run, checked before anything runs.

In: YAML or arguments. Out: a `RunConfig` and its `Point`s: model x task x method x budget.
"""
