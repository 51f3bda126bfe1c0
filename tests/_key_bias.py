"""What tests of the key bias share: a method that weighs its tokens, and what a run of it says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch

import tokenprune
from tokenprune.interfaces.intervention import Intervention
from tokenprune.interfaces.pruner import Pruner
from tokenprune.interfaces.selection import Selection
from tokenprune.registry import INTERVENTIONS, METHODS
from tokenprune.state import kv_cache

TOLERANCE = 1e-5
SIZES = [3.0, 1.0, 2.0, 5.0, 1.0, 4.0, 2.0, 1.0, 1.0]  # of the tokens that `weighed` keeps


@pytest.fixture(autouse=True)
def weighed():
    """Keeps every fourth token as it is and says that it stands for so many."""

    @tokenprune.register_method("weighed")
    @dataclass
    class Weighed(Pruner):
        merges: ClassVar[bool] = True
        default_key_bias: ClassVar[bool] = True
        weigh: float | None = None
        """One size for all, in place of SIZES; 0 says no sizes."""

        def select(self, view):
            step = view.num_tokens // view.budget
            kept = torch.arange(view.budget) * step
            sizes = torch.tensor(
                [SIZES[i % len(SIZES)] if self.weigh is None else self.weigh for i in range(len(kept))]
            )
            kept, sizes = kept.expand(view.num_images, -1), sizes.expand(view.num_images, -1)
            return Selection(kept, view.features[:, kept[0]], sizes=None if self.weigh == 0 else sizes)

    yield Weighed
    METHODS.unregister("weighed")


@pytest.fixture
def recomputed():
    """An intervention that computes what the layer does anyway, from what it is given."""

    @tokenprune.register_intervention("recomputed")
    @dataclass
    class Recomputed(Intervention):
        def note(self, entering):
            return {"visual": entering.visual}

        def attend(self, given):
            groups = given.query.shape[1] // given.key.shape[1]
            key, value = (part.repeat_interleave(groups, 1) for part in (given.key, given.value))
            scores = given.query @ key.transpose(2, 3) * given.scale
            if given.allowed is not None:
                scores = scores.masked_fill(~given.allowed[:, None], float("-inf"))
            return scores.softmax(-1) @ value

    yield Recomputed
    INTERVENTIONS.unregister("recomputed")


def answer(model: Any, batch: dict[str, torch.Tensor], method: Any, **options: Any) -> torch.Tensor:
    with tokenprune.applied(model, method, **options), torch.no_grad():
        return model(**batch).logits


def last_of(handle: Any) -> Any:
    return handle.last


def key_facts(cache: Any) -> Any:
    return kv_cache.key_facts(cache)


# --- what it equals ---------------------------------------------------------------------------------------------------


def plain(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, bias: Any = 0.0) -> torch.Tensor:
    groups = query.shape[1] // key.shape[1]
    key, value = (part.repeat_interleave(groups, 1) for part in (key, value))
    return (query @ key.transpose(2, 3) * scale + bias).softmax(-1) @ value


def flash_like(module, query, key, value, attention_mask, dropout=0.0, scaling=1.0, sliding_window=None, softcap=None,
               is_causal=None, **kwargs):  # fmt: skip
    """What a flash function asks for, and computes."""
    assert module.config._attn_implementation == "flash_attention_like", "it looks up which it is"
    assert query.shape[-1] == key.shape[-1] == value.shape[-1] and query.shape[-1] % 8 == 0
    assert attention_mask is None or attention_mask.dim() == 2
    rows, count = query.shape[2], key.shape[2]
    allowed = torch.ones(rows, count, dtype=torch.bool).tril(count - rows)[None]
    if attention_mask is not None:
        allowed = allowed & attention_mask[:, None, :count].bool()
        allowed = allowed | torch.eye(count, dtype=torch.bool)[count - rows :] & ~allowed.any(-1, keepdim=True)
    low = torch.zeros(allowed.shape).masked_fill(~allowed, float("-inf"))[:, None]
    return plain(query, key, value, scaling, low).transpose(1, 2), None
