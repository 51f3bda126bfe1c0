"""What an adapter of a model family must say. What differs between families is in the adapter's file."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from tokenprune.cost import ModelShape
from tokenprune.interfaces.attention_reading import AttentionReading, attention_of, mlp_of, read_attention
from tokenprune.interfaces.pruner import ModelDepths
from tokenprune.interfaces.signals import TowerInfo
from tokenprune.interfaces.vision_tower import VisionTower
from tokenprune.interfaces.visual import Pictures, Visual


class Adapter:
    """Description of one loaded model.

    Attributes:
        classes: names of the transformers classes that the family covers.
        model: the model that the user loaded (has `generate`).
        entry: the module that is called with `input_ids` and `pixel_values` and calls the language model.
        language_model: the decoder stack, called with `inputs_embeds`.
        layers: its layers.
        placeholder_ids: by kind ("image", "video"), the id of the placeholder token.
        features: by kind, what makes visual tokens: a method of `entry`, or the path in it to a module that is called.
        pixels: by kind, the name of the argument with the pixels.
        vision: the vision tower.
        projector: the module between tower and decoder that costs are counted of; None if it is part of the tower.
        first_cut: lowest K of the site "layer:K".
        mrope: whether positions are 3-D ids of which gaps are no counts of tokens.
        behind_tower: whether visuals are laid out once the tower has run, by the features that it made
            (`visuals_behind`), rather than before it (`visuals`).
        latents: the class of a module that makes latents of whole pictures before the decoder, so that its tower is
            neither read nor cut; "" where there is none, or its file says what is a token's.
        verified: whether its classes are tested one by one; else the loaded model is tried when a method is applied.
        decoder_path, projector_path: where these modules are, from the model.
    """

    name: ClassVar[str] = ""
    classes: ClassVar[tuple[str, ...]] = ()
    features: Mapping[str, str] = {"image": "get_image_features"}
    pixels: Mapping[str, str] = {"image": "pixel_values", "video": "pixel_values_videos"}
    mrope: bool = False
    behind_tower: ClassVar[bool] = False
    latents: str = ""
    verified: ClassVar[bool] = True
    decoder_path: ClassVar[str] = "model.language_model"
    projector_path: ClassVar[str] = "model.multi_modal_projector"

    model: Any
    entry: Any
    language_model: Any
    placeholder_ids: Mapping[str, int]
    vision: VisionTower
    projector: Any
    first_cut: int = 1

    features_at_places: ClassVar[bool] = True
    """Whether what a features call returns stands at the placeholders as it is."""
    prefix_type: ClassVar[int | None] = None
    """In `token_type_ids`, the type of tokens of a prompt that see each other in both directions, text among them."""
    added_inside: ClassVar[bool] = False
    """Whether features are added to rows of visual tokens inside the decoder, by arguments that `per_token_kwargs` cuts
    and that the decoder looks at again before each layer, and the rows at its input are empty: `rows_seen` says by what
    methods choose there."""
    layer_by_place: tuple[str, ...] = ()
    """Further arguments `[B, S, ...]` of a decoder layer that go by place, to be cut as its rows are."""

    @classmethod
    def covers(cls, model: Any) -> bool:
        """Whether it covers a model of one of its classes; else the model is read as one of no family."""
        return True

    def check_call(self, call: Mapping[str, Any]) -> None:
        """Look at the arguments of a call with a prompt, whether it brings pictures or not.

        Raises:
            ValueError: some of them cannot be pruned right.
        """

    @classmethod
    def chat_template(cls, processor: Any) -> str:
        """The chat template of a checkpoint that brings none, where its processor's own prompt has a form to keep to;
        "" where it has not."""
        return ""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.entry = submodule(model, "model")
        self.language_model = submodule(model, self.decoder_path)
        self.projector = submodule(model, self.projector_path)
        self.placeholder_ids = {kind: getattr(model.config, f"{kind}_token_id") for kind in self.features}

    def features_call(self, kind: str) -> tuple[Any, str]:
        """The object that is asked for features of a kind, and the attribute of it that is called: a method of `entry`;
        `forward` where `features` leads to a module."""
        path, _, name = self.features[kind].rpartition(".")
        owner = submodule(self.entry, path) if path else self.entry
        found = getattr(owner, name)
        return (found, "forward") if isinstance(found, nn.Module) else (owner, name)

    @property
    def tower(self) -> TowerInfo:
        """Facts on the vision tower."""
        return self.vision.facts

    @property
    def head(self) -> nn.Module | None:
        """The language-model head; None if the model does not say which it is."""
        # classes with several embeddings have a head, but give none
        return self.model.get_output_embeddings() or getattr(self.model, "lm_head", None)

    @property
    def layers(self) -> Sequence[Any]:
        """The decoder's layers.

        Raises:
            ValueError: it has none where they are looked for.
        """
        layers = getattr(self.language_model, "layers", None)
        if layers is None:
            raise ValueError(
                f"The decoder {type(self.language_model).__name__} has no list of layers at `layers`, where those of "
                "Llama and its relatives have theirs, so tokens cannot be taken out of it. Use a model with another "
                "decoder."
            )
        return layers

    @property
    def depths(self) -> ModelDepths:
        """What stages can be planned for."""
        feature = self.tower.feature_layer if self.vision.can_cut else None
        one_size = self.num_tokens is not None
        return ModelDepths(
            self.tower.num_layers,
            feature,
            len(self.layers),
            self.first_cut,
            self.vision.can_resize,
            one_size,
            self.vision.can_merge,
        )

    @property
    def num_tokens(self) -> int | None:
        """Visual tokens of an image, where the family has one number for all; else None."""
        return None

    def visuals(self, kind: str, call: Mapping[str, Any]) -> list[Visual]:
        """How each image or video of a call is laid out, in tower order; `call` is the call's arguments by name.

        The one place that reads sizes off the device, and once: `pixel_rows` and `VisionTower.resize` are told them by
        the visuals."""
        raise TypeError(f"{type(self).__name__} defines no visuals().")

    def visuals_behind(self, kind: str, call: Mapping[str, Any], output: Any) -> list[Visual]:
        """The same behind the tower; `output` is what the features call returned. Asked where `behind_tower` is set."""
        return self.visuals(kind, call)

    def pictures(self, kind: str, ids: Tensor | None, places: Sequence[Tensor]) -> Pictures | None:
        """Which of a prompt's visuals make a picture, where the tower gives the tiles of pictures one by one.

        Args:
            ids: `[S]` on the CPU, the prompt; None where it came as embeddings.
            places: `[n]` int64 on the CPU, where the tokens of each visual stand in it, in order; there are some.

        Returns:
            None where each visual is a picture or a video.
        """
        return None

    def feature_rows(self, output: Any) -> list[Tensor]:
        """`[n, D]` of each visual, what the model puts at its placeholders, from the output of a features call."""
        return list(output.pooler_output)

    def pixel_rows(self, kind: str, call: Mapping[str, Any], visuals: Sequence[Visual]) -> list[Tensor]:
        """The pixels of each visual, for the seeds of random methods."""
        return list(call[self.pixels[kind]])

    def heads(self, layer: Any, hidden: Tensor, part: str) -> Tensor:
        """Query ("q") `[B, H, S, d]`, key ("k") or value ("v") `[B, Hk, S, d]`, before their rotation, that a decoder
        layer makes of hidden states `[B, S, D]` that enter it."""
        return self.reading(layer).heads(hidden, part)

    def reading(self, layer: Any) -> AttentionReading:
        """How queries, keys and values of a decoder layer are made, how they are rotated and scaled."""
        return read_attention(layer)

    def attention(self, layer: Any) -> nn.Module:
        """Attention of a decoder layer."""
        return attention_of(layer)

    def branches(self, layer: Any) -> tuple[nn.Module, nn.Module]:
        """Attention and MLP of a decoder layer: modules called with normalised states, whose output is added to the
        residual as it is."""
        return attention_of(layer), mlp_of(layer)

    def layer_kind(self, layer: int) -> str:
        """Decoder layers of one kind get the same masks and rotations; "" where all are alike."""
        kinds = getattr(self.language_model.config, "layer_types", None)
        return str(kinds[layer]) if kinds else ""

    def key_layer(self, layer: int) -> int:
        """The decoder layer whose keys and values a layer attends to: itself, but for those that reuse another's."""
        modes = getattr(self.language_model.config, "kv_sharing_modes", None)
        if not modes or modes[layer] != "reuse":
            return layer
        kind = self.layer_kind(layer)
        return max(one for one in range(layer) if modes[one] != "reuse" and self.layer_kind(one) == kind)

    def rotary(self, hidden: Tensor, position_ids: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """cos and sin `[B, S, d]` for position ids as that decoder layer gets them."""
        rotary = self.language_model.rotary_emb
        if "layer_type" in inspect.signature(rotary.forward).parameters:  # Gemma 3: each kind of layer has another base
            return rotary(hidden, position_ids, self.layer_kind(layer))
        return rotary(hidden, position_ids)

    def position_ids(self, positions: Tensor) -> Tensor:
        """Position ids as the decoder takes them, for text whose tokens stand at `positions` `[B, S]`."""
        return positions.expand(3, *positions.shape) if self.mrope else positions

    def merged(self, call: Mapping[str, Any]) -> Tensor:
        """`[B, S, D]`: the embeddings of a call with features at its placeholders, as the decoder itself would merge
        them. Asked where `entry` is `language_model`, so that rows can be cut between merging and the first layer.

        Args:
            call: the arguments, by name, `input_ids` among them.
        """
        raise TypeError(f"{type(self).__name__} defines no merged().")

    def expand_features(self, output: Any, expand: Callable[[Sequence[Tensor]], list[Tensor]]) -> None:
        """Put what a features call made of smaller pictures at full length, in place: all of its per-visual tensors."""
        output.pooler_output = expand(output.pooler_output)

    def rows_seen(self, kwargs: Mapping[str, Any], embeds: Tensor) -> Tensor:
        """`[B, S, D]`, what methods at "input" are shown of the decoder's rows.

        Args:
            kwargs: of the decoder, before pruning.
            embeds: `[B, S, D]`, the rows themselves.
        """
        return embeds

    def per_token_kwargs(
        self, kwargs: Mapping[str, Any], rows: Callable[[Tensor], Tensor], real: Tensor
    ) -> dict[str, Any]:
        """Arguments of the decoder that go by place, shortened: what is added to visual tokens inside it.

        Args:
            kwargs: of the decoder, before pruning.
            rows: moves `[B, S, ...]` to `[B, P, ...]`.
            real: `[B, P]` bool, False at padding.
        """
        return {}

    def cost_shape(self) -> ModelShape:
        """The sizes that decide what this model costs."""
        raise TypeError(f"{type(self).__name__} defines no cost_shape().")


def submodule(module: Any, path: str) -> nn.Module:
    """The submodule at a dotted path, or a ValueError that says in a sentence what is missing."""
    for part in path.split("."):
        module = getattr(module, part, None)
        if module is None:
            raise ValueError(f"The model has no submodule {path!r}; this transformers version lays it out differently.")
    return module
