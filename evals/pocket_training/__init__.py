"""The recipes that made the pocket weights, from scenes to the folders under `pocket/models`.

In: the suites of `pocket`. Out: checkpoints, model cards. Nothing else in the project needs this room.
"""
