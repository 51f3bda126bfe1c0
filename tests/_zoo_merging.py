"""Families that make words of a codebook out of pictures, whose decoder merges them by itself, or without a tower."""

from __future__ import annotations

import inspect
from typing import Any

from _zoo import BREAK, IMAGE, START, TEXT, Batch, Rows, fixed, zoo

Made = tuple[type, Any]
_WORDS = range(40, 56)  # of the vocabulary: those of pictures
_CODES = {
    "base_channels": 32, "channel_multiplier": [1, 2], "num_res_blocks": 1, "latent_channels": 8, "embed_dim": 8,
}  # fmt: skip


@zoo(fixed(36, 12))
def chameleon() -> Made:
    """The decoder merges by itself."""
    from transformers import ChameleonConfig, ChameleonForConditionalGeneration

    names = {f"IMGIMG{chr(ord('A') + i // 10)}{chr(ord('A') + i % 10)}Z": word for i, word in enumerate(_WORDS)}
    codes = {**_CODES, "num_embeddings": len(_WORDS), "resolution": 12}
    return ChameleonForConditionalGeneration, ChameleonConfig(
        **TEXT, vq_config=codes, vocabulary_map={**names, "<image>": IMAGE}
    )


def _with_row_ends(rows: Rows) -> Batch:
    """Pictures of their own sizes in a frame, whose rows of tokens end in another one (Emu3)."""
    import torch

    grids = rows.grids()
    batch = rows.write([[IMAGE] * (high * (wide + 1)) for high, wide in grids])
    sizes = torch.tensor(grids) * 2
    return {**batch, "pixel_values": rows.pixels(rows.total, 3, *sizes.amax(0).tolist()), "image_sizes": sizes}


@zoo(_with_row_ends)
def emu3() -> Made:
    from transformers import Emu3Config, Emu3ForConditionalGeneration

    names = {f"<|visual token {i:06d}|>": word for i, word in enumerate(_WORDS)}
    codes = {
        **_CODES, "codebook_size": len(_WORDS), "attn_resolutions": [1], "hidden_size": 64,
        "temporal_downsample_factor": 2,
    }  # fmt: skip
    return Emu3ForConditionalGeneration, Emu3Config(
        text_config=dict(TEXT), vq_config=codes, vocabulary_map={**names, "<image>": IMAGE, "<|extra_200|>": 58}
    )


def _patches_in_rows(rows: Rows) -> Batch:
    """Patches of all pictures in one tensor; each row of them ends in an id, and another stands behind a picture."""
    from transformers import FuyuModel

    older = "pixel_values" not in inspect.signature(FuyuModel.forward).parameters  # before 5.23
    grids = rows.grids()
    batch = rows.write([([IMAGE] * wide + [BREAK]) * high + [START] for high, wide in grids])
    patches = rows.pixels(sum(high * wide for high, wide in grids), 48)
    return {**batch, "image_patches" if older else "pixel_values": patches}


@zoo(_patches_in_rows)
def fuyu() -> Made:
    """Without a tower; the decoder turns half of each head."""
    from transformers import FuyuConfig, FuyuForCausalLM, PersimmonConfig

    text = PersimmonConfig(**{**TEXT, "num_key_value_heads": 4})
    return FuyuForCausalLM, FuyuConfig(
        text_config=text.to_dict(), image_token_id=IMAGE, patch_size=4, **{**TEXT, "num_key_value_heads": 4}
    )
