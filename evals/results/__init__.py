"""From rows to results: scores, comparisons, the files of a run folder, several seeds or tasks together.

In: the rows of a store. Out: `results.jsonl` and `results.csv`; a finished run read back.
"""
