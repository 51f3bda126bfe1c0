"""What is to be known of a model family before it is loaded: from its config, and from what its processor returns.

Imports no vLLM: the front end counts placeholders with it, and a worker lays out pictures.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from tokenprune.interfaces.signals import TowerInfo
from tokenprune.interfaces.visual import Raster, Visual, one_raster
from tokenprune.vllm.crops import crops_visual, mosaic_shape
from tokenprune.vllm.positions import MOST_IDS
from tokenprune.vllm.settings import ModelFacts
from tokenprune.vllm.towers import CLS_SIGNALS, PATCH_ONLY_SIGNALS

Colours = tuple[tuple[float, float, float], tuple[float, float, float]]
CLIP: Colours = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
HALF: Colours = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
IMAGENET: Colours = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Mean and standard deviation of the colours in the published processors."""


class Family:
    """What one of vLLM's model classes is asked.

    Attributes:
        kinds: what it prunes: "image", "video".
        mrope: whether positions are 3-D ids.
        no_videos: why an engine with a setting takes no videos though the model does; "" where it takes them, or the
            model knows none.
    """

    kinds: tuple[str, ...] = ("image",)
    mrope = False
    no_videos = ""

    def facts(self, config: Any) -> ModelFacts:
        """What methods are held against; `config` is Hugging Face's.

        Raises:
            ValueError: a model of this class that is not covered.
        """
        raise NotImplementedError

    def visuals(self, config: Any, kind: str, inputs: Mapping[str, Any]) -> list[Visual]:
        """How each picture or video is laid out; `inputs` are the processor's, or a worker's. Empty where they hold
        none of this kind.

        Raises:
            ValueError: features in place of pixels.
        """
        raise NotImplementedError

    def example(self, config: Any) -> Visual:
        """A picture to try methods on."""
        raise NotImplementedError

    def placeholders(self, config: Any, kind: str) -> int:
        """The id of the placeholder token."""
        for name in (f"{kind}_token_id", f"{kind}_token_index"):
            if getattr(config, name, None) is not None:
                return int(getattr(config, name))
        raise ValueError(f"The model's config has no {kind}_token_id.")


def refuse_features(inputs: Mapping[str, Any], *names: str) -> None:
    """Raise ValueError where a request brings features in place of pixels."""
    given = [name for name in names if inputs.get(name) is not None]
    if given:
        raise ValueError(
            f"The request brings {given[0]}, features in place of pixels, and tokenprune's methods look at pictures. "
            "Send the picture, or ask an engine that runs without tokenprune."
        )


def vit_facts(
    config: Any, block: int, has_cls: bool, decoder: int, one_size: bool = True, colours: Colours | None = None
) -> ModelFacts:
    """Facts of a CLIP or SigLIP tower whose block `block` makes the visual tokens: vLLM builds no later ones."""
    mean, std = colours or (CLIP if has_cls else HALF)
    tower = TowerInfo(
        num_layers=config.num_hidden_layers, feature_layer=block, has_cls=has_cls,
        num_heads=config.num_attention_heads, hidden_size=config.hidden_size, pixel_mean=mean, pixel_std=std,
    )  # fmt: skip
    signals = CLS_SIGNALS if has_cls else PATCH_ONLY_SIGNALS
    return ModelFacts(tower, signals, block + 1, decoder, one_size=one_size)


def feature_block(layer: Any, depth: int) -> int:
    """0-based block whose output is the entry `layer` of a tower's hidden states, the first of which are embeddings.

    Raises:
        ValueError: several layers are joined.
    """
    if not isinstance(layer, int):
        raise ValueError(f"vision_feature_layer must be one layer, got {layer!r}: several have no common raster.")
    return (layer if layer >= 0 else depth + 1 + layer) - 1


class LlavaFamily(Family):
    """LLaVA-1.5 with a CLIP tower: one grid a picture, [CLS] left out."""

    def facts(self, config: Any) -> ModelFacts:
        vision = config.vision_config
        if vision.model_type != "clip_vision_model" or config.vision_feature_select_strategy != "default":
            raise ValueError(
                "Inside vLLM tokenprune covers LLaVA with a CLIP tower whose patches alone are visual tokens; this "
                f"one has {vision.model_type} and the strategy {config.vision_feature_select_strategy!r}."
            )
        block = feature_block(config.vision_feature_layer, vision.num_hidden_layers)
        return vit_facts(vision, block, has_cls=True, decoder=config.text_config.num_hidden_layers)

    def visuals(self, config: Any, kind: str, inputs: Mapping[str, Any]) -> list[Visual]:
        refuse_features(inputs, "image_embeds")
        patch = config.vision_config.patch_size
        pixels = inputs.get("pixel_values")
        return [] if pixels is None else [one_raster((p.shape[-2] // patch, p.shape[-1] // patch)) for p in pixels]

    def example(self, config: Any) -> Visual:
        side = config.vision_config.image_size // config.vision_config.patch_size
        return one_raster((side, side))


class CropsFamily(Family):
    """LLaVA-NeXT and LLaVA-OneVision: a thumbnail and a mosaic of crops; see `crops.crops_visual`.

    Args:
        tower: type of the vision tower in configs.
        strategy: which of its tokens are visual ones.
        largest: see `crops_visual`.
        no_videos: see `Family`.
    """

    def __init__(self, tower: str, strategy: str, largest: int | None, no_videos: str = "") -> None:
        self.tower, self.strategy, self.largest, self.no_videos = tower, strategy, largest, no_videos

    def facts(self, config: Any) -> ModelFacts:
        vision = config.vision_config
        given = (vision.model_type, config.vision_feature_select_strategy)
        if given != (self.tower, self.strategy):
            raise ValueError(
                f"Inside vLLM tokenprune covers this class with the tower {self.tower} and the strategy "
                f"{self.strategy!r}; this model has {given[0]} and {given[1]!r}."
            )
        ratio = getattr(config, "vision_aspect_ratio", None)
        if self.largest and ratio != f"anyres_max_{self.largest}":
            raise ValueError(
                f"vision_aspect_ratio is {ratio!r}, and vLLM packs pictures by anyres_max_{self.largest} whatever a "
                "config says: this model is served without tokenprune."
            )
        block = feature_block(config.vision_feature_layer, vision.num_hidden_layers)
        has_cls, depth = self.strategy == "default", config.text_config.num_hidden_layers
        return vit_facts(vision, block, has_cls, depth, one_size=False)

    def visuals(self, config: Any, kind: str, inputs: Mapping[str, Any]) -> list[Visual]:
        refuse_features(inputs, "image_embeds")
        sizes, pixels = inputs.get("image_sizes"), inputs.get("pixel_values")
        if sizes is None or pixels is None:
            return []
        found = []
        for (height, width), crops in zip(torch.as_tensor(sizes).tolist(), pixels):
            visual = crops_visual(config, (int(height), int(width)), len(crops), self.largest)
            if len(crops) < 1 + math.prod(mosaic_shape(config, (int(height), int(width)))):
                raise ValueError("A prompt with several pictures has one crop of each here, which is not covered.")
            found.append(visual)
        return found

    def example(self, config: Any) -> Visual:
        side = config.vision_config.image_size
        return crops_visual(config, (side, 2 * side), None, self.largest)


class InternVLFamily(Family):
    """InternVL in Hugging Face's form: tiles of one size, a pixel shuffle that joins patches."""

    no_videos = "the frames of a video stand apart in its prompts"

    def facts(self, config: Any) -> ModelFacts:
        vision = config.vision_config
        if config.vision_feature_layer not in (-1, vision.num_hidden_layers):
            raise ValueError(
                f"vision_feature_layer is {config.vision_feature_layer}, and vLLM takes what the last block leaves."
            )
        if config.vision_feature_select_strategy != "default":
            raise ValueError("vision_feature_select_strategy must be 'default': vLLM leaves [CLS] out.")
        depth = config.get_text_config().num_hidden_layers
        return vit_facts(vision, vision.num_hidden_layers - 1, True, depth, one_size=False, colours=IMAGENET)

    def visuals(self, config: Any, kind: str, inputs: Mapping[str, Any]) -> list[Visual]:
        refuse_features(inputs, "image_embeds")
        counts = inputs.get("image_num_patches", inputs.get("num_patches"))
        return [] if counts is None else [self.visual(config, int(count)) for count in counts]

    @staticmethod
    def visual(config: Any, tiles: int) -> Visual:
        """A picture of so many tiles."""
        vision = config.vision_config
        sides = zip(vision.image_size, vision.patch_size)
        rows, cols = (int(side // patch * config.downsample_ratio) for side, patch in sides)
        if tiles == 1:
            return one_raster((rows, cols))
        return Visual(tuple(Raster((rows, cols), tile * rows * cols, "crop") for tile in range(tiles)))

    def example(self, config: Any) -> Visual:
        return self.visual(config, 2)


class QwenFamily(Family):
    """Qwen2-VL and Qwen2.5-VL: pictures and videos of any size, cells of merge x merge patches, M-RoPE."""

    kinds: tuple[str, ...] = ("image", "video")
    mrope = True
    colours = CLIP

    def facts(self, config: Any) -> ModelFacts:
        vision = config.vision_config
        tower = TowerInfo(
            num_layers=vision.depth, feature_layer=vision.depth - 1, has_cls=False, num_heads=vision.num_heads,
            hidden_size=getattr(vision, "embed_dim", None) or vision.hidden_size,
            pixel_mean=self.colours[0], pixel_std=self.colours[1],
        )  # fmt: skip
        decoder = config.get_text_config().num_hidden_layers
        return ModelFacts(tower, PATCH_ONLY_SIGNALS, vision.depth, decoder, mrope=True, one_size=False)

    def visuals(self, config: Any, kind: str, inputs: Mapping[str, Any]) -> list[Visual]:
        refuse_features(inputs, f"{kind}_embeds")
        grids = inputs.get(f"{kind}_grid_thw")
        if grids is None:
            return []
        merge = config.vision_config.spatial_merge_size
        found = [self.visual(kind, int(t), int(h) // merge, int(w) // merge) for t, h, w in grids]
        if kind == "video":
            for place, (frames, *_) in enumerate(grids):
                self._check_length(int(frames), self.step(config, kind, inputs, place))
        return found

    @staticmethod
    def step(config: Any, kind: str, inputs: Mapping[str, Any], place: int) -> float:
        """Ids between the frames of a video, as vLLM's `iter_mm_grid_thw` has it."""
        if kind == "image":
            return 1.0
        seconds = inputs.get("second_per_grid_ts")
        rate = getattr(config.vision_config, "tokens_per_second", 1.0)
        return rate * (1.0 if seconds is None else float(seconds[place]))

    @staticmethod
    def _check_length(frames: int, step: float) -> None:
        last = int((frames - 1) * step)
        if last >= MOST_IDS:
            raise ValueError(
                f"A video of {frames} frames at {step:g} ids a frame ends at the 3-D id {last}; with tokenprune ids go "
                f"to {MOST_IDS - 1}. Send a shorter one, or sample more of its frames."
            )

    def visual(self, kind: str, frames: int, rows: int, cols: int) -> Visual:
        """One picture or video of so many frames."""
        name = "image" if kind == "image" else "frame"
        rasters = tuple(Raster((rows, cols), frame * rows * cols, name) for frame in range(frames))
        return Visual(rasters, kind=kind)

    def example(self, config: Any) -> Visual:
        return self.visual("image", 1, 9, 12)


class Qwen3Family(QwenFamily):
    """Qwen3-VL: as its elders, with features of several depths behind those of each token (DeepStack)."""

    kinds = ("image",)
    colours = HALF
    no_videos = "time stamps stand between the frames of a video, and how many tokens of each frame stay is not known"


FAMILIES: dict[str, Family] = {
    "InternVLForConditionalGeneration": InternVLFamily(),
    "LlavaForConditionalGeneration": LlavaFamily(),
    "LlavaNextForConditionalGeneration": CropsFamily("clip_vision_model", "default", None),
    "LlavaOnevisionForConditionalGeneration": CropsFamily(
        "siglip_vision_model", "full", 9, "its frames are pooled from four patches each, which was not built"
    ),
    "Qwen2VLForConditionalGeneration": QwenFamily(),
    "Qwen2_5_VLForConditionalGeneration": QwenFamily(),
    "Qwen3VLForConditionalGeneration": Qwen3Family(),
}
"""By vLLM's class, which has the name of Hugging Face's, what is covered."""


def family_of(config: Any) -> Family:
    """What a model is asked, by its config.

    Raises:
        ValueError: it is not covered.
    """
    names = list(getattr(config, "architectures", None) or [])
    for name in names:
        if name in FAMILIES:
            return FAMILIES[name]
    raise ValueError(
        f"tokenprune does not cover {', '.join(names) or 'this model'} inside vLLM; it covers "
        f"{', '.join(sorted(FAMILIES))}."
    )
