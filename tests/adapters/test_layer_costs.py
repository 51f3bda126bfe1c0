"""What is read off decoder layers of every kind equals what torch counts and what the cache holds: a prompt and a
decode step behind it, with prompts shorter and longer than a window."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from _tiny import TEXT
from torch import nn

from tokenprune.adapters import _layer_shapes
from tokenprune.adapters._layer_shapes import beside_layers, layer_shapes
from tokenprune.evals.profiling.flops import TOLERANCE, cache_bytes, flop_counter, keys_held
from tokenprune.seams import cache_argument

WINDOW = 16
_ROPE = {"rope_type": "default", "rope_theta": 1e4}
_MROPE = {**_ROPE, "mrope_section": [2, 2, 2], "mrope_interleaved": True, "partial_rotary_factor": 1.0}
_SLIDING = ["sliding_attention", "full_attention"] * 2
_LINEAR = {
    **TEXT, "head_dim": 12, "layer_types": ["linear_attention"] * 3 + ["full_attention"], "linear_key_head_dim": 12,
    "linear_value_head_dim": 12, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "rope_parameters": _MROPE,
}  # fmt: skip
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
KINDS = (
    "llama", "mistral", "gemma3", "gemma4", "gemma4_experts", "qwen3_5", "qwen3_5_moe", "lfm2", "llama4", "qwen3_moe",
    "persimmon",
)  # fmt: skip


def _gemma4(**more: Any) -> nn.Module:
    from transformers.models.gemma4.modeling_gemma4 import Gemma4TextConfig, Gemma4TextModel

    kinds = [*_SLIDING, "sliding_attention", "full_attention"]
    text = {**TEXT, "num_hidden_layers": 6, "head_dim": 12, "global_head_dim": 24, "layer_types": kinds}
    return Gemma4TextModel(Gemma4TextConfig(**text, sliding_window=WINDOW, **more))


@functools.cache
def decoder(kind: str) -> nn.Module:
    import transformers as t
    from transformers.models.llama4.modeling_llama4 import Llama4TextConfig, Llama4TextModel
    from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5TextConfig, Qwen3_5TextModel
    from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeTextConfig, Qwen3_5MoeTextModel

    made = {
        "llama": lambda: t.LlamaModel(t.LlamaConfig(**TEXT)),
        "mistral": lambda: t.MistralModel(t.MistralConfig(**TEXT, sliding_window=WINDOW)),
        "gemma3": lambda: t.Gemma3TextModel(
            t.Gemma3TextConfig(**TEXT, head_dim=12, sliding_window=WINDOW, layer_types=_SLIDING)
        ),
        # the last two layers use keys of others; embeddings by layer are projected outside of the layers
        "gemma4": lambda: _gemma4(
            hidden_size_per_layer_input=8, vocab_size_per_layer_input=64, num_kv_shared_layers=2
        ),
        # experts beside an MLP, and values that are keys
        "gemma4_experts": lambda: _gemma4(
            hidden_size_per_layer_input=0, enable_moe_block=True, num_experts=4, top_k_experts=2,
            moe_intermediate_size=32, attention_k_eq_v=True, num_global_key_value_heads=2,
        ),  # fmt: skip
        "qwen3_5": lambda: Qwen3_5TextModel(Qwen3_5TextConfig(**_LINEAR)),
        "qwen3_5_moe": lambda: Qwen3_5MoeTextModel(
            Qwen3_5MoeTextConfig(**_LINEAR, **_EXPERTS, shared_expert_intermediate_size=32)
        ),
        "lfm2": lambda: t.Lfm2Model(
            t.Lfm2Config(**TEXT, layer_types=["conv", "conv", "full_attention", "conv"], block_auto_adjust_ff_dim=False)
        ),
        # its experts compute every token
        "llama4": lambda: Llama4TextModel(
            Llama4TextConfig(
                **TEXT, head_dim=12, intermediate_size_mlp=64, num_local_experts=4, num_experts_per_tok=1,
                interleave_moe_layer_step=2, attention_chunk_size=512, no_rope_layers=[1, 1, 1, 0], use_qk_norm=True,
            )
        ),
        "qwen3_moe": lambda: t.Qwen3MoeModel(
            t.Qwen3MoeConfig(**TEXT, head_dim=12, **_EXPERTS, decoder_sparse_step=2, mlp_only_layers=[])
        ),
        "persimmon": lambda: t.PersimmonModel(t.PersimmonConfig(**{**TEXT, "num_key_value_heads": 4})),
    }  # fmt: skip
    torch.manual_seed(0)
    return made[kind]().eval()


class Counted:
    """What torch counts in each layer and in the whole of a decoder."""

    def __init__(self, module: nn.Module) -> None:
        self.counter, self.begun, self.spent = flop_counter(), {}, {}
        for name, part in [("all", module), *enumerate(module.layers)]:
            part.register_forward_pre_hook(functools.partial(self._before, name))
            part.register_forward_hook(functools.partial(self._after, name))

    def _before(self, name: Any, *given: Any) -> None:
        self.begun[name] = self.counter.get_total_flops()

    def _after(self, name: Any, *given: Any) -> None:
        self.spent[name] = self.counter.get_total_flops() - self.begun[name]


SHORT = [kind for kind in KINDS if kind not in ("lfm2", "qwen3_5", "qwen3_5_moe")]
"""Without those with a causal convolution, which computes a few places more over a prompt: of 7 that is a share."""


@pytest.mark.parametrize(("kind", "length"), [(k, n) for k in KINDS for n in (7, 40, 80) if n > 7 or k in SHORT])
def test_layers_of_every_kind(kind: str, length: int) -> None:
    from transformers import DynamicCache

    module = decoder(kind)
    shapes, beside = layer_shapes(module.layers, module.config), beside_layers(module)
    assert None not in shapes and beside is not None
    counted = Counted(module)
    cache = DynamicCache(config=module.config)
    width = getattr(module.config, "hidden_size_per_layer_input", 0)
    for new, before in ((length, 0), (1, length)):
        call = {"inputs_embeds": torch.randn(1, new, 48), "attention_mask": torch.ones(1, before + new)}
        if width:
            call["per_layer_inputs"] = torch.randn(1, new, len(module.layers), width)
        with torch.no_grad(), counted.counter:
            module(**call, use_cache=True, **cache_argument(cache))
        layers = [counted.spent[layer] for layer in range(len(shapes))]
        assert [shape.flops(new, before) for shape in shapes] == pytest.approx(layers, rel=TOLERANCE)
        rest = counted.spent["all"] - sum(layers)
        assert 2 * new * beside == rest
        assert [shape.bytes(before + new, 4) for shape in shapes] == cache_bytes(cache)
    held = keys_held(cache)
    for layer, shape in enumerate(shapes):
        dropped = shape.window is not None and length + 1 >= shape.window
        assert held[layer] == (None if shape.cached == 0 or dropped else length + 1)


class Wrapped(nn.Module):
    """As LoRA wraps a linear layer."""

    def __init__(self, inside: nn.Linear, rank: int) -> None:
        super().__init__()
        self.in_features, self.out_features, self.base_layer = inside.in_features, inside.out_features, inside
        self.down = nn.ModuleDict({"default": nn.Linear(inside.in_features, rank)})
        self.up = nn.ModuleDict({"default": nn.Linear(rank, inside.out_features)})


def test_a_wrapped_linear_layer_counts_once_with_what_is_added() -> None:
    module = decoder("persimmon")
    plain = layer_shapes(module.layers, module.config)[0]
    inside = module.layers[0].self_attn.dense
    module.layers[0].self_attn.dense = Wrapped(inside, rank=3)
    wrapped = layer_shapes(module.layers, module.config)[0]
    module.layers[0].self_attn.dense = inside
    assert wrapped.linear == plain.linear + 3 * (48 + 48)
    assert (wrapped.scores, wrapped.cached) == (plain.scores, plain.cached)


def test_a_layer_with_a_weight_that_is_not_known_is_not_modelled() -> None:
    module = decoder("mistral")
    module.layers[1].extra = nn.Linear(4, 4)
    module.layers[2].self_attn.mixing = nn.Parameter(torch.ones(4, 4))
    try:
        shapes = layer_shapes(module.layers, module.config)
        assert shapes[0] is not None and shapes[1] is not None and shapes[2] is None
        assert shapes[1].linear == shapes[0].linear + 16  # a linear layer runs once for each token
    finally:
        del module.layers[1].extra, module.layers[2].self_attn.mixing
    module.far = nn.Parameter(torch.ones(4, 4))
    assert beside_layers(module) is None
    del module.far


@pytest.mark.parametrize(("experts", "counts"), [(4, True), (None, True), (5, False)])
def test_a_router_is_one_matrix_that_says_which_experts(experts, counts):
    """Gemma's routers scale what they are given by a row of their own, which is no matrix."""

    class Router(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(4, 8))
            self.scale = torch.nn.Parameter(torch.zeros(8))
            self.score_bias = torch.nn.Parameter(torch.zeros(4, 1))
            self.top_k = 2
            if experts is not None:
                self.num_experts = experts

    if counts:
        assert _layer_shapes._linear("router", Router()) == 4 * 8
    else:
        with pytest.raises(_layer_shapes._Unknown):
            _layer_shapes._linear("router", Router())


@pytest.mark.parametrize(
    "more", [{"indexer": nn.Linear(8, 2)}, {"head_dim": None}], ids=["chooses its keys", "no width of a head"]
)
def test_attention_of_which_not_all_is_known_is_not_modelled(more):
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head_dim = 4
            self.q_proj, self.o_proj = nn.Linear(8, 16), nn.Linear(16, 8)
            self.k_proj, self.v_proj = nn.Linear(8, 8), nn.Linear(8, 8)

    assert _layer_shapes._grouped(Attention()) == {"scores": 2 * 16, "cached": 8 + 8}
    unknown = Attention()
    for name, value in more.items():
        setattr(unknown, name, value)
    with pytest.raises(_layer_shapes._Unknown):
        _layer_shapes._grouped(unknown)


def test_experts_that_are_a_list_of_modules():
    """As remote code has them: each token is sent to two of four."""

    class Gate(nn.Module):
        top_k = 2

    def layer(*widths: int) -> nn.Module:
        return nn.ModuleDict({"gate": Gate(), "experts": nn.ModuleList(nn.Linear(8, width) for width in widths)})

    assert _layer_shapes._experts(layer(3, 3, 3, 3)) == 2 * 8 * 3
    assert _layer_shapes._experts(nn.Linear(8, 3)) == 0
    with pytest.raises(_layer_shapes._Unknown):
        _layer_shapes._experts(layer(3, 3, 3, 5))
