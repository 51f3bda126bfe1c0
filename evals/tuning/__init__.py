"""Searching: a method's options at a budget (`tune`), how many tokens leave behind each layer (`calibrate`), and the
cheapest setting within an accuracy drop (`recommend`).

In: a model and samples. Out: YAML or JSON that `apply` takes.
"""
