"""Hooks on a stock model: visual tokens are found, a method chooses, and the rest of the call fits what stays.

In: stages, interventions, an adapter. Out: a `Prompt` with what was kept; outputs, by the caller's places.
"""
