"""Tiny random models of every family, built from configs, and ragged batches for them: no hub, no processor."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from _tiny import IMAGE, PAD, TEXT, prompts, tiny_llava

import tokenprune
from tokenprune.registry import METHODS

VIDEO, START, END = 6, 3, 4
KEEP = 9  # of the pictures that `pairs` tries


def _loud(model: Any) -> Any:
    """Weights so large that logits differ: the default 0.02 leaves attention flat."""
    model = model.eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, parameter[0].numel() ** -0.5 * 1.5)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD
    return model


def _build(cls: Any, config: Any, attention: str, seed: int) -> Any:
    torch.manual_seed(seed)
    config._attn_implementation = attention
    return _loud(cls(config))


def _clip(**more: Any) -> Any:
    from transformers import CLIPVisionConfig

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
    return CLIPVisionConfig(**{**sizes, "image_size": 28, "patch_size": 7, **more})


def llava_next(attention: str = "sdpa", seed: int = 0) -> Any:
    from transformers import LlamaConfig, LlavaNextConfig, LlavaNextForConditionalGeneration

    config = LlavaNextConfig(
        vision_config=_clip(), text_config=LlamaConfig(**TEXT), image_token_index=IMAGE,
        image_grid_pinpoints=[[28, 56], [56, 28], [56, 56]], vision_feature_layer=-2,
    )  # fmt: skip
    return _build(LlavaNextForConditionalGeneration, config, attention, seed)


def llava_next_video(attention: str = "sdpa", seed: int = 0) -> Any:
    from transformers import LlamaConfig, LlavaNextVideoConfig, LlavaNextVideoForConditionalGeneration

    config = LlavaNextVideoConfig(
        vision_config=_clip(), text_config=LlamaConfig(**TEXT), image_token_index=IMAGE, video_token_index=VIDEO,
        image_grid_pinpoints=[[28, 56], [56, 28], [56, 56]], vision_feature_layer=-2, spatial_pool_mode="average",
        spatial_pool_stride=2,
    )  # fmt: skip
    return _build(LlavaNextVideoForConditionalGeneration, config, attention, seed)


def llava_onevision(attention: str = "sdpa", seed: int = 0) -> Any:
    from transformers import (
        LlavaOnevisionConfig,
        LlavaOnevisionForConditionalGeneration,
        Qwen2Config,
        SiglipVisionConfig,
    )

    vision = SiglipVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, image_size=28, patch_size=7
    )
    config = LlavaOnevisionConfig(
        vision_config=vision, text_config=Qwen2Config(**TEXT), image_token_index=IMAGE, video_token_index=VIDEO,
        image_grid_pinpoints=[[28, 56], [56, 28], [56, 56], [84, 84]], vision_aspect_ratio="anyres_max_4",
    )  # fmt: skip
    return _build(LlavaOnevisionForConditionalGeneration, config, attention, seed)


def _qwen_ids() -> dict[str, int]:
    return {
        "image_token_id": IMAGE,
        "video_token_id": VIDEO,
        "vision_start_token_id": START,
        "vision_end_token_id": END,
    }


def qwen2_vl(attention: str = "sdpa", seed: int = 0) -> Any:
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    vision = {"depth": 3, "embed_dim": 32, "hidden_size": 48, "num_heads": 4, "mlp_ratio": 2, "patch_size": 4}
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 2]}
    config = Qwen2VLConfig(vision_config=vision, text_config={**TEXT, "rope_parameters": rope}, **_qwen_ids())
    return _build(Qwen2VLForConditionalGeneration, config, attention, seed)


def qwen2_5_vl(attention: str = "sdpa", seed: int = 0) -> Any:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    vision = {
        "depth": 3, "hidden_size": 32, "out_hidden_size": 48, "num_heads": 4, "intermediate_size": 48, "patch_size": 4,
        "window_size": 16, "fullatt_block_indexes": [1],
    }  # fmt: skip
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 2]}
    config = Qwen2_5_VLConfig(vision_config=vision, text_config={**TEXT, "rope_parameters": rope}, **_qwen_ids())
    return _build(Qwen2_5_VLForConditionalGeneration, config, attention, seed)


def qwen3_vl(attention: str = "sdpa", seed: int = 0) -> Any:
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    vision = {
        "depth": 3, "hidden_size": 32, "out_hidden_size": 48, "num_heads": 4, "intermediate_size": 48, "patch_size": 4,
        "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1],
    }  # fmt: skip
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 2], "mrope_interleaved": True}
    text = {**TEXT, "head_dim": 12, "rope_parameters": rope}
    config = Qwen3VLConfig(vision_config=vision, text_config=text, **_qwen_ids())
    return _build(Qwen3VLForConditionalGeneration, config, attention, seed)


def internvl(attention: str = "sdpa", seed: int = 0) -> Any:
    from transformers import InternVLConfig, InternVLForConditionalGeneration, InternVLVisionConfig, Qwen2Config

    vision = InternVLVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, image_size=[48, 48],
        patch_size=[4, 4], layer_scale_init_value=1.0,
    )  # fmt: skip
    config = InternVLConfig(vision_config=vision, text_config=Qwen2Config(**TEXT), image_token_id=IMAGE)
    return _build(InternVLForConditionalGeneration, config, attention, seed)


def smolvlm(attention: str = "sdpa", seed: int = 0) -> Any:
    from transformers import LlamaConfig, SmolVLMConfig, SmolVLMForConditionalGeneration, SmolVLMVisionConfig

    vision = SmolVLMVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, image_size=48, patch_size=4
    )
    config = SmolVLMConfig(
        vision_config=vision, text_config=LlamaConfig(**TEXT), image_token_id=IMAGE, scale_factor=2, pad_token_id=PAD
    )
    return _build(SmolVLMForConditionalGeneration, config, attention, seed)


BUILDERS: dict[str, Callable[..., Any]] = {
    "llava": lambda attention="sdpa", seed=0: tiny_llava(seed, attention),
    "llava_next": llava_next,
    "llava_next_video": llava_next_video,
    "llava_onevision": llava_onevision,
    "qwen2_vl": qwen2_vl,
    "qwen2_5_vl": qwen2_5_vl,
    "qwen3_vl": qwen3_vl,
    "internvl": internvl,
    "smolvlm": smolvlm,
}


@functools.cache
def family(name: str, attention: str = "sdpa") -> Any:
    """The tiny model of a family, one for all tests: `applied` must leave it as it was."""
    return BUILDERS[name](attention)


class Writer:
    """Writes rows of token ids, and pads them."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.rows: list[list[int]] = []

    def words(self, count: int) -> list[int]:
        return torch.randint(8, 64, (count,), generator=self.generator).tolist()

    def pixels(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator)

    def row(self, *parts: list[int]) -> None:
        tokens = self.words(2 + len(self.rows))
        for part in parts:
            tokens += part + self.words(2)
        self.rows.append(tokens + self.words(4))

    def batch(self, side: str) -> dict[str, torch.Tensor]:
        length = max(map(len, self.rows))
        ids, mask = [], []
        for tokens in self.rows:
            pad = [PAD] * (length - len(tokens))
            left = side == "left"
            ids.append(pad + tokens if left else tokens + pad)
            mask.append([0] * len(pad) + [1] * len(tokens) if left else [1] * len(tokens) + [0] * len(pad))
        return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def _anyres_length(model: Any, size: tuple[int, int]) -> int:
    """Placeholders of a picture, from the model's own features."""
    with torch.no_grad():
        pixels = torch.randn(1, 10, 3, 28, 28)
        features = model.model.get_image_features(pixels, torch.tensor([size]), return_dict=True).pooler_output
    return len(features[0])


def _anyres_batch(name: str, samples: list[list[Any]], side: str, seed: int) -> dict[str, torch.Tensor]:
    """Pictures are (rows, cols) in pixels, videos are frames."""
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    model, writer = family(name), Writer(seed)
    sizes = [item for sample in samples for item in sample if isinstance(item, tuple)]
    videos = [item for sample in samples for item in sample if isinstance(item, int)]
    per_frame = 4
    separator = 1 if name == "llava_onevision" else 0
    for sample in samples:
        parts = []
        for item in sample:
            if isinstance(item, tuple):
                parts.append([IMAGE] * _anyres_length(model, item))
            else:
                parts.append([VIDEO] * (item * per_frame + separator))
        writer.row(*parts)
    batch = writer.batch(side)
    if sizes:
        grid = model.config.image_grid_pinpoints
        crops = [image_size_to_num_patches(size, grid, 28) for size in sizes]
        pixels = torch.zeros(len(sizes), max(crops), 3, 28, 28)
        for i, count in enumerate(crops):
            pixels[i, :count] = writer.pixels(count, 3, 28, 28)
        batch |= {"pixel_values": pixels, "image_sizes": torch.tensor(sizes)}
    if videos:
        batch["pixel_values_videos"] = writer.pixels(len(videos), videos[0], 3, 28, 28)
    return batch


def _qwen_batch(name: str, samples: list[list[Any]], side: str, seed: int) -> dict[str, torch.Tensor]:
    """Pictures are (rows, cols) in merged cells, videos (frames, rows, cols)."""
    writer = Writer(seed)
    grids: dict[str, list[list[int]]] = {"image": [], "video": []}
    for sample in samples:
        parts = []
        for item in sample:
            if len(item) == 2:
                grids["image"].append([1, item[0] * 2, item[1] * 2])
                parts.append([START] + [IMAGE] * (item[0] * item[1]) + [END])
            elif name == "qwen3_vl":
                grids["video"].append([item[0], item[1] * 2, item[2] * 2])
                part: list[int] = []
                for _ in range(item[0]):
                    part += [*writer.words(2), START] + [VIDEO] * (item[1] * item[2]) + [END]
                parts.append(part)
            else:
                grids["video"].append([item[0], item[1] * 2, item[2] * 2])
                parts.append([START] + [VIDEO] * (item[0] * item[1] * item[2]) + [END])
        writer.row(*parts)
    batch = writer.batch(side)
    ids = batch["input_ids"]
    batch["mm_token_type_ids"] = (ids == IMAGE).long() + 2 * (ids == VIDEO).long()
    for kind, pixels in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        if grids[kind]:
            total = sum(t * h * w for t, h, w in grids[kind])
            batch[pixels] = writer.pixels(total, 3 * 2 * 4 * 4)
            batch[f"{kind}_grid_thw"] = torch.tensor(grids[kind])
    return batch


def smolvlm_picture(tiles: int) -> list[int]:
    """Ids of a picture in one row of `tiles` - 1 tiles and the whole of it, as the processor writes them."""
    parts = [[START, 6 + tile] + [IMAGE] * 36 for tile in range(tiles - 1)]
    return [*sum(parts, []), START, END, *[IMAGE] * 36, START]


def _tile_batch(name: str, samples: list[list[int]], side: str, seed: int) -> dict[str, torch.Tensor]:
    """Pictures are counts of tiles."""
    writer = Writer(seed)
    for sample in samples:
        if name == "internvl":
            writer.row(*([START] + [IMAGE] * 36 * tiles + [END] for tiles in sample))
        else:
            writer.row(*map(smolvlm_picture, sample))
    batch = writer.batch(side)
    totals = [sum(sample) for sample in samples]
    if name == "internvl":
        batch["pixel_values"] = writer.pixels(sum(totals), 3, 48, 48)
    else:
        pixels = torch.zeros(len(samples), max(totals), 3, 48, 48)
        for row, tiles in enumerate(totals):
            pixels[row, :tiles] = writer.pixels(tiles, 3, 48, 48)
        batch["pixel_values"] = pixels
    return batch


_ANYRES = {
    "one": [[(40, 30)]],
    "ragged": [[(30, 60)], [(20, 20), (50, 25), (28, 28)], [], [(56, 56), (30, 60)]],
}
_QWEN = {
    "one": [[(5, 6)]],
    "ragged": [[(6, 6)], [(5, 7), (6, 6), (4, 9)], [], [(5, 7), (6, 6)]],
    "mixed": [[(5, 7), (3, 4, 4)], [(2, 5, 4)], [(6, 6)]],
}
SAMPLES: dict[str, dict[str, list[list[Any]]]] = {
    "llava_next": _ANYRES,
    "llava_next_video": {**_ANYRES, "mixed": [[(30, 60), 3], [3], [(40, 30)]]},
    "llava_onevision": {
        **_ANYRES, "mixed": [[(30, 60), 3], [3], [(40, 30)]], "interpolated": [[(84, 80)], [(40, 30)]],
    },
    "qwen2_vl": _QWEN,
    "qwen2_5_vl": _QWEN,
    "qwen3_vl": _QWEN,
    "internvl": {"one": [[1]], "ragged": [[2], [1, 2], [], [3]]},
    "smolvlm": {"one": [[2]], "ragged": [[2], [1, 2], [], [3]]},
}  # fmt: skip
_LLAVA = {"one": [1], "ragged": [1, 3, 0, 2]}


def layouts(name: str) -> list[str]:
    """Names of the batches that a family is tried on; all but "one" also padded on the right."""
    names = _LLAVA if name == "llava" else SAMPLES[name]
    return [*(f"{layout}_left" for layout in names), "ragged_right"]


def batch_of(name: str, layout: str, seed: int = 1) -> dict[str, torch.Tensor]:
    """Inputs of a family; `layout` is one of `layouts(name)`."""
    kind, _, side = layout.partition("_")
    if name == "llava":
        return prompts(_LLAVA[kind], side, seed)
    samples = SAMPLES[name][kind]
    if name.startswith("llava"):
        return _anyres_batch(name, samples, side, seed)
    if name.startswith("qwen"):
        return _qwen_batch(name, samples, side, seed)
    return _tile_batch(name, samples, side, seed)


@functools.cache
def refusal(name: str, method: str) -> str:
    """What `apply` says of a method that a family cannot take; "" if it can."""
    try:
        tokenprune.apply(family(name), method, keep=KEEP).remove()
    except ValueError as error:
        return str(error)
    return ""


def pairs(taken: bool) -> list[tuple[str, str]]:
    """Families and methods that go together, or do not."""
    return [(name, method) for name in BUILDERS for method in METHODS.names() if (not refusal(name, method)) == taken]
