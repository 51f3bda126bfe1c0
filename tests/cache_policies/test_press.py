"""Presses behind pruned prompts: a stand-in with kvpress' interface against a model that keeps and hides all keys, and
kvpress itself where it can be imported."""

from __future__ import annotations

import contextlib
import functools
import importlib.util

import pytest
import torch
from _tiny import prompts, tiny_llava
from interventions.open_attention import generated
from masked_reference import masked_by, relative_error

import tokenprune
from tokenprune.cache_policies.press import Press
from tokenprune.seams import cache_argument, cache_in, cache_of

TOLERANCE = 1e-5  # relative, fp32


@functools.cache
def model():
    return tiny_llava()


class Ends:
    """Keeps the first two keys and the last ones, as StreamingLLM does; `forward_hook` as kvpress', by the names that
    the installed transformers has."""

    def __init__(self, compression_ratio):
        self.compression_ratio = compression_ratio

    def compress(self, module, hidden_states, keys, values, attentions, kwargs):
        assert hidden_states.shape[1] == keys.shape[2] == len(kwargs["cache_position"])
        count = int(keys.shape[2] * (1 - self.compression_ratio))
        index = torch.cat([torch.arange(2), torch.arange(keys.shape[2] - count + 2, keys.shape[2])])
        return keys[:, :, index], values[:, :, index]

    @contextlib.contextmanager
    def __call__(self, found):
        def hook(module, args, kwargs, output):
            held = cache_of(kwargs).layers[module.layer_idx]
            if held.keys.shape[2] == kwargs["hidden_states"].shape[1]:
                more = {"cache_position": torch.arange(held.keys.shape[2])}
                held.keys, held.values = self.compress(
                    module, kwargs["hidden_states"], held.keys, held.values, output[1], {**kwargs, **more}
                )

        hooks = [
            layer.self_attn.register_forward_hook(hook, with_kwargs=True) for layer in found.model.language_model.layers
        ]
        try:
            yield
        finally:
            for one in hooks:
                one.remove()


def answers(found, batch, handle):
    tokens = torch.tensor([[9, 17, 23]])
    with torch.no_grad():
        out = found(**batch, use_cache=True)
        report, cache = handle.report(), cache_in(out)
        counted = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
        scores, mask = [out.logits[:, -1]], batch["attention_mask"]
        for number in range(3):
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            token = tokens[:, number : number + 1]
            scores.append(found(input_ids=token, attention_mask=mask, **cache_argument(cache)).logits[:, -1])
    return torch.stack(scores, 1), report, counted, tokens


@pytest.mark.parametrize("way", ["policy", "with"])
def test_a_press_behind_holov_is_counted_and_equals_hiding_its_keys(way):
    """The truth is the unpruned model whose mask hides what holov took out, and of decoded rows what the press did."""
    found, batch, press = model(), prompts([1]), Ends(0.5)
    inside = press(found) if way == "with" else contextlib.nullcontext()
    method = ["holov@20", Press(press=press)] if way == "policy" else ["holov@20"]
    with inside, tokenprune.applied(found, method) as handle:
        scores, report, counted, tokens = answers(found, batch, handle)
        kept, adapter = handle.kept, handle.adapter
        again = generated(found, batch)
    assert report.kv_bytes == counted < report.kv_bytes_unpruned / 2
    assert "press  layers 0-3; Ends, 0.5 of the keys leave" in str(report) or way == "with"
    there = torch.ones(batch["input_ids"].shape[1], dtype=torch.bool)
    places = (batch["input_ids"][0] == 5).nonzero()[:, 0]
    there[places] = False
    there[places[kept[0][0]]] = True
    left = there.nonzero()[:, 0]
    count = int(len(left) * 0.5)
    stays = torch.cat([left[:2], left[len(left) - count + 2 :]])
    hidden = there.clone()
    hidden[stays] = False
    truth = masked_by(adapter, batch, kept, "compact")
    with hiding_behind(adapter, batch["input_ids"].shape[1], hidden):
        wanted = truth.continuation(tokens)
    assert relative_error(scores[:, : wanted.shape[1]], wanted) < TOLERANCE
    assert torch.isfinite(again).all()


@contextlib.contextmanager
def hiding_behind(adapter, prompt, hidden):
    """Rows behind a prompt of so many tokens do not see the keys `hidden` `[S]`."""

    def before(module, args, kwargs):
        mask, length = kwargs["attention_mask"], kwargs["hidden_states"].shape[1]
        more = torch.zeros(length, length, dtype=torch.bool)
        more[prompt:, :prompt] = hidden
        if mask is None:
            mask = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
        shut = mask & ~more if mask.dtype == torch.bool else mask.masked_fill(more, torch.finfo(mask.dtype).min)
        return args, {**kwargs, "attention_mask": shut}

    hooks = [layer.self_attn.register_forward_pre_hook(before, with_kwargs=True) for layer in adapter.layers]
    try:
        yield
    finally:
        for one in hooks:
            one.remove()


def test_what_a_press_cannot_do_is_refused():
    found = model()
    with (
        tokenprune.applied(found, [Press(press=Ends(0.5))]),
        pytest.raises(ValueError, match="know nothing of padding"),
    ):
        found(**prompts([1, 2]), use_cache=True)
    taken = pytest.raises(ValueError, match="took keys out of the cache, and act")
    with Ends(0.5)(found), tokenprune.applied(found, ["holov@9", "act"]), taken:
        found(**prompts([1]), use_cache=True)
    with pytest.raises(ValueError, match="must be a press of kvpress or its name, got None"):
        tokenprune.apply(found, "press")
    with pytest.raises(ValueError, match="ratio goes with the name"):
        Press(press=Ends(0.5), ratio=0.5)

    class BasePress:
        def compress(self):
            pass

        def forward_hook(self):
            pass

        def __call__(self):
            pass

    with pytest.raises(ValueError, match="has a forward_hook of its own"):
        Press(press=type("Later", (BasePress,), {"forward_hook": lambda self: None})())


def test_a_ratio_of_zero_is_stock_bit_for_bit():
    stock = generated(model(), prompts([1]))
    with tokenprune.applied(model(), [Press(press=Ends(0))]):
        assert torch.equal(generated(model(), prompts([1])), stock)


needs_kvpress = pytest.mark.skipif(
    importlib.util.find_spec("kvpress") is None,
    reason="kvpress is not installed: its releases want transformers below 5.3, and 5.17 is the lowest here",
)


@needs_kvpress
@pytest.mark.parametrize(
    "press", ["SnapKVPress(window_size=4)", "KnormPress()", "StreamingLLMPress(n_sink=2)", "TOVAPress()"]
)
def test_presses_of_kvpress_thin_a_pruned_cache(press):
    import kvpress

    made = eval(press, vars(kvpress))
    made.compression_ratio = 0.5
    with tokenprune.applied(model(), ["holov@20", Press(press=made)]) as handle:
        scores, report, counted, _ = answers(model(), prompts([1]), handle)
    assert torch.isfinite(scores).all() and report.kv_bytes == counted < report.kv_bytes_unpruned / 2


@needs_kvpress
def test_its_own_context_asks_for_what_transformers_no_longer_passes():
    from kvpress import KnormPress

    with KnormPress(0.5)(model()), pytest.raises(KeyError, match="past_key_values|cache_position"):
        model()(**prompts([1]), use_cache=True)
