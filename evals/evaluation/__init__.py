"""Asking: a loaded model with a method at work answers the samples of a task, and each answer is kept at once.

In: points, models, tasks. Out: one row a sample.
"""
