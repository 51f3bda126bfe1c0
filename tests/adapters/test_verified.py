"""What is found out of a loaded model before it is pruned: classes without rows of visual tokens are refused by name, a
decoder is tried, the first prompt is held against the features, and what is not known to be right is refused."""

from __future__ import annotations

import copy
import functools
import inspect
from typing import Any

import pytest
import torch
import transformers
from _capabilities import FILE, as_yaml, capabilities, expected
from _decoders import DECODERS, llava_with
from _tiny import TEXT
from _zoo_all import FAMILIES, zoo_batch, zoo_model

import tokenprune
from tokenprune.adapters._generic import Generic
from tokenprune.adapters._not_applicable import NOT_APPLICABLE
from tokenprune.api import adapter_for, prepare
from tokenprune.engine import decoder_probe
from tokenprune.engine.decoder_probe import removal_error
from tokenprune.engine.layer_sample import only, sampled_layers
from tokenprune.engine.prompt_reader import prompt_visuals
from tokenprune.interfaces.capability import CAPABILITIES

INKLING = {
    **TEXT, "head_dim": 12, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 12, "d_rel": 4,
    "rel_extent": 64, "moe_intermediate_size": 32, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "sliding_window_size": 64, "local_layer_ids": [0, 2], "tie_word_embeddings": False,
}  # fmt: skip


def _hollow(cls: type) -> Any:
    """An object of a class, with nothing in it."""
    model = cls.__new__(cls)
    torch.nn.Module.__init__(model)
    return model


@pytest.mark.parametrize("name", list(NOT_APPLICABLE))
def test_a_class_without_rows_of_visual_tokens_is_refused_by_name(name: str) -> None:
    cls = getattr(transformers, name, None)
    if cls is None:
        pytest.skip("this transformers has no such class")
    with pytest.raises(TypeError, match=f"{name} has no input cuts: {NOT_APPLICABLE[name][:20]}"):
        tokenprune.apply(_hollow(cls), "random", keep=4)
    derived = type("Mine", (cls,), {})
    with pytest.raises(TypeError, match="Mine has no input cuts"):
        tokenprune.apply(_hollow(derived), "random", keep=4)


def test_a_text_model_and_a_dual_encoder_are_refused() -> None:
    text = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT))
    with pytest.raises(TypeError, match="LlamaForCausalLM has no module that makes features of pictures"):
        tokenprune.apply(text, "random", keep=4)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    both = transformers.CLIPConfig(
        text_config={**sizes, "vocab_size": 64}, vision_config={**sizes, "image_size": 24, "patch_size": 4}
    )
    with pytest.raises(TypeError, match="CLIPModel has no decoder stack"):
        tokenprune.apply(transformers.CLIPModel(both), "random", keep=4)


def _inkling() -> Any:
    if not hasattr(transformers, "InklingTextConfig"):
        pytest.skip("this transformers has no Inkling")
    config = transformers.LlavaConfig(
        vision_config=llava_with("llama").config.vision_config, text_config=transformers.InklingTextConfig(**INKLING),
        image_token_index=5, vision_feature_layer=-2, vision_feature_select_strategy="default",
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(0.0, weight[0].numel() ** -0.5 * 1.5 if weight.dim() > 1 else 0.5)
    return model


def test_inkling_is_refused_because_hiding_is_not_removing_there() -> None:
    model = _inkling()
    assert removal_error(adapter_for(model)) > 0.05
    with pytest.raises(ValueError, match="InklingTextModel has .* no input cuts"):
        tokenprune.apply(model, "random", keep=4)


def test_llama_4_is_refused_where_transformers_itself_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """The zoo mends what 5.24 lacks; without that the model answers nothing, with pictures or without."""
    model, outputs = zoo_model("llama4"), transformers.modeling_outputs
    if "image_outputs" not in inspect.unwrap(type(model).forward).__code__.co_names:
        pytest.skip("this transformers does not read it")
    monkeypatch.delattr(outputs.MoeCausalLMOutputWithPast, "image_outputs")
    with pytest.raises(AttributeError, match="has no attribute 'image_outputs'"):
        model(input_ids=torch.tensor([[9, 10]]))
    with pytest.raises(TypeError, match="fails in this release .* it reads image_outputs off the MoeCausalLMOutput"):
        tokenprune.apply(model, "random", keep=4)


# --- the trial of a decoder -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [(), (2,), (1, 2, 3)])
def test_a_decoder_that_attends_passes(layers: tuple[int, ...]) -> None:
    for name in ("mistral3", "glm4v", "kimi_k25"):
        assert removal_error(adapter_for(zoo_model(name)), layers) < 1e-5
        assert not zoo_model(name).model.language_model._forward_hooks


def test_a_decoder_that_counts_places_does_not() -> None:
    model = copy.deepcopy(zoo_model("mistral3"))
    layer = model.model.language_model.layers[2]
    forward = layer.forward

    def blurred(hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        """Each token sees the one before it in the row, whatever a mask says."""
        return forward(hidden_states + hidden_states.roll(1, 1), *args, **kwargs)

    layer.forward = blurred
    with pytest.raises(ValueError, match=r"Mistral3\w+ has no input cuts: taking tokens out .* is not hiding them"):
        tokenprune.apply(model, "random", keep=4)
    with tokenprune.applied(model, "random", keep=4, verify=False):
        pass


def test_a_decoder_is_tried_once_and_only_if_no_test_knows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[tuple[int, ...]] = []

    def note(adapter: Any, layers: tuple[int, ...] = ()) -> float:
        tried.append(layers)
        return 0.0

    monkeypatch.setattr(decoder_probe, "removal_error", note)
    model = copy.deepcopy(zoo_model("mistral3"))
    for _ in range(2):
        tokenprune.apply(model, "random", keep=4).remove()
    assert tried == [()]
    tokenprune.apply(model, {"at": "layer:2", "prune": "random", "keep": 4}).remove()
    assert tried == [(), (2,)]
    tokenprune.apply(llava_with("llama"), "random", keep=9).remove()
    assert tried == [(), (2,)]
    tokenprune.apply(llava_with("phi3"), "random", keep=9).remove()
    assert tried == [(), (2,), ()]


@pytest.mark.parametrize(
    ("decoder", "cuts", "runs"),
    [
        ("phi3", (), [0, 11]),
        ("phi3", (5,), [0, 5, 11]),
        ("cohere2", (), [0, 1, 2, 11]),  # two kinds in turn
        ("lfm2", (7,), [0, 1, 2, 7, 11]),
    ],
)
def test_of_layers_that_are_alike_a_few_are_tried(
    decoder: str, cuts: tuple[int, ...], runs: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, more = DECODERS[decoder]
    many = {"num_hidden_layers": 12} | {k: v * 3 for k, v in more.items() if k == "layer_types"}
    monkeypatch.setitem(DECODERS, decoder, (kind, {**more, **many}))
    model = llava_with(decoder)
    adapter, ran = adapter_for(model), []
    assert sampled_layers(adapter, cuts) == runs
    for number, layer in enumerate(adapter.layers):
        layer.forward = functools.partial(_counted, ran, number, layer.forward)
    assert sampled_layers(adapter, cuts) == runs
    with only(adapter, sampled_layers(adapter, cuts)):
        assert removal_error(adapter, cuts) < 1e-4
    assert sorted({*ran}) == runs
    adapter.layers[9].own_setting = 1
    assert sampled_layers(adapter, cuts) == sorted({*runs, 9}), "one that differs is one more kind"


def _counted(ran: list[int], number: int, forward: Any, *args: Any, **kwargs: Any) -> Any:
    ran.append(number)
    return forward(*args, **kwargs)


def test_a_decoder_of_other_code_is_tried_in_every_layer() -> None:
    model = llava_with("phi3")
    decoder = model.model.language_model
    decoder.__class__ = type("Mine", (type(decoder),), {"__module__": "my_package"})
    assert sampled_layers(adapter_for(model)) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("layer", "why"),
    [(1, "Layers before 2 get features of the vision tower added"), (9, "The decoder has 4 layers")],
)
def test_a_layer_that_is_no_place_to_cut_is_refused_with_the_reason(layer: int, why: str) -> None:
    with pytest.raises(ValueError, match=f"K goes from 2 to 3 .*{why}"):
        tokenprune.apply(zoo_model("cosmos3_omni"), {"at": f"layer:{layer}", "prune": "random", "keep": 4})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_passes(dtype: torch.dtype) -> None:
    for name in ("mistral3", "qwen3_vl_moe"):
        model = copy.deepcopy(zoo_model(name)).to(dtype)
        tokenprune.apply(model, "pyramiddrop", keep=4).remove()


# --- the first prompt -------------------------------------------------------------------------------------------------


class _Doubled(Generic):
    def feature_rows(self, output: Any) -> list[torch.Tensor]:
        return [2 * own for own in super().feature_rows(output)]


class _Elsewhere(Generic):
    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.language_model = copy.deepcopy(self.language_model)


class _HalfKnown(Generic):
    decoder_by_place = ("moe_mm_token_type_ids",)


LAYER = {"at": "layer:2", "prune": "random", "keep": 4}


@pytest.mark.parametrize(
    ("name", "adapter", "method", "says"),
    [
        ("mistral3", _Doubled, "random@4", "differs by 5.0e-01 from the features .* has no input cuts"),
        ("mistral3", _Elsewhere, "random@4", "did not call MinistralModel|did not call MistralModel"),
        ("ernie4_5_vl_moe", Generic, "random@4", "given 'moe_mm_token_type_ids' for each token.*no input cuts"),
        ("ernie4_5_vl_moe", _HalfKnown, LAYER, "given 'moe_mm_token_type_ids' for each token.*no layer cuts"),
    ],
)
def test_what_a_prompt_shows_to_be_wrong_is_refused(name: str, adapter: Any, method: Any, says: str) -> None:
    model = zoo_model(name)
    pruned = prepare(model, method, adapter=adapter(model))
    with pruned.applied(), torch.no_grad(), pytest.raises(ValueError, match=says):
        model(**zoo_batch(name))
    with torch.no_grad():
        assert model(**zoo_batch(name)).logits.isfinite().all(), "nothing is left behind"


def test_placeholders_that_are_too_many_are_refused() -> None:
    model, batch = zoo_model("mistral3"), zoo_batch("mistral3")
    batch["input_ids"][0, -1] = model.config.image_token_id
    # the model itself looks first
    with tokenprune.applied(model, "random", keep=4), torch.no_grad(), pytest.raises(ValueError, match="(?i)image"):
        model(**batch)


@pytest.mark.parametrize("method", ["vtc_cls", "holov", "flowcut"])
def test_tower_signals_are_given_where_attention_can_be_read(method: str) -> None:
    """And cuts inside the tower, which are tried at the first picture."""
    with pytest.raises(ValueError, match=r"has no tower signals|its adapter says so"):
        tokenprune.apply(zoo_model("got_ocr2"), method, keep=4)
    for name in ("idefics3", "mistral3"):
        tokenprune.apply(zoo_model(name), method, keep=4).remove()


def test_costs_that_are_not_known_are_not_made_up() -> None:
    model = zoo_model("ovis2")  # its decoder is modelled, its tower is not
    with tokenprune.applied(model, "random", keep=4) as handle, torch.no_grad():
        model(**zoo_batch("ovis2"))
        report = handle.report()
    assert report.flops.total is report.flops.vision is report.flops.projector is None
    assert "FLOPs to the first token  not modelled" in str(report) and report.flops.prefill and report.kv_bytes


def test_a_subclass_and_a_tower_of_another_kind_are_covered() -> None:
    model = zoo_model("mistral3")
    mine = type("Mine", (type(model),), {})(model.config).eval()
    assert adapter_for(mine).name == "generic"
    assert {adapter_for(zoo_model(name)).name for name in ("llava_siglip", "llava_pixtral")} == {"generic"}
    assert {"ernie4_5_vl_moe", "hunyuan_vl", "idefics2", "video_llava"} <= {
        adapter_for(zoo_model(name)).name for name in FAMILIES
    }
    assert len(CAPABILITIES) == 5


def test_the_table_of_classes_says_what_the_cells_come_to() -> None:
    assert FILE.read_text(encoding="utf-8") == as_yaml(capabilities(expected()))


def test_visuals_are_told_without_a_prompt_too() -> None:
    for name in ("mistral3", "glm4v", "idefics2", "hunyuan_vl"):
        model, batch = zoo_model(name), zoo_batch(name)
        with tokenprune.applied(model, "random", 1.0) as handle, torch.no_grad():
            model(**batch)
            spans = handle.last.layout.spans
        visuals = [visual for visual in prompt_visuals(adapter_for(model), "image", batch) if visual.length]
        assert [v.rasters for v in visuals] == [span.visual.rasters for span in spans]
