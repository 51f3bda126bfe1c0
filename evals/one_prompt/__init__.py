"""One prompt, and what a method makes of it.

In: a loaded model, one picture with a question, a method. Out: the answer, tokens, FLOPs, KV bytes and times of that
one prompt, and pictures of what was kept. `tokenprune run` prints them, `tokenprune ui` shows them.
"""
