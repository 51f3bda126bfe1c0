"""From a name to a loaded model with its processor, and from a conversation to what the processor takes.

In: a pocket name, a folder or a hub id. Out: `LoadedModel`.
"""
