"""Benchmarks, one command a table: kernels, prefill, decode, sizes of published checkpoints, runs that are killed.

In: a quiet machine. Out: CSV with hardware, versions, commit and date, in `docs/bench/`.
"""
