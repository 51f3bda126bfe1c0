"""What a model looks at: attention diagnostics of a decoder, before and after pruning, as numbers and as one page.

In: a model, a task, a method. Out: `diagnosis.json`, `visual_heads.json` and `diagnosis.html` in a folder.

No attention matrix is formed: rows are made some at a time from query and key, and what is asked of them is added up.
"""
