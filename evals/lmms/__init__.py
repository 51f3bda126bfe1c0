"""Our side of lmms-eval: the model `tokenprune` in its command line. Its tasks as ours are in `tasks/lmms_task.py`.

In: `--model_args`. Out: answers, costs in its results.
"""
