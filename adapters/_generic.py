"""Any image-text class that agrees with transformers on names: what a family file would say is read off the model.

`Generic` covers a class that no file in this folder covers, and is what the files of families derive from that need
little more. It finds the module that merges text and pictures, the decoder in it and the ids of placeholders; where
visuals stand, and in which grid, it reads behind the tower off the features that the model made. Nothing is taken for
granted: `tokenprune.engine.decoder_probe` tries the decoder when a method is applied, the first prompt is held against
the features, and what does not agree is refused. Signals of the tower are read where `tokenprune.engine.tower_probe`
finds out which of its patches make each token; whole cells of them leave inside it where `engine/tower_cut_probe.py`
showed that taking them out of a block is hiding them. A class whose parts have names like a Q-Former's or a perceiver's
is taken to make latents: its tower is neither read nor cut.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tokenprune.adapters._cost import first_of, generic_shape
from tokenprune.adapters._deepstack import DEEPSTACK, deepstack_kwargs
from tokenprune.adapters._grids import Grids, feature_rows, visuals_of
from tokenprune.adapters._not_applicable import why_not
from tokenprune.adapters._read_tower import UnreadTower, tower_of
from tokenprune.adapters._tower_cost import tower_and_projector
from tokenprune.cost import ModelShape
from tokenprune.interfaces.adapter import Adapter
from tokenprune.interfaces.signals import TowerInfo
from tokenprune.interfaces.visual import Visual

KINDS = ("image", "video")
_DECODERS = ("language_model", "text_model", "language_model.model", "text_model.model")
_IDS = ("{}_token_id", "{}_token_index", "{}_patch_id")
_PIXELS = {"image": ("pixel_values", "pixel_values_images"), "video": ("pixel_values_videos",)}
_OF_VIDEOS = ("pixel", "video")  # in the name of an argument of code that comes with a checkpoint
_MROPE = ("get_rope_index", "compute_3d_position_ids")
_TOWERS = ("vision_tower", "visual", "vision_model", "vision_encoder")
_MERGES = ("spatial_merge_size", "merge_kernel_size", "scale_factor", "downsample_factor")
_LATENTS = ("Perceiver", "QFormer", "Abstractor", "CrossAttention")
_MOVED = ("inputs_embeds", "attention_mask", "position_ids", *DEEPSTACK)


def vision_config(config: Any) -> Any:
    """The part of a model's config that describes its vision tower; the config itself if there is none."""
    found = (getattr(config, name, None) for name in ("vision_config", "vq_config"))
    return next((own for own in found if own is not None), config)


class Generic(Adapter):
    """A family as it is read off a loaded model.

    Raises:
        TypeError: the model has no module that merges features of pictures into the input of a decoder, or no
            placeholders for them.
    """

    behind_tower = True
    verified = False
    decoder_by_place: tuple[str, ...] = ()
    """Further arguments `[B, S, ...]` of the decoder that go by place, to be cut as its rows are."""
    decoder_is_entry: ClassVar[bool] = False
    """Whether the module that merges text and pictures is the decoder itself: `merged` says what it merges."""
    feature_names: ClassVar[dict[str, str]] = {kind: f"get_{kind}_features" for kind in KINDS}
    """By kind, the method of the merging module that makes features of pixels, or the path in it to a module that does
    when it is called."""
    id_names: tuple[str, ...] = _IDS
    """Where the config has the ids of placeholders, a part of it before a dot; `{}` stands for the kind."""
    pixel_names: ClassVar[dict[str, tuple[str, ...]]] = _PIXELS
    """By kind, the names that the argument with the pixels may have."""
    decoder_paths: tuple[str, ...] = _DECODERS
    """Where in the merging module the decoder stack may be."""

    def __init__(self, model: Any) -> None:
        if why := why_not(type(model)):
            raise TypeError(f"{type(model).__name__} has no input cuts: {why}.")
        self.model = model
        self.entry = merging_module(model, self.feature_names["image"])
        self.language_model = self.entry if self.decoder_is_entry else decoder_in(self.entry, self.decoder_paths)
        self.projector = None
        config = model.config
        parameters = {*inspect.signature(self.entry.forward).parameters, *inspect.signature(model.forward).parameters}
        ids = {kind: first_of(config, *(name.format(kind) for name in self.id_names)) for kind in KINDS}
        pixels = {kind: next((name for name in self.pixel_names[kind] if name in parameters), None) for kind in KINDS}
        found = [
            kind
            for kind in KINDS
            if isinstance(ids[kind], int) and pixels[kind] and _has(self.entry, self.feature_names[kind])
        ]
        if "image" not in found:
            raise TypeError(
                f"{type(model).__name__} has no placeholders for visual tokens (image_token_id in its config, "
                "pixel_values among its arguments), so there is nothing to prune in its decoder's rows."
                f"{self._part_that_has(model)}"
            )
        if ids["image"] == ids["video"]:
            found = ["image"]  # which placeholder is whose would be a guess
        self._not_read = {str(pixels[kind]): kind for kind in KINDS if pixels[kind] and kind not in found}
        self.features = {kind: self.feature_names[kind] for kind in found}
        self.placeholder_ids = {kind: int(ids[kind]) for kind in found}
        self.pixels = {kind: str(pixels[kind]) for kind in found}
        self.mrope = any(hasattr(self.entry, name) for name in _MROPE)
        vision = vision_config(config)
        depth = first_of(vision, "num_hidden_layers", "depth", "layers", "num_layers", default=1)
        facts = TowerInfo(
            num_layers=depth,
            feature_layer=depth - 1,
            has_cls=False,
            num_heads=first_of(vision, "num_attention_heads", "num_heads", "heads", default=1),
            hidden_size=first_of(vision, "hidden_size", "embed_dim", "width", default=1),
        )
        tower = next((getattr(self.entry, name) for name in _TOWERS if hasattr(self.entry, name)), None)
        cost, self._projector_cost = tower_and_projector(self.entry, tower, self.language_model, config)
        self.latents = mixing_module(self.entry, self.language_model)
        self.vision = UnreadTower(tower, facts, cost) if self.latents else tower_of(tower, config, facts, cost)
        added = getattr(vision, "deepstack_visual_indexes", None) or ()
        self.first_cut = max(1, len(added))

    def check_call(self, call: Mapping[str, Any]) -> None:
        named = [name for name in call if all(part in name for part in _OF_VIDEOS)]
        not_read = {} if "video" in self.features else dict.fromkeys(named, "video")
        brought = {name: kind for name, kind in {**not_read, **self._not_read}.items() if call.get(name) is not None}
        encoded = call.get("mm_encoder_outputs") or {}  # `generate` encodes before it calls
        brought |= {
            f"features of a {kind} (mm_encoder_outputs)": kind
            for kind in KINDS
            if kind not in self.features and encoded.get(kind) is not None
        }
        for what, kind in brought.items():
            raise ValueError(
                f"This call brings {what}, and {type(self.model).__name__} has no input cuts of a {kind}: which "
                f"placeholders are a {kind}'s, or which call makes its features, is not known. Remove the method "
                "for such prompts, or pass frames as pictures."
            )

    def _part_that_has(self, model: Any) -> str:
        """A sentence on the part of a model that answers in text, where it has others that speak; else ""."""
        for name, part in model.named_children():
            config = getattr(part, "config", None)
            if hasattr(part, "generate") and first_of(config, *(own.format("image") for own in self.id_names)):
                return f" Its part {name!r}, a {type(part).__name__}, has some: apply the method to model.{name}."
        return ""

    def visuals(self, kind: str, call: Mapping[str, Any]) -> list[Visual]:
        """For whoever asks without a run of the tower, as a picture of what was kept does: it is run."""
        function = getattr(*self.features_call(kind))
        takes = inspect.signature(function).parameters
        given = {name: value for name, value in call.items() if name in takes and value is not None}
        with torch.no_grad():
            named = {"return_dict": True} if {"return_dict", "kwargs"} & {*takes} else {}
            return self.visuals_behind(kind, call, function(**given, **named))

    def visuals_behind(self, kind: str, call: Mapping[str, Any], output: Any) -> list[Visual]:
        rows = self.feature_rows(output)
        lengths = [len(own) for own in rows]
        grids = None if self.latents else self._grids(kind, call, len(rows))
        return visuals_of(kind, lengths, grids, scattered=kind == "video")

    def feature_rows(self, output: Any) -> list[Tensor]:
        return feature_rows(output)

    def _grids(self, kind: str, call: Mapping[str, Any], count: int) -> Grids:
        config = self.model.config
        patch = first_of(vision_config(config), "patch_size")
        merges = (first_of(own, *_MERGES) for own in (vision_config(config), config))
        return Grids(kind, call, call[self.pixels[kind]], count, patch, next((own for own in merges if own), None))

    def pixel_rows(self, kind: str, call: Mapping[str, Any], visuals: Sequence[Visual]) -> list[Tensor]:
        pixels, sizes = call[self.pixels[kind]], call.get("image_sizes")
        if pixels.shape[0] == len(visuals) and pixels.dim() == 4 and kind == "image" and sizes is not None:
            sizes = sizes.tolist() if isinstance(sizes, Tensor) else sizes
            # without what fills up the smaller pictures of a batch
            return [own[:, : int(high), : int(wide)] for own, (high, wide) in zip(pixels, sizes)]
        if pixels.shape[0] == len(visuals):
            return list(pixels)
        patches = self._grids(kind, call, len(visuals)).patches()
        if patches is not None and sum(patches) == pixels.shape[0]:
            return list(pixels.split(patches))
        return [pixels] * len(visuals)  # not told apart: their places in the prompt are

    def per_token_kwargs(
        self, kwargs: Mapping[str, Any], rows: Callable[[Tensor], Tensor], real: Tensor
    ) -> dict[str, Any]:
        known = {name: rows(kwargs[name]) for name in self.decoder_by_place if isinstance(kwargs.get(name), Tensor)}
        shape = kwargs["inputs_embeds"].shape[:2]
        for name, value in kwargs.items():
            if name not in known and name not in _MOVED and isinstance(value, Tensor) and value.shape[:2] == shape:
                raise ValueError(
                    f"{type(self.language_model).__name__} is given {name!r} for each token, and what that means when "
                    f"tokens leave is not known of {type(self.model).__name__}: it has no input cuts. Its family needs "
                    "a file of its own (docs/guides/adding_a_family.md)."
                )
        return known | deepstack_kwargs(kwargs, rows, real)

    def cost_shape(self) -> ModelShape:
        return generic_shape(self, self._projector_cost)


def merging_module(model: Any, features: str = "get_image_features") -> nn.Module:
    """The innermost module that makes features of pixels and is called with `input_ids`."""
    found = [
        module
        for module in model.modules()
        if _has(module, features) and "input_ids" in inspect.signature(module.forward).parameters
    ]
    if not found:
        raise TypeError(
            f"{type(model).__name__} has no module that makes features of pictures ({features}) and merges "
            "them into the rows of a decoder, so no tokens can be taken out of them."
        )
    return found[-1]


def _has(module: Any, path: str) -> bool:
    """Whether there is something at a dotted path."""
    for part in path.split("."):
        module = getattr(module, part, None)
    return module is not None


def mixing_module(entry: Any, decoder: Any) -> str:
    """The class of a module outside of the decoder that makes latents which look at all of a picture; "" if there is
    none. Visual tokens have no grid then, and no patches of their own in the tower."""
    inside = set(decoder.modules())
    names = [type(module).__name__ for module in entry.modules() if module not in inside]
    return next((name for name in names if any(word in name for word in _LATENTS)), "")


def decoder_in(entry: Any, paths: Sequence[str] = _DECODERS) -> nn.Module:
    """The decoder stack inside a module that merges text and pictures: under the name that it mostly has, else the only
    one there is, whatever it is called (code that comes with a checkpoint has names of its own).

    Raises:
        TypeError: there is none with `layers` that takes `inputs_embeds`, or several.
    """
    for path in paths:
        module: Any = entry
        for part in path.split("."):
            module = getattr(module, part, None)
        if _is_stack(module):
            return module
    found = {name: module for name, module in entry.named_modules() if module is not entry and _is_stack(module)}
    if len(found) == 1:
        return next(iter(found.values()))
    several = f" but several ({', '.join(found)})" if found else ""
    raise TypeError(
        f"{type(entry).__name__} has no decoder stack with `layers` under a known name ({', '.join(paths)})"
        f"{several}, so no tokens can be taken out of its rows."
    )


def _is_stack(module: Any) -> bool:
    """Whether a module is called as decoders are; the towers that take embeddings take no position ids."""
    if not hasattr(module, "layers"):
        return False
    return {"inputs_embeds", "position_ids"} <= {*inspect.signature(module.forward).parameters}
