"""Pages of the documentation site that are made when it is built, from docstrings, tables of results and settings.

In: the checkout. Out: Markdown by path inside the site. `hooks.py` hands them to mkdocs; nothing made here is committed.
"""
