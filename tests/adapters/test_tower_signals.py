"""Signals of towers that are read off their model equal those of transformers' own eager attention, whose whole softmax
matrix is kept here, by visual token: which patches are a token's is found by making one patch after the other NaN."""

from __future__ import annotations

import copy
import sys
from typing import Any

import pytest
import torch
from _eager_towers import eager_matrices, expected
from _masked_cells import features, patches_of_tokens, pixels
from _masked_whole import compare_whole
from _zoo import SPECIAL, zoo_batch
from _zoo_all import zoo_model
from masked_reference import run_pruned
from torch import Tensor, nn

import tokenprune
from tokenprune.adapters._attention_calls import attention_in
from tokenprune.api import adapter_for
from tokenprune.interfaces.signals import summary_attention
from tokenprune.state.tower_recording import sources_of

KINDS = {
    "gemma3": 1,  # SigLIP, patches pooled
    "deepseek_vl": 1,  # SigLIP, a token a patch
    "vipllava": 1,  # CLIP: [CLS], features of two blocks
    "cohere2_vision": 1,  # pixel shuffle
    "qianfan_ocr": 1,  # [CLS], pixel shuffle
    "mistral3": 2,  # Pixtral: pictures of any size, in one row under one mask
    "llava_siglip": 1,  # LLaVA's own class with another tower
    "llava_pixtral": 2,
    "lfm2_vl": 2,  # SigLIP 2: pictures filled up
    "qwen3_vl_moe": 2,  # patches by cell, in one row
    "glm4v": 2,
    "kimi_k25": 2,
    "exaone4_5": 2,  # sorted by windows, keys shared by heads
}
"""Families by the kind of their tower, and pictures of a prompt."""
WHOLE = {"exaone4_5": 1}
"""Blocks that see the whole picture, where the others have windows."""
METHODS_ON = ("gemma3", "mistral3", "glm4v", "qianfan_ocr", "hyperclovax_vision_v2")


@pytest.mark.parametrize("name", list(KINDS))
def test_signals_are_those_of_the_whole_matrix(name: str) -> None:
    model, batch = zoo_model(name), zoo_batch(name, "signals", [KINDS[name]])
    adapter = adapter_for(model)
    facts = adapter.tower
    block = WHOLE.get(name, facts.feature_layer)
    with tokenprune.applied(model, f"vtc_cls(start_layer={block})", keep=4), torch.no_grad():
        recording, _ = sources_of(adapter.entry.get_image_features(**pixels(batch), return_dict=True))[0]
    mine = torch.cat(recording.signals[summary_attention(facts, block)])
    with eager_matrices(adapter.vision, block) as matrices:
        features(adapter, batch)
    sizes = [visual.num_tokens for visual in recording.visuals]
    patches = patches_of_tokens(adapter, adapter.vision.blocks[facts.feature_layer], batch)
    assert len(patches) == sum(sizes) and len({len(own) for own in patches}) == 1
    torch.testing.assert_close(mine, expected(matrices, patches, sizes, facts.has_cls), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(("name", "method"), [(n, m) for n in METHODS_ON for m in ("holov", "vflowopt(recycle=false)")])
def test_methods_that_read_towers_equal_the_masked_model(name: str, method: str) -> None:
    batch = zoo_batch(name, method)
    run = run_pruned(zoo_model(name), method, 4, batch, tokens=4, silent=[token for token in SPECIAL if token < 64])
    compare_whole(run, batch, 1e-5, [token for token in SPECIAL if token < 64])
    assert run["report"].kept_tokens < run["report"].visual_tokens


# --- what does not verify ---------------------------------------------------------------------------------------------


def _refused(model: Any, batch: dict[str, Tensor], why: str) -> None:
    with (
        tokenprune.applied(model, "vtc_cls", keep=4),
        torch.no_grad(),
        pytest.raises(ValueError, match=f"has no tower signals of this image: .*{why}"),
    ):
        model(**batch)


class _Turned(nn.Module):
    """A projector that hands on its tokens in another order."""

    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside = inside

    def forward(self, *args: Any) -> Tensor:
        return self.inside(*args).roll(1, dims=1)


class _Blurred(_Turned):
    """One that mixes neighbours, as a convolution does."""

    def forward(self, *args: Any) -> Tensor:
        tokens = self.inside(*args)
        return tokens + 0.1 * tokens.roll(1, dims=1)


@pytest.mark.parametrize(("projector", "why"), [(_Turned, "follows no order"), (_Blurred, "go into other tokens too")])
def test_tokens_of_other_patches_are_refused(projector: type[_Turned], why: str) -> None:
    model = copy.deepcopy(zoo_model("paligemma"))
    model.model.multi_modal_projector = projector(model.model.multi_modal_projector)
    _refused(model, zoo_batch("paligemma"), why)


def test_attention_that_is_not_what_is_read_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = copy.deepcopy(zoo_model("paligemma"))
    vision = adapter_for(model).vision
    attention = attention_in(vision.blocks[0])

    def capped(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **kwargs: Any) -> Any:
        scores = (query @ key.transpose(2, 3) * scaling).tanh()
        return (scores.softmax(-1) @ value).transpose(1, 2).contiguous(), None

    monkeypatch.setattr(sys.modules[type(attention).__module__], "eager_attention_forward", capped)
    attention.config._attn_implementation = "eager"
    _refused(model, zoo_batch("paligemma"), "do not give what its attention computed")


class _Rolled(nn.Module):
    """Attention over its patches in another order."""

    def __init__(self, inside: Any) -> None:
        super().__init__()
        self.inside = inside

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Any:
        output, *more = self.inside(hidden_states=hidden_states.roll(1, dims=1), **kwargs)
        return (output.roll(-1, dims=1), *more)


def test_attention_over_rows_in_another_order_is_refused() -> None:
    model = copy.deepcopy(zoo_model("paligemma"))
    for block in adapter_for(model).vision.blocks:
        block.self_attn = _Rolled(block.self_attn)
    _refused(model, zoo_batch("paligemma"), "rows in another order than its states")


def test_features_of_another_block_than_the_config_says_are_refused() -> None:
    model = copy.deepcopy(zoo_model("paligemma"))
    model.config.vision_feature_layer = -2  # which this class does not heed
    _refused(model, zoo_batch("paligemma"), "features come from block 2 .* block 1 was expected")


def test_nothing_stays_on_the_model() -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    model, batch = copy.deepcopy(zoo_model("qwen3_vl_moe")), zoo_batch("qwen3_vl_moe")
    blocks = model.model.visual.blocks
    names, configs = set(ALL_ATTENTION_FUNCTIONS), [block.attn.config for block in blocks]
    model.train()
    with torch.inference_mode(), tokenprune.applied(model, "vtc_cls", keep=4) as handle:
        model(**batch)
        assert handle.report().kept_tokens
        assert set(ALL_ATTENTION_FUNCTIONS) != names
        assert not any("forward" in vars(block) for block in blocks)
    assert set(ALL_ATTENTION_FUNCTIONS) == names
    assert all(block.attn.config is config for block, config in zip(blocks, configs))
    assert all(module.training for module in model.modules())
    assert all(weight.grad is None for weight in model.parameters())
