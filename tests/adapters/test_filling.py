"""Masks that tell a tower that a part of a picture is filling: what would take it for picture is refused."""

from __future__ import annotations

import pytest
import torch
from _families import batch_of, family
from _zoo_all import zoo_batch, zoo_model

import tokenprune


def partly_filled(batch: dict) -> dict:
    """The last columns of the first tile are filling."""
    pixels = batch["pixel_values"]
    mask = torch.ones(*pixels.shape[:2], *pixels.shape[3:], dtype=torch.bool)
    mask[0, 0, :, -pixels.shape[-1] // 3 :] = False
    return {**batch, "pixel_attention_mask": mask}


@pytest.mark.parametrize("name", ["smolvlm", "idefics3"])
@pytest.mark.parametrize("method", ["vtc_cls@4", "flowcut@4"])
def test_filling_inside_a_tile(name, method):
    model, batch = (family(name), batch_of(name, "one")) if name == "smolvlm" else (zoo_model(name), zoo_batch(name))
    filled = partly_filled(batch)
    with torch.no_grad():
        with tokenprune.applied(model, method):
            whole = model(**batch).logits
            everything = {**filled, "pixel_attention_mask": torch.ones_like(filled["pixel_attention_mask"])}
            assert torch.equal(model(**everything).logits, whole)
            with pytest.raises(ValueError, match="that a part of a picture is filling"):
                model(**filled)
            assert torch.equal(model(**batch).logits, whole)
        with tokenprune.applied(model, "divprune@4"):
            model(**filled)


@pytest.mark.parametrize("method", ["vtc_cls@4", {"method": "random", "keep": 4, "at": "vision:0"}])
def test_filling_of_which_no_token_is_made(method):
    """LFM2-VL's rows are as long as the largest picture's."""
    model, batch = zoo_model("lfm2_vl"), zoo_batch("lfm2_vl")
    assert not bool(batch["pixel_attention_mask"].all())
    with torch.no_grad(), tokenprune.applied(model, method):
        model(**batch)
