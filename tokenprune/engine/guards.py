"""Uses of a wrapped model that could only go wrong: each is refused here, with a sentence, before it can."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Collection, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor

from tokenprune.engine.whole_masks import RECURRENT
from tokenprune.hooks import Ledger, opaque
from tokenprune.interfaces.adapter import Adapter
from tokenprune.interfaces.capability import INPUT_CUTS
from tokenprune.interfaces.pruner import Stage
from tokenprune.interfaces.signals import DECODER_SIGNALS
from tokenprune.state.call_inputs import CallInputs
from tokenprune.state.kv_cache import PrunedPrompt
from tokenprune.state.prompt_layout import Layout
from tokenprune.state.prompt_state import Prompt
from tokenprune.wrappers import runs_again

_PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx")  # where samples of a packed row begin


def _refuse_copies(label: str) -> Any:
    """What stands on a wrapped model in place of its copying and pickling: a copy would call the original's methods,
    for ever."""

    def refuse(*args: Any) -> NoReturn:
        raise TypeError(
            f"{label} is at work on this model object, and a copy or a pickle of it would not work alike. Call the "
            "handle's remove() first, or save its weights with save_pretrained() or state_dict()."
        )

    return refuse


class Guards:
    """Watches the calls of one model.

    Args:
        adapter: the model's family.
        label: the method, for messages.
        cuts_layers: whether a stage cuts inside the tower or the decoder.
        changes_attention: whether an intervention is at work.
    """

    def __init__(self, adapter: Adapter, label: str, cuts_layers: bool, changes_attention: bool) -> None:
        self._adapter, self._label = adapter, label
        self._cuts_layers, self._changes_attention = cuts_layers, changes_attention
        self._run_again = False  # whether checkpoint wrappers run a block a second time

    def install(self, ledger: Ledger) -> None:
        """Place the hooks; `ledger` takes them away."""
        model = self._adapter.model
        for module in (model, self._adapter.entry, self._adapter.language_model):
            for name in ("__deepcopy__", "__reduce_ex__"):
                ledger.set(module, name, _refuse_copies(self._label))
        blocks = (*self._adapter.layers, *self._adapter.vision.blocks) if self._cuts_layers else ()
        self._run_again = any(runs_again(model, block) for block in blocks)
        ledger.hook(model.register_forward_pre_hook(opaque(self._check), with_kwargs=True))

    def _check(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        wanted = kwargs.get("output_attentions")
        config = self._adapter.language_model.config
        if self._changes_attention and (getattr(config, "output_attentions", False) if wanted is None else wanted):
            raise ValueError(
                f"output_attentions=True wants the attention matrix of every layer, and {self._label} forms none where "
                "it acts. Leave it out, remove the intervention, or pass key_bias=False to a method that merges."
            )
        if self._cuts_layers and module.training:
            self._check_checkpointing()

    def _check_checkpointing(self) -> None:
        again = self._run_again and torch.is_grad_enabled()
        for block in (*self._adapter.layers, *self._adapter.vision.blocks):
            again |= (
                block.training and getattr(block, "gradient_checkpointing", False) and _runs_hooks_again(type(block))
            )
        if again:
            raise ValueError(
                f"{self._label} cuts before a layer that gradient checkpointing runs a second time, with its hooks, "
                "after the prompt is forgotten. Switch gradient checkpointing off, put checkpoint wrappers around "
                "single layers, cut at 'input', or use a transformers release that keeps hooks outside of it (5.23 "
                "does)."
            )


def _runs_hooks_again(block: type) -> bool:
    """Whether a layer's class checkpoints its call, hooks included, and not its forward alone."""
    return any(
        "gradient_checkpointing" in inspect.getsource(cls.__call__)
        for cls in block.__mro__
        if "__call__" in vars(cls) and cls.__module__.startswith("transformers")
    )


# --- what a call brings -----------------------------------------------------------------------------------------------


def check_replica(module: Any, adapter: Adapter) -> None:
    """Raise RuntimeError where another module than the adapter's own is called with its hooks."""
    if module is not adapter.entry:
        raise RuntimeError(
            "A replica of the wrapped model was called (DataParallel makes them), and the method is at work on the "
            "original. Use DistributedDataParallel, one process a device, and apply the method in each."
        )


def check_cache(inputs: CallInputs) -> None:
    """Raise ValueError where the cache cannot hold a pruned prompt."""
    if getattr(inputs.cache, "is_compileable", False):
        raise ValueError(
            "A static cache has one fixed length for all layers and rows, so it cannot hold a pruned prompt, and its "
            "keys cannot be kept track of. Use the default dynamic cache (leave cache_implementation and the cache "
            "alone)."
        )


def in_pages(inputs: CallInputs, prompt: Prompt | None, changes: str) -> bool:
    """Whether a call of text alone has the cache of continuous batching, so that nothing of it is to be changed.

    Args:
        inputs: what the decoder was given.
        prompt: of this call; None without pictures.
        changes: what acts on text as well; "" if nothing.

    Raises:
        ValueError: it is not text alone, or something acts on it.
    """
    if inputs.cache is None or hasattr(inputs.cache, "get_seq_length"):
        return False
    if prompt is None and not changes:
        return True
    raise ValueError(
        f"Continuous batching (generate_batch, cache_implementation='paged') lays several prompts in one row and their "
        f"keys in pages ({type(inputs.cache).__name__}), so {changes or 'a method'} cannot tell which are whose. Call "
        "generate() instead, or remove the method first."
    )


def check_drafts(adapter: Adapter, call: Mapping[str, Any], drafted: int) -> None:
    """Raise ValueError where the prompt of a call would see what a draft proposed.

    Args:
        adapter: the model's family.
        call: arguments, by name.
        drafted: tokens at the end of each row that are not the prompt's.
    """
    types = call.get("token_type_ids")
    if adapter.prefix_type is None or not drafted or not isinstance(types, Tensor):
        return
    if bool((types[:, -drafted:] == adapter.prefix_type).any()):
        raise ValueError(
            f"All of a prompt of {type(adapter.model).__name__} sees itself in both directions, and generate gave the "
            f"{drafted} tokens that a draft proposed the type of the prompt: it would see them, and its answers would "
            "not be those without drafts, pruned or not. Generate without assistant_model and prompt_lookup_num_tokens."
        )


def warn_of_features(inputs: CallInputs) -> None:
    """Warn where a prompt may hold pictures that nobody says are there."""
    if inputs.ids is None and inputs.length > 1 and inputs.past == 0:
        warnings.warn(
            "This prompt came as inputs_embeds without pixels. If it holds visual features already, they run unpruned: "
            "which embeddings they are cannot be seen. Pass pixel_values (and input_ids, or inputs_embeds with the "
            "placeholders' own embeddings) and let the model put the features in.",
            stacklevel=3,
        )


def check_emptied(inputs: CallInputs) -> None:
    """Raise ValueError where a prompt given as embeddings, without pixels, holds features of a picture of which tokens
    left inside the tower: zeros stand there, and a model that merges by itself would take them for tokens."""
    if inputs.ids is not None or inputs.embeds is None or inputs.length <= 1 or inputs.past:
        return
    empty = (inputs.embeds == 0).all(-1)  # [B, S]
    attended = inputs.attended(empty.device)
    count = int((empty if attended is None else empty & attended).sum())
    if count:
        raise ValueError(
            f"This prompt came as inputs_embeds without pixels, and {count} of its rows are zeros: features that were "
            "made while the method takes tokens out before or inside the vision tower have zeros where tokens left, "
            "and the model would attend to those. Pass pixel_values, or what get_image_features returned as "
            "mm_encoder_outputs={'image': ...}, or make the features before the method is applied."
        )


def check_packed(
    call: Mapping[str, Any], attended: Tensor | None, mask: Tensor | None, positions: Tensor | None
) -> None:
    """Raise ValueError where one row holds several samples.

    Args:
        call: arguments, by name.
        attended: `[B, S]` bool on the CPU, False at padding; None: there is none.
        mask: `[B, S]` on the CPU, as given.
        positions: `[B, S]` on the CPU, positions in the text.
    """
    how = next((name for name in _PACKED if call.get(name) is not None), "")
    if not how and mask is not None and int(mask.max()) > 1:
        how = "an attention_mask that numbers samples"
    if not how and positions is not None:
        backwards = positions.diff(dim=1) < 0  # [B, S - 1]
        if attended is not None:
            backwards &= attended[:, 1:] & attended[:, :-1]
        how = "position_ids that go back" if bool(backwards.any()) else ""
    if how:
        raise ValueError(
            f"A row of this batch holds several samples ({how}): a method would rank the pictures of one by the text "
            "of another, and the boundaries would move. Give each sample its own row (packing=False, "
            "padding_free=False), or remove the method for packed training."
        )


def check_attended(layout: Layout, attended: Tensor | None) -> None:
    """Raise ValueError where the mask `[B, S]` hides visual tokens."""
    for span in layout.spans if attended is not None else ():
        hidden = int((~attended[span.sample, span.places]).sum())  # type: ignore[index]
        if hidden:
            raise ValueError(
                f"The attention mask hides {hidden} of the {len(span.places)} visual tokens of a picture in row "
                f"{span.sample}; a method would choose among tokens that nothing attends to. Mask padding only, or "
                "leave the picture out of the prompt."
            )


def check_repeated(prompt: Prompt, kinds: Collection[str]) -> None:
    """Raise ValueError where a row is given one picture twice, in place of another.

    Args:
        kinds: of visuals that were encoded before, those whose features come in a tensor each.
    """
    seen: set[tuple[int, int, int]] = set()
    for span, (recording, row) in zip(prompt.layout.spans, prompt.sources):
        own = (span.sample, id(recording), row)
        if span.visual.kind in kinds and own in seen:
            raise ValueError(
                f"Row {span.sample} of this call is given the same {span.visual.kind} at two of its places: "
                "transformers repeated the pictures of a prompt one by one for beams or several answers, not the "
                "prompt's all together. Generate with one picture a prompt, or with one answer and without beams."
            )
        seen.add(own)


def check_features(adapter: Adapter, prompt: Prompt, embeds: Tensor) -> None:
    """Raise ValueError where the features that a model made are not what it put at its placeholders.

    Args:
        adapter: the model's family.
        prompt: laid out behind the tower.
        embeds: `[B, S, D]` that the decoder is given.
    """
    same, apart = [], 0.0
    for span, (recording, row) in zip(prompt.layout.spans, prompt.sources):
        if not recording.features:
            continue
        made = recording.features[row].detach().to(embeds)  # [P, D]
        there = embeds.detach()[span.sample, span.places.to(embeds.device)]
        same.append((there - made).float().norm() / made.float().norm().clamp(min=1e-12))
    if same:
        apart = float(torch.stack(same).max())  # one read for all
    if not apart < 1e-2:
        raise ValueError(
            f"What {type(adapter.entry).__name__} puts at the placeholders of pictures differs by {apart:.1e} from the "
            f"features that it makes of them, so which are whose is not known: {type(adapter.model).__name__} has no "
            f"{INPUT_CUTS}. Its family needs a file of its own (docs/guides/adding_a_family.md)."
        )


def check_added_inside(adapter: Adapter, stage: Stage | None) -> None:
    """Raise ValueError where a stage at "input" changes or reads rows whose features are added inside the decoder."""
    if not adapter.added_inside or stage is None:
        return
    if stage.pruner.is_merging:
        does = f"{stage.pruner.name} puts merged tokens there"
    elif any(signal.name in DECODER_SIGNALS for signal in stage.signals(adapter.tower)):
        does = f"{stage.pruner.name} reads what the first layer would make of them"
    else:
        return
    raise ValueError(
        f"{type(adapter.language_model).__name__} adds the features of pictures layer by layer, their rows are empty "
        f"at its input, and {does}. Use a method that only drops tokens there (random, divprune), or one that cuts "
        "at a layer (fastv)."
    )


# --- what the decoder is given ----------------------------------------------------------------------------------------


def check_mask(inputs: CallInputs) -> None:
    """Raise ValueError where the decoder's mask cannot be cut as the rows are."""
    mask, length = inputs.mask, inputs.past + inputs.length
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"A pruned prompt needs the 2-D attention mask [B, tokens], got {shape}; its 4-D form is made after the "
            "pruning. Static caches, which make it earlier, cannot hold a pruned prompt."
        )
    if mask.shape[1] != length:
        raise ValueError(
            f"The attention mask covers {mask.shape[1]} tokens, but the cache and the new input together have "
            f"{length}. Count every token that the model was given, pruned ones included."
        )


def check_places(config: Any, inputs: CallInputs, made: Any) -> None:
    """Raise ValueError where a decoder counts places of the shortened rows, or says with no mask that all see all.

    Args:
        config: the decoder's.
        inputs: what it was given.
        made: masks that the merging module made; None if it made none.
    """
    scale, length = getattr(config, "floor_scale", None), inputs.past + inputs.length
    if getattr(config, "attn_temperature_tuning", False) and scale is not None and length > scale:
        raise ValueError(
            f"This decoder scales attention by a token's place in the row from {scale} tokens on, and the prompt with "
            f"its answer has {length}: tokens behind those that leave would move to other places. Keep prompts shorter."
        )
    if (
        made is None
        and inputs.mask is None
        and inputs.length > 1
        and getattr(config, "use_bidirectional_attention", None)
    ):
        raise ValueError(
            "In this decoder pictures see themselves in both directions, and this call does not say which tokens are "
            "pictures. Pass the token_type_ids and the attention_mask that the model's processor gives."
        )


def check_rotation(config: Any, inputs: CallInputs, before: PrunedPrompt) -> None:
    """Raise ValueError where new tokens pass the position from which a decoder turns all of a row otherwise (longrope),
    and its cache holds keys that were turned before.

    Args:
        config: the decoder's.
        inputs: what it was given.
        before: the pruned prompt that its cache holds.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    limit = rope.get("original_max_position_embeddings") if rope.get("rope_type") == "longrope" else None
    if limit is None or inputs.past + inputs.length <= limit:
        return
    places = inputs.text_positions
    places = torch.arange(inputs.past, inputs.past + inputs.length)[None] if places is None else places  # [B, S]
    for segment in before.segments:
        closed = places - segment.shift.to(places.device)[:, None]
        first, last = torch.stack([closed[:, 0].max(), closed.max()]).tolist()
        if bool(segment.shift.any()) and first <= limit <= last:
            raise ValueError(
                f"From position {limit} on, a decoder with {type(config).__name__} turns queries and keys by other "
                "factors (longrope). The positions of a pruned prompt are closed up, so its answer gets there while "
                "the cache holds keys that were turned by the first ones. Pass positions='keep', or ask for a shorter "
                "answer."
            )


def check_right_padding(config: Any, inputs: CallInputs, pad_left: bool, generating: bool) -> None:
    """Raise ValueError where padding on the right would pass by a state before the answer does.

    Args:
        config: the decoder's.
        inputs: what it was given.
        pad_left: whether padding stands on the left, or nowhere.
        generating: whether `generate` goes on from the prompt.
    """
    kinds = [kind for kind in getattr(config, "layer_types", None) or () if kind in RECURRENT]
    if kinds and not pad_left and generating and inputs.cache is not None:
        raise ValueError(
            f"This decoder has layers of the kind {kinds[0]}, whose state runs over padding on the right before the "
            "answer begins. Pad on the left (tokenizer.padding_side = 'left')."
        )


def check_padding_between(config: Any, past: int, padded: bool) -> None:
    """Raise ValueError where padding would pass by a state that earlier turns left behind.

    Args:
        config: the decoder's.
        past: tokens of earlier turns.
        padded: whether rows were shortened to different lengths.
    """
    kinds = [kind for kind in getattr(config, "layer_types", None) or () if kind in RECURRENT]
    if kinds and past and padded:
        raise ValueError(
            f"This decoder has layers of the kind {kinds[0]}, whose state would run over padding between two turns, as "
            "rows of this batch lose different numbers of tokens. Prune later turns one row at a time."
        )


def check_cached_keys(keys: Tensor, length: int, layer: int, cache: Any) -> None:
    """Raise ValueError where a layer's cache does not hold the `length` keys of earlier turns as they were."""
    if keys.dim() != 4 or keys.shape[2] != length:
        raise ValueError(
            f"A stage here looks at the attention of decoder layer {layer} to earlier turns, and this cache "
            f"({type(cache.layers[layer]).__name__}) does not hold their keys as they were. Use the default cache, or "
            "a method that cuts at 'input'."
        )
