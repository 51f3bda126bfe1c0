"""Ops of the namespace `tokenprune` in torch: a reference, a Triton kernel, and what compilers and counters need.

On CPU tensors a call is a call of the reference, whose operations autograd and FLOP counters see for themselves (where
it multiplies in NumPy, a counter is given the op instead).
On CUDA tensors, and while torch.compile traces, it is the op `torch.ops.tokenprune.NAME`, which they see as one node
with a fake implementation and, where it multiplies matrices, a FLOP formula. Where a gradient is asked for, the
reference runs on every device: the kernels have no backward.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from tokenprune.kernels.launch import HAS_TRITON, runs_triton

_LIBRARY = torch.library.Library("tokenprune", "FRAGMENT")

FORMULAS: dict[Any, Callable[..., int]] = {}
"""By op, its floating-point operations: a `custom_mapping` for `FlopCounterMode`, registered there too if triton is
installed."""


class Op:
    """A registered op.

    Args:
        schema: as in `torch.library`, the name first; the first argument is a tensor.
        reference: PyTorch, for every device.
        launch: the same with Triton kernels.
        fake: the same on tensors without values.
        flops: floating-point operations of its matrix products, from the same arguments; None where it has none.
        direct: what runs in place of the reference where no op is called, if there it may keep something between
            calls that a graph should not see.
        hidden: whether the reference multiplies outside torch, where no counter sees it.
    """

    def __init__(
        self,
        schema: str,
        reference: Callable[..., Any],
        launch: Callable[..., Any],
        fake: Callable[..., Any],
        flops: Callable[..., int] | None = None,
        direct: Callable[..., Any] | None = None,
        hidden: bool = False,
    ) -> None:
        self.name = schema.partition("(")[0]
        self.direct, self.hidden = direct or reference, hidden
        _LIBRARY.define(schema)

        def run(first: Tensor, *args: Any) -> Any:
            with _exact(first):
                return launch(first, *args) if runs_triton(first) else reference(first, *args)

        for key in ("CPU", "CUDA"):
            _LIBRARY.impl(self.name, run, key)
        torch.library.register_fake(f"tokenprune::{self.name}", fake, lib=_LIBRARY)
        packet = getattr(torch.ops.tokenprune, self.name)
        self._op = packet.default
        if flops is not None:
            formula = flops

            def count(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
                return formula(*args, **kwargs)

            count._get_raw = True  # type: ignore[attr-defined]  # the counter hands on tensors, not their shapes
            FORMULAS[packet] = count
            # the counter complains on import where triton is missing
            if HAS_TRITON:
                from torch.utils.flop_counter import register_flop_formula

                register_flop_formula(packet, get_raw=True)(count)

    def __call__(self, first: Tensor, *args: Any) -> Any:
        if torch.compiler.is_compiling() or runs_triton(first):
            as_op = not _wants_gradient(first, *args)
        else:
            as_op = self.hidden and is_in_torch_dispatch_mode()
        if as_op:
            return self._op(first, *args)
        with _exact(first):
            return self.direct(first, *args)


def _exact(first: Tensor) -> AbstractContextManager[object]:
    """Where ops compute in the precision that they promise, also under autocast."""
    kind = first.device.type
    if kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return nullcontext()


def _wants_gradient(*args: Any) -> bool:
    flat = (part for arg in args for part in (arg if isinstance(arg, list) else [arg]))
    return torch.is_grad_enabled() and any(isinstance(part, Tensor) and part.requires_grad for part in flat)
