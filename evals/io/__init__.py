"""Files that survive a kill: rows, whole files, locks, digests; and the one reader of pictures.

In: plain data, pictures of any kind. Out: what is on disk whole or not at all; upright 8-bit RGB.
"""
