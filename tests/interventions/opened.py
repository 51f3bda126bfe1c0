"""Attention of any class with its matrix in the open: a function of transformers' own table takes the place of the
decoder's, so that queries and keys are as the class made them (fused, turned, shared, latent), and so is its mask.

It shares no code with the library; `open_attention.py` is the same for classes whose projections it knows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from interventions.open_attention import Row, Rule, visual_tokens
from torch import Tensor
from transformers.masking_utils import AttentionMaskInterface, eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "opened"


@contextlib.contextmanager
def opened(adapter: Any, batch: dict[str, Tensor], layers: Sequence[int], rule: Rule) -> Iterator[list[float]]:
    """Every decoder call without a cache has the attention of `rule` in `layers`, and plain attention in the others;
    yields how far sums of its rows are from 1."""
    real, visual, worst = batch["attention_mask"].bool(), visual_tokens(adapter, batch), [0.0]
    numbers = {adapter.attention(adapter.layers[layer]): layer for layer in layers}
    config = adapter.language_model.config

    def attention(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, scaling: float, **_: Any
    ):
        length, more = query.shape[2], query.shape[2] - real.shape[1]
        k, v = (part.repeat_interleave(query.shape[1] // part.shape[1], 1).double() for part in (key, value))
        result = torch.zeros(*query.shape[:3], v.shape[-1], dtype=torch.float64)
        seen = attention_mask if attention_mask.dtype == torch.bool else attention_mask > torch.finfo(query.dtype).min
        for b in range(query.shape[0]):
            own = seen[b if seen.shape[0] > 1 else 0].expand(query.shape[1], -1, -1)[0]
            attended = torch.nn.functional.pad(real[b], (0, more), value=True)
            there = attended & own.diagonal()
            logits = query[b].double() @ k[b].transpose(1, 2) * scaling
            plain = logits.masked_fill(~own, float("-inf")).softmax(-1).nan_to_num(0.0)
            layer = numbers.get(module)
            if layer is not None:
                shown = torch.nn.functional.pad(visual[b], (0, more))
                row = Row(layer, b, logits.masked_fill(~(own & there), float("-inf")), shown, there, real.shape[1])
                weights = rule(row)
                if weights is not None:
                    changed = there & ~weights.isnan().any(-1).any(0)
                    plain[:, changed] = weights[:, changed]
                    sums = (weights[:, changed].sum(-1) - 1).abs()
                    worst[0] = max(worst[0], float(sums.max()) if sums.numel() else 0.0)
            result[b] = plain @ v[b]
        assert length >= real.shape[1], "a call with a cache"
        return result.transpose(1, 2).to(query.dtype), None

    before = config._attn_implementation
    ALL_ATTENTION_FUNCTIONS[NAME] = attention
    AttentionMaskInterface._global_mapping[NAME] = eager_mask
    config._attn_implementation = NAME
    try:
        yield worst
    finally:
        config._attn_implementation = before
        ALL_ATTENTION_FUNCTIONS.pop(NAME)
        AttentionMaskInterface._global_mapping.pop(NAME)
