"""`tokenprune ui`: one page on which a picture is asked about, with up to three methods side by side.

In: a loaded model; from the page, a picture, a question, methods and a budget. Out: answers, overlays, tokens, FLOPs,
KV bytes and times. One request at a time has the model; the page asks nothing of any other machine.
"""
