"""What layers are handed for each token of a row, cut in step with the row."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from tokenprune.engine.layer_cuts import cut_by_place

INDEX = torch.tensor([[0, 2, 3], [1, 4, 5]])  # [B, P]: what is left of rows of six


def _cut(values: torch.Tensor, known: bool = True) -> dict[str, torch.Tensor]:
    adapter = SimpleNamespace(layer_by_place=("kinds",) if known else (), language_model=object(), model=object())
    now = SimpleNamespace(index=INDEX, moves=[], length=6)
    return cut_by_place(adapter, now, {"kinds": values, "position_ids": values, "scale": values[:1], "flag": True})


@pytest.mark.parametrize("shape", [(2, 6), (2, 6, 4), (2, 6, 4, 3)])
def test_values_of_each_token_are_those_of_the_tokens_left(shape: tuple[int, ...]) -> None:
    values = torch.randn(shape)
    found = _cut(values)
    assert set(found) == {"kinds"}
    assert torch.equal(found["kinds"], torch.stack([row[own] for row, own in zip(values, INDEX)]))


def test_what_no_family_names_is_refused() -> None:
    with pytest.raises(ValueError, match="are given 'kinds' for each token"):
        _cut(torch.randn(2, 6), known=False)
