"""One pruning method a file: `methods/NAME.py` registers the class called NAME. Methods know no model.

In: a `View` of images of one shape. Out: a `Selection`. A leading underscore marks what several methods share.
"""

from typing import Any


def __getattr__(name: str) -> Any:
    """Classes by name (`from tokenprune.methods import ...`); `__init__.pyi` has them for type checkers."""
    from tokenprune.registry import METHODS

    return METHODS.class_called(name)
