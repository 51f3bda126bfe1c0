"""Tiny random models built from configs, and inputs for them: no hub, no processor."""

from __future__ import annotations

from typing import Any

import torch

IMAGE, PAD, EOS = 5, 0, 1
GRID = (6, 6)
PATCHES = GRID[0] * GRID[1]


TEXT = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 512,
    "pad_token_id": PAD,
    "bos_token_id": 2,
    "eos_token_id": EOS,
}
"""Sizes of every tiny decoder: grouped queries, four layers."""


def tiny_llava(seed: int = 0, attention: str = "sdpa", layers: int = 4, vision_layers: int = 4, **text: Any) -> Any:
    """A LLaVA-1.5 with a 6 x 6 CLIP tower and a grouped-query Llama decoder; weights so large that logits differ."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(seed)
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=vision_layers,
        num_attention_heads=4,
        image_size=42,
        patch_size=7,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=LlamaConfig(**{**TEXT, "num_hidden_layers": layers, **text}),
        image_token_index=IMAGE,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    config._attn_implementation = attention
    model = LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                # the default 0.02 leaves attention flat; here tokens must matter
                parameter.normal_(0.0, parameter.shape[-1] ** -0.5 * 1.5)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD
    return model


def prompts(
    images_per_sample: list[int], side: str = "left", seed: int = 1, grid: tuple[int, int] = GRID
) -> dict[str, torch.Tensor]:
    """A ragged batch: one row per entry, with that many images between words; padded on `side`.

    Returns:
        input_ids and attention_mask `[B, S]`, and pixel_values `[M, 3, 42, 42]` if there is an image.
    """
    generator = torch.Generator().manual_seed(seed)
    count = grid[0] * grid[1]

    def words(number: int) -> list[int]:
        return torch.randint(8, 64, (number,), generator=generator).tolist()

    rows = []
    for row, images in enumerate(images_per_sample):
        tokens = words(2 + row)
        for _ in range(images):
            tokens += [IMAGE] * count + words(2)
        rows.append(tokens + words(4))
    length = max(map(len, rows))
    ids, mask = [], []
    for tokens in rows:
        pad = [PAD] * (length - len(tokens))
        left = side == "left"
        ids.append(pad + tokens if left else tokens + pad)
        mask.append([0] * len(pad) + [1] * len(tokens) if left else [1] * len(tokens) + [0] * len(pad))
    batch: dict[str, torch.Tensor] = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
    total = sum(images_per_sample)
    if total:
        batch["pixel_values"] = torch.randn(total, 3, grid[0] * 7, grid[1] * 7, generator=generator)
    return batch
