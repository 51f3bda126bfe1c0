"""A decoder that adds the features of pictures before its layers, whose rows of pictures are empty at its input: what
methods see of them there, and what cannot be done with them."""

from __future__ import annotations

import pytest
import torch
from _zoo_all import KEEP, zoo_batch, zoo_model

import tokenprune
from tokenprune.methods.divprune import DivPrune

NAME = "granite4_vision"


def test_methods_at_the_input_see_what_is_added_first(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch, seen = zoo_model(NAME), zoo_batch(NAME, "seen", [1]), []
    select = DivPrune.select
    monkeypatch.setattr(DivPrune, "select", lambda self, view: (seen.append(view.features), select(self, view))[1])
    with torch.no_grad():
        made = model.model.get_image_features(batch["pixel_values"], batch["image_sizes"]).deepstack_features
        with tokenprune.applied(model, "divprune", KEEP):
            model(**batch)
    (first,) = [features for layer, features in made if layer == 0]
    layout_has = {tuple(row) for row in torch.cat([part.reshape(-1, part.shape[-1]) for part in seen]).tolist()}
    assert layout_has and layout_has <= {tuple(row) for row in first[0].tolist()}
    assert all(bool(part.any(-1).all()) for part in seen), "no row is empty"


@pytest.mark.parametrize(
    ("method", "says"), [("visionzip", "puts merged tokens there"), ("gtc", "reads what the first")]
)
def test_what_needs_the_rows_themselves_is_refused_at_apply(method: str, says: str) -> None:
    with pytest.raises(ValueError, match=f"Granite4VisionTextModel adds the features .*{says}"):
        tokenprune.apply(zoo_model(NAME), method, KEEP)
