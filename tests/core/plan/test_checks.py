"""Plans that could not run are refused by `apply`, before anything runs."""

from __future__ import annotations

from typing import Any

import pytest
from _tiny import tiny_llava

import tokenprune


@pytest.mark.parametrize(
    "entry",
    [
        {"method": "fastv", "layer": 3, "at": "layer:2"}, {"method": "pyramiddrop", "layers": [1, 2], "at": "layer:3"},
        {"method": "todre", "tau": 9, "at": "input"}, {"method": "vflowopt", "first": 0.5, "at": "input"},
        {"method": "transprune", "schedule": "low", "at": "layer:3"},
    ],
)  # fmt: skip
def test_options_that_a_site_makes_void(entry):
    with pytest.raises(ValueError, match="has no meaning beside at="):
        tokenprune.apply(tiny_llava(), {**entry, "keep": 8})


@pytest.mark.parametrize(
    ("method", "says"),
    [
        ({"prune": "vtc_cls", "at": "vision:1", "keep": 9}, "reads block 2 of the vision tower"),
        ({"prune": "holov", "at": "vision:0", "keep": 9}, "reads block 2 of the vision tower"),
        ({"prune": "todre", "at": "vision:1", "keep": 9}, "reads block 3 of the vision tower"),
        ({"prune": "downsample", "at": "layer:2", "keep": 9}, "downsample acts at 'pixels', not at 'layer:2'"),
        ({"prune": "uniform", "at": "pixels", "keep": 9}, "uniform acts at 'input', not at 'pixels'"),
        (["random@20", {"prune": "pool", "at": "layer:2", "keep": 9}], "nothing may leave before it"),
        (["downsample@16", "pool@9"], "nothing may leave before it"),
    ],
)
def test_plans_that_could_not_run_are_refused_by_apply(method: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        tokenprune.apply(tiny_llava(), method)


def test_what_leaves_before_the_decoder_leaves_under_one_policy():
    """The rows are cut once there, so two policies are refused, whichever site comes first."""
    both = ["pixelprune@20", "divprune@9"]
    says = "pixelprune has positions='keep' and divprune positions='compact'.*in one cut"
    for plan in (both, both[::-1]):
        with pytest.raises(ValueError, match=says):
            tokenprune.apply(tiny_llava(), plan)
    for positions in ("keep", "compact"):
        plan = [f"pixelprune(positions={positions})@20", f"divprune(positions={positions})@9"]
        tokenprune.apply(tiny_llava(), plan).remove()
    # a cut at a layer moves tokens of its own, and a smaller picture drops none
    for plan in (["divprune@9", "fastv@4"], ["downsample@9", "random(positions=keep)@4"]):
        tokenprune.apply(tiny_llava(), plan).remove()
