"""The numbers of the diagnostics are those of full matrices of the stock model, and no matrix is formed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import pytest
import torch
from _families import batch_of, family
from _tiny import TEXT
from torch.utils._python_dispatch import TorchDispatchMode

from tokenprune.api import adapter_for, applied, prepare
from tokenprune.evals.diagnose.attention_tap import Call
from tokenprune.evals.diagnose.batch_reader import BatchReader
from tokenprune.evals.diagnose.diagnose import read_answers
from tokenprune.evals.diagnose.gather import Gathered
from tokenprune.evals.diagnose.prompt_tokens import FIRST, IMAGE, QUESTION, TEMPLATE, PromptTokens
from tokenprune.evals.diagnose.row_blocks import BLOCK
from tokenprune.evals.diagnose.sink_channels import Channels
from tokenprune.evals.models.load import LoadedModel

TOKENS, KINDS = 3, 5
CHANNELS = Channels((3, 17), 1.2, "", "", "given")


def _tokens(model: Any, batch: dict[str, torch.Tensor]) -> PromptTokens:
    """The last three words are the question; a third of the image tokens are asked about."""
    ids, real = batch["input_ids"], batch["attention_mask"].bool()
    visual = torch.zeros_like(real)
    for number in adapter_for(model).placeholder_ids.values():
        visual |= ids == number
    groups = torch.where(visual, IMAGE, TEMPLATE) * real
    groups[:, -4:-1] = QUESTION
    groups[torch.arange(len(ids)), real.int().argmax(1)] = FIRST
    region = visual & (torch.arange(ids.shape[1]) % 3 == 0)
    return PromptTokens(groups, region, torch.ones(len(ids), dtype=torch.bool))


def _full(model: Any, batch: dict[str, torch.Tensor], method: str | None, tokens: PromptTokens) -> dict[str, Any]:
    """By layer of the model: the matrix of prompt and answer `[B, H, n, n]` float64, and the kind of each of the n
    tokens `[B, n]`, with 5 for those of the answer, 0 for padding; and the hidden states that enter it."""
    hidden: dict[int, torch.Tensor] = {}
    stays: list[torch.Tensor] = []
    layers = adapter_for(model).layers

    def run() -> dict[int, list[torch.Tensor]]:
        with _in_the_open(layers) as found:
            model.generate(**batch, do_sample=False, max_new_tokens=TOKENS)
        return found

    with torch.no_grad():
        if method is None:
            hooks = _note(layers, hidden)
            made = run()
            by_layer = {0: torch.ones_like(tokens.groups, dtype=torch.bool)}
        else:
            with applied(model, method) as handle:
                hooks = _note(layers, hidden)
                made = run()
                by_layer = handle.stays_by_layer
    [hook.remove() for hook in hooks]
    matrices, kinds, regions = [], [], []
    for layer in range(len(layers)):
        prompt, *steps = made[layer]
        length = prompt.shape[2] + len(steps)
        whole = torch.zeros(*prompt.shape[:2], length, length, dtype=torch.float64)
        whole[:, :, : prompt.shape[2], : prompt.shape[2]] = prompt
        for at, step in enumerate(steps, start=prompt.shape[2]):
            whole[:, :, at, : at + 1] = step[:, :, 0]
        stay = by_layer[max(at for at in by_layer if at <= layer)] & (tokens.groups > 0)
        kind = torch.zeros(len(stay), length, dtype=torch.int64)
        region = torch.zeros(len(stay), length, dtype=torch.bool)
        for row, there in enumerate(stay):
            count, end = int(there.sum()), prompt.shape[2]
            kind[row, end - count : end] = tokens.groups[row][there]
            region[row, end - count : end] = tokens.region[row][there]
            kind[row, end:] = 5
        real = kind > 0
        matrices.append(whole * (real[:, None, :, None] & real[:, None, None]))
        kinds.append(kind)
        regions.append(region)
        stays.append(stay)
    return {"matrices": matrices, "kinds": kinds, "regions": regions, "stays": stays, "hidden": hidden}


@contextmanager
def _in_the_open(layers: Any) -> Iterator[dict[int, list[torch.Tensor]]]:
    """Attention by its formula, in the dtype of the model; matrices `[B, H, q, k]` of each layer, call by call."""
    found: dict[int, list[torch.Tensor]] = {}
    inside, heads = [], TEXT["num_attention_heads"]

    def formula(
        query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: float = 0.0, is_causal: bool = False,
        scale: Any = None, enable_gqa: bool = False,
    ) -> torch.Tensor:  # fmt: skip
        group = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        logits = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scale is None else scale)
        if is_causal:
            logits = logits.masked_fill(~torch.ones(logits.shape[2:], dtype=torch.bool).tril(), -math.inf)
        if attn_mask is not None:
            bool_mask = attn_mask.dtype == torch.bool
            logits = logits.masked_fill(~attn_mask, -math.inf) if bool_mask else logits + attn_mask
        weights = logits.softmax(-1).nan_to_num()  # rows of padding see nothing
        if inside:
            by_head = weights.flatten(1, 2)[
                :, :, None
            ]  # a decoded row: heads of a group may stand as rows of their key
            found.setdefault(inside[-1], []).append(by_head if weights.shape[1] < heads else weights)
        return weights @ value

    hooks = []
    for number, layer in enumerate(layers):
        hooks.append(layer.register_forward_pre_hook(lambda *_, number=number: inside.append(number)))
        hooks.append(layer.register_forward_hook(lambda *_: inside.clear()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", formula)
        yield found
    [hook.remove() for hook in hooks]


def _note(layers: Any, hidden: dict[int, torch.Tensor]) -> list[Any]:
    def enter(number: int) -> Any:
        def note(module: Any, args: Any, kwargs: Any) -> None:
            entering = args[0] if args else kwargs["hidden_states"]
            if entering.shape[1] > 1:
                hidden[number] = entering.double()

        return note

    return [layer.register_forward_pre_hook(enter(i), with_kwargs=True) for i, layer in enumerate(layers)]


def _close(got: torch.Tensor, want: torch.Tensor) -> None:
    assert got.shape == want.shape
    scale = float(want.abs().max())
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-7 * max(scale, 1e-12))


CASES = [("llava", None), ("qwen2_5_vl", None), ("llava", "holov@9"), ("qwen2_5_vl", "fastv@8")]


@pytest.mark.parametrize(("name", "method"), CASES)
def test_numbers_are_those_of_full_matrices(name, method):
    # in double precision: in single, states of two ways to attend round apart by up to 2e-5, more than is held here
    model, stock = deepcopy(family(name)).double(), deepcopy(family(name)).double()
    batch = {
        key: value.double() if value.is_floating_point() else value
        for key, value in batch_of(name, "ragged_left").items()
    }
    tokens = _tokens(model, batch)
    full = _full(stock, batch, method, tokens)
    loaded = LoadedModel(name, model, None, "")
    before = [vars(module).get("config") for module in model.modules()]
    prepared = None if method is None else prepare(model, method)
    reader, answers = read_answers(loaded, [], batch, tokens, prepared, CHANNELS, TOKENS)
    assert [vars(module).get("config") for module in model.modules()] == before
    assert answers.shape[1] == TOKENS and len(reader.steps) == TOKENS
    layers = len(full["matrices"])
    guard = _outlying(full["matrices"][2], full["kinds"][2])
    marked = torch.zeros_like(tokens.groups, dtype=torch.bool)
    for row, there in enumerate(full["stays"][2]):
        marked[row, there.nonzero()[:, 0]] = guard[row, -int(there.sum()) - TOKENS + 1 : -TOKENS + 1]
    mixed = torch.nn.functional.one_hot(tokens.groups, KINDS + 1)[..., 1:].double()
    later = torch.zeros(len(mixed), TOKENS - 1, KINDS, dtype=torch.float64)
    later[..., KINDS - 1] = 1
    for layer in range(layers):
        a, kind, stay = full["matrices"][layer], full["kinds"][layer], full["stays"][layer]
        prompt, record = a.shape[2] - TOKENS + 1, reader.records[layer]
        hot = torch.nn.functional.one_hot(kind, KINDS + 1)[..., 1:].double()
        _close(record.flow, _flow(a, hot, prompt))
        _close(record.received, _received(a, kind)[..., :prompt])
        assert torch.equal(record.outlying, _outlying(a, kind)[:, :prompt])
        x = full["hidden"][layer]
        phi = x[..., list(CHANNELS.numbers)].abs().amax(-1) / (x.square().mean(-1) + 1e-6).sqrt()
        assert torch.equal(record.sinks, (phi >= CHANNELS.tau) & (kind[:, :prompt] == IMAGE))
        # the state of every token as a mixture of the kinds of the prompt, by the whole matrix
        entering = torch.zeros(len(a), a.shape[2], KINDS, dtype=torch.float64)
        free = torch.zeros_like(kind, dtype=torch.bool)
        for row, there in enumerate(stay):
            start = prompt - int(there.sum())
            entering[row, start:prompt] = mixed[row][there]
            free[row, start:prompt] = ~marked[row][there]
            entering[row, prompt:] = later[row]
        leaving = (entering + a.mean(1) @ entering) / 2
        for row, there in enumerate(stay):
            mixed[row, there.nonzero()[:, 0]] = leaving[row, prompt - int(there.sum()) : prompt]
        later = leaving[:, prompt:]
        visual = kind == IMAGE
        for step in range(TOKENS):
            got, weights = reader.steps[step][layer], a[:, :, prompt - 1 + step]
            _close(got.mass, weights @ hot)
            _close(got.rollout, leaving[:, prompt - 1 + step])
            image = (weights * visual[:, None]).sum(-1)
            on_boxes = (weights * (visual & full["regions"][layer])[:, None]).sum(-1)
            _close(got.region, torch.where(image > 0, on_boxes / image.clamp(min=1e-300), 0))
            _close(got.focus, _focus(weights, visual & free))
    looks = reader.looks(1)
    assert torch.equal(looks > 0, full["stays"][1] & (looks > 0)) and float(looks.sum(1).min()) > 0.99
    _check_summary(reader, full, answers)


def _flow(a: torch.Tensor, hot: torch.Tensor, prompt: int) -> torch.Tensor:
    rows = hot[:, :prompt]
    total = rows.transpose(1, 2) @ (a.mean(1)[:, :prompt, :prompt] @ rows)
    return total / rows.sum(1)[..., None].clamp(min=1)


def _received(a: torch.Tensor, kind: torch.Tensor) -> torch.Tensor:
    visual = kind == IMAGE
    asking = (kind > 0) & (kind < 5) & ~visual & (visual.cumsum(1) > 0)
    return (a * asking[:, None, :, None]).sum(2) / asking.sum(1)[:, None, None].clamp(min=1)


def _outlying(a: torch.Tensor, kind: torch.Tensor) -> torch.Tensor:
    received, visual = _received(a, kind), (kind == IMAGE)[:, None]
    mean = (received * visual).sum(-1, keepdim=True) / visual.sum(-1, keepdim=True).clamp(min=1)
    return ((received > 10 * mean) & visual).double().mean(1) > 0.5


def _focus(weights: torch.Tensor, among: torch.Tensor) -> torch.Tensor:
    found = torch.zeros(weights.shape[:2], dtype=torch.float64)
    for row, there in enumerate(among):
        count = int(there.sum())
        for head in range(weights.shape[1]):
            kept = weights[row, head][there]
            if count < 2 or float(kept.sum()) == 0:
                continue
            shares = kept / kept.sum()
            entropy = -sum(float(p) * math.log(float(p)) for p in shares if p > 0)
            found[row, head] = 1 - entropy / math.log(count)
    return found


def _check_summary(reader: BatchReader, full: dict[str, Any], answers: torch.Tensor) -> None:
    """Means of the page, from the matrices: MDI and AEI of two sets of rows, attention to the image by head."""
    layers = len(full["matrices"])
    gathered = Gathered(layers, TEXT["num_key_value_heads"])
    sets = {"writing": [0, 1, 2], "generated": [1, 2]}
    samples = [row for row in range(len(answers)) if bool((full["kinds"][0][row] == IMAGE).any())]
    for row in samples:
        gathered.add(reader, row, sets, True)
    summary = gathered.summary()
    for name, steps in sets.items():
        for layer in range(layers):
            a, kind = full["matrices"][layer], full["kinds"][layer]
            prompt = a.shape[2] - TOKENS + 1
            ratios, shares = [], []
            for row in samples:
                rows = a[row].mean(0)[[prompt - 1 + step for step in steps]].sum(0)
                text, image = (kind[row] > 0) & (kind[row] < IMAGE), kind[row] == IMAGE
                ratios.append(float(rows[text].mean() / rows[image].mean()))
                heads = a[row][:, [prompt - 1 + step for step in steps]].mean(1)
                shares.append(heads[:, image].sum(-1))
            assert summary["text_dominance"][name]["mdi"][layer] == pytest.approx(sum(ratios) / len(ratios), rel=1e-5)
            _close(torch.tensor(summary["lookback"][name]["share"][layer]).double(), torch.stack(shares).mean(0))


def test_the_cases_hold_what_they_are_there_for():
    assert TEXT["num_attention_heads"] > TEXT["num_key_value_heads"] > 1
    assert adapter_for(family("qwen2_5_vl")).mrope
    for name in ("llava", "qwen2_5_vl"):
        assert not bool(batch_of(name, "ragged_left")["attention_mask"].all())


class _Sizes(TorchDispatchMode):
    """The largest tensor that an operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for one in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(one, torch.Tensor):
                self.largest = max(self.largest, one.untyped_storage().nbytes() // one.element_size())
        return made


def test_no_attention_matrix_is_ever_formed():
    """Twice the tokens take no larger block: the largest tensor is smaller than the matrix of one head."""
    largest = {}
    for length in (1536, 3072):
        groups = torch.full((1, length), TEMPLATE)
        groups[:, 8:-8] = IMAGE
        tokens = PromptTokens(groups, groups == IMAGE, torch.ones(1, dtype=torch.bool))
        reader = BatchReader(tokens, 2)
        generator = torch.Generator().manual_seed(0)
        query, key = (torch.randn(1, heads, length, 8, generator=generator) for heads in (4, 2))
        with _Sizes() as sizes:
            for layer in range(2):
                reader.read(Call(layer, query, key, None, 0.35, None))
            for layer in range(2):
                longer = torch.cat([key, key[:, :, :1]], dim=2)
                reader.read(Call(layer, query[:, :, :1], longer, None, 0.35, None))
        assert float(reader.steps[0][1].mass.sum(-1).min()) == pytest.approx(1, abs=1e-5)
        largest[length] = sizes.largest
        assert sizes.largest <= BLOCK < length * length
    assert largest[3072] <= largest[1536] * 1.01


def test_a_prompt_in_parts_and_a_cache_that_lost_keys_are_refused():
    groups = torch.tensor([[FIRST, IMAGE, IMAGE, QUESTION]])
    tokens = PromptTokens(groups, groups == IMAGE, torch.ones(1, dtype=torch.bool))
    query, key = torch.ones(1, 2, 4, 4), torch.ones(1, 1, 4, 4)
    reader = BatchReader(tokens, 1)
    with pytest.raises(ValueError, match="in one pass from the first layer on"):
        reader.read(Call(0, query[:, :, 2:], key, None, 1.0, None))
    with pytest.raises(ValueError, match="before its prompt had passed"):
        reader.read(Call(0, query[:, :, :1], key, None, 1.0, None))
    hidden = torch.ones(1, 1, 4, 4, dtype=torch.bool).tril()
    hidden[..., 1] = False
    with pytest.raises(RuntimeError, match="Its mask hides tokens"):
        reader.read(Call(0, query, key, hidden, 1.0, None))
    reader.read(Call(0, query, key, None, 1.0, None))
    with pytest.raises(RuntimeError, match="caches that keep every key"):
        reader.read(Call(0, query[:, :, :1], key, None, 1.0, None))
