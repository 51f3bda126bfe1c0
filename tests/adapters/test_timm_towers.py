"""Classes whose towers are timm's, which the environment of the other tests leaves out: cells of `test_any_model.py`
that run with the newest and the lowest versions."""

from __future__ import annotations

import pytest
import torch
from _masked_whole import compare_whole
from _zoo import IMAGE, SPECIAL, Rows
from _zoo_all import KEEP, LACKS, PLANS, zoo_batch, zoo_model
from _zoo_timm import NAMES
from masked_reference import run_pruned

import tokenprune

CELLS = [(name, plan) for name in NAMES for plan in ("random", "layer_2")]


@pytest.mark.parametrize(("name", "plan"), [cell for cell in CELLS if cell not in LACKS])
def test_removal_equals_masking(name: str, plan: str) -> None:
    model, batch, method = zoo_model(name), zoo_batch(name, plan), PLANS[plan]
    run = run_pruned(model, method, KEEP if isinstance(method, str) else None, batch, tokens=6, silent=SPECIAL)
    compare_whole(run, batch, 1e-5, SPECIAL)


@pytest.mark.parametrize(("name", "plan"), [cell for cell in CELLS if cell in LACKS])
def test_what_a_class_lacks_is_refused_by_name(name: str, plan: str) -> None:
    model = zoo_model(name)
    with pytest.raises(ValueError, match=f"{type(model).__name__} {LACKS[name, plan]}"):
        tokenprune.apply(model, PLANS[plan])


@pytest.mark.parametrize("case", ["one", "tiles"])
def test_tiles_of_perception_lm_make_their_pictures(case: str) -> None:
    """Pictures side by side are one run of placeholders: what splits it is how many tiles each has in the call."""
    model, tiles = zoo_model("perception_lm"), {"one": 1, "tiles": 3}[case]
    rows = Rows(0, [2])
    words, pictures = rows.words(3), [[IMAGE] * (9 * tiles) for _ in range(2)]
    ids = torch.tensor([[*words, *pictures[0], *pictures[1], *words]])
    batch = {
        "input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": rows.pixels(2, tiles, 3, 24, 24),
    }  # fmt: skip
    with torch.no_grad(), tokenprune.applied(model, "random", 4) as handle:
        model(**batch)
        assert [len(span.visual.rasters) for span in handle.last.layout.spans] == [tiles, tiles]
        assert handle.report().kept_tokens == 8 and not handle.report().notes
