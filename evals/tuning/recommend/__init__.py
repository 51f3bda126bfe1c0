"""The cheapest setting whose accuracy drop is shown to be within a bound.

In: a model, a task, a bound. Out: a YAML file that `apply` takes, and what was tried.
"""
