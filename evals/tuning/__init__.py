"""Searching: a method's options at a budget (`tune`), and the cheapest setting within an accuracy drop (`recommend`).

In: a model and samples. Out: YAML that `apply` takes.
"""
