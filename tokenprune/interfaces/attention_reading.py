"""How query, key and value of a decoder layer are read off the loaded module, whatever decoder a family was built with.

What is known here are the names in which transformers' decoders agree: of projections (one each, or one for all three),
of norms before and after them, and the rotary function in the decoder's modeling file. A layer that follows none of
them is refused with a sentence; whether a reading is right in numbers is for `tokenprune.engine.layer_check` to find
out.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_ATTENTION = ("self_attn", "attention", "self_attention")
_MLP = ("mlp", "block_sparse_moe", "feed_forward")
_INPUT_NORM = ("input_layernorm", "attention_layernorm")
_HEAD_NORMS = ("{}_norm", "{}_layernorm")
_OUTPUT = ("o_proj", "dense", "out_proj")
_HEAD_WIDTH = ("head_dim", "head_size")
_BLOCKS = ("qkv_proj", "W_pack")  # queries of all heads, then keys, then values: Phi-3, Baichuan
_BY_HEAD = ("query_key_value",)  # query, key and value of each head in turn: GPT-NeoX, Persimmon
_UNREAD = {
    "attn_logit_softcapping": "caps its attention logits",
    "clip_qkv": "clips its queries, keys and values",
    "sinks": "has attention sinks of its own",
}
_PARTS = ("q", "k", "v")


@dataclass(frozen=True)
class AttentionReading:
    """Where a decoder layer has what makes its queries, keys and values.

    Attributes:
        layer: the layer.
        attention: its attention.
        norm: what hidden states pass before the projections; None if nothing.
        projections: by part ("q", "k", "v") the module, three times the same where they are one.
        split: from a projection's output and the part to that part `[B, S, H d]`.
        norms: by part, the norm of queries or keys; None where there is none.
        width: d, of one head.
        turn: which rotation, see `turned`.
        scale: what products of queries and keys are multiplied by.
    """

    layer: Any
    attention: nn.Module
    norm: nn.Module | None
    projections: dict[str, nn.Module]
    split: Callable[[Tensor, str], Tensor]
    norms: dict[str, nn.Module | None]
    width: int
    turn: str
    scale: float

    def heads(self, hidden: Tensor, part: str) -> Tensor:
        """Query ("q") `[B, H, S, d]`, key ("k") or value ("v") `[B, Hk, S, d]`, before rotation, of hidden states
        `[B, S, D]` that enter the layer."""
        entering = hidden if self.norm is None else self.norm(hidden)
        return self._by_head(self.split(self.projections[part](entering), part), part)

    def _by_head(self, made: Tensor, part: str) -> Tensor:
        norm = self.norms[part]
        over_all = norm is not None and _over_all_heads(norm, self.width)
        if norm is not None and over_all:
            made = norm(made)
        made = made.unflatten(-1, (-1, self.width))
        if norm is not None and not over_all:
            made = norm(made)
        return made.transpose(1, 2)

    def keys_and_values(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Keys, before rotation, and values `[B, Hk, S, d]` of hidden states `[B, S, D]`; what makes both runs once."""
        entering = hidden if self.norm is None else self.norm(hidden)
        made = self.projections["k"](entering)
        other = made if self.projections["v"] is self.projections["k"] else self.projections["v"](entering)
        return self._by_head(self.split(made, "k"), "k"), self._by_head(self.split(other, "v"), "v")

    def rotate(self, values: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        """Rotary embedding of `[B, H, P, d]` by cos and sin `[1 or B, P, r]`: of the first r of a head's d channels."""
        count = rotation[0].shape[-1]
        first = turned(self.turn, values[..., :count], rotation)
        return first if count == values.shape[-1] else torch.cat([first, values[..., count:]], dim=-1)

    def absent(self) -> str | None:
        """What is wrong with the weights that are read: "on the meta device" or "sharded"; None if they can be read."""
        for module in (self.norm, *self.projections.values(), *self.norms.values()):
            for part in () if module is None else module.modules():
                if hasattr(part, "_hf_hook"):  # accelerate brings its weights whenever it is called
                    continue
                for weight in part.parameters(recurse=False):
                    if weight.is_meta:
                        return "on the meta device"
                    if hasattr(weight, "placements"):  # a DTensor
                        return "sharded"
        return None


def turned(kind: str, values: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary embedding of `[B, H, P, r]` by cos and sin `[1 or B, P, r]`.

    Args:
        kind: "halves" turns channel i with i + r / 2 (Llama and most others). "pairs" turns channel 2 i with 2 i + 1
            (Cohere); "pairs of halves" the same by the first half of cos and sin, each value for both of a pair (GLM).
    """
    cos, sin = (part[:, None].to(values.dtype) for part in rotation)
    if kind == "halves":
        first, second = values.chunk(2, dim=-1)
        return values * cos + torch.cat([-second, first], dim=-1) * sin
    if kind == "pairs of halves":
        cos, sin = (part[..., : part.shape[-1] // 2].repeat_interleave(2, dim=-1) for part in (cos, sin))
    crossed = torch.stack([-values[..., 1::2], values[..., ::2]], dim=-1).flatten(-2)
    return values * cos + crossed * sin


def attention_of(layer: Any) -> nn.Module:
    """The attention of a decoder layer.

    Raises:
        ValueError: it has none under a known name.
    """
    return _named(layer, _ATTENTION, "attention")


def mlp_of(layer: Any) -> nn.Module:
    """The MLP of a decoder layer, with the same error."""
    return _named(layer, _MLP, "MLP")


def output_of(attention: nn.Module) -> nn.Module:
    """The projection at the end of an attention, with the same error."""
    return _named(attention, _OUTPUT, "output projection")


def read_attention(layer: Any) -> AttentionReading:
    """How queries, keys and values of a decoder layer are made.

    Raises:
        ValueError: it is not laid out in a way that is known here; the message says what is missing.
    """
    attention = attention_of(layer)
    config = getattr(attention, "config", None)
    for name, does in _UNREAD.items():
        if getattr(attention, name, None) is not None or getattr(config, name, None) is not None:
            raise ValueError(f"{type(attention).__name__} {does} ({name}), which is not computed outside it.")
    width = next((getattr(attention, name) for name in _HEAD_WIDTH if hasattr(attention, name)), None)
    if not isinstance(width, int):
        raise ValueError(f"{type(attention).__name__} does not say how wide its heads are ({', '.join(_HEAD_WIDTH)}).")
    projections, split = _projections(attention, config, width)
    norms = {part: _head_norm(attention, part) for part in _PARTS}
    norm = next((getattr(layer, name) for name in _INPUT_NORM if hasattr(layer, name)), None)
    scale = float(getattr(attention, "scaling", None) or width**-0.5)
    return AttentionReading(layer, attention, norm, projections, split, norms, width, _turn(attention), scale)


def _named(module: Any, names: tuple[str, ...], what: str) -> nn.Module:
    part = next((getattr(module, name) for name in names if isinstance(getattr(module, name, None), nn.Module)), None)
    if part is None:
        raise ValueError(f"{type(module).__name__} has no {what} under a known name ({', '.join(names)}).")
    return part


def _projections(
    attention: nn.Module, config: Any, width: int
) -> tuple[dict[str, nn.Module], Callable[[Tensor, str], Tensor]]:
    separate = [getattr(attention, f"{part}_proj", None) for part in _PARTS]
    if all(isinstance(module, nn.Module) for module in separate):
        return dict(zip(_PARTS, separate)), _whole  # type: ignore[arg-type]
    for name in (*_BLOCKS, *_BY_HEAD):
        joined = getattr(attention, name, None)
        if not isinstance(joined, nn.Module):
            continue
        if name in _BY_HEAD:
            split: Callable[[Tensor, str], Tensor] = functools.partial(_of_each_head, width)
        else:
            heads = config.num_attention_heads
            key_heads = getattr(config, "num_key_value_heads", None) or heads
            split = functools.partial(_of_blocks, [heads * width, key_heads * width, key_heads * width])
        return dict.fromkeys(_PARTS, joined), split
    names = "q_proj with k_proj and v_proj, " + ", ".join((*_BLOCKS, *_BY_HEAD))
    raise ValueError(f"{type(attention).__name__} has no projections under a known name ({names}).")


def _whole(made: Tensor, part: str) -> Tensor:
    return made


def _of_blocks(sizes: list[int], made: Tensor, part: str) -> Tensor:
    return made.split(sizes, dim=-1)[_PARTS.index(part)]


def _of_each_head(width: int, made: Tensor, part: str) -> Tensor:
    return made.unflatten(-1, (-1, 3, width))[..., _PARTS.index(part), :].flatten(-2)


def _head_norm(attention: nn.Module, part: str) -> nn.Module | None:
    for name in _HEAD_NORMS:
        norm = getattr(attention, name.format(part), None)
        if isinstance(norm, nn.Module):
            return norm
    return None


def _over_all_heads(norm: nn.Module, width: int) -> bool:
    """Whether a norm of queries or keys takes all heads together (OLMo-2), not each for itself (Qwen3, Cohere)."""
    weight = getattr(norm, "weight", None)
    return isinstance(weight, Tensor) and weight.dim() == 1 and weight.shape[0] != width


def _turn(attention: nn.Module) -> str:
    rotate = getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb", None)
    return "halves" if rotate is None else _turn_of(rotate)


@functools.lru_cache(maxsize=64)
def _turn_of(rotate: Any) -> str:
    """Which of the rotations the function of a decoder's modeling file is: it is tried on a few numbers."""
    generator = torch.Generator().manual_seed(0)
    values, cos, sin = (torch.randn(1, 2, 3, 8, generator=generator, device="cpu") for _ in range(3))
    cos, sin = cos[:, 0], sin[:, 0]
    try:
        with torch.no_grad():
            rotated = rotate(values, values[:, :1], cos, sin)[0]
    except Exception as error:
        raise ValueError(f"{rotate.__module__} rotates in a way that is not known here: {error}") from error
    for kind in ("halves", "pairs", "pairs of halves"):
        if rotated.shape == values.shape and torch.allclose(rotated, turned(kind, values, (cos, sin)), atol=1e-5):
            return kind
    raise ValueError(f"{rotate.__module__} rotates in a way that is not known here.")
