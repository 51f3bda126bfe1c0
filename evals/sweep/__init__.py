"""A grid of points from start to files: who does which part of the work, and what a plan would cost.

In: a `RunConfig`. Out: a run folder.
"""
