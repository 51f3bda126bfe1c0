"""Attention of chosen decoder layers with its matrix in the open, in float64, changed by a rule.

It shares no code with the library. Hooks on a full-length model read projections, rotary tables and the mask of each
layer; a rule makes other weights of the logits, and these go into the output projection.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from _tiny import prompts
from masked_reference import masked_by, relative_error
from torch import Tensor

import tokenprune
from tokenprune.seams import cache_argument, cache_in


@dataclass
class Row:
    """One sample in one layer, decoded tokens behind those of its prompt.

    Attributes:
        layer, sample: which.
        logits: `[H, S, S]` float64, scaled, -inf where a row does not see a key.
        visual: `[S]` bool, tokens of pictures, those that left among them.
        there: `[S]` bool, tokens that are there: no padding, and not taken out.
        prompt: how many places the prompt has.
    """

    layer: int
    sample: int
    logits: Tensor
    visual: Tensor
    there: Tensor
    prompt: int

    @property
    def weights(self) -> Tensor:
        """`[H, S, S]`, zero rows where a row sees nothing."""
        return self.logits.softmax(-1).nan_to_num(0.0)


Rule = Callable[[Row], Tensor | None]
"""Weights `[H, S, S]` in place of a row's own; None leaves the layer's output as it is. Rows of NaN keep theirs."""


def visual_tokens(adapter: Any, batch: dict[str, Tensor]) -> Tensor:
    """`[B, S]` bool."""
    visual = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
    for number in adapter.placeholder_ids.values():
        visual |= batch["input_ids"] == number
    return visual


@contextlib.contextmanager
def open_attention(adapter: Any, batch: dict[str, Tensor], layers: Sequence[int], rule: Rule):
    """Every decoder call has the attention of `rule` in `layers`; yields how far sums of its rows are from 1."""
    real, visual = batch["attention_mask"].bool(), visual_tokens(adapter, batch)
    handles: list[Any] = []
    taken: dict[str, Any] = {}
    worst = [0.0]

    @torch.no_grad()
    def output(layer: int, module: Any, flat: Tensor) -> Tensor:
        batch_size, length, _ = flat.shape
        cos, sin = taken["rotation"]
        width, more = module.head_dim, length - real.shape[1]

        def heads(x: Tensor, turn: bool) -> Tensor:
            x = x.reshape(batch_size, length, -1, width).double()
            if not turn:
                return x.transpose(1, 2)
            half = torch.cat([-x[..., width // 2 :], x[..., : width // 2]], -1)
            return (x * cos[:, :, None].double() + half * sin[:, :, None].double()).transpose(1, 2)

        q, k, v = (heads(taken[name], name != "v") for name in "qkv")
        k, v = (part.repeat_interleave(q.shape[1] // part.shape[1], 1) for part in (k, v))
        mask = taken["mask"]
        if mask is None:
            mask = torch.ones(1, 1, length, length, dtype=torch.bool).tril()
        mask = mask.expand(batch_size, -1, -1, -1)[:, 0]
        # what is added to logits, besides hiding keys: of keys that stand for several merged tokens
        bias = torch.zeros(()) if mask.dtype == torch.bool else mask.clamp(min=0)
        mask = mask if mask.dtype == torch.bool else mask >= 0
        bias = bias.double().expand(mask.shape)
        result = flat.reshape(batch_size, length, -1, width).transpose(1, 2).clone()
        for b in range(batch_size):
            attended = torch.nn.functional.pad(real[b], (0, more), value=True)
            there = attended & mask[b].diagonal()
            allowed = mask[b] & there  # of the rows that are there
            logits = (q[b] @ k[b].transpose(1, 2) * module.scaling + bias[b]).masked_fill(~allowed, float("-inf"))
            row = Row(layer, b, logits, torch.nn.functional.pad(visual[b], (0, more)), there, real.shape[1])
            weights = rule(row)
            if weights is None:
                continue
            changed = there & ~weights.isnan().any(-1).any(0)
            assert bool((weights[:, changed] >= 0).all())
            worst[0] = max(worst[0], float((weights[:, changed].sum(-1) - 1).abs().max()) if changed.any() else 0.0)
            result[b][:, changed] = (weights[:, changed] @ v[b]).to(result.dtype)
        return result.transpose(1, 2).reshape(flat.shape)

    def before(module: Any, args: Any, kwargs: Any) -> None:
        taken["rotation"], taken["mask"] = kwargs["position_embeddings"], kwargs.get("attention_mask")

    try:
        for layer in layers:
            attn = adapter.layers[layer].self_attn
            handles.append(attn.register_forward_pre_hook(before, with_kwargs=True))
            for name in "qkv":
                own = getattr(attn, f"{name}_norm", None) or getattr(attn, f"{name}_proj")
                handles.append(own.register_forward_hook(lambda m, a, out, name=name: taken.__setitem__(name, out)))
            handles.append(
                attn.o_proj.register_forward_pre_hook(
                    lambda m, a, attn=attn, layer=layer: (output(layer, attn, a[0]), *a[1:])
                )
            )
        yield worst
    finally:
        for handle in handles:
            handle.remove()


def generated(found: Any, batch: dict[str, Tensor], tokens: int = 3) -> Tensor:
    """Logits `[T, B, V]` of so many greedy tokens."""
    with torch.no_grad():
        out = found.generate(
            **batch, max_new_tokens=tokens, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
    return torch.stack(out.logits)


@dataclass
class Turns:
    """A conversation of two turns, of two rows with 1 and 2 images in the first.

    Attributes:
        adapter: of the model that ran it.
        whole: the conversation as one prompt.
        kept: visual tokens that stayed, by row and image.
        tokens: `[B, T]` that were decoded behind it, and their logits `[B, T, V]`.
        first: places of the first turn.
    """

    adapter: Any
    whole: dict[str, Tensor]
    kept: list[list[Tensor]]
    tokens: Tensor
    logits: Tensor
    first: int


def two_turns(
    found: Any,
    method: Any,
    images: int,
    tokens: int = 3,
    between: Callable[[Any, dict[str, Tensor]], None] | None = None,
) -> Turns:
    """Run two turns, with so many images in each row of the second; `between` is given the cache of the first turn and
    what the second will be."""
    first, second = prompts([1, 2]), prompts([images, images], seed=9)
    both = {name: torch.cat([first[name], second[name]], 1) for name in ("input_ids", "attention_mask")}
    pixels = {"pixel_values": second["pixel_values"]} if images else {}
    length = first["input_ids"].shape[1]
    with tokenprune.applied(found, method) as handle, torch.no_grad():
        mask = first["attention_mask"]
        cache = cache_in(found(**first, position_ids=(mask.cumsum(1) - 1).clamp(min=0)))
        kept = handle.kept
        if between is not None:
            between(cache, second)
        out = found.generate(
            input_ids=both["input_ids"], attention_mask=both["attention_mask"], **cache_argument(cache), **pixels,
            max_new_tokens=tokens, do_sample=False, output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
        if images:
            kept = [old + new for old, new in zip(kept, handle.kept)]
        adapter = handle.adapter
    values = [first["pixel_values"][:1], first["pixel_values"][1:]]
    if images:
        values = [values[0], second["pixel_values"][:1], values[1], second["pixel_values"][1:]]
    whole = {**both, "pixel_values": torch.cat(values)}
    decoded = out.sequences[:, both["input_ids"].shape[1] :]
    return Turns(adapter, whole, kept, decoded, torch.stack(out.logits, 1), length)


def second_turn(found: Any, method: Any, images: int, layers: Sequence[int], rule: Rule, tolerance: float) -> None:
    """Compare a second turn, with so many images in each of two rows, with the whole conversation at once."""
    turns = two_turns(found, method, images)
    with open_attention(turns.adapter, turns.whole, layers, rule):
        scores = masked_by(turns.adapter, turns.whole, turns.kept, "compact").continuation(turns.tokens)
    assert relative_error(turns.logits, scores) < tolerance
