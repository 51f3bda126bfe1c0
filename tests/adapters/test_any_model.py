"""Promise 1 on every class that is read off its model: removal equals masking, prompt and decode, in batches of rows
with several pictures, padded on the left. Layouts are drawn by seed, another one for each cell. What a class lacks is
refused with a sentence that names it. Decoders with layers that go along the row are held against it in double
precision, see `_doubled.py`."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from _doubled import TOLERANCE as DOUBLE_TOLERANCE
from _doubled import double_batch, double_model, goes_along, in_double
from _masked_whole import compare_whole
from _zoo import SPECIAL
from _zoo_all import CELLS, FAMILIES, KEEP, LACKS, PICTURES, PLANS, zoo_batch, zoo_model
from masked_reference import run_pruned

import tokenprune

TOLERANCE = 1e-5  # relative, fp32
RUN = [(name, plan) for name, plan in CELLS if (name, plan) not in LACKS]


def _run(name: str, plan: str, **more: Any) -> tuple[dict[str, Any], dict[str, torch.Tensor], list[int]]:
    model, batch = zoo_model(name), zoo_batch(name, plan, PICTURES.get(plan))
    if goes_along(name):
        model, batch = double_model(name), double_batch(batch)
    silent = [token for token in SPECIAL if token < model.get_output_embeddings().weight.shape[0]]
    method = PLANS[plan]
    keep = KEEP if isinstance(method, str) else None
    return run_pruned(model, method, keep, batch, tokens=6, silent=silent, **more), batch, silent


@pytest.mark.parametrize(("name", "plan"), RUN, ids=lambda value: value)
def test_removal_equals_masking(name: str, plan: str) -> None:
    along = goes_along(name)
    with in_double() if along else contextlib.nullcontext():
        run, batch, silent = _run(name, plan)
        compare_whole(run, batch, DOUBLE_TOLERANCE if along else TOLERANCE, silent)
    assert run["scores"].dtype == (torch.float64 if along else torch.float32)
    assert run["report"].kept_tokens < run["report"].visual_tokens


@pytest.mark.parametrize(("name", "plan"), list(LACKS), ids=lambda value: value)
def test_what_a_class_lacks_is_refused_by_name(name: str, plan: str) -> None:
    precision = in_double() if goes_along(name) else contextlib.nullcontext()
    with precision, pytest.raises(ValueError, match=LACKS[name, plan]) as refused:
        _run(name, plan)
    if LACKS[name, plan] not in ("works on a grid", "this family's tower cannot be cut"):
        model = zoo_model(name)
        named = [type(part).__name__ in str(refused.value) for part in (model, *model.modules())]
        assert any(named), "the class is named"


@pytest.mark.parametrize("name", list(FAMILIES))
def test_keeping_everything_changes_no_bit(name: str) -> None:
    model, batch = zoo_model(name), zoo_batch(name)
    with torch.no_grad():
        plain = model(**batch).logits
        with tokenprune.applied(model, "random", 1.0):
            assert torch.equal(model(**batch).logits, plain)
        assert torch.equal(model(**batch).logits, plain)
