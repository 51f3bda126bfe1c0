"""Received attention on a CPU: blocks that fit the cache give what one large softmax gives."""

from __future__ import annotations

import pytest
import torch

from tokenprune.kernels import attention_received as kernel
from tokenprune.kernels.attention_received import attention_received


@pytest.mark.parametrize("count", [1, 7, 129, 700, kernel._BLOCK // kernel._CHUNK + 5, kernel._BLOCK // 33])
@pytest.mark.parametrize("heads", [1, 3])
def test_blocks_add_up_to_the_columns_of_the_whole_matrix(count, heads):
    generator = torch.Generator().manual_seed(count)
    rows = min(count, 300)
    query = torch.randn(1, rows, heads, 8, generator=generator).transpose(1, 2)
    key = torch.randn(1, count, heads, 8, generator=generator).transpose(1, 2)
    truth = (query.double() * 0.35 @ key.double().transpose(2, 3)).softmax(-1).sum(2).mean(1)
    found = attention_received(query, key, 0.35)
    assert found.dtype == torch.float32
    assert ((found - truth).abs() / truth).max() < 1e-5


def test_many_keys_are_taken_in_the_same_order_whatever_the_block(monkeypatch):
    """Up to 2,048 keys every block has 128 rows, so how many heads go together changes no bit."""
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, 4, 500, 16, generator=generator) for _ in range(2))
    found = []
    for block in (500 * kernel._CHUNK, kernel._BLOCK, 1 << 24):
        monkeypatch.setattr(kernel, "_BLOCK", block)
        found.append(kernel.reference(query, key, 0.25, None))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    # and those of a ragged batch's plain road, where nothing is ragged
    plain = kernel.reference(query, key, 0.25, torch.tensor([500]))
    assert (found[0] - plain).abs().max() < 1e-5


def test_it_takes_tensors_that_want_gradients_and_none_at_all():
    query = torch.randn(1, 2, 5, 4, requires_grad=True)
    with torch.no_grad():
        assert attention_received(query, query, 0.5).sum().item() == pytest.approx(5, rel=1e-5)
    assert not attention_received(query[:, :, :0], query.detach(), 0.5).any()
