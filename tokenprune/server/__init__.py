"""`tokenprune serve`: an OpenAI-compatible server for models that vLLM does not prune.

In: HTTP requests with pictures, questions and, in the field `tokenprune`, a method and its budget. Out: answers, whole
or streamed, and what they cost. One thread owns the model and answers one request at a time, so requests never mix.
"""
