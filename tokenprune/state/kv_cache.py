"""Bookkeeping that travels with the KV cache: the map of a pruned prompt, and what is known of its keys.

A pruned cache holds fewer keys than its prompt had tokens. `generate` counts prompt tokens (logical length),
attention counts keys (physical length). The cache object that generation made becomes a subclass of its own class that
answers each question with the right one of the two, and carries the map between them through beam reordering,
cropping, batch repetition and `copy.deepcopy`. What an intervention noted on keys goes the same way.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from tokenprune.state.policy_state import PolicyState


@dataclass(frozen=True)
class Segment:
    """The keys of consecutive decoder layers that hold the same tokens.

    The first `slots.shape[1]` keys are described by `slots`; every later key is one later token, in order.

    Attributes:
        first_layer: lowest layer of the segment; it ends where the next one begins.
        slots: `[B, P]` int64, logical index of each physical key, -1 where the key is padding.
        shift: `[B]` int64, what the positions of later tokens shrink by in these layers: visual tokens that left under
            the "compact" policy.
        padded: whether any slot is -1.
        moved: whether the shift differs from that of layer 0.
    """

    first_layer: int
    slots: Tensor
    shift: Tensor
    padded: bool
    moved: bool = False

    def rows(self, index: Tensor) -> Segment:
        """The same for the rows in `index`, in that order."""
        index = index.to(self.slots.device)
        return replace(self, slots=self.slots[index], shift=self.shift[index])

    def mask(self, mask: Tensor | None, length: int, past: int) -> Tensor | None:
        """Physical mask of the keys that these layers hold.

        Args:
            mask: `[B, >= past]` logical 2-D mask (1 = attend), or None for all ones.
            length: logical tokens that `slots` stands for.
            past: logical tokens in the cache.

        Returns:
            `[B, P + past - length]` of the same dtype, or None where nothing is hidden.
        """
        if mask is None:
            if not self.padded:
                return None
            mask = torch.ones(self.slots.shape[0], past, dtype=torch.int64, device=self.slots.device)
        slots = self.slots.to(mask.device)
        prompt = mask.gather(1, slots.clamp(min=0)).masked_fill(slots < 0, 0)
        return torch.cat([prompt, mask[:, length:past]], dim=1)


@dataclass(frozen=True)
class PrunedPrompt:
    """How the physical keys of a cache map to the logical tokens of its prompt.

    Attributes:
        segments: by first layer; the first one begins at layer 0.
        length: L, logical tokens that the slots stand for.
    """

    segments: tuple[Segment, ...]
    length: int

    def segment(self, layer: int) -> Segment:
        """The segment of a decoder layer."""
        return next(segment for segment in reversed(self.segments) if segment.first_layer <= layer)

    def hidden(self, layer: int = 0) -> int:
        """Logical minus physical length in a layer: the same at all times after the prompt."""
        return self.length - self.segment(layer).slots.shape[1]

    def rows(self, index: Tensor) -> PrunedPrompt:
        """The same for the rows in `index`, in that order."""
        return replace(self, segments=tuple(segment.rows(index) for segment in self.segments))


@dataclass(frozen=True)
class LayerFacts:
    """What an intervention noted on the keys of one layer.

    Attributes:
        values: by name, `[B, P]`, of the first P physical keys; later keys are later tokens.
        applies: `[B]` bool, samples whose attention is changed in this layer.
        some, every: whether it is changed in any and in every sample, known on the host; `some` may be too cautious.
        made: what was made of `values` alone, to be made once for all tokens to come; a changed copy begins with none.
    """

    values: Mapping[str, Tensor]
    applies: Tensor
    some: bool = True
    every: bool = False
    made: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def rows(self, index: Tensor) -> LayerFacts:
        """The same for the rows in `index`, in that order."""
        index = index.to(self.applies.device)
        return replace(self, values={name: v[index] for name, v in self.values.items()}, applies=self.applies[index])


@dataclass(frozen=True)
class KeyAnnotations:
    """What interventions noted on the keys of a cache.

    Attributes:
        layers: by decoder layer, those in which interventions act.
        visual: `[B]` bool, whether a row has had a visual token.
        bias: by decoder layer, `[B, P]` fp32, what is added to the logits of the first P physical keys because they
            stand for several tokens; layers that hold the same tokens share a tensor.
    """

    layers: Mapping[int, LayerFacts]
    visual: Tensor
    bias: Mapping[int, Tensor] = field(default_factory=dict)

    def rows(self, index: Tensor) -> KeyAnnotations:
        """The same for the rows in `index`, in that order."""
        layers = {layer: facts.rows(index) for layer, facts in self.layers.items()}
        moved = {id(bias): bias[index.to(bias.device)] for bias in self.bias.values()}
        bias = {layer: moved[id(bias)] for layer, bias in self.bias.items()}
        return KeyAnnotations(layers, self.visual[index.to(self.visual.device)], bias)

    def cropped(self, lengths: Mapping[int, int]) -> KeyAnnotations:
        """The same where layers hold so many keys only."""
        layers = {
            layer: replace(facts, values={name: values[:, : lengths[layer]] for name, values in facts.values.items()})
            for layer, facts in self.layers.items()
        }
        bias = {layer: bias[:, : lengths[layer]] for layer, bias in self.bias.items()}
        return replace(self, layers=layers, bias=bias)


class PrunedCacheMixin:
    """Overrides of a transformers `Cache` whose prompt was pruned, or on whose keys facts were noted."""

    tokenprune: PrunedPrompt | None = None
    tokenprune_facts: KeyAnnotations | None = None
    tokenprune_policy: PolicyState | None = None
    tokenprune_active: bool = False
    """Whether a model that knows of the pruning is at work on it."""
    tokenprune_whole: bool = False
    """Whether masks are made for whole rows now, which are cut afterwards."""
    layers: list[Any]

    def get_mask_sizes(self, *args: Any, **kwargs: Any) -> Any:
        """As the stock class; a model asks once a call, so it is here that one which does not know is stopped.

        Raises:
            RuntimeError: the prompt was pruned, and the model that goes on has no method applied.
        """
        if self.tokenprune is not None and not self.tokenprune_active:
            raise RuntimeError(
                "This cache holds a pruned prompt, and the model that goes on from it has no method applied, so masks "
                "and positions would be wrong. Apply the method again, or run the prompt anew."
            )
        if self.tokenprune_whole:
            queries, layer = (*args, *kwargs.values())[:2]  # both are numbers; older releases name them otherwise
            return self.get_seq_length(layer) + queries, 0
        return super().get_mask_sizes(*args, **kwargs)  # type: ignore[misc]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Logical length: tokens that the model was given, pruned ones included."""
        layer = self._with_keys(layer_idx)
        hidden = 0 if self.tokenprune is None else self.tokenprune.hidden(layer)
        return self.layers[layer].get_seq_length() + hidden

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Physical length: keys that a layer was given, which is what its mask is made for; the logical one while masks
        are made for whole rows."""
        if self.tokenprune_whole:
            return self.get_seq_length(layer_idx)
        return self.layers[self._with_keys(layer_idx)].get_seq_length()

    def _with_keys(self, layer_idx: int) -> int:
        """The layer itself, or the first that has keys: states of linear attention have no length."""
        if hasattr(self.layers[layer_idx], "get_seq_length"):
            return layer_idx
        return next(index for index, layer in enumerate(self.layers) if hasattr(layer, "get_seq_length"))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self._take(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)  # type: ignore[misc]
        self._take(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        rows = torch.arange(self.layers[self._with_keys(0)].keys.shape[0])
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        self._take(rows.repeat_interleave(repeats))

    def _take(self, index: Tensor) -> None:
        if self.tokenprune is not None:
            self.tokenprune = self.tokenprune.rows(index)
        if self.tokenprune_facts is not None:
            self.tokenprune_facts = self.tokenprune_facts.rows(index)
        if self.tokenprune_policy is not None:
            self.tokenprune_policy = self.tokenprune_policy.rows(index)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens (negative: that many; positive: down to that logical length).

        Raises:
            ValueError: the cut would reach a place of the prompt where the rows of the batch no longer line up with it:
                a pruned picture or padding; or a cache policy has let go of keys by what later tokens looked at.
        """
        if self.tokenprune_policy is not None:
            raise ValueError(
                f"{self.tokenprune_policy.name} has thinned this cache by what its last tokens looked at, so they "
                "cannot be taken back. Decode without drafts (no assistant_model, no prompt_lookup_num_tokens)."
            )
        prompt, logical = self.tokenprune, self.get_seq_length()
        removed = -tokens_to_remove if tokens_to_remove <= 0 else max(logical - tokens_to_remove, 0)
        inside = 0 if prompt is None else removed - (logical - prompt.length)
        if prompt is not None and inside > 0:
            # assisted decoding runs prompt and first candidates in one call, and crops the rejected ones
            tail = torch.arange(prompt.length - inside, prompt.length)
            held = min(segment.slots.shape[1] for segment in prompt.segments)
            ends = [segment.slots[:, -inside:] for segment in prompt.segments]
            if inside > held or not bool((torch.stack(ends) == tail.to(ends[0].device)).all()):
                raise ValueError(
                    f"Cannot crop {removed} tokens: that reaches into pictures or padding of the pruned prompt, of "
                    f"{prompt.length} tokens. Run the prompt again instead."
                )
            shorter = tuple(replace(segment, slots=segment.slots[:, :-inside]) for segment in prompt.segments)
            self.tokenprune = PrunedPrompt(shorter, prompt.length - inside)
        super().crop(-removed)  # type: ignore[misc]
        if self.tokenprune_facts is not None:
            facts = self.tokenprune_facts
            lengths = {layer: self.get_query_offset(layer) for layer in {*facts.layers, *facts.bias}}
            self.tokenprune_facts = self.tokenprune_facts.cropped(lengths)

    def __reduce__(self) -> Any:
        # this class has no name that a pickle could find
        return _revived, (type(self).__mro__[2],), dict(vars(self))

    def reset(self) -> None:
        """Empty the cache; it is an ordinary one again."""
        super().reset()  # type: ignore[misc]
        self.__class__ = type(self).__mro__[2]
        for name in ("tokenprune", "tokenprune_facts", "tokenprune_policy", "tokenprune_active", "tokenprune_whole"):
            vars(self).pop(name, None)


def pruned_prompt(cache: Any) -> PrunedPrompt | None:
    """The bookkeeping of `cache`, or None if its prompt was not pruned."""
    return getattr(cache, "tokenprune", None)


def key_facts(cache: Any) -> KeyAnnotations | None:
    """What interventions noted on the keys of `cache`, or None."""
    return getattr(cache, "tokenprune_facts", None)


_subclasses: dict[type, type] = {}


def mark_pruned(cache: Any, prompt: PrunedPrompt) -> None:
    """Make `cache` carry `prompt`. The object stays the same; its class becomes a subclass of what it was."""
    _subclass(cache)
    cache.tokenprune = prompt


def mark_facts(cache: Any, facts: KeyAnnotations) -> None:
    """Make `cache` carry `facts`, in the same way."""
    _subclass(cache)
    cache.tokenprune_facts = facts


def _revived(cls: type) -> Any:
    """An empty cache of this stock class that can carry our bookkeeping; a pickle fills it."""
    cache = object.__new__(cls)
    _subclass(cache)
    return cache


def _subclass(cache: Any) -> None:
    cls = type(cache)
    if not issubclass(cls, PrunedCacheMixin):
        if cls not in _subclasses:
            _subclasses[cls] = type(f"Pruned{cls.__name__}", (PrunedCacheMixin, cls), {})
        cache.__class__ = _subclasses[cls]
