import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tokenprune.kernels.attention_rows import attention_rows


def by_hand(query: torch.Tensor, key: torch.Tensor, scale: float) -> torch.Tensor:
    """Loops in fp64, one softmax at a time."""
    batch, heads, rows, _ = query.shape
    group = heads // key.shape[1]
    out = torch.zeros(batch, rows, key.shape[2], dtype=torch.float64)
    for b in range(batch):
        for r in range(rows):
            for h in range(heads):
                logits = [scale * float(query[b, h, r].double() @ k.double()) for k in key[b, h // group]]
                top = max(logits)
                powers = [math.exp(logit - top) for logit in logits]
                out[b, r] += torch.tensor(powers, dtype=torch.float64) / sum(powers) / heads
    return out


@pytest.mark.parametrize(
    ("batch", "heads", "key_heads", "rows", "count", "width"),
    [(1, 1, 1, 1, 1, 1), (2, 4, 4, 1, 37, 8), (2, 6, 2, 3, 17, 5), (1, 8, 1, 2, 65, 16), (3, 2, 2, 5, 2, 3)],
)
def test_equals_softmax_by_hand(batch: int, heads: int, key_heads: int, rows: int, count: int, width: int) -> None:
    torch.manual_seed(count)
    query, key = torch.randn(batch, heads, rows, width), torch.randn(batch, key_heads, count, width)
    out = attention_rows(query, key, width**-0.5)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), by_hand(query, key, width**-0.5), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(out.sum(dim=2), torch.ones(batch, rows))


def test_query_heads_share_keys_in_hugging_face_order() -> None:
    query, key = torch.randn(1, 6, 2, 4), torch.randn(1, 2, 9, 4)
    repeated = key.repeat_interleave(3, dim=1)
    torch.testing.assert_close(attention_rows(query, key, 0.5), attention_rows(query, repeated, 0.5))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inputs_are_computed_in_fp32(dtype: torch.dtype) -> None:
    query, key = torch.randn(2, 4, 1, 16).to(dtype), torch.randn(2, 4, 50, 16).to(dtype)
    assert torch.equal(attention_rows(query, key, 0.25), attention_rows(query.float(), key.float(), 0.25))


def test_strided_views_give_the_same_rows() -> None:
    # [batch, tokens, heads, width] is how a model holds them
    hidden = torch.randn(2, 21, 4, 8)
    query, key = hidden.transpose(1, 2)[:, :, 3:4], torch.randn(2, 21, 2, 16)[..., ::2].transpose(1, 2)
    torch.testing.assert_close(
        attention_rows(query, key, 0.3), attention_rows(query.contiguous(), key.contiguous(), 0.3)
    )


def test_large_logits_do_not_overflow() -> None:
    query, key = torch.full((1, 2, 1, 4), 60.0), torch.full((1, 2, 5, 4), 60.0)
    key[:, :, 2] = 61.0
    out = attention_rows(query.half(), key.half(), 1.0)
    assert out[0, 0].tolist() == [0, 0, 1, 0, 0]


def test_gradients_reach_query_and_key() -> None:
    query, key = torch.randn(1, 2, 1, 4, requires_grad=True), torch.randn(1, 2, 5, 4, requires_grad=True)
    attention_rows(query, key, 0.5)[0, 0, 2].backward()
    assert query.grad is not None and key.grad is not None
    assert query.grad.abs().sum() > 0 and key.grad.abs().sum() > 0


def test_only_the_asked_rows_are_computed() -> None:
    query, key = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 50, 8)
    with FlopCounterMode(display=False) as counter:
        attention_rows(query, key, 1.0)
    assert counter.get_total_flops() == 2 * 2 * 4 * 3 * 50 * 8


@pytest.mark.parametrize(
    ("query", "key"),
    [((2, 4, 3, 8), (2, 3, 5, 8)), ((2, 4, 3, 8), (1, 4, 5, 8)), ((2, 4, 3, 8), (2, 4, 5, 6)), ((4, 3, 8), (4, 5, 8))],
)
def test_shapes_that_do_not_fit_are_refused(query: tuple[int, ...], key: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="query|Query"):
        attention_rows(torch.randn(query), torch.randn(key), 1.0)
