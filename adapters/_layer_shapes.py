"""What each decoder layer of a loaded model costs, read off its modules.

A layer is modelled where every weight of it is one whose use is known: linear layers, which run once for each token,
experts beside a router that says how many a token is sent to, and one of the kinds of attention below. Any other weight
makes it a layer that is not modelled, so that no number is wrong.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from tokenprune.cost import BLOCK, LayerShape

_OUT = ("o_proj", "out_proj", "dense")
_EXPERTS = ("experts",)
_STACKED = {"gate_up_proj", "down_proj", "up_proj", "gate_proj"}
_EVERY_TOKEN_TO_ALL = ("Llama4TextExperts",)
"""Experts that compute every token, whichever of them it is sent to."""
_EXPLICIT = ("eager", "sdpa")
"""Implementations of attention that compute scores of all keys, also where few are chosen."""


class _Unknown(Exception):
    """A layer has a part whose cost is not known."""


def layer_shapes(layers: Any, text: Any) -> tuple[LayerShape | None, ...]:
    """Of each layer of a decoder; None where it is not modelled.

    Args:
        layers: its layers.
        text: its config.
    """
    caches = _caches(text, len(layers))
    if caches is None:
        return (None,) * len(layers)
    return tuple(_shape(layer, text, cache) for layer, cache in zip(layers, caches, strict=True))


def beside_layers(decoder: Any) -> int | None:
    """Multiply-adds of a decoder for each position outside of its layers; None where they are not modelled."""
    inside = {id(module) for layer in decoder.layers for module in layer.modules()}
    found = [(name, module) for name, module in decoder.named_modules() if id(module) not in inside]
    try:
        return sum(_linear(name, module) for name, module in found)
    except _Unknown:
        return None


def width_of(module: Any) -> tuple[int, int] | None:
    """(in, out) of a linear layer, quantised or not; None for other modules."""
    sizes = getattr(module, "in_features", None), getattr(module, "out_features", None)
    return sizes if isinstance(sizes[0], int) and isinstance(sizes[1], int) else None  # type: ignore[return-value]


def _shape(layer: Any, text: Any, cache: Any) -> LayerShape | None:
    try:
        linear = sum(_linear(name, module) for name, module in _weighty(layer)) + _experts(layer)
        attention = _mixer(layer, text)
        expanded = attention.pop("in_place", 0)
        window = attention.pop("window", 0) or getattr(cache, "sliding_window", None)
        return LayerShape(linear=linear - expanded, window=window, **attention)
    except (_Unknown, AttributeError):  # a module of a known name that is none of the known kinds
        return None


def _weighty(layer: Any) -> Iterator[tuple[str, Any]]:
    """Modules of a layer that are no part of its experts."""
    experts = [name for name, _ in layer.named_modules() if name.rpartition(".")[2] in _EXPERTS]
    for name, module in layer.named_modules():
        if not any(name == own or name.startswith(f"{own}.") for own in experts):
            yield name, module


def _linear(name: str, module: Any) -> int:
    """Multiply-adds of a module's own weights for each token."""
    width = width_of(module)
    if width is not None:
        wraps = any(width_of(part) for part in module.modules() if part is not module)
        return 0 if wraps else width[0] * width[1]  # LoRA: the layer inside and its two matrices count themselves
    if isinstance(module, nn.Embedding):
        return 0
    own = [(name, weight) for name, weight in module.named_parameters(recurse=False) if weight.dim() > 1]
    if isinstance(module, nn.Conv1d) and module.groups == module.in_channels:
        return 0  # by those that know the layer's kind
    if [name for name, _ in own if "bias" not in name] and not _is_router(module):
        raise _Unknown(name)
    return sum(weight.numel() for name, weight in own if "bias" not in name)


def _is_router(module: Any) -> bool:
    """Whether a module's one matrix says which experts a token is sent to."""
    shapes = [w.shape for name, w in module.named_parameters(recurse=False) if w.dim() > 1 and "bias" not in name]
    count = next((n for name in ("num_experts", "n_routed_experts") if (n := getattr(module, name, None))), None)
    return len(shapes) == 1 and len(shapes[0]) == 2 and hasattr(module, "top_k") and count in (None, shapes[0][0])


# --- experts ----------------------------------------------------------------------------------------------------------


def _experts(layer: Any) -> int:
    """Multiply-adds of the experts that a token is sent to.

    Raises:
        _Unknown: there are several sets of them, or a weight that is not understood, or no saying how many are active.
    """
    sets = [module for name, module in layer.named_modules() if name.rpartition(".")[2] in _EXPERTS]
    if not sets:
        return 0
    (experts,) = sets if len(sets) == 1 else (None,)
    chosen = {module.top_k for module in layer.modules() if isinstance(getattr(module, "top_k", None), int)}
    if not chosen:
        configs = [module.config for module in layer.modules() if hasattr(module, "config")]
        chosen = {config.top_k_experts for config in configs if getattr(config, "top_k_experts", None)}
    if experts is None or len(chosen) != 1:
        raise _Unknown("experts")
    (active,) = chosen
    if isinstance(experts, nn.ModuleList):
        each = [sum(_linear(name, module) for name, module in one.named_modules()) for one in experts]
        if len(set(each)) != 1:
            raise _Unknown("experts")
        return active * each[0]
    weights = {name: weight for name, weight in experts.named_parameters() if weight.dim() > 1 and "bias" not in name}
    counts = {weight.shape[0] for weight in weights.values() if weight.dim() == 3 and weight.is_floating_point()}
    if not weights.keys() <= _STACKED or len(counts) != 1 or any(weight.dim() != 3 for weight in weights.values()):
        raise _Unknown("experts")
    (count,) = counts
    if type(experts).__name__ in _EVERY_TOKEN_TO_ALL:
        active = count
    return active * sum(weight.numel() for weight in weights.values()) // count


# --- attention and what stands in its place ---------------------------------------------------------------------------


def _mixer(layer: Any, text: Any) -> dict[str, int]:
    """What a layer's attention, convolution or linear attention adds to its linear layers.

    Raises:
        _Unknown: it is none of the known kinds.
    """
    found = [module for _, module in _weighty(layer) if any(name in module._modules for name in _OUT)]
    if len(found) != 1:
        raise _Unknown("attention")
    (module,) = found
    if hasattr(module, "head_k_dim") and hasattr(module, "in_proj_qkv"):
        return _delta(module)
    if hasattr(module, "conv") and hasattr(module, "in_proj"):
        return {"scores": 0, "state": module.conv.weight.numel(), "convolved": module.conv.weight.numel()}
    if hasattr(module, "kv_b_proj"):
        return _latent(module, text)
    if hasattr(module, "q_proj"):
        return _grouped(module)
    for joined, out in (("query_key_value", "dense"), ("qkv_proj", "o_proj")):  # GPT-NeoX, Phi
        if hasattr(module, joined):
            width = _width(getattr(module, out))[0]
            return {"scores": 2 * width, "cached": _width(getattr(module, joined))[1] - width}
    raise _Unknown("attention")


def _delta(module: Any) -> dict[str, int]:
    """Gated delta rule."""
    heads, keys, values = module.num_v_heads, module.head_k_dim, module.head_v_dim
    block = BLOCK * BLOCK * (2 * keys + values) + 3 * BLOCK * keys * values
    convolved = module.conv1d.weight.numel()
    return {
        "scores": 0, "scanned": heads * block, "convolved": convolved, "state": convolved,
        "state_fp32": heads * keys * values,
    }  # fmt: skip


def _latent(module: Any, text: Any) -> dict[str, int]:
    """Keys and values made of latents, which are what is cached; perhaps with an indexer that chooses keys."""
    rank, out = _width(module.kv_b_proj)
    made = module.kv_a_proj_with_mqa is not None
    found = {
        "scores": module.num_heads * (module.qk_head_dim + module.v_head_dim),
        "expanded": rank * out,
        "in_place": rank * out,
        "cached": _width(module.kv_a_proj_with_mqa)[1] if made else 0,
    }
    indexer = getattr(module, "indexer", None)
    if indexer is not None:
        if text._attn_implementation not in _EXPLICIT:
            raise _Unknown("indexer")
        found["scores"] += indexer.n_heads * (indexer.head_dim + 1)
        found["cached"] += indexer.head_dim
    return found


def _grouped(module: Any) -> dict[str, int]:
    """Grouped heads. Layers that use keys of others have no projections for them, and values may be the keys."""
    if hasattr(module, "indexer") or not isinstance(getattr(module, "head_dim", None), int):
        raise _Unknown("attention")
    width = _width(next(getattr(module, name) for name in _OUT if hasattr(module, name)))[0]
    keys, values = (getattr(module, name, None) for name in ("k_proj", "v_proj"))
    if keys is None:  # its cache is another's, and holds as much as this one sees
        return {"scores": 2 * width, "window": getattr(module, "sliding_window", None) or 0}
    return {"scores": 2 * width, "cached": _width(keys)[1] + _width(keys if values is None else values)[1]}


def _width(module: Any) -> tuple[int, int]:
    width = width_of(module)
    if width is None:
        raise _Unknown("linear")
    return width


def _caches(text: Any, layers: int) -> list[Any] | None:
    """The layers of the cache that generation makes for a decoder: they say which drop keys. None if it fails."""
    from transformers.cache_utils import DynamicCache

    try:
        made = list(DynamicCache(config=text).layers)
    except Exception:  # a config of an unknown kind
        return None
    return [*made, *[None] * layers][:layers]
