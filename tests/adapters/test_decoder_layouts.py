"""Decoders that are not laid out like Llama's: equal to the masked model, signals equal to their own eager attention,
or refused by `apply` with a sentence."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from _decoders import llava_with
from _tiny import prompts
from masked_reference import compare, relative_error, run_pruned

import tokenprune
from tokenprune.api import adapter_for
from tokenprune.methods.fastv import FastV
from tokenprune.methods.pyramiddrop import PyramidDrop

EAGER = ("gemma2", "gpt_oss")  # these have no SDPA
READ = (
    "llama", "phi3", "phi3 partial", "olmo2", "glm", "glm4", "phi", "phi norms", "gemma3", "gpt_neox",
    "gpt_neox in turn", "cohere", "mistral", "qwen3", "granite", "starcoder2", "stablelm", "persimmon",
)  # fmt: skip
METHODS = ("uniform", "fastv", "pyramiddrop", "transprune", "todre")
LOGITS, BRANCHES = "caps its attention logits", "reads both branches of decoder layer 0"
REFUSED = {
    ("gemma2", "fastv"): LOGITS, ("gemma2", "pyramiddrop"): LOGITS, ("gemma2", "transprune"): LOGITS,
    ("gemma2", "todre"): LOGITS, ("olmo2", "transprune"): BRANCHES, ("glm4", "transprune"): BRANCHES,
    ("gemma3", "transprune"): BRANCHES, ("granite", "transprune"): BRANCHES,
    ("cohere2", "fastv"): "rotation and scale do not give", ("smollm3", "fastv"): "rotation and scale do not give",
    ("gpt_oss", "fastv"): "attention sinks", ("llama4", "fastv"): "rotated by complex numbers",
    ("lfm2", "pyramiddrop"): "reads the attention of decoder layer 1", ("biogpt", "uniform"): "has no rotary positions",
}  # fmt: skip


RUN = [(name, method) for name in READ for method in METHODS if (name, method) not in REFUSED]
RUN += [
    ("gemma2", "uniform"),
    ("llama4", "uniform"),
    ("cohere2", "uniform"),
    ("cohere2", "todre"),
    ("smollm3", "uniform"),
    ("smollm3", "todre"),
]


@pytest.mark.parametrize(("name", "method"), RUN)
def test_a_pruned_decoder_of_any_layout_equals_the_masked_one(name: str, method: str) -> None:
    model = llava_with(name, "eager" if name in EAGER else "sdpa")
    batch = prompts([1, 2])
    compare(run_pruned(model, method, 9, batch), batch, 1e-5)


@pytest.mark.parametrize(("name", "method"), list(REFUSED))
def test_what_cannot_be_read_is_refused_by_apply(name: str, method: str) -> None:
    model = llava_with(name, "eager" if name in EAGER else "sdpa")
    hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())
    with pytest.raises(ValueError, match=REFUSED[name, method]) as refused:
        tokenprune.apply(model, method, keep=9)
    assert type(model.model.language_model).__name__ in str(refused.value), "the decoder's class is named"
    assert hooks == sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())
    with torch.no_grad():
        assert model(**prompts([1])).logits.isfinite().all()


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss", "biogpt", "llama4"])
def test_interventions_need_an_attention_that_they_know(name: str) -> None:
    with pytest.raises(ValueError, match="changes the attention of decoder layer"):
        tokenprune.apply(llava_with(name, "eager"), "var", channels=[3])


def test_a_decoder_without_layers_is_refused() -> None:
    model = llava_with("llama")
    model.model.language_model.blocks = model.model.language_model.layers
    del model.model.language_model.layers
    with pytest.raises(ValueError, match="LlamaModel has no list of layers"):
        tokenprune.apply(model, "uniform", keep=9)


@pytest.mark.parametrize("cls", [FastV, PyramidDrop])
@pytest.mark.parametrize("name", READ)
def test_signals_equal_the_models_own_attention(name: str, cls: Any) -> None:
    """FastV reads layer 1 as it ran, PyramidDrop's first cut tries it on its input."""
    views: list[Any] = []

    @dataclass
    class Watched(cls):
        def select(self, view: Any) -> Any:
            views.append(view)
            return super().select(view)

    model, batch = llava_with(name), prompts([1, 2])
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with tokenprune.applied(model, Watched(), keep=9) as handle, torch.no_grad():
        model(**batch, position_ids=positions)
        spans = handle.last.layout.spans
    with torch.no_grad():
        eager = llava_with(name, "eager")
        found = eager(**batch, position_ids=positions, output_attentions=True).attentions[1].float().mean(1)
    (signal,) = views[0].signals
    truth = torch.stack([found[span.sample, -1, span.places] for span in spans])  # padding is on the left
    assert signal.layer == 1
    assert relative_error(views[0].signals[signal], truth) < 1e-5


@pytest.mark.parametrize("name", ["llama", "gemma3", "cohere2", "phi", "gpt_neox"])
def test_rotations_made_anew_are_those_that_each_layer_gets(name: str) -> None:
    model, got = llava_with(name), []
    adapter = adapter_for(model)

    def note(module: Any, args: Any, kwargs: Any) -> None:
        got.append((args[0], kwargs["position_ids"], kwargs["position_embeddings"]))

    for layer in adapter.layers:
        layer.register_forward_pre_hook(note, with_kwargs=True)
    with torch.no_grad():
        model(**prompts([1]))
        for index, (hidden, positions, rotation) in enumerate(got):
            made = adapter.rotary(hidden, positions, index)
            assert all(torch.equal(one, other) for one, other in zip(made, rotation))
    kinds = len({tuple(rotation[1][0, 3].tolist()) for _, _, rotation in got})
    assert kinds == (2 if name == "gemma3" else 1)


@pytest.mark.parametrize("name", ["llama", "phi3", "qwen3"])
def test_the_check_leaves_no_trace(name: str) -> None:
    model = llava_with(name).train()
    model.model.language_model.layers[1].self_attn.eval()
    calls: list[int] = []
    model.model.language_model.layers[1].register_forward_hook(lambda *_: calls.append(1))
    modes = [module.training for module in model.modules()]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    generator = torch.get_rng_state()
    with tokenprune.applied(model, "transprune", keep=9):
        assert torch.equal(generator, torch.get_rng_state())
        assert modes == [module.training for module in model.modules()]
        assert not calls, "hooks of others do not see it"
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("break_it", [False, True])
def test_the_check_sees_a_changed_layer_in_any_precision(dtype: torch.dtype, break_it: bool) -> None:
    model = llava_with("llama").to(dtype)
    attention = model.model.language_model.layers[1].self_attn
    if break_it:  # as a checkpoint's own code might: queries twice as large behind the projection
        forward = type(attention).forward

        def louder(hidden_states: Any, **kwargs: Any) -> Any:
            attention.scaling, scaling = 2 * attention.scaling, attention.scaling
            try:
                return forward(attention, hidden_states, **kwargs)
            finally:
                attention.scaling = scaling

        attention.forward = louder
        with pytest.raises(ValueError, match="relative error"):
            tokenprune.apply(model, "fastv", keep=9)
    else:
        tokenprune.apply(model, "fastv", keep=9).remove()


def test_on_the_meta_device_only_names_are_checked() -> None:
    tokenprune.apply(llava_with("phi3").to("meta"), "fastv", keep=9).remove()
    with pytest.raises(ValueError, match=LOGITS):
        tokenprune.apply(llava_with("gemma2", "eager").to("meta"), "fastv", keep=9)


@pytest.mark.parametrize("method", [*METHODS, "vtc_cls", "var(channels=[3])"])
@pytest.mark.parametrize("whole_layers", [False, True])
def test_weights_that_accelerate_brings(method: str, whole_layers: bool) -> None:
    """With CPU offload a layer's weights are on the meta device until they are needed."""
    accelerate = pytest.importorskip("accelerate")
    model, batch = llava_with("qwen3"), prompts([1, 2])
    budget = {} if method.startswith("var") else {"keep": 9}
    with tokenprune.applied(copy.deepcopy(model), method, **budget) as handle, torch.no_grad():
        truth = handle.model(**batch).logits
    preload = ["Qwen3DecoderLayer"] if whole_layers else None
    accelerate.cpu_offload(model, execution_device="cpu", preload_module_classes=preload)
    with tokenprune.applied(model, method, **budget), torch.no_grad():
        if whole_layers and method in ("pyramiddrop", "transprune"):
            with pytest.raises(ValueError, match="on the meta device where it reads them"):
                model(**batch)
        else:
            assert torch.equal(model(**batch).logits, truth)


def test_pictures_are_found_among_embeddings_of_an_offloaded_table() -> None:
    accelerate = pytest.importorskip("accelerate")
    model, batch = llava_with("llama"), prompts([1])
    embeds = model.get_input_embeddings()(batch["input_ids"]).detach()
    accelerate.cpu_offload(model, execution_device="cpu")
    with tokenprune.applied(model, "uniform", keep=9) as handle, torch.no_grad():
        given = {name: value for name, value in batch.items() if name != "input_ids"}
        model(inputs_embeds=embeds, **given)
        assert len(handle.kept[0][0]) == 9
