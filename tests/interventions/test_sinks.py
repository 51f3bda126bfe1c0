"""Sink channels: the table, and discovery on models with planted massive activations."""

from __future__ import annotations

import re
import warnings

import pytest
import torch
from _tiny import prompts, tiny_llava
from interventions.explicit import Explicit, explicit_var
from masked_reference import compare, run_pruned

import tokenprune
from tokenprune.interfaces.intervention import DecoderInfo
from tokenprune.interventions._sinks import known_channels

CHANNEL = 17
SINKS = [3, 21]  # places in the 6 x 6 picture; 2 of 36 are 5.6 percent, so pictures here are larger
BOS = 2


def planted(
    width: int = 48, size: float = 30000.0, where: tuple[int, ...] = (50,), loud: bool = True, bos: bool = True
):
    """A model whose first token, and whose picture at `where`, have one huge channel, and whose keys there are loud."""
    model = tiny_llava(layers=5, hidden_size=width, intermediate_size=64)
    with torch.no_grad():
        if bos:
            model.get_input_embeddings().weight[BOS, CHANNEL] = size
        for layer in model.model.language_model.layers:
            layer.self_attn.o_proj.weight[CHANNEL] = 0  # the channel stays as it was planted
            layer.mlp.down_proj.weight[CHANNEL] = 0
            scale = 8.0 if loud else 0.0
            layer.self_attn.k_proj.weight[:, CHANNEL] *= scale

    def plant(module, args, output):
        output = output.clone()
        output.view(-1, 144, width)[:, list(where), CHANNEL] = size
        return output

    model.model.multi_modal_projector.register_forward_hook(plant)
    return model


def batch(images: list[int], seed: int = 1):
    """Pictures of 12 x 12 tokens: 1 of 144 is 0.7 percent. Rows begin with BOS."""
    found = prompts(images, "left", seed, grid=(12, 12))
    for row, mask in zip(found["input_ids"], found["attention_mask"]):
        row[int((mask == 0).sum())] = BOS
    return found


def big(model):
    """The tower takes 84 pixels a side, as the prompts' pictures have."""
    from torch import nn

    embeddings = model.model.vision_tower.embeddings
    embeddings.image_size, embeddings.num_patches, embeddings.num_positions = 84, 144, 145
    embeddings.position_embedding = nn.Embedding(145, 32)
    embeddings.register_buffer("position_ids", torch.arange(145).expand(1, -1), persistent=False)
    return model


def run(model, spec, batches):
    handle = tokenprune.apply(model, spec)
    with torch.no_grad():
        for one in batches:
            model(**one)
    return handle


def test_planted_channels_are_found_and_act():
    model = big(planted())
    first = batch([1, 1])
    with torch.no_grad():
        stock = model(**first).logits
    handle = run(model, "var(calibrate=4, rho=0.1, s_min=0.0)", [])
    with torch.no_grad():
        assert torch.equal(model(**first).logits, stock), "prompts run unchanged while it looks"
        assert "not acting yet: 2 more prompts" in str(handle.report())
        again = {**first, "input_ids": first["input_ids"].clone()}
        again["input_ids"][:, -3:] = 9  # the same pictures, another question
        model(**again)
        acting = model(**first).logits
    found = handle.interventions[0].discovery
    assert found.channels == (CHANNEL,) and found.reason == ""
    assert 4 < found.tau < 48**0.5, "20 cannot be reached with 48 channels: the gap in phi decides"
    assert found.share == pytest.approx(1 / 144) and found.ratio > 3 and found.overlap == 1.0
    assert not torch.equal(acting, stock)
    report = str(handle.report())
    assert f"channels {CHANNEL} discovered on 4 prompts" in report and "1.0 visual" in report
    settled = handle.interventions[0].settled()
    handle.remove()
    with torch.no_grad(), tokenprune.applied(model, settled):
        torch.testing.assert_close(model(**first).logits, acting, rtol=1e-5, atol=1e-6)


def test_a_wide_model_meets_the_published_threshold():
    model = big(planted(width=512))
    handle = run(model, "var(calibrate=2)", [batch([1, 1]), batch([1])])
    found = handle.interventions[0].discovery
    handle.remove()
    assert found.channels == (CHANNEL,) and found.tau == 20.0 and found.reason == ""


def test_discovery_without_a_bos_token_reads_other_text():
    model = big(planted(bos=False))
    with torch.no_grad():
        model.get_input_embeddings().weight[9, CHANNEL] = 30000.0
    given = batch([1, 1])
    given["input_ids"][:, -2] = 9
    handle = run(model, "var(calibrate=2)", [given, given])
    assert handle.interventions[0].discovery.channels == (CHANNEL,)
    handle.remove()


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda: tiny_llava(layers=5), "no channel stands out"),
        (lambda: planted(where=()), "have .* only|they mark"),
        (lambda: planted(where=tuple(range(40))), "27.78% of the image tokens"),
        (lambda: planted(loud=False), "times the mean attention"),
    ],
    ids=["nothing planted", "no visual sinks", "too many", "not attended to"],
)
def test_where_discovery_fails_var_is_off_and_says_why(model, reason):
    own, given = big(model()), batch([1, 2])
    with torch.no_grad():
        stock = own(**given).logits
    handle = run(own, "var(calibrate=2, rho=0, s_min=0)", [given])
    with torch.no_grad(), pytest.warns(UserWarning, match=f"var is off for this model: .*({reason})"):
        assert torch.equal(own(**given).logits, stock)
    with torch.no_grad():
        assert torch.equal(own(**given).logits, stock)
    assert re.search(f"off: .*({reason})", str(handle.report()))
    settled = handle.interventions[0].settled()
    handle.remove()
    with torch.no_grad(), warnings.catch_warnings(), tokenprune.applied(own, settled):
        warnings.simplefilter("error")
        assert torch.equal(own(**given).logits, stock)


def test_a_discovered_var_equals_the_explicit_matrix():
    model, given = big(planted()), batch([1, 2])
    handle = run(model, "var(calibrate=2, rho=0.05, s_min=0.1)", [given, given])
    settled, tau = handle.interventions[0].settled(), handle.interventions[0].discovery.tau
    handle.remove()
    rule = Explicit([2, 3], [CHANNEL], tau, 0.6, 0.95, 0.1)
    result = run_pruned(model, [settled], None, given, tokens=3)
    with explicit_var(result["adapter"], given, rule):
        compare(result, given, 1e-5)
    assert 0 < rule.changed < rule.pairs


def test_the_table_is_read_by_family_and_sizes():
    llava = DecoderInfo("llava", "llama", 4096, 32, 32, 32)
    known = known_channels(llava)
    assert known is not None and known.channels == (1415, 2533) and "code" in known.evidence
    assert known_channels(DecoderInfo("llava_next", "mistral", 5120, 40, 40, 40)) is None
    assert known_channels(DecoderInfo("qwen2_5_vl", "qwen2_5_vl_text", 3584, 28, 28, 4)).channels == (458, 2570)
    assert known_channels(DecoderInfo("llava", "llama", 48, 4, 4, 4)) is None
    assert known_channels(DecoderInfo("llava", "llama", 4096, 32, 32, 8)) is None, "Llama 3 is no Vicuna"


def test_a_model_of_the_table_is_reported_with_its_evidence(monkeypatch):
    from tokenprune.interventions import _sinks, var

    known = _sinks.Known("Some-7B", (5,), "third party, one source")
    monkeypatch.setattr(var, "known_channels", lambda decoder: known)
    model = tiny_llava(layers=5)
    with torch.no_grad(), tokenprune.applied(model, "var") as handle:
        model(**prompts([1]))
        text = str(handle.report())
    assert "table row Some-7B, taken for the model's sizes; evidence: third party, one source" in text
    with torch.no_grad(), tokenprune.applied(model, "var(channels=discover)") as handle:
        model(**prompts([1]))
        assert "not acting yet" in str(handle.report())


@pytest.mark.parametrize("method", ["fastv@20", "transprune@20", "pyramiddrop@20", "todre(tau=9)@100"])
def test_discovery_beside_a_stage_that_cuts_where_it_listens(method):
    """It looks before the cut and listens after it: attention is that of the tokens that are left."""
    var = "var(channels=discover,calibrate=4,rho=0.1,s_min=0.0)"
    found = []
    for plan in ([var], [method, var]):
        with tokenprune.applied(big(planted()), plan) as handle, torch.no_grad():
            for _ in range(3):
                handle.model(**batch([1, 1]))
            found.append(handle.interventions[0].discovery)
    alone, beside = found
    assert alone is not None and alone.channels == beside.channels == (CHANNEL,)
    assert not alone.reason and not beside.reason and beside.ratio > 3


def test_discovery_hears_padded_prompts_too():
    """The rows that fill up a batch may be padding, which sees no key: nothing of them counts, not even 0 * NaN."""
    given = batch([1, 2, 1])
    assert int(given["attention_mask"].min()) == 0
    with tokenprune.applied(big(planted()), "var(channels=discover,calibrate=9)") as handle, torch.no_grad():
        handle.model(**given)
        records = handle.interventions[0]._search._records.values()
    assert len(records) == 3 * 2, "three prompts in layers 2 and 3 of 5"
    for record in records:
        assert record.attention is not None and bool(record.attention.isfinite().all())
        assert float(record.attention.sum()) > 0


def test_beams_of_a_prompt_are_one_prompt_to_discovery():
    model = tiny_llava()
    with tokenprune.applied(model, "var(channels=discover,calibrate=4)") as handle, torch.no_grad():
        model.generate(**prompts([1]), max_new_tokens=2, num_beams=3, do_sample=False)
        assert handle.interventions[0].wants_prompts == 3
        model(**prompts([1, 1], seed=5))
        assert handle.interventions[0].wants_prompts == 1
