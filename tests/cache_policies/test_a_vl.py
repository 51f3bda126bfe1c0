"""A-VL against a model that keeps all keys and hides them in a float64 matrix, and the invariants of its card."""

from __future__ import annotations

import contextlib
import copy
import functools

import pytest
import torch
from _families import batch_of, family
from _tiny import IMAGE, PATCHES, prompts, tiny_llava
from interventions.open_attention import generated
from masked_reference import relative_error

import tokenprune
from tokenprune.seams import cache_argument, cache_in

TOLERANCE = 1e-5  # relative, fp32
ACTING = "a_vl(secondary=0.5,core=0.2,refresh=3,text=0.6,heavy=0.7,least_text=3)"


@functools.cache
def model(attention: str = "sdpa"):
    return tiny_llava(attention=attention)


class Reference:
    """The card's two policies with loops over samples and heads, for one call of several tokens and then one at a time.

    Nothing leaves here: what the policy has let go of is hidden. `sets` has, by layer and sample, (secondary, core,
    text by key head) after the last call.
    """

    def __init__(self, batch, images, secondary=0.5, core=0.2, refresh=3, text=0.6, heavy=0.7, least=3):
        self.real, self.images = batch["attention_mask"].bool(), images
        self.secondary, self.core, self.refresh = secondary, core, refresh
        self.text, self.heavy, self.least = text, heavy, least
        self.sets, self.got, self.step, self.sizes = {}, {}, 0, {}

    def pictures(self, b):
        """Places of each picture of a row."""
        at = (self.images[b]).nonzero()[:, 0].tolist()
        groups = []
        for place in at:
            if not groups or place != groups[-1][-1] + 1:
                groups.append([])
            groups[-1].append(place)
        return groups

    def hidden(self, layer, b, head, length):
        """`[length]` bool, keys that a row at hand does not see."""
        if (layer, b) not in self.sets:
            return torch.zeros(length, dtype=torch.bool)
        secondary, core, text = self.sets[layer, b]
        full = self.refresh > 0 and self.step % self.refresh == 0
        seen = secondary if full or self.refresh < 0 else core
        gone = torch.zeros(length, dtype=torch.bool)
        behind = self.behind(b, length)
        for k in range(length - 1):
            visual = k < self.images.shape[1] and bool(self.images[b, k])
            gone[k] = (visual and k not in seen) or (k in behind and k not in text[head])
        return gone

    def behind(self, b, length):
        groups = self.pictures(b)
        if not groups:
            return set()
        first, prompt = groups[0][0], self.real.shape[1]
        own = {k for k in range(first, prompt) if self.real[b, k] and not self.images[b, k]}
        return own | set(range(prompt, length))

    def learn(self, layer, b, weights):
        """`weights` `[H, rows, K]` of this call, hidden keys 0."""
        groups, length, rows = self.pictures(b), weights.shape[2], weights.shape[1]
        if not groups:
            return
        behind, start = sorted(self.behind(b, length)), length - rows
        last = max(k for k in range(length) if k >= self.real.shape[1] or self.real[b, k]) - start
        s = weights[:, last].mean(0)
        secondary, core, _ = self.sets.get((layer, b), (set(), set(), None))
        if self.step == 0 or (self.refresh > 0 and self.step % self.refresh == 0):
            best = [sorted(g, key=lambda k: (-float(s[k]), k)) for g in groups]
            if self.step == 0:
                secondary = {k for own in best for k in own[: int(self.secondary * len(own))]}
            core = set()
            for own in best:
                core |= set([k for k in own if k in secondary][: int(self.core * len(own))])
        group = weights.shape[0] // self.key_heads
        got = self.got.get((layer, b), torch.zeros(self.key_heads, length))
        got = torch.nn.functional.pad(got, (0, length - got.shape[1]))
        asking = [k - start for k in behind if k >= start]
        for head in range(self.key_heads):
            got[head] += weights[head * group : (head + 1) * group][:, asking].sum((0, 1))
        self.got[layer, b] = got
        size = max(round(self.text * len(behind)), self.least)
        heavy, windows = int(self.heavy * size), []
        for head in range(self.key_heads):
            there = behind
            if (layer, b) in self.sets:
                there = [k for k in behind if k in self.sets[layer, b][2][head] or k == length - 1]
            if len(there) <= size or self.text == 1:
                windows.append(set(there))
                continue
            recent = there[len(there) - (size - heavy) :]
            rest = sorted(set(there) - set(recent), key=lambda k: (-float(got[head, k]), k))
            windows.append({*recent, *rest[:heavy]})
        self.sizes[layer, b] = min(size, len(behind)) if self.text < 1 else len(behind)
        self.sets[layer, b] = (secondary, core, windows)


@contextlib.contextmanager
def hiding(adapter, rule):
    """Attention of all layers as `rule` has it, in float64."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    config = adapter.language_model.config
    before, places = config._attn_implementation, {}
    for number, layer in enumerate(adapter.layers):
        places[adapter.attention(layer)] = number

    def attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
        layer = places[module]
        if layer == 0 and query.shape[2] == 1:
            rule.step += 1
        groups, (batch, heads, rows, _), count = query.shape[1] // key.shape[1], query.shape, key.shape[2]
        rule.key_heads = key.shape[1]
        keys, values = (part.repeat_interleave(groups, 1).double() for part in (key, value))
        scores = query.double() @ keys.transpose(2, 3) * (scaling or module.scaling)
        seen = torch.ones(rows, count, dtype=torch.bool).tril(count - rows).expand(batch, 1, -1, -1)
        real = torch.nn.functional.pad(rule.real, (0, count - rule.real.shape[1]), value=True)
        seen = (seen & real[:, None, None]).expand(-1, heads, -1, -1).clone()
        for b in range(batch):
            for head in range(heads):
                seen[b, head] &= ~rule.hidden(layer, b, head // groups, count)
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0.0)
        for b in range(batch):
            rule.learn(layer, b, weights[b])
        return (weights @ values).transpose(1, 2).to(query.dtype), None

    ALL_ATTENTION_FUNCTIONS["hiding"] = attention
    config._attn_implementation = "hiding"
    try:
        yield
    finally:
        config._attn_implementation = before
        ALL_ATTENTION_FUNCTIONS.pop("hiding")


def steps(found, batch, tokens):
    """Logits `[T, B, V]` of the last real row and of decoded tokens, and the cache."""
    scores, mask = [], batch["attention_mask"]
    with torch.no_grad():
        out = found(**batch, use_cache=True, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
        last = (mask * torch.arange(mask.shape[1])).argmax(1)
        scores.append(out.logits[torch.arange(len(mask)), last])
        cache = cache_in(out)
        for number in range(tokens.shape[1]):
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            given = {"input_ids": tokens[:, number : number + 1], "position_ids": (mask.cumsum(1) - 1)[:, -1:]}
            out = found(**given, attention_mask=mask, **cache_argument(cache), use_cache=True)
            scores.append(out.logits[:, -1])
    return torch.stack(scores), cache


def check(found, method, batch, images, count=7, **settings):
    tokens = torch.randint(8, 60, (len(batch["input_ids"]), count), generator=torch.Generator().manual_seed(3))
    with tokenprune.applied(found, method) as handle:
        adapter = handle.adapter
        scores, cache = steps(found, batch, tokens)
    rule = Reference(batch, images, **settings)
    with hiding(adapter, rule):
        truth, _ = steps(found, batch, tokens)
    assert relative_error(scores, truth) < TOLERANCE
    with torch.no_grad():
        stock, _ = steps(found, batch, tokens)
    assert relative_error(scores[1:], stock[1:]) > 1e-3, "the policy changes what is decoded"
    assert torch.equal(scores[0], stock[0]), "and not the prompt's own answer"
    return rule, cache


@pytest.mark.parametrize(("images", "side", "attention"), [([1, 3, 0, 2], "left", "sdpa"), ([2, 1], "right", "eager")])
def test_equals_hiding_keys_in_a_matrix(images, side, attention):
    batch = prompts(images, side)
    rule, cache = check(model(attention), ACTING, batch, batch["input_ids"] == IMAGE)
    state = cache.tokenprune_policy
    for (layer, sample), (secondary, core, text) in rule.sets.items():
        keys = state.layers[layer]
        per_picture = [(int(0.5 * PATCHES), int(0.2 * PATCHES))] * images[sample]
        assert (len(secondary), len(core)) == tuple(map(sum, zip(*per_picture))) and core < secondary
        read = int((keys.image[sample] > 0).sum())  # 7 steps: the sixth refreshed, so the core is what is read
        waits = int(keys.aside.real[sample].sum())
        assert (read, read + waits) == (len(core), len(secondary)), "invariant 2"
        assert int(keys.text[sample].sum()) == rule.sizes[layer, sample] == len(text[0]), "invariant 4"
        size = rule.sizes[layer, sample]
        recent = size - int(0.7 * size)
        total = batch["input_ids"].shape[1] + 7
        assert all(set(range(total - min(recent, 7), total)) <= own for own in text)
    layers = {tuple(sorted(rule.sets[layer, 0][1])) for layer in range(4)}
    heads = rule.sets[1, 1][2]
    assert len(layers) > 1 and heads[0] != heads[1], "layers and heads hold different keys"


@pytest.mark.parametrize(
    ("options", "settings"),
    [
        ("secondary=0.4,refresh=-1,text=1", {"secondary": 0.4, "refresh": -1, "text": 1}),
        ("secondary=1,core=1,text=0.4,heavy=0.5,least_text=2",
         {"secondary": 1, "core": 1, "text": 0.4, "heavy": 0.5, "least": 2}),
        ("secondary=0.6,core=0.1,refresh=2,text=1", {"secondary": 0.6, "core": 0.1, "refresh": 2, "text": 1}),
    ],
)  # fmt: skip
def test_each_policy_alone_equals_hiding_keys(options, settings):
    batch = prompts([1])
    check(model(), f"a_vl({options})", batch, batch["input_ids"] == IMAGE, **settings)


def test_equals_hiding_keys_with_positions_in_three_dimensions():
    found, batch = family("qwen2_5_vl"), batch_of("qwen2_5_vl", "ragged_left")
    adapter = tokenprune.api.adapter_for(found)
    images = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
    for number in adapter.placeholder_ids.values():
        images |= batch["input_ids"] == number
    stock = generated(found, batch, 5)
    with tokenprune.applied(found, ACTING):
        scores = generated(found, batch, 5)
    with hiding(adapter, Reference(batch, images)):
        assert relative_error(scores, generated(found, batch, 5)) < TOLERANCE
    assert torch.equal(scores[0], stock[0]) and relative_error(scores[1:], stock[1:]) > 1e-3


@pytest.mark.parametrize(
    "method", ["a_vl(secondary=1,refresh=-1,text=1)", "a_vl(secondary=1,core=1,text=1)", "a_vl(layers=[])"]
)
def test_off_is_stock_bit_for_bit(method):
    batch = prompts([1, 0, 2])
    stock = generated(model(), batch)
    with tokenprune.applied(model(), method):
        assert torch.equal(generated(model(), batch), stock)


def cache_bytes(cache):
    waits = [keys.aside for keys in cache.tokenprune_policy.layers.values() if keys.aside is not None]
    tensors = [part for layer in cache.layers for part in (layer.keys, layer.values)]
    return sum(t.numel() * t.element_size() for t in [*tensors, *(p for w in waits for p in (w.key, w.value))])


@pytest.mark.parametrize("before", [[], ["holov@20"], ["fastv@12"]])
def test_bytes_and_flops_are_those_that_are_counted(before):
    from torch.utils.flop_counter import FlopCounterMode

    found, batch = model(), prompts([1])
    with tokenprune.applied(found, [*before, ACTING]) as handle, torch.no_grad():
        cache = cache_in(found(**batch, use_cache=True, logits_to_keep=1))
        report = handle.report()
        assert report.kv_bytes == cache_bytes(cache) < report.kv_bytes_unpruned
        more = torch.nn.functional.pad(batch["attention_mask"], (0, 1), value=1)
        with FlopCounterMode(display=False) as counter:
            found(input_ids=torch.tensor([[9]]), attention_mask=more, **cache_argument(cache), use_cache=True)
        assert counter.get_total_flops() == report.flops.decode < report.flops_unpruned.decode
        assert "a_vl  layers 0-3; 0.5 of a picture's keys stay, 0.2 are read" in str(report)


def test_beams_and_copies_and_generate_go_on_from_it():
    found, batch = model(), prompts([1, 2])
    with tokenprune.applied(found, ACTING), torch.no_grad():
        one = {name: values[:1] for name, values in prompts([1]).items()}
        alone = generated(found, one)
        cache = cache_in(found(**one, use_cache=True))
        copied = copy.deepcopy(cache)
        more = torch.nn.functional.pad(one["attention_mask"], (0, 1), value=1)
        token = {"input_ids": alone[0].argmax(-1, keepdim=True), "attention_mask": more}
        first = found(**token, **cache_argument(cache)).logits
        again = found(**token, **cache_argument(copied)).logits
        assert torch.equal(first, again) and relative_error(first[:, -1], alone[1]) < TOLERANCE
        beams = found.generate(**batch, num_beams=3, max_new_tokens=5, do_sample=False)
        assert beams.shape == (2, batch["input_ids"].shape[1] + 5)
        scores, ways = [], copy.deepcopy(cache)
        ways.reorder_cache(torch.tensor([0]))
        for held in (cache, ways):
            more = torch.nn.functional.pad(one["attention_mask"], (0, 2), value=1)
            scores.append(found(input_ids=torch.tensor([[9]]), attention_mask=more, **cache_argument(held)).logits)
        assert torch.equal(*scores)


def test_text_of_a_later_turn_reads_all_that_stayed():
    found, batch = model(), prompts([1])
    text = torch.randint(8, 60, (1, 3), generator=torch.Generator().manual_seed(5))
    kept = int(0.5 * PATCHES)
    with tokenprune.applied(found, "a_vl(secondary=0.5,core=0.2,refresh=3,text=1)"), torch.no_grad():
        cache = cache_in(found(**batch, use_cache=True))
        assert cache.layers[0].keys.shape[2] == batch["input_ids"].shape[1] - PATCHES + int(0.2 * PATCHES)
        seen = []
        hook = found.model.language_model.layers[0].self_attn.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(cache.layers[0].keys.shape[2]), with_kwargs=True
        )
        more = torch.nn.functional.pad(batch["attention_mask"], (0, 3), value=1)
        found(input_ids=text, attention_mask=more, **cache_argument(cache), use_cache=True)
        hook.remove()
        assert seen == [batch["input_ids"].shape[1] - PATCHES + kept]
        assert cache.get_seq_length() == batch["input_ids"].shape[1] + 3, "invariant 5: every token is counted"
        with pytest.raises(ValueError, match="brings a picture to a cache that a_vl has thinned"):
            second = prompts([1], seed=4)
            mask = torch.cat([more, second["attention_mask"]], 1)
            found(**{**second, "attention_mask": mask}, **cache_argument(cache), use_cache=True)
        with pytest.raises(ValueError, match="Decode without drafts"):
            cache.crop(-1)


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ("a_vl(secondary=0)", "secondary is a share, in \\(0, 1\\], got 0"),
        ("a_vl(core=0.7)", "no larger than secondary=0.5, got 0.7"),
        ("a_vl(refresh=0)", "refresh must be a number of steps from 1 on, or -1, got 0"),
        ("a_vl(least_text=0)", "least_text must be a number of tokens"),
        ("a_vl@64", "a_vl thins the KV cache and keeps every token, so it takes no budget, got 64"),
        ("a_vl(layers=[1])", "a_vl acts in all decoder layers"),
        ("a_vl+act", "act notes facts on the keys of decoder layer"),
        ("a_vl+a_vl", "both say what stays in the KV cache"),
    ],
)
def test_what_it_cannot_do_is_refused(method, said):
    with pytest.raises(ValueError, match=said):
        tokenprune.apply(model(), method)
