"""What an adapter of a model family must say. What differs between families is in the adapter's file."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from tokenprune.cost import ModelShape, tower_flops
from tokenprune.interfaces.attention_reading import AttentionReading, attention_of, mlp_of, read_attention
from tokenprune.interfaces.pruner import ModelDepths
from tokenprune.interfaces.signals import TowerInfo
from tokenprune.interfaces.visual import Pictures, TowerWork, Visual


class VisionTower:
    """The vision tower of one loaded model: where its blocks are, and how their tokens are read and thinned out.

    The tower works on pictures ("crops" of a `Visual`), each of `cells` tokens: patches, or groups of patches where the
    tower merges them into one visual token.

    Attributes:
        facts: what methods may know.
        blocks: its transformer blocks.
        signals: names of the signals that it can record.
        module: the whole tower.
        exit: the module whose output are the visual tokens of all pictures: the projector, or the merger.
        can_cut: whether tokens can leave after a block.
        can_merge: whether cells can be given other states between two blocks: those whose cells are single patches.
        can_resize: whether it takes pictures of other sizes than the processor's.
        patches_per_cell: patches that one visual token comes from.
        moments: frames that a patch spans, the slowest index of its pixels of one colour.
        restores_blocks: whether the length is restored behind each block, so that what comes behind them works on all
            cells.
    """

    facts: TowerInfo
    blocks: Sequence[Any]
    signals: tuple[str, ...] = ()
    module: Any
    exit: Any
    can_cut: bool = False
    can_merge: bool = False
    can_resize: bool = False
    patches_per_cell: int = 1
    moments: int = 1
    restores_blocks: bool = False

    @property
    def exits(self) -> Sequence[Any]:
        """All modules that make visual tokens of the tower's states: `exit`, and those for other depths."""
        return (self.exit,)

    def hook_attention(self, block: int, done: Any) -> list[Any]:
        """Hook a block so that `done(read)` is called when its attention ran.

        `read(run, pictures, count)` gives query, key and value `[m, H, T, d]` of pictures that all have `count` cells
        left; T counts patches, and a [CLS] token before them if there is one. Patches are in the tower's order,
        see `in_raster_order`. `run` is what `start` made.

        Returns:
            The removable hook handles.
        """
        raise TypeError(f"{type(self).__name__} records no signals.")

    def hook_states(self, block: int, done: Callable[[Tensor], None]) -> list[Any]:
        """Hook a block so that `done(hidden)` is called with the hidden states that it leaves, in the form in which the
        tower has them and `states` reads them.

        Returns:
            The removable hook handles.
        """

        def on_output(module: Any, args: Any, output: Any) -> None:
            done((output[0] if isinstance(output, tuple) else output).detach())

        return [self.blocks[block].register_forward_hook(on_output)]

    def start(self, grids: Sequence[tuple[int, int]]) -> Any:
        """What the other calls need to know of one run; `grids` are (rows, cols) of cells by picture."""
        return None

    def states(self, run: Any, args: Any, pictures: Sequence[int], count: int) -> Tensor:
        """Hidden states `[m, count, D]` of pictures that all have `count` cells, mean over the patches of a cell."""
        raise TypeError(f"{type(self).__name__} cannot be cut inside.")

    def drop_tokens(self, run: Any, args: Any, kwargs: Any, kept: Sequence[Tensor] | None) -> tuple[Any, Any]:
        """Arguments for a block of a run that was cut.

        Args:
            kept: for a block before which tokens leave, the cells that stay, `[k]` int64 indices into those that were
                left before, one tensor a picture; None for blocks after it, whose hidden states are short already.
        """
        raise TypeError(f"{type(self).__name__} cannot be cut inside.")

    def replace_states(self, run: Any, args: Any, kept: Sequence[Tensor], merged: Sequence[Tensor | None]) -> Any:
        """Arguments for a block with other states at cells that stay, before the others leave.

        Args:
            kept: as for `drop_tokens`.
            merged: `[k, D]` for each picture, or None where its cells keep their own.
        """
        raise TypeError(f"{type(self).__name__} cannot be given merged states.")

    def restore_length(self, run: Any, output: Tensor, alive: Sequence[Tensor]) -> Tensor:
        """Output of one of `exits` at full length: zeros where tokens left; `alive` are the cells left of each picture.
        An output that has its full length already is handed back."""
        raise TypeError(f"{type(self).__name__} cannot be cut inside.")

    def masked_attention(self, block: int) -> Any:
        """The module that is given a mask where pictures keep different numbers of cells, if that is not the block:
        `attention_mask` makes it, and it goes by that name. None if it is, or where no mask is needed."""
        return None

    def attention_mask(self, run: Any, block: int, states: Tensor) -> Tensor | None:
        """The mask for `masked_attention`; None while none is needed.

        Args:
            states: what that module is given.
        """
        return None

    def hide_keys(self, block: int, gone: Tensor, rows: int) -> list[Any]:
        """Let a block's attention be computed in the open, without the keys of some rows: what taking them out is held
        against.

        Args:
            gone: `[M, T]` or `[1, T]` bool, the rows that nothing is to see, of the states that the block is given.
            rows: how many of the others are computed, evenly over each row of states; the rest are zeros.

        Returns:
            The removable hooks; the first says in `computed` which rows were, `[M, T]` bool.
        """
        raise TypeError(f"{type(self).__name__} hides no keys.")

    def computed(self, run: Any, counts: Sequence[int]) -> list[int]:
        """Cells of each picture that are computed where so many are left: padding costs what a token costs."""
        return list(counts)

    def by_cell(self, values: Tensor) -> Tensor:
        """From `[m, patches, ...]` to `[m, cells, ...]`: the mean over each cell's patches."""
        return values

    def in_raster_order(self, run: Any, values: Tensor, pictures: Sequence[int]) -> Tensor:
        """From the order in which the tower has the cells of some pictures, `[m, cells, ...]`, to that of their
        rasters."""
        return values

    def patch_pixels(self, pixels: Tensor, pictures: int) -> Tensor:
        """`[pictures, patches, C, n]`: the n normalised pixel values of each patch and colour, in the order of patches
        that `by_cell` takes.

        Args:
            pixels: of one visual, see `Adapter.pixel_rows`.
            pictures: how many the tower gets of it.
        """
        raise TypeError(f"{type(self).__name__} cuts no pixels into patches.")

    def pixels_by_cell(self, values: Tensor, grids: Sequence[tuple[int, int]]) -> list[Tensor]:
        """`[cells, ...]` of each picture, from values `[pictures, patches, ...]` in the order of `patch_pixels`.

        Args:
            grids: (rows, cols) of cells of each picture.
        """
        return list(self.by_cell(values))

    def cell_pixels(self, pixels: Tensor, grids: Sequence[tuple[int, int]], kind: str) -> list[Tensor]:
        """`[cells, C, n]` of each picture: the normalised pixel values of each cell and colour, cells in raster order.

        Where a patch has several moments, those of an image are the same picture over again: the first is given.

        Args:
            pixels: as for `patch_pixels`.
            grids: (rows, cols) of cells of each picture that the tower gets of the visual.
            kind: "image" or "video".
        """
        patches = self.patch_pixels(pixels, len(grids))  # [m, patches, C, n]
        if kind == "image" and self.moments > 1:
            patches = patches[..., : patches.shape[-1] // self.moments]
        return list(patches.unflatten(1, (-1, self.patches_per_cell)).transpose(2, 3).flatten(3))

    def flops(self, shape: ModelShape, work: TowerWork) -> int | None:
        """Floating-point operations of one run of the tower, by the conventions of `tokenprune.cost`; None where they
        are not modelled."""
        pictures = [rows * cols * self.patches_per_cell for rows, cols in work.grids]
        return tower_flops(shape, pictures, work.blocks, work.first)

    def resize(
        self, kind: str, call: Mapping[str, Any], visuals: Sequence[Visual], grids: Sequence[tuple[int, int]]
    ) -> Mapping[str, Any]:
        """Arguments of the features call with each picture (each frame of a video) of `visuals` shrunk so that the
        tower makes a raster of `grids` tokens of it."""
        raise TypeError(f"{type(self).__name__} cannot run at another size.")


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
