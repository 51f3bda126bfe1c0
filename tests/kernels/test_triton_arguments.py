"""Kernels on arguments of any form: gradients, strides, formats, and nothing to do."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from _triton import DEVICE, DTYPES, HALF, ROUNDING, assert_near, both, heads, on_device, poisoned, pytestmark, some_seen  # noqa: F401
from torch import Tensor

from tokenprune.kernels import (
    attention_received,
    attention_rows,
    compact_rows,
    greedy_diversity,
    merge,
    redistribute_attention,
    segmented_topk,
    token_transition,
)


@pytest.mark.parametrize(
    "call",
    [
        lambda x: attention_rows.attention_rows(x[:, :, :1], x, 1.0),
        lambda x: attention_received.attention_received(x, x, 1.0),
        lambda x: merge.merge(x[0], torch.zeros(2, 5, dtype=torch.int64, device=x.device), 1),
        lambda x: compact_rows.compact_rows(torch.tensor([[0, 3], [1, 2]], device=x.device), [x[0] * 1, x[0]])[1],
        lambda x: token_transition.token_transition(x[0], x[0] + 1, x[0], x[0] - 1)[0],
        lambda x: redistribute_attention.redistribute_attention(
            x,
            x,
            x,
            torch.ones(1, 5, dtype=torch.int8, device=x.device),
            None,
            share=0.6,
            least_mass=0.0,
            most_sink=1.0,
            slack=0.0,
            scale=1.0,
        ),
    ],
)
def test_gradients_go_through_the_reference(call: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(1, 2, 5, 4, device=DEVICE, requires_grad=True)
    call(x).sum().backward()
    assert x.grad is not None


# --- layouts and formats that no model has, and no check forbids -----------------------------------------------------


def test_arguments_of_any_strides() -> None:
    features, table = torch.randn(3, 40, 8), torch.tensor([[3, 20], [5, 15], [7, 10]])
    for first in (table[:, 0], torch.tensor(4).expand(3)):
        found, expected = both(greedy_diversity, features, 9, "k_center", first, table[:, 1])
        assert torch.equal(found, expected)
    query, key, _ = heads(3, 2, 2, 20, 20, 8, torch.float32)
    for lengths in (table[:, 1], torch.tensor(11).expand(3)):
        assert_near(*both(attention_received, query, key, 0.3, lengths))
    target = torch.randint(-1, 4, (40, 3)).t()
    assert_near(*both(merge, features, target, 4, torch.rand(40, 3).t()))


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float64, torch.int8, torch.float16, torch.float8_e4m3fn])
def test_rows_of_any_format_are_moved(dtype: torch.dtype) -> None:
    source = torch.randn(2, 9, 3, dtype=torch.float32).mul(50).to(dtype)
    index = torch.tensor([[8, 0, 3], [1, 2, 5]])
    (found,) = compact_rows._OP(on_device(index), [on_device(source)])
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[source.element_size()]
    expected = torch.stack([row[places] for row, places in zip(source.view(bits), index)])
    assert found.dtype == dtype and torch.equal(found.cpu().view(bits), expected)


@pytest.mark.parametrize("name", ["attention_rows", "attention_received"])
def test_float64_is_taken(name: str) -> None:
    query, key, _ = heads(2, 2, 1, 5, 33, 8, torch.float64)
    module = attention_rows if name == "attention_rows" else attention_received
    assert_near(*both(module, query, key, 0.3, None))


def test_outputs_share_no_memory() -> None:
    tensors = [on_device(torch.randn(1, 5, 16)) for _ in range(4)]
    torch.library.opcheck(token_transition._OP._op, tuple(tensors), test_utils=("test_schema",))


def test_kernels_have_nothing_to_do() -> None:
    x, keys = torch.randn(2, 2, 0, 4), torch.randn(2, 1, 3, 4)
    groups = torch.zeros(2, 3, dtype=torch.int8)
    settings = (None, None, 0.6, 0.1, 0.9, 0.0, 0.5)
    for given in ((x, keys, keys, groups), (x[:0], keys[:0], keys[:0], groups[:0])):
        found = redistribute_attention._OP(*[on_device(part) for part in given], *settings)
        assert found.shape == (*given[0].shape[:3], 4)
    for rows in (0, 2):
        scores, quotas = torch.randn(rows, 5), torch.zeros(rows, 2, dtype=torch.int64)
        found = segmented_topk._OP(on_device(scores), [2, 3], on_device(quotas), 0)
        assert found.shape == (rows, 0)
