"""Triton where it is installed: kernels are compiled at their first launch, and triton is imported no sooner than that.

With TRITON_INTERPRET=1 in the environment before triton is imported, every op runs its kernels on CPU tensors, in
Triton's interpreter: slow, and what the tests compare with the references.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterator

HAS_TRITON = find_spec("triton") is not None
INTERPRETED = HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1"


@dataclass(frozen=True)
class Launch:
    """A launch that was noted instead of made: by position of the kernel's parameters, and with its options."""

    kernel: Kernel
    args: tuple[Any, ...]
    options: dict[str, Any]


class Kernel:
    """A Triton kernel that is compiled at its first launch: `kernel[grid](arguments)`.

    Attributes:
        noted: while a list, launches are added to it and not made (see `noting`).
    """

    noted: ClassVar[list[Launch] | None] = None

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.__doc__ = function, function.__doc__

    @functools.cached_property
    def compiled(self) -> Any:
        """The function after `triton.jit`."""
        import triton
        import triton.language

        # a kernel may only name globals, and this one is not imported with its module
        self.function.__globals__["tl"] = triton.language
        return triton.jit(self.function)

    def __getitem__(self, grid: Sequence[int]) -> Callable[..., Any]:
        noted = Kernel.noted
        if noted is None:
            launched = self.compiled[tuple(grid)]

            def launch(*args: Any, **options: Any) -> None:
                # triton launches on the current device, whatever device the tensors are on
                with torch.cuda.device_of(args[0]) if args[0].is_cuda else nullcontext():
                    launched(*args, **options)

            return launch

        def note(*args: Any, num_warps: int = 4, num_stages: int = 3) -> None:
            noted.append(Launch(self, args, {"num_warps": num_warps, "num_stages": num_stages}))

        return note


@contextmanager
def noting() -> Iterator[list[Launch]]:
    """Note launches instead of making them: how kernels are compiled for a GPU that this machine does not have."""
    Kernel.noted = []
    try:
        yield Kernel.noted
    finally:
        Kernel.noted = None


def runs_triton(tensor: Tensor) -> bool:
    """Whether an op runs its kernels on this tensor, and not its reference."""
    return INTERPRETED or (HAS_TRITON and tensor.is_cuda)


def power_of_two(number: int, least: int = 1, most: int = 1 << 30) -> int:
    """The smallest power of two that is at least `number`, within bounds."""
    return max(least, min(most, 1 << max(number - 1, 0).bit_length()))


def ceil_div(count: int, size: int) -> int:
    """How many blocks of `size` it takes for `count`."""
    return -(-count // size)


def must_widen(*dtypes: torch.dtype) -> bool:
    """Whether factors of these dtypes have to become fp32 before `tl.dot`: where they differ, and bf16 in the
    interpreter, which multiplies its bits as if they were integers (triton 3.6 to 3.9)."""
    return len(set(dtypes)) > 1 or dtypes[0] == torch.float64 or (INTERPRETED and dtypes[0] == torch.bfloat16)


def on_device(values: Sequence[int], device: torch.device) -> Tensor:
    """`[n]` int64 on a device, queued on that device without waiting for it."""
    if device.type != "cuda":
        return torch.tensor(values, dtype=torch.int64, device=device)
    return torch.tensor(values, dtype=torch.int64, pin_memory=True).to(device, non_blocking=True)


def block_of_width(width: int, *dtypes: torch.dtype) -> int:
    """Columns of a head that a dot product takes at a time: few enough that nothing spills to memory."""
    wide = must_widen(*dtypes) or dtypes[0] == torch.float32
    return power_of_two(width, 16, 32 if wide or width % 64 else 64)
