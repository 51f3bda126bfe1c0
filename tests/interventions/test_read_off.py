"""Interventions on classes without a file of their own, one of each kind of decoder: equal to the matrix in the open,
or refused with a sentence. In double precision, so that no tiny model's rounding hides a difference. With `--sampled`
one cell of each class, drawn by its name."""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from _doubled import TOLERANCE, double_batch, double_model, in_double
from _masked_whole import compare_whole
from _zoo import SPECIAL
from _zoo_all import zoo_batch
from interventions import explicit, test_act, test_bypass, test_cmai, test_gift, test_imbalance, test_zerotuning
from interventions.open_attention import Row, visual_tokens
from interventions.opened import opened
from masked_reference import relative_error, run_pruned

import tokenprune
from tokenprune.api import prepare
from tokenprune.interfaces.pruner import Pruner
from tokenprune.interfaces.selection import Selection
from tokenprune.interfaces.signals import Signal, TowerInfo, summary_attention
from tokenprune.interfaces.view import View

RULES: dict[str, Callable[[], Any]] = {
    "zerotuning(gamma=3.0, layers={})": lambda: test_zerotuning.scaled([3.0] * 4),
    "act(theta=0.06, layers={})": lambda: test_act.Reference(),
    "gift(alpha=3.0, measured={}, layers={})": lambda: test_gift.Reference(),
    "cmai(measured={}, layers={})": lambda: test_cmai.Reference(),
}
BYPASSES = ("naavit(layers={})", "shortv(layers={})")
"""Visual tokens stand still in both."""
NOT_RUN = [("gemma3_window", one) for one in BYPASSES]
"""The plain reading of them is `gemma3`'s."""
LAYERS = {
    "mistral3": [1, 2, 3],  # plain rotation
    "glm4v": [1, 2, 3],  # M-RoPE, numbers in turn
    "qwen3_vl_moe": [1, 2, 3],  # M-RoPE woven, norms of heads, experts
    "fuyu": [1, 2, 3],  # query, key and value of one projection; half of each head turns
    "cohere2_vision": [0, 1, 2],  # attention and MLP side by side; layer 3 turns nothing
    "paligemma": [1, 2, 3],  # all of a prompt sees itself
    "gemma3": [1, 2, 3],  # pictures see themselves, windows that are not full
    "gemma3_window": [2, 5],  # those layers that see all, beside windows that are
    "aria": [1, 2, 3],  # experts, no grid
}
"""By class, the layers in which an intervention acts."""
LATENT, TURNED = "does not say how wide its heads are", "is not laid out as it would be read"
ALONG, WINDOW = "a layer of the kind .*, which has no attention. Name layers that have: layers=", "window of .* tokens"
REFUSED = {
    "kimi_k25": LATENT, "gemma4": "rotates in a way that is not known", "llama4": "rotated by complex numbers",
    "paligemma2": "caps", "qwen3_5": ALONG, "lfm2_vl": ALONG, "mistral3_window": WINDOW, "gemma3_window": WINDOW,
    "cohere2_vision": TURNED,
}  # fmt: skip
"""Keys from a latent, shared keys, complex rotation, capped logits, states along the row, keys that leave a window's
cache while the answer is written, layers that turn nothing: what is said of interventions in layers 1 to 3."""
EVERY = [
    "zerotuning(gamma=3.0, layers=[1, 2, 3])", "act(theta=0.02, layers=[1, 2, 3])",
    "gift(measured=1, layers=[2, 3])",
    "cmai(layers=[2, 3])", "imbalance(layers=[2, 3])",
]  # fmt: skip


READ = ("mistral3", "glm4v", "qwen3_vl_moe", "cohere2_vision", "paligemma", "gemma3")
"""Classes whose towers are read, of each kind of decoder."""


def _method(pattern: str, layers: list[int]) -> str:
    if "measured" in pattern:
        return pattern.format(layers[0], layers[1:])
    return pattern.format(layers)


def _given(name: str, pattern: str) -> tuple[Any, dict[str, torch.Tensor], list[int]]:
    model = double_model(name)
    silent = [token for token in SPECIAL if token < model.get_output_embeddings().weight.shape[0]]
    return model, double_batch(zoo_batch(name, pattern)), silent


def _draws(cells: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """One cell of each class."""
    names = dict.fromkeys(name for name, _ in cells)
    own = {name: [cell for cell in cells if cell[0] == name] for name in names}
    return [random.Random(zlib.crc32(name.encode())).choice(own[name]) for name in names]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    own, draw = metafunc.function.__name__, metafunc.config.getoption("--sampled")
    equal = [(name, rule) for name in LAYERS for rule in [*RULES, *BYPASSES] if (name, rule) not in NOT_RUN]
    refused = [(name, one) for name in REFUSED for one in EVERY]
    equal, refused = (_draws(cells) if draw else cells for cells in (equal, refused))
    cells = {
        "test_equals_the_explicit_matrix": [cell for cell in equal if cell[1] not in BYPASSES],
        "test_visual_tokens_that_pass_layers_by_stand_still": [cell for cell in equal if cell[1] in BYPASSES],
        "test_what_cannot_be_changed_is_refused_with_a_sentence": refused,
    }.get(own)
    if cells is not None:
        metafunc.parametrize(("name", "pattern"), cells, ids=[f"{name}-{one.partition('(')[0]}" for name, one in cells])


def test_equals_the_explicit_matrix(name: str, pattern: str) -> None:
    model, batch, silent = _given(name, pattern)
    rule, layers = RULES[pattern](), LAYERS[name]
    if isinstance(rule, (test_gift.Reference, test_cmai.Reference)):
        rule.measured = layers[0]
    with in_double():
        run = run_pruned(model, [_method(pattern, layers)], None, batch, tokens=3, silent=silent)
        with opened(run["adapter"], batch, layers, rule) as worst:
            compare_whole(run, batch, TOLERANCE, silent)
        plain = run_pruned(model, "random", 1.0, batch, tokens=1, silent=silent)
    assert worst[0] < 1e-12
    assert relative_error(run["logits"], plain["logits"]) > 1e-4, "it changes something"


@dataclass
class _Scores(Pruner):
    """Keeps the first tokens, and what `imbalance` reads of the tower, picture by picture."""

    found: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)

    def signals(self, tower: TowerInfo) -> tuple[Signal, ...]:
        return summary_attention(tower, 0), summary_attention(tower, tower.feature_layer)

    def select(self, view: View) -> Selection:
        early, late = (view.signal(one.name, one.layer, *one.settings) for one in self.signals(view.tower))
        self.found += [(one.double(), other.double()) for one, other in zip(early, late)]
        return Selection(torch.arange(view.budget).expand(view.num_images, -1).contiguous())


@pytest.mark.parametrize("name", READ)
def test_imbalance_equals_the_explicit_matrix(name: str) -> None:
    """Its sets are made anew of what the tower says, which `tests/core/capture` and `tests/adapters` hold."""
    model, batch, silent = _given(name, "imbalance")
    scores = _Scores()
    with in_double():
        with prepare(model, scores, 2).applied() as handle, torch.no_grad():
            model(**batch)
            samples = [span.sample for span in handle.last.layout.spans]
        assert len(scores.found) == len(samples)
        counts = [samples.count(row) for row in range(len(batch["input_ids"]))]
        # many tokens are local and few stand out in pictures of a few patches
        rule = test_imbalance.Reference(list(zip(*scores.found)), counts, ratio=0.5)
        layers = LAYERS[name]
        run = run_pruned(model, [f"imbalance(layers={layers}, ratio=0.5)"], None, batch, tokens=3, silent=silent)
        with opened(run["adapter"], batch, layers, rule) as worst:
            compare_whole(run, batch, TOLERANCE, silent)
        plain = run_pruned(model, "random", 1.0, batch, tokens=1, silent=silent)
    assert worst[0] < 1e-12 and rule.counts[0] > 0
    assert relative_error(run["logits"], plain["logits"]) > 1e-4, "it changes something"


class _Sinks:
    """VAR by its card for one row, with sinks found in the hidden states that enter its layer."""

    def __init__(self, adapter: Any, layers: list[int], batch: dict[str, torch.Tensor]) -> None:
        self.rule = explicit.Explicit(layers, [1, 2], 1.6, p=0.6, most_sink=0.3, s_min=0.2)
        self.visual, self.real = visual_tokens(adapter, batch), batch["attention_mask"].bool()
        self.hidden: dict[int, torch.Tensor] = {}
        self.hooks = [
            adapter.layers[layer].register_forward_pre_hook(
                lambda m, a, k, layer=layer: self.hidden.update({layer: a[0] if a else k["hidden_states"]}),
                with_kwargs=True,
            )
            for layer in layers
        ]

    def __call__(self, row: Row) -> torch.Tensor:
        rule, x = self.rule, self.hidden[row.layer][row.sample].double()
        look = torch.nn.functional.pad(self.real[row.sample], (0, len(x) - self.real.shape[1]))
        groups = row.visual.long() * look
        phi = x[:, rule.channels].abs().amax(-1) / (x.square().mean(-1) + 1e-6).sqrt()
        groups = torch.where((phi >= rule.tau) & look, 2 + (groups == 0).long(), groups)
        seen = (row.logits > float("-inf"))[0]
        groups = groups.masked_fill(~seen.any(0), 0)
        out = torch.full_like(row.logits, torch.nan)
        for i in (row.there & ~row.visual & (row.visual.cumsum(0) > 0)).nonzero()[:, 0].tolist():
            if bool((seen[i] & (groups == 2)).any()):
                out[:, i], looks = explicit.redistributed(row.weights[:, i], groups, rule.p, rule.most_sink, rule.s_min)
                rule.pairs, rule.changed = rule.pairs + len(looks), rule.changed + int(looks.sum())
        return out


@pytest.mark.parametrize("name", [name for name in LAYERS if name != "gemma3_window"])
def test_var_equals_the_explicit_matrix(name: str) -> None:
    layers = LAYERS[name]
    model, batch, silent = _given(name, "var")
    with in_double():
        method = f"var(channels=[1, 2], tau=1.6, layers={layers}, p=0.6, rho=0.7, s_min=0.2)"
        run = run_pruned(model, [method], None, batch, tokens=3, silent=silent)
        rule = _Sinks(run["adapter"], layers, batch)
        try:
            with opened(run["adapter"], batch, layers, rule) as worst:
                compare_whole(run, batch, TOLERANCE, silent)
        finally:
            [hook.remove() for hook in rule.hooks]
    assert worst[0] < 1e-12 and 0 < rule.rule.changed < rule.rule.pairs


def test_what_cannot_be_changed_is_refused_with_a_sentence(name: str, pattern: str) -> None:
    model, batch, silent = _given(name, pattern)
    with in_double(), pytest.raises(ValueError, match=REFUSED[name]):
        run_pruned(model, [pattern], None, batch, tokens=3, silent=silent)


def test_visual_tokens_that_pass_layers_by_stand_still(name: str, pattern: str) -> None:
    layers = LAYERS[name][:2]
    model, batch, silent = _given(name, pattern)
    visual, real = test_bypass.visual_of(model, batch), batch["attention_mask"].bool()
    asked = {**batch, "max_new_tokens": 3, "do_sample": False, "suppress_tokens": silent, "output_logits": True}
    with in_double(), torch.no_grad():
        stock = model(**batch).logits
        with test_bypass.plainly(model, visual, "skip", layers):
            truth, written = model(**batch).logits, model.generate(**asked, return_dict_in_generate=True)
        with tokenprune.applied(model, pattern.format(layers)):
            found, answer = model(**batch).logits, model.generate(**asked, return_dict_in_generate=True)
    known = torch.isfinite(truth[real]).all(0)  # some ids are never said
    assert relative_error(found[real][:, known], truth[real][:, known]) < TOLERANCE
    assert torch.equal(answer.sequences, written.sequences)
    assert relative_error(found[real][:, known], stock[real][:, known]) > 1e-4, "it changes something"


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("qwen3_5", "layers of the kind linear_attention"),
        ("gemma3", "layers of the kind sliding_attention"),
        ("llama4", "layers of the kind chunked_attention"),
        ("mistral3_window", "layer 0 of this one is a DynamicSlidingWindowLayer"),
        ("kimi_k25", "keeps latents in its cache, of 1 head.s. where its attention has keys of 4"),
    ],
)
def test_a_cache_that_a_vl_cannot_thin_is_refused(name: str, says: str) -> None:
    model, batch, silent = _given(name, "a_vl")
    with in_double(), pytest.raises(ValueError, match=says):
        run_pruned(model, ["a_vl"], None, batch, tokens=3, silent=silent)
