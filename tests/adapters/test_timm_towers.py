"""Classes whose towers are timm's, which the environment of the other tests leaves out: cells of `test_any_model.py`
that run with the newest and the lowest versions."""

from __future__ import annotations

import pytest
from _masked_whole import compare_whole
from _zoo import SPECIAL
from _zoo_all import KEEP, PLANS, zoo_batch, zoo_model
from _zoo_timm import NAMES
from masked_reference import run_pruned


@pytest.mark.parametrize("plan", ["random", "layer_2"])
@pytest.mark.parametrize("name", NAMES)
def test_removal_equals_masking(name: str, plan: str) -> None:
    model, batch, method = zoo_model(name), zoo_batch(name, plan), PLANS[plan]
    run = run_pruned(model, method, KEEP if isinstance(method, str) else None, batch, tokens=6, silent=SPECIAL)
    compare_whole(run, batch, 1e-5, SPECIAL)
