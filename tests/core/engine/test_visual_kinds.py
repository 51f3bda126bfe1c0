"""Pictures and videos side by side in one batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from _families import VIDEO, _qwen_batch, batch_of, family
from _forward import forward
from _tiny import IMAGE

import tokenprune
from tokenprune.interfaces.pruner import Pruner
from tokenprune.interfaces.selection import Selection
from tokenprune.interfaces.view import View


@dataclass
class Told(Pruner):
    """Keeps the first tokens and writes down what it was told of each visual."""

    name: ClassVar[str] = "told"
    hints: ClassVar[tuple[str, ...]] = ("tag",)
    default_scope: ClassVar[str] = "visual"
    heard: ClassVar[list[tuple[str, str]]] = []

    def select(self, view: View) -> Selection:
        self.heard.extend((view.site, tag) for tag in view.hints["tag"])
        return Selection(torch.arange(view.budget, device=view.features.device).expand(view.num_images, -1))


@pytest.mark.parametrize("method", ["vflowopt(cell=3.0)@6", "todre@6", "random@6"])
def test_a_picture_is_cut_alike_alone_and_beside_a_video_of_its_size(method):
    model = family("qwen2_vl")
    alone = _qwen_batch("qwen2_vl", [[(6, 6)]], "left", 3)
    row, pixels, grid = alone["input_ids"], alone["pixel_values"], alone["image_grid_thw"]
    ids = torch.cat([row.masked_fill(row == IMAGE, VIDEO), row])
    other = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(0))
    beside = {
        "input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels, "image_grid_thw": grid,
        "mm_token_type_ids": (ids == IMAGE).long() + 2 * (ids == VIDEO).long(), "pixel_values_videos": other,
        "video_grid_thw": grid,
    }  # fmt: skip
    first, one = forward(model, alone, method)
    second, two = forward(model, beside, method)
    assert torch.equal(first.kept[0][0], second.kept[1][0])
    torch.testing.assert_close(one[0, -1], two[1, -1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("site", ["vision:0", "input"])
def test_hints_inside_the_tower_are_those_of_the_batch(site):
    """The batch shows picture, video, video, picture, and the tower runs all pictures first."""
    tags = ["A-image", "B-video", "C-video", "D-image"]
    Told.heard.clear()
    with tokenprune.applied(family("qwen2_vl"), [{"method": Told(), "keep": 4, "at": site}]) as handle, torch.no_grad():
        handle.set_hints(tag=tags)
        family("qwen2_vl")(**batch_of("qwen2_vl", "mixed_left"))
    own = [tag for where, tag in Told.heard if where == site]
    assert set(own) == set(tags)
    if site == "vision:0":  # pictures first, then the frames of each video
        assert own[:2] == ["A-image", "D-image"] and own[2:] == sorted(own[2:]) and own[2][0] == "B"
