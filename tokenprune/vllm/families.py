"""What is to be known of a model family before it is loaded: from its config, and from what its processor returns.

Imports no vLLM: the front end counts placeholders with it, and a worker lays out pictures.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokenprune.interfaces.signals import TowerInfo
from tokenprune.interfaces.visual import Raster, Visual, one_raster
from tokenprune.vllm.settings import ModelFacts
from tokenprune.vllm.towers import CLS_SIGNALS, PATCH_ONLY_SIGNALS

CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
"""Mean and standard deviation of the colours in the published processors."""


class Family:
    """What one of vLLM's model classes is asked.

    Attributes:
        kinds: what it prunes: "image", "video".
        mrope: whether positions are 3-D ids.
    """

    kinds: tuple[str, ...] = ("image",)
    mrope = False

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


def vit_facts(config: Any, block: int, has_cls: bool, decoder: int, one_size: bool = True) -> ModelFacts:
    """Facts of a CLIP or SigLIP tower whose block `block` makes the visual tokens: vLLM builds no later ones."""
    mean, std = CLIP if has_cls else HALF
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


class QwenFamily(Family):
    """Qwen2.5-VL: pictures and videos of any size, cells of merge x merge patches, M-RoPE."""

    kinds = ("image", "video")
    mrope = True

    def facts(self, config: Any) -> ModelFacts:
        vision = config.vision_config
        tower = TowerInfo(
            num_layers=vision.depth, feature_layer=vision.depth - 1, has_cls=False, num_heads=vision.num_heads,
            hidden_size=getattr(vision, "embed_dim", None) or vision.hidden_size, pixel_mean=CLIP[0], pixel_std=CLIP[1],
        )  # fmt: skip
        decoder = config.get_text_config().num_hidden_layers
        return ModelFacts(tower, PATCH_ONLY_SIGNALS, vision.depth, decoder, mrope=True, one_size=False)

    def visuals(self, config: Any, kind: str, inputs: Mapping[str, Any]) -> list[Visual]:
        refuse_features(inputs, f"{kind}_embeds")
        grids = inputs.get(f"{kind}_grid_thw")
        if grids is None:
            return []
        merge = config.vision_config.spatial_merge_size
        return [self.visual(kind, int(t), int(h) // merge, int(w) // merge) for t, h, w in grids]

    def visual(self, kind: str, frames: int, rows: int, cols: int) -> Visual:
        """One picture or video of so many frames."""
        name = "image" if kind == "image" else "frame"
        rasters = tuple(Raster((rows, cols), frame * rows * cols, name) for frame in range(frames))
        return Visual(rasters, kind=kind)

    def example(self, config: Any) -> Visual:
        return self.visual("image", 1, 9, 12)
