"""One change of attention a file: `interventions/NAME.py` registers the class called NAME.

In: query, key and value of a decoder layer, facts on keys. Out: the output of the rows that it replaces.
"""

from typing import Any


def __getattr__(name: str) -> Any:
    """Classes by name (`from tokenprune.interventions import ...`); `__init__.pyi` has them for type checkers."""
    from tokenprune.registry import INTERVENTIONS

    return INTERVENTIONS.class_called(name)
