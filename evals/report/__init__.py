"""A run to look at: the page, plots, tables, pictures of kept tokens, Markdown, the README's tables.

In: a finished run. Out: HTML, PNG, Markdown, text.
"""
