"""From what a user writes to stages: names, mappings, lists, YAML and one-line expressions, read and checked.

In: anything that `apply(model, method, ...)` takes. Out: a `Spec`, and for a model its `Stage`s, or a sentence.
"""
