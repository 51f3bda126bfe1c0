"""Models in double precision, whole.

Where a layer goes along the row, one pass over a row and steps behind a cache are different formulas, and both round.
What that comes to depends on the weights: a head whose output nearly cancels is divided by its own small norm. So the
two are compared in double precision, where what is left is 1e-14 if they are the same function, and no tolerance for
rounding is to be chosen. Stock layers compute parts in float32 whatever their weights are in; here those are doubled
too, because a call that names float32 is given float64.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from _zoo import Batch, zoo_model
from torch.overrides import TorchFunctionMode

from tokenprune.engine.whole_masks import RECURRENT

TOLERANCE = 1e-12  # relative


class _NoSingle(TorchFunctionMode):
    """Gives float64 to every call of torch that asks for float32."""

    def __torch_function__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.float:
            return args[0].double()
        given = {name: _wide(value) for name, value in (kwargs or {}).items()}
        return func(*map(_wide, args), **given)


def _wide(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


def goes_along(name: str) -> bool:
    """Whether some layers of a family's decoder go along the row."""
    text = zoo_model(name).config.get_text_config()
    return any(kind in RECURRENT for kind in getattr(text, "layer_types", None) or ())


@functools.cache
def double_model(name: str) -> Any:
    """The tiny model of a family in double precision, with its experts one by one: grouped products are none of
    doubles."""
    model = copy.deepcopy(zoo_model(name)).double()
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    return model


def double_batch(batch: Batch) -> Batch:
    return {name: value.double() if value.is_floating_point() else value for name, value in batch.items()}


@contextmanager
def in_double() -> Iterator[None]:
    """Everything computed in here is computed in double precision."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _NoSingle():
            yield
    finally:
        torch.set_default_dtype(before)
