"""Where keys of merged tokens are biased, with what, and what is refused because it could not be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from tokenprune.interfaces.pruner import Stage
from tokenprune.interfaces.site import first_layer
from tokenprune.state.key_bias import biased_width, joined_bias, standing_bias
from tokenprune.state.kv_cache import key_facts
from tokenprune.state.prompt_state import Prompt

_WIDEST_FLASH = 256


@dataclass
class BiasOfCall:
    """The bias of keys in one call of the decoder.

    Attributes:
        layers: by layer that ran, `[B, <= K]` fp32; layers that hold the same tokens share a tensor.
    """

    layers: dict[int, Tensor] = field(default_factory=dict)
    _standing: tuple[Tensor | None] | None = None  # of the tokens of the call, once it was asked for
    _joined: dict[tuple[int, int], Tensor | None] = field(default_factory=dict)

    def moved(self) -> None:
        """Tokens of the call left, and others stand elsewhere."""
        self._standing, self._joined = None, {}

    def of_keys(self, prompt: Prompt | None, before: Tensor | None, held: int, new: Tensor) -> Tensor | None:
        """`[B, <= held + P]` fp32: the bias of a layer's keys; None: there is none.

        Args:
            prompt: of the call.
            before: of keys that were there before the call, `held` of them.
            new: `[B, P, ...]`, of the tokens of the call as they stand.
        """
        if self._standing is None:
            self._standing = (standing_bias(prompt, new.shape[0], new.shape[1], new.device),)
        key = id(before), held
        if key not in self._joined:
            self._joined[key] = joined_bias(before, self._standing[0], held)
        return self._joined[key]


class KeyBias:
    """What biases keys on one model.

    Args:
        stages: of the method.
        config: of the decoder.
        layers: how many it has.
        kind: its attention function.

    Attributes:
        layers: decoder layers in which keys may be biased, from the first cut that merges on, and by what.

    Raises:
        ValueError: keys shall be biased, and the decoder's attention cannot do that.
    """

    def __init__(self, stages: Sequence[Stage], config: Any, layers: int, kind: str) -> None:
        self.layers: dict[int, str] = {}
        for stage in stages:
            if stage.pruner.biases_keys:
                for layer in range(first_layer(stage.site), layers):
                    self.layers.setdefault(layer, f"key_bias of {stage.pruner.name}")
        if self.layers:
            check_wider(config, kind, next(iter(self.layers.values())), "pass key_bias=False")

    def check_honoured(self, cache: Any) -> None:
        """Raise ValueError where keys of the cache are biased in layers in which the method at work biases none."""
        facts = key_facts(cache)
        if facts is not None and any(layer not in self.layers for layer in facts.bias):
            raise ValueError(
                "This cache holds merged tokens whose keys weigh as many as were merged (key_bias), and the method at "
                "work now would leave that out. Apply the method that made it, or run the prompt anew."
            )

    def check_reached(self, prompt: Prompt | None, of_call: BiasOfCall) -> None:
        """Raise RuntimeError where decoder layers ran past the function that biases keys."""
        cuts = [] if prompt is None else prompt.cuts
        first = next((cut for cut in cuts if any(sizes is not None for sizes in cut.sizes)), None)
        missed = [layer for layer in self.layers if first is not None and first_layer(first.site) <= layer]
        missed = [layer for layer in missed if layer not in of_call.layers]
        if missed:
            raise RuntimeError(
                f"Decoder layer {missed[0]} computed its attention past the function that its config names, so keys of "
                "merged tokens were not weighed there. Pass key_bias=False, or use a model whose layers look it up."
            )


def check_wider(config: Any, kind: str, who: str, instead: str) -> None:
    """Raise ValueError where heads cannot have columns whose products are a bias.

    Args:
        config: of the decoder.
        kind: its attention function.
        who: what wants them.
        instead: what the user may do.
    """
    if any(word in kind for word in ("flex", "paged")):
        raise ValueError(
            f"{who} works with SDPA, eager and flash attention, and this model was loaded with {kind!r}. Load it with "
            f"attn_implementation='sdpa', or {instead}."
        )
    if getattr(config, "attn_logit_softcapping", None):
        raise ValueError(
            f"{who} adds to attention logits, and this decoder caps them afterwards (attn_logit_softcapping="
            f"{config.attn_logit_softcapping:g}), so a key would weigh less than it shall. "
            f"{instead[0].upper()}{instead[1:]}."
        )
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if "flash" in kind and biased_width(width) > _WIDEST_FLASH:
        raise ValueError(
            f"{who} needs heads of {biased_width(width)} numbers (this decoder's have {width}), and {kind} takes at "
            f"most {_WIDEST_FLASH}. Load the model with attn_implementation='sdpa', or {instead}."
        )
