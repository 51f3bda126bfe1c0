"""Models at the sizes of the published checkpoints, built from configs with random weights, and prompts for them.

Weights do not matter for times and memory, so nothing is downloaded. The sizes that end in `0.5b` are for a CPU with a
few cores: CLIP-L/14-336 as published, or a tower of Qwen2.5-VL's kind at ViT-B's size, before a decoder of Qwen2-0.5B's
shape, prompts as long as those of the 7B models. No checkpoint of LLaVA-1.5, LLaVA-NeXT or Qwen2.5-VL is so small. A
small copy of each (`tiny-...`) serves to try the commands.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from tokenprune.registry import UnknownName, near

TEXT = 60  # text tokens of a prompt: a system prompt, a question and the turn's markers
_CLIP = {
    "model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
    "num_attention_heads": 16, "image_size": 336, "patch_size": 14, "projection_dim": 768,
}  # fmt: skip
_VICUNA = {"model_type": "llama", "vocab_size": 32064, "max_position_embeddings": 65536}
_GRID = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
_QWEN_TEXT = {
    "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
    "num_attention_heads": 28, "num_key_value_heads": 4, "rms_norm_eps": 1e-6, "max_position_embeddings": 128000,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
}  # fmt: skip
_QWEN_VISION = {
    "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584,
    "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31], "patch_size": 14,
}  # fmt: skip
_QWEN_HALF = {
    "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
    "num_attention_heads": 14, "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "max_position_embeddings": 32768,
    "tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
}  # fmt: skip
_QWEN_HALF_TEXT = _QWEN_HALF | {
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]}
}
_QWEN_BASE_VISION = _QWEN_VISION | {
    "depth": 12, "hidden_size": 768, "intermediate_size": 2048, "num_heads": 12, "out_hidden_size": 896,
    "fullatt_block_indexes": [2, 5, 8, 11],
}  # fmt: skip
_TINY_CLIP = _CLIP | {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2,
                      "image_size": 56}  # fmt: skip
_TINY_LLAMA = _VICUNA | {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 16,
                         "num_attention_heads": 2, "num_key_value_heads": 2}  # fmt: skip
_TINY_QWEN_TEXT = _QWEN_TEXT | {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 16, "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
}  # fmt: skip
_TINY_QWEN_VISION = _QWEN_VISION | {"depth": 4, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2,
                                    "out_hidden_size": 32, "fullatt_block_indexes": [1, 3]}  # fmt: skip
_QWEN_IDS = {"image_token_id": 7, "video_token_id": 6, "vision_start_token_id": 3, "vision_end_token_id": 4}


@dataclass(frozen=True)
class Size:
    """One model size.

    Attributes:
        config: of the model, for `AutoConfig.for_model`, with its `model_type`.
        picture: height and width of an image, in pixels.
        budgets: what the papers keep of an image: tokens (int) or a fraction of them (float).
    """

    config: dict[str, Any]
    picture: tuple[int, int]
    budgets: tuple[int | float, ...]

    @property
    def side(self) -> int:
        """Pixels a side of the square that a CLIP tower sees."""
        return self.config["vision_config"]["image_size"]


def _llava(vision: dict[str, Any], text: dict[str, Any], tied: bool = False) -> dict[str, Any]:
    return {"model_type": "llava", "vision_config": vision, "text_config": text, "image_token_index": 7,
            "tie_word_embeddings": tied}  # fmt: skip


def _next(vision: dict[str, Any], text: dict[str, Any], grid: list[list[int]], tied: bool = False) -> dict[str, Any]:
    return _llava(vision, text, tied) | {"model_type": "llava_next", "image_grid_pinpoints": grid}


def _qwen(vision: dict[str, Any], text: dict[str, Any], tied: bool = False) -> dict[str, Any]:
    return {"model_type": "qwen2_5_vl", "vision_config": vision, "text_config": text, **_QWEN_IDS,
            "tie_word_embeddings": tied}  # fmt: skip


def _vip(vision: dict[str, Any], text: dict[str, Any], blocks: list[int]) -> dict[str, Any]:
    return _llava(vision, text) | {"model_type": "vipllava", "vision_feature_layers": blocks}


SIZES: dict[str, Size] = {
    "llava-1.5-7b": Size(_llava(_CLIP, _VICUNA), (336, 336), (192, 128, 64)),
    "vip-llava-7b": Size(_vip(_CLIP, _VICUNA, [-2, -5, -8, -11, 6]), (336, 336), (192, 128, 64)),
    "llava-next-7b": Size(_next(_CLIP, _VICUNA, _GRID), (672, 672), (640, 320, 160)),
    "qwen2.5-vl-7b": Size(_qwen(_QWEN_VISION, _QWEN_TEXT), (1008, 1008), (0.333, 0.222, 0.111)),
    "llava-1.5-0.5b": Size(_llava(_CLIP, {"model_type": "qwen2", **_QWEN_HALF}, tied=True), (336, 336), (192, 128, 64)),
    "llava-next-0.5b": Size(
        _next(_CLIP, {"model_type": "qwen2", **_QWEN_HALF}, _GRID, tied=True), (672, 672), (640, 320, 160)
    ),
    "qwen2.5-vl-0.5b": Size(_qwen(_QWEN_BASE_VISION, _QWEN_HALF_TEXT, tied=True), (1008, 1008), (0.333, 0.222, 0.111)),
    "tiny-llava-1.5": Size(_llava(_TINY_CLIP, _TINY_LLAMA), (56, 56), (8, 4)),
    "tiny-vip-llava": Size(_vip(_TINY_CLIP, _TINY_LLAMA, [-2, -3]), (56, 56), (8, 4)),
    "tiny-llava-next": Size(_next(_TINY_CLIP, _TINY_LLAMA, [[112, 112]]), (112, 112), (16, 8)),
    "tiny-qwen2.5-vl": Size(_qwen(_TINY_QWEN_VISION, _TINY_QWEN_TEXT), (168, 168), (0.333, 0.111)),
}


def find_size(name: str) -> Size:
    """The size called `name`; raises UnknownName with the near matches."""
    if name not in SIZES:
        raise UnknownName(f"There is no model size {name!r}.{near(name, list(SIZES))} Known: {', '.join(SIZES)}.")
    return SIZES[name]


def build(name: str, dtype: str, device: str, decoder_layers: int | None = None) -> Any:
    """The model with random weights, made on `device` in `dtype`; with other `decoder_layers` than its own."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    size = find_size(name)
    settings = {key: value for key, value in size.config.items() if key != "model_type"}
    config = AutoConfig.for_model(size.config["model_type"], **settings)
    config.dtype = getattr(torch, dtype)
    if decoder_layers is not None:
        text = config.get_text_config()
        text.num_hidden_layers = decoder_layers
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[:decoder_layers]
    with torch.device(device):
        model: Any = AutoModelForImageTextToText.from_config(config, dtype=getattr(torch, dtype))
    model.generation_config.eos_token_id = None  # what random weights say must not end a timed decode
    return model.eval()


@dataclass
class SizedModel:
    """What `tokenprune.evals.profiling.timing` needs of a loaded model, with prompts in place of a processor.

    Attributes:
        images: pictures a prompt; 0 where there is a video.
        frames: frames of the one video of a prompt, a multiple of 2; 0: none. Of the Qwen sizes only.
        batch: prompts together, all alike in shape.
        picture: height and width in place of the size's own, of the Qwen sizes only.
    """

    name: str
    model: Any
    images: int = 1
    frames: int = 0
    batch: int = 1
    picture: tuple[int, int] | None = None
    prepared: dict[Any, Any] = field(default_factory=dict)

    @cached_property
    def adapter(self) -> Any:
        """As that of a loaded model."""
        from tokenprune.api import adapter_for

        return adapter_for(self.model)

    def inputs(self, *_: Any) -> dict[str, Any]:
        """Random pixels and words, `[batch, S]`, on the model's device."""
        import torch

        size, device = find_size(self.name), self.model.device
        kind = size.config["model_type"]
        if (self.frames or self.picture) and kind != "qwen2_5_vl":
            raise ValueError(f"Videos and other picture sizes are built for the Qwen sizes only, not for {self.name}.")
        size = size if self.picture is None else replace(size, picture=self.picture)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            count, pixels = _PIXELS[kind](size, self.images * self.batch, self.frames, self.batch, generator)
        place = 6 if self.frames else 7
        words = torch.randint(8, 100, (self.batch, TEXT), generator=generator)
        visual = torch.full((self.batch, count + 2), place)
        visual[:, 0], visual[:, -1] = 3, 4
        parts = [words[:, : TEXT // 2], *[visual] * max(1, self.images), words[:, TEXT // 2 :]]
        ids = torch.cat(parts, 1)
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **pixels}
        if kind == "qwen2_5_vl":
            given["mm_token_type_ids"] = (ids == 7).long() + 2 * (ids == 6).long()
        moved = {key: value.to(device) for key, value in given.items()}
        return {key: value.to(self.model.dtype) if value.is_floating_point() else value for key, value in moved.items()}


def _llava_pixels(size: Size, pictures: int, frames: int, clips: int, generator: Any) -> tuple[int, dict[str, Any]]:
    import torch

    count = (size.side // 14) ** 2
    return count, {"pixel_values": torch.randn(pictures, 3, size.side, size.side, generator=generator)}


def _next_pixels(size: Size, pictures: int, frames: int, clips: int, generator: Any) -> tuple[int, dict[str, Any]]:
    import torch

    rows, cols = (pixels // 14 for pixels in size.picture)
    crops = 1 + size.picture[0] * size.picture[1] // size.side**2
    pixels = torch.randn(pictures, crops, 3, size.side, size.side, generator=generator)
    sizes = torch.tensor([size.picture] * pictures)
    return (size.side // 14) ** 2 + rows * (cols + 1), {"pixel_values": pixels, "image_sizes": sizes}


def _qwen_pixels(size: Size, pictures: int, frames: int, clips: int, generator: Any) -> tuple[int, dict[str, Any]]:
    import torch

    rows, cols = (pixels // 14 for pixels in size.picture)
    grids = [[max(1, frames // 2), rows, cols]] * (clips if frames else pictures)
    patches = torch.randn(len(grids) * grids[0][0] * rows * cols, 3 * 2 * 14 * 14, generator=generator)
    count = grids[0][0] * rows * cols // 4
    if frames:
        seconds = torch.ones(len(grids))
        return count, {"pixel_values_videos": patches, "video_grid_thw": torch.tensor(grids),
                       "second_per_grid_ts": seconds}  # fmt: skip
    return count, {"pixel_values": patches, "image_grid_thw": torch.tensor(grids)}


_PIXELS: dict[str, Callable[..., tuple[int, dict[str, Any]]]] = {
    "llava": _llava_pixels, "vipllava": _llava_pixels, "llava_next": _next_pixels, "qwen2_5_vl": _qwen_pixels,
}  # fmt: skip
