"""What stays in the KV cache, a policy a file: `cache_policies/NAME.py` registers the class called NAME.

In: query and keys of a decoder layer behind its attention. Out: which keys stay, and which of them steps read.
"""

from typing import Any


def __getattr__(name: str) -> Any:
    """Classes by name (`from tokenprune.cache_policies import ...`); `__init__.pyi` has them for type checkers."""
    from tokenprune.registry import CACHE_POLICIES

    return CACHE_POLICIES.class_called(name)
