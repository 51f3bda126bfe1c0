"""What tests of the Triton kernels share: the device, poisoned memory, and both implementations of an op."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tokenprune.kernels.launch import INTERPRETED

DEVICE = "cpu" if INTERPRETED else "cuda"
HALF = [torch.float16, torch.bfloat16]
DTYPES = [torch.float32, *HALF]
# of the largest value: fp32 sums in another order; one rounding to the output's format, which is that of the input
ROUNDING = {torch.float32: 1e-5, torch.float16: 2**-10, torch.bfloat16: 2**-7}

pytestmark = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(), reason="needs a GPU, or TRITON_INTERPRET=1 before the start"
)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Memory that a kernel is handed holds NaN or nonsense, so what it leaves unwritten shows."""

    def poison(tensor: Tensor) -> Tensor:
        if tensor.dtype.is_floating_point:
            return tensor.fill_(torch.nan)
        return tensor.fill_(True) if tensor.dtype == torch.bool else tensor.fill_(113)

    empty, new_empty = torch.empty, Tensor.new_empty
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: poison(empty(*args, **kwargs)))
    monkeypatch.setattr(Tensor, "new_empty", lambda *args, **kwargs: poison(new_empty(*args, **kwargs)))
    torch.manual_seed(0)
    yield


def on_device(value: Any) -> Any:
    if isinstance(value, list):
        return [on_device(item) for item in value]
    return value.to(DEVICE) if isinstance(value, Tensor) else value


def both(module: Any, *args: Any) -> tuple[Any, Any]:
    """Kernel and reference, on the CPU."""
    launched = module._OP(*[on_device(arg) for arg in args])
    expected = module.reference(*args)
    if isinstance(launched, Tensor):
        return launched.cpu(), expected
    return [tensor.cpu() for tensor in launched], list(expected)


def assert_near(found: Tensor, expected: Tensor, rounding: float = 1e-5) -> None:
    """Equal within `rounding` of the largest value."""
    assert found.dtype == expected.dtype and found.shape == expected.shape
    error = (found.double() - expected.double()).abs().max()
    assert error <= rounding * expected.double().abs().max(), f"{float(error)}"


def heads(
    batch: int, query_heads: int, key_heads: int, rows: int, count: int, width: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key, value as models hold them: tokens before heads, so every one is strided."""
    sizes = ((rows, query_heads), (count, key_heads), (count, key_heads))
    query, key, value = (torch.randn(batch, n, h, width).to(dtype).transpose(1, 2) for n, h in sizes)
    return query, key, value


def some_seen(batch: int, rows: int, count: int) -> Tensor:
    seen = torch.rand(batch, rows, count) < 0.7
    seen[..., 0] = True
    return seen


# --- attention rows ---------------------------------------------------------------------------------------------------
