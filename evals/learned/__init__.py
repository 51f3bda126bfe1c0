"""Methods that are trained: labels from a model's own answers, and the small networks that learn to predict them.

In: a model and training questions. Out: folders of weights that `apply` takes (`student=`, `branch=`).
"""
