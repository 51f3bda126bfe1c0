"""Every image-text class of transformers is covered, or refused with its reason; models built from configs show it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
import yaml
from _capabilities import FILE, missing_table
from _paths import ROOT
from _tiny import IMAGE, TEXT
from _zoo import VIDEO, VIT
from _zoo_all import FAMILIES
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as MAPPING

import tokenprune
from tokenprune.adapters._not_applicable import FAILS_THE_TRIAL, NOT_APPLICABLE
from tokenprune.adapters.generic import MISSING
from tokenprune.cli import main
from tokenprune.registry import MODELS


def test_no_class_of_transformers_is_forgotten() -> None:
    named = {one for value in MAPPING.values() for one in ([value] if isinstance(value, str) else value)}
    covered = {*yaml.safe_load(FILE.read_text(encoding="utf-8"))}
    with_files = {cls for name in MODELS.names() if name in FAMILIES for cls in MODELS.get(name).classes}
    assert named <= covered | with_files | {*MISSING}, f"neither covered nor refused: {sorted(named - {*MISSING})}"
    assert not {*MISSING} & (covered | with_files), "said to be missing, and is not"


_HEARD = (
    "FunAsrNanoForConditionalGeneration", "GlmAsrForConditionalGeneration", "GraniteSpeechForConditionalGeneration",
    "GraniteSpeechPlusForConditionalGeneration", "KyutaiSpeechToTextForConditionalGeneration",
    "MossTranscribeDiarizeForConditionalGeneration", "Nemotron3_5TranscribeForConditionalGeneration",
    "OmniASRForConditionalGeneration", "Qwen2AudioForConditionalGeneration", "Qwen3ASRForConditionalGeneration",
    "VibeVoiceAsrForConditionalGeneration", "VoxtralForConditionalGeneration",
    "VoxtralRealtimeForConditionalGeneration",
)  # fmt: skip
"""Classes of several modalities that take sounds, and no pictures."""
_BY_THEIR_THINKERS = ("Qwen2_5OmniForConditionalGeneration", "Qwen3OmniMoeForConditionalGeneration")
"""Those that speak: the part that answers in text is a class of its own, which is covered."""


def test_no_class_of_several_modalities_is_forgotten() -> None:
    from transformers.models.auto import modeling_auto

    named = {*modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES.values()} - {*MAPPING.values()}
    covered = {*yaml.safe_load(FILE.read_text(encoding="utf-8"))}
    assert named <= covered | {*MISSING} | {*_HEARD} | {*_BY_THEIR_THINKERS}
    assert {one.replace("ForC", "ThinkerForC") for one in _BY_THEIR_THINKERS} <= covered


def test_the_list_of_what_is_missing_stands_in_the_docs_and_on_the_command_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = (ROOT / "docs" / "support.md").read_text(encoding="utf-8")
    assert missing_table() in text, "make test-all SUPPORT=docs/support.md writes it"
    assert main(["ls", "models", "--missing"]) == 0
    said = capsys.readouterr().out
    assert all(name in said and why in said for name, why in MISSING.items())


# --- those whose decoders are refused when they are tried -------------------------------------------------------------

_HYBRID = {
    **TEXT, "head_dim": 12, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 12, "d_rel": 4,
    "rel_extent": 64, "moe_intermediate_size": 32, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "sliding_window_size": 64, "tie_word_embeddings": False, "unpadded_vocab_size": 64,
}  # fmt: skip
_TOWER = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "patch_size": 4, "text_hidden_size": 48}


def _inkling() -> Any:
    config = transformers.InklingConfig(
        text_config={**_HYBRID, "local_layer_ids": [0, 2]}, vision_config={**_TOWER, "patch_size": 40},
        audio_config={"text_hidden_size": 48}, image_token_id=IMAGE, audio_token_id=6, image_bos_token_id=3,
        audio_bos_token_id=4,
    )  # fmt: skip
    return transformers.InklingForConditionalGeneration(config)


def _inkling2() -> Any:
    vision = {**_TOWER, "projection_hidden_dim": 48, "posemb_grid_size": 8}
    return transformers.Inkling2ForConditionalGeneration(
        transformers.Inkling2Config(text_config=_HYBRID, vision_config=vision, image_token_id=IMAGE)
    )


def _inkling2_loop() -> Any:
    looped = {"n_layers_per_attn_res_block": 2, "loop_layer_index_start": 2, "loop_layer_index_end": 4}
    vision = {"model_type": "inkling2_vision", **_TOWER, "projection_hidden_dim": 48, "posemb_grid_size": 8}
    text = {**_HYBRID, **looped, "loop_num_passes": 2, "loop_gate_rank": 4}
    return transformers.Inkling2LoopForConditionalGeneration(
        transformers.Inkling2LoopConfig(text_config=text, vision_config=vision, image_token_id=IMAGE)
    )


def _minimax(kinds: list[str]) -> Any:
    text = {
        **TEXT, "head_dim": 12, "rotary_dim": 12, "dense_intermediate_size": 32, "shared_intermediate_size": 32,
        "num_local_experts": 4, "num_experts_per_tok": 2, "index_n_heads": 2, "index_head_dim": 12,
        "index_block_size": 4, "index_topk_blocks": 2, "layer_types": kinds,
    }  # fmt: skip
    vision = {**VIT, "image_size": 24, "patch_size": 4}
    return transformers.MiniMaxM3SparseForConditionalGeneration(
        transformers.MiniMaxM3VLConfig(
            text_config=text, vision_config=vision, image_token_index=IMAGE, video_token_index=VIDEO,
            projector_hidden_size=48,
        )
    )  # fmt: skip


def _nemotron() -> Any:
    text = {
        "model_type": "nemotron_h", **{k: v for k, v in TEXT.items() if k != "num_hidden_layers"}, "head_dim": 12,
        "layers_block_type": ["mamba", "attention", "mamba", "attention"], "ssm_state_size": 8, "mamba_num_heads": 4,
        "mamba_head_dim": 12, "n_groups": 2, "chunk_size": 8,
    }  # fmt: skip
    vision = {"model_type": "radio", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
              "patch_size": 4, "image_size": 24, "max_img_size": 64, "video_temporal_patch_size": 2}  # fmt: skip
    return transformers.NemotronH_Omni_Reasoning_V3(
        transformers.NemotronH_Omni_Reasoning_V3_Config(
            text_config=text, vision_config=vision, vision_hidden_size=32, projector_hidden_size=48,
            image_token_id=IMAGE, video_token_id=VIDEO,
        )
    )  # fmt: skip


_BUILDERS: dict[str, tuple[Callable[[], Any], str]] = {
    "InklingForConditionalGeneration": (_inkling, r"has no rotary positions .* distance in the row.* no input cuts"),
    "Inkling2ForConditionalGeneration": (_inkling2, r"has no rotary positions .* distance in the row.* no input cuts"),
    "Inkling2LoopForConditionalGeneration": (_inkling2_loop, r"has no rotary positions .* in the row.* no input cuts"),
    "MiniMaxM3SparseForConditionalGeneration": (
        lambda: _minimax(["full_attention"] + ["minimax_m3_sparse"] * 3),
        r"layers of the kind minimax_m3_sparse, in which .* no input cuts",
    ),
    "NemotronH_Omni_Reasoning_V3": (_nemotron, r"NemotronHModel has no rotary positions .* no input cuts"),
}


@pytest.mark.parametrize("name", list(FAILS_THE_TRIAL))
def test_a_class_that_is_not_refused_by_name_is_when_it_is_tried(name: str) -> None:
    if not hasattr(transformers, name):
        pytest.skip("this transformers has no such class")
    build, says = _BUILDERS[name]
    with pytest.raises(ValueError, match=says):
        tokenprune.apply(build(), "random", keep=4)


def test_minimax_m3_whose_layers_see_all_is_pruned() -> None:
    if not hasattr(transformers, "MiniMaxM3SparseForConditionalGeneration"):
        pytest.skip("this transformers has no such class")
    torch.manual_seed(0)
    tokenprune.apply(_minimax(["full_attention"] * 4).eval(), "random", keep=4).remove()


# --- those that are refused by name, and whose reason a tiny model shows ----------------------------------------------

_WORDS = {
    "vocab_size": 64, "embed_dim": 48, "layers": 2, "ffn_dim": 64, "attention_heads": 4, "pad_token_id": 0,
    "max_position_embeddings": 128, "bos_token_id": 2, "eos_token_id": 1,
}  # fmt: skip
_LATENTS = 9


def _kosmos2() -> tuple[Any, Callable[[int], dict[str, torch.Tensor]]]:
    """A model, and the pixels of a picture: of one size."""
    config = transformers.Kosmos2Config(
        text_config=_WORDS, vision_config={**VIT, "image_size": 24, "patch_size": 4}, latent_query_num=_LATENTS
    )
    return transformers.Kosmos2ForConditionalGeneration(config), lambda side: {
        "pixel_values": torch.randn(1, 3, 24, 24)
    }


def _kosmos2_5() -> tuple[Any, Callable[[int], dict[str, torch.Tensor]]]:
    """A model, and the pixels of a picture: its patches, each behind its row and column."""
    vision = {**VIT, "head_dim": 8, "patch_embed_hidden_size": 48, "patch_size": 4, "max_num_patches": 64}
    config = transformers.Kosmos2_5Config(text_config=_WORDS, vision_config=vision, latent_query_num=_LATENTS)

    def pixels(side: int) -> dict[str, torch.Tensor]:
        places = torch.cartesian_prod(torch.arange(1, side + 1), torch.arange(1, side + 1))
        return {"flattened_patches": torch.cat([places, torch.randn(side * side, 48)], dim=1)[None]}

    return transformers.Kosmos2_5ForConditionalGeneration(config), pixels


@pytest.mark.parametrize("make", [_kosmos2, _kosmos2_5], ids=lambda make: make.__name__[1:])
def test_kosmos_is_as_its_refusal_says(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, pixels = make()
    model.eval()
    name = type(model).__name__
    latents: list[torch.Size] = []
    model.image_to_text_projection.register_forward_hook(lambda module, args, output: latents.append(output[0].shape))
    ids, mask = torch.randint(8, 60, (1, 20)), torch.zeros(1, 20, dtype=torch.int64)
    mask[:, 2 : 2 + _LATENTS] = 1
    other = torch.where(mask == 1, ids.flip(1), ids)
    small, large = pixels(4), pixels(5)
    asked = {"attention_mask": torch.ones_like(ids), "image_embeds_position_mask": mask}
    with torch.no_grad():
        logits = model(input_ids=ids, **asked, **small).logits
        assert torch.equal(model(input_ids=other, **asked, **small).logits, logits), "no id is a placeholder's"
        assert not torch.equal(model(input_ids=ids, **asked, **large).logits, logits), "a picture is seen"
    assert {tuple(shape) for shape in latents} == {(1, _LATENTS, 48)}, "so many latents, whatever the picture"
    with pytest.raises(TypeError, match=f"{name} has no input cuts: {NOT_APPLICABLE[name]}"):
        tokenprune.apply(model, "random", keep=4)
    monkeypatch.setattr("tokenprune.adapters._generic.why_not", lambda cls: "")
    with pytest.raises(TypeError, match=f"{name} has no placeholders for visual tokens"):
        tokenprune.apply(model, "random", keep=4)
