"""Families that few others are like: attention sinks, hyper-connections, words of a codebook beside audio."""

from __future__ import annotations

from typing import Any

import torch
from _zoo import BREAK, END, EXPERTS, IMAGE, LATENT, START, TEXT, VIDEO, VIT, Batch, Rows, packed, zoo

Made = tuple[type, Any]
_LINE = 61


@zoo(packed(moments=1, count=lambda high, wide: high * (wide + 1)), attention="eager")
def hy_v4_vl() -> Made:
    """Keys from a latent, of which each query chooses some, with a sink; several states a token; rows of pictures end
    in a token of their own. No SDPA."""
    from transformers import HYV4VLConfig, HYV4VLForConditionalGeneration

    text = {
        **TEXT, **EXPERTS, **LATENT, "index_topk": 6, "index_head_dim": 8, "index_n_heads": 16, "hc_mult": 2,
        "indexer_types": ["full", "full", "shared", "full"],
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 0]},
    }  # fmt: skip
    vision = {**VIT, "patch_size": 4, "out_hidden_size": 48, "max_image_size": 64}
    return HYV4VLForConditionalGeneration, HYV4VLConfig(
        vision_config=vision, text_config=text, image_token_id=IMAGE, video_token_id=VIDEO,
    )  # fmt: skip


def _in_a_frame(rows: Rows) -> Batch:
    """Pictures of their own sizes in a frame, a token for each 2 x 2 pixels, and an end of line between their rows."""
    grids = rows.grids()
    batch = rows.write(
        [[START, *([IMAGE] * wide + [_LINE]) * (high - 1), *[IMAGE] * wide, END] for high, wide in grids]
    )
    sizes = torch.tensor(grids) * 2
    return {**batch, "pixel_values": rows.pixels(rows.total, 3, *sizes.amax(0).tolist()), "image_sizes": sizes}


@zoo(_in_a_frame, attention="eager")
def apertus1p5() -> Made:
    """Words of a codebook. Its tokenizer of pictures takes no SDPA."""
    from transformers import Apertus1p5Config, Apertus1p5ForConditionalGeneration, Apertus1p5TextConfig

    codes = {
        "codebook_size": 16, "embed_dim": 8, "latent_channels": 8, "base_channels": 32, "channel_multiplier": [1, 2],
        "num_res_blocks": 1, "attn_resolutions": [6], "resolution": 12,
    }  # fmt: skip
    audio = {
        "model_type": "wavtokenizer_encoder",
        "codebook_size": 4,
        "num_filters": 2,
        "upsampling_ratios": [2, 2],
        "num_lstm_layers": 1,
        "hidden_size": 8,
        "codebook_dim": 8,
    }
    rope = {"rope_type": "default", "rope_theta": 1e4}
    return Apertus1p5ForConditionalGeneration, Apertus1p5Config(
        text_config=Apertus1p5TextConfig(**TEXT, rope_parameters=rope), vision_config=codes, audio_config=audio,
        image_token_id=IMAGE, audio_token_id=BREAK, image_token_offset=40, audio_token_offset=56,
    )  # fmt: skip
