"""Layers that visual tokens pass by, against a plain reading: the layer runs all rows, and visual ones are put back."""

from __future__ import annotations

import json
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from _families import BUILDERS, batch_of, family, layouts
from _tiny import IMAGE, PATCHES, prompts, tiny_llava

import tokenprune
from tokenprune.api import adapter_for
from tokenprune.cli import main
from tokenprune.cost import LayerShape
from tokenprune.engine.bypass import skipped
from tokenprune.evals.models.load import load_model
from tokenprune.evals.profiling.flops import flop_counter
from tokenprune.evals.tasks.unlabelled import draw_samples
from tokenprune.seams import cache_in

MODES = {"skip": "still", "composite": "mlp", "mask": "mask"}
SKIP = [1, 2]  # of four decoder layers
NAAVIT = f"naavit(layers={SKIP})"


def visual_of(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    """`[B, S]` bool."""
    ids = torch.tensor(sorted(adapter_for(model).placeholder_ids.values()))
    return torch.isin(batch["input_ids"], ids)


@contextmanager
def plainly(model: Any, visual: torch.Tensor, variant: str, layers: list[int]) -> Any:
    """The stock model whose layers run all rows; what stands at `visual` is overwritten behind each, or masked."""
    adapter, hooks = adapter_for(model), []

    def behind(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        entered = args[0] if args else kwargs["hidden_states"]
        if entered.shape[1] != visual.shape[1]:
            return None
        left = entered
        if variant == "composite":
            left = entered + adapter.branches(module)[1](module.post_attention_layernorm(entered))
        out = output[0] if isinstance(output, tuple) else output
        out = torch.where(visual[..., None], left, out)
        return (out, *output[1:]) if isinstance(output, tuple) else out

    def before(module: Any, args: Any, kwargs: Any) -> Any:
        mask, length = kwargs["attention_mask"], visual.shape[1]
        if (args[0] if args else kwargs["hidden_states"]).shape[1] != length:
            return None
        seen = torch.ones(length, length, dtype=torch.bool).tril()[None, None] if mask is None else mask
        seen = (seen if seen.dtype == torch.bool else seen >= 0).expand(len(visual), 1, length, length).clone()
        for sample in range(len(visual)):
            for one in visual[sample].nonzero()[:, 0].tolist():
                for other in visual[sample].nonzero()[:, 0].tolist():
                    seen[sample, 0, one, other] &= one == other
        return args, {**kwargs, "attention_mask": seen}

    for layer in layers:
        module = adapter.layers[layer]
        if variant == "mask":
            hooks.append(module.register_forward_pre_hook(before, with_kwargs=True))
        else:
            hooks.append(module.register_forward_hook(behind, with_kwargs=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def near(mine: torch.Tensor, truth: torch.Tensor) -> bool:
    return float((mine.double() - truth.double()).norm() / truth.double().norm()) < 1e-5


def cached(output: Any) -> list[torch.Tensor]:
    return [part for layer in cache_in(output).layers for part in (layer.keys, layer.values)]


@pytest.mark.parametrize("variant", list(MODES))
@pytest.mark.parametrize("name", list(BUILDERS))
def test_equals_the_layer_with_visual_rows_put_back(name: str, variant: str) -> None:
    model, moved = family(name), 0.0
    for layout in layouts(name)[:: 2 if variant == "skip" else 5]:
        batch = batch_of(name, layout)
        visual, real = visual_of(model, batch), batch["attention_mask"].bool()
        with torch.no_grad():
            stock = model(**batch).logits
            with plainly(model, visual, variant, SKIP):
                truth = model(**batch, use_cache=True)
                written = model.generate(**batch, max_new_tokens=4, do_sample=False, return_dict_in_generate=True,
                                         output_logits=True)  # fmt: skip
            with tokenprune.applied(model, f"naavit(layers={SKIP}, variant={variant!r})"):
                mine = model(**batch, use_cache=True)
                assert near(model(**batch, use_cache=False).logits[real], truth.logits[real]), layout
                answer = model.generate(**batch, max_new_tokens=4, do_sample=False, return_dict_in_generate=True,
                                        output_logits=True)  # fmt: skip
        assert near(mine.logits[real], truth.logits[real]), layout
        keep = real[:, None, :, None]
        for one, other in zip(cached(mine), cached(truth)):
            assert near(one * keep, other * keep), layout
        assert torch.equal(answer.sequences, written.sequences)
        assert all(near(one, other) for one, other in zip(answer.logits, written.logits)), layout
        moved = max(moved, float((mine.logits - stock)[real].abs().max()))
    assert moved > 1e-2  # it does something


@pytest.mark.parametrize("variant", list(MODES))
@pytest.mark.parametrize("beside", [0, 1], ids=["alone", "beside text"])
def test_a_row_of_visual_tokens_alone(beside: int, variant: str) -> None:
    """Two pictures are as long as a picture with as many words around it."""
    rows = [IMAGE] * (2 * PATCHES), *[[9] * (PATCHES - 1) + [IMAGE] * PATCHES + [7]] * beside
    model = tiny_llava()
    batch = {
        "input_ids": torch.tensor(rows),
        "attention_mask": torch.ones(len(rows), 2 * PATCHES, dtype=torch.int64),
        "pixel_values": torch.randn(1 + len(rows), 3, 42, 42, generator=torch.Generator().manual_seed(3)),
    }
    visual = visual_of(model, batch)
    assert bool(visual[0].all())
    with torch.no_grad():
        with plainly(model, visual, variant, SKIP):
            truth = model(**batch, use_cache=True)
            written = model.generate(**batch, max_new_tokens=4, do_sample=False)
        with tokenprune.applied(model, f"naavit(layers={SKIP}, variant={variant!r})"):
            mine = model(**batch, use_cache=True)
            answer = model.generate(**batch, max_new_tokens=4, do_sample=False)
    assert near(mine.logits, truth.logits)
    assert all(near(one, other) for one, other in zip(cached(mine), cached(truth)))
    assert torch.equal(answer, written)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize("plan", ["uniform@9", "fastv@9"])
def test_behind_cuts(name: str, plan: str) -> None:
    """Of one picture in one prompt: visual rows are those between the text in front and the text behind."""
    model, batch = family(name), batch_of(name, "one_left")
    pieces: list[Any] = [{"method": "fastv", "keep": 9, "at": "layer:2"} if plan == "fastv@9" else plan]
    visual = visual_of(model, batch)[0]
    first, count = int(visual.nonzero()[0]), int(visual.sum())
    adapter, hooks = adapter_for(model), []

    def behind(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        entered = args[0] if args else kwargs["hidden_states"]
        out = output[0] if isinstance(output, tuple) else output
        if out.shape[1] > 1:
            stays = out.shape[1] - (len(visual) - count)
            out = out.clone()
            out[:, first : first + stays] = entered[:, -out.shape[1] :][:, first : first + stays]
        return (out, *output[1:]) if isinstance(output, tuple) else out

    with torch.no_grad():
        with tokenprune.applied(model, pieces):
            for layer in [1, 3]:  # a cut at layer 2 would change what entered
                hooks.append(adapter.layers[layer].register_forward_hook(behind, with_kwargs=True))
            try:
                truth = model.generate(**batch, max_new_tokens=4, do_sample=False, return_dict_in_generate=True,
                                       output_logits=True)  # fmt: skip
            finally:
                for hook in hooks:
                    hook.remove()
        with tokenprune.applied(model, [*pieces, "naavit(layers=[1, 3])"]) as handle:
            mine = model.generate(**batch, max_new_tokens=4, do_sample=False, return_dict_in_generate=True,
                                  output_logits=True)  # fmt: skip
            assert handle.report().kept_tokens == 9
    assert all(near(one, other) for one, other in zip(mine.logits, truth.logits))


def test_what_stands_still_is_the_same_to_the_last_bit_and_nobody_elses_tensor_is_written() -> None:
    model, batch = tiny_llava(), prompts([1, 2])
    visual, kept = visual_of(model, batch), []
    layers = model.model.language_model.layers
    hooks = [layer.register_forward_hook(lambda module, args, output: kept.append(output)) for layer in layers]
    with torch.no_grad(), tokenprune.applied(model, "naavit(layers=[1, 2, 3])"):
        states = model(**batch, output_hidden_states=True).hidden_states
        alone = model(**batch).logits
        for hook in hooks:
            hook.remove()
        assert near(model(**batch).logits, alone)  # here layers write into what the one before returned
    for layer in (1, 2):
        assert torch.equal(states[layer + 1][visual], states[layer][visual])
        assert not torch.equal(states[layer + 1][~visual], states[layer][~visual])
    assert torch.equal(kept[1], states[2]) and torch.equal(kept[2], states[3])


def test_the_last_layer_alone_changes_no_text() -> None:
    model, batch = tiny_llava(), prompts([1, 2])
    text = ~visual_of(model, batch) & batch["attention_mask"].bool()
    with torch.no_grad():
        stock = model(**batch).logits
        with tokenprune.applied(model, "naavit(layers=[3])"):
            assert near(model(**batch).logits[text], stock[text])


@pytest.mark.parametrize("method", ["naavit(layers=[])", "shortv(layers=[])"])
def test_off_and_without_pictures_nothing_changes(method: str) -> None:
    model, batch = tiny_llava(), prompts([1])
    text = {"input_ids": torch.tensor([[2, 9, 8, 7]])}
    with torch.no_grad():
        stock, alone = model(**batch).logits, model(**text).logits
        with tokenprune.applied(model, method):
            assert torch.equal(model(**batch).logits, stock)
        with tokenprune.applied(model, NAAVIT):
            assert torch.equal(model(**text).logits, alone)


def test_gradients_are_those_of_the_plain_reading() -> None:
    model, batch = tiny_llava(), prompts([1, 2])
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    found = []
    for applied in (plainly(model, visual_of(model, batch), "skip", SKIP), tokenprune.applied(model, NAAVIT)):
        model.zero_grad()
        with applied:
            model(**batch, labels=labels).loss.backward()
        found.append([weight.grad.clone() for weight in model.parameters() if weight.grad is not None])
    assert len(found[0]) == len(found[1])
    assert all(near(mine, truth) for mine, truth in zip(found[1], found[0]) if truth.norm() > 1e-6)


def test_a_masked_visual_token_hears_of_no_other() -> None:
    model, batch = tiny_llava(), prompts([1])
    visual = visual_of(model, batch)[0].nonzero()[:, 0]
    all_layers = "naavit(layers=[0, 1, 2, 3], variant='mask')"
    with torch.no_grad(), tokenprune.applied(model, all_layers):
        one = model(**batch, output_hidden_states=True).hidden_states[-1][0]

        def zero(module: Any, args: Any, kwargs: Any) -> Any:
            return args, {**kwargs, "inputs_embeds": kwargs["inputs_embeds"].index_fill(1, visual[4:5], 0.0)}

        hook = model.model.language_model.register_forward_pre_hook(zero, with_kwargs=True)
        other = model(**batch, output_hidden_states=True).hidden_states[-1][0]
        hook.remove()
    others = torch.cat([visual[:4], visual[5:]])
    assert torch.equal(one[others], other[others]) and not torch.allclose(one[-1], other[-1])


@pytest.mark.parametrize("variant", list(MODES))
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "internvl"])
def test_flops_are_those_that_torch_counts(name: str, variant: str) -> None:
    model, batch = family(name), batch_of(name, "one_left")
    counted = []
    for method in ("naavit(layers=[])", f"naavit(layers={SKIP}, variant={variant!r})"):
        with torch.no_grad(), tokenprune.applied(model, method) as handle:
            with flop_counter() as counter:
                model(**batch, use_cache=True, logits_to_keep=1)
            counted.append(counter.get_total_flops())
            report = handle.report()
    saved = (report.flops_unpruned.prefill or 0) - (report.flops.prefill or 0)
    assert saved == counted[0] - counted[1]
    assert (saved > 0) == (variant != "mask")
    by_layer = [part or 0 for part in report.flops_by_layer]
    assert by_layer[0] > by_layer[1] or variant == "mask"
    assert report.kv_bytes == report.kv_bytes_unpruned


def test_published_shares_of_flops() -> None:
    """The card: LLaVA-1.5-7B, 576 visual tokens and 64 of text; all layers frozen -75 %, 19 of 32 leave 55.2 %."""
    h, m, v, t = 4096, 11008, 576, 64
    shape = LayerShape(linear=4 * h * h + 3 * h * m, scores=2 * h)
    made = [SimpleNamespace(parameters=lambda: [torch.empty(h, h, device="meta")]) for _ in range(2)]
    reading = SimpleNamespace(projections={"k": made[0], "v": made[1]})
    adapter: Any = SimpleNamespace(layers=[None], reading=lambda layer: reading)
    skips = skipped(adapter, 0, shape, "still")
    assert skips is not None
    whole, saved = shape.flops(t + v), skips.flops(t, v)
    assert 32 * whole == pytest.approx(8.50e12, rel=2e-3) and 32 * (whole - saved) == pytest.approx(2.09e12, rel=3e-3)
    assert (32 * whole - 19 * saved) / (32 * whole) == pytest.approx(0.552, abs=2e-3)


def test_shortv_freezes_the_layers_that_contribute_least(tmp_path: Any) -> None:
    file = tmp_path / "shortv.json"
    file.write_text(json.dumps({"contributions": [0.4, 0.1, 0.3, 0.2]}), encoding="utf-8")
    model, batch = tiny_llava(), prompts([1])
    with torch.no_grad():
        with tokenprune.applied(model, {"method": "shortv", "calibration": str(file), "share": 0.5}) as handle:
            mine = model(**batch).logits
            assert "layers 1, 3" in str(handle.report())
        with tokenprune.applied(model, "shortv(layers=[1, 3])"):
            assert torch.equal(model(**batch).logits, mine)
    with pytest.raises(ValueError, match="has 2"):
        tokenprune.apply(tiny_llava(layers=2), {"method": "shortv", "calibration": str(file)})
    for wrong, said in (
        ({}, "needs to know"),
        ({"calibration": "no.json"}, "is neither a file"),
        ({"share": 2.0}, r"\[0, 1\]"),
    ):
        with pytest.raises(ValueError, match=said):
            tokenprune.apply(model, {"method": "shortv", **wrong})


def test_shortv_is_calibrated_by_what_freezing_one_layer_changes(tmp_path: Any, capsys: Any) -> None:
    file = tmp_path / "shortv.json"
    asked = ["--model", "pocket-llava", "--data", "pocket", "--samples", "2", "--output", str(file)]
    assert main(["calibrate", "shortv", *asked]) == 0
    said = json.loads(file.read_text(encoding="utf-8"))
    assert capsys.readouterr().out.count(" nats") == said["layers"] == len(said["contributions"])
    loaded = load_model("pocket-llava")
    samples, _ = draw_samples("pocket", 2, 1, 0)
    for layer in (1, said["layers"] - 1):
        found = 0.0
        for one in samples:
            batch = loaded.inputs([one.question], [one.image])
            with torch.no_grad():
                stock = loaded.model(**batch).logits[0, -1].double().softmax(-1)
                with plainly(loaded.model, visual_of(loaded.model, batch), "skip", [layer]):
                    other = loaded.model(**batch).logits[0, -1].double().softmax(-1)
            found += float((stock * (stock / other).log()).sum()) / 2
        assert said["contributions"][layer] == pytest.approx(max(found, 0), rel=1e-3, abs=1e-7)
    assert main(["calibrate", "shrtv", *asked]) == 2
    assert "Did you mean 'shortv'" in capsys.readouterr().err


def test_what_does_not_go_together_is_refused() -> None:
    model = tiny_llava()
    with pytest.raises(ValueError, match="one layer takes one"):
        tokenprune.apply(model, ["naavit(layers=[2])", "shortv(layers=[2])"])
    with pytest.raises(ValueError, match="one layer takes one"):
        tokenprune.apply(model, ["naavit(layers=[2])", "var(layers=[2])"])
    with pytest.raises(ValueError, match="variant must be one of .*Did you mean 'composite'"):
        tokenprune.apply(model, "naavit(variant='composit')")
    with pytest.raises(ValueError, match="transprune reads what decoder layer"):
        tokenprune.apply(model, [{"method": "transprune", "keep": 9}, "naavit(layers=[0, 1, 2, 3])"])
    with pytest.raises(ValueError, match="one layer takes one"):
        tokenprune.apply(model, [{"method": "era", "keep": 9}, NAAVIT])
    with pytest.raises(ValueError, match="has layers 0 to 3"):
        tokenprune.apply(model, "naavit(layers=[4])")
