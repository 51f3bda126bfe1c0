"""TransPrune against an independent reference in loops and fp64, as a rule on signals and inside running models."""

from __future__ import annotations

import copy
import dataclasses
import math
import random
from typing import Any

import pytest
import torch
from _tiny import prompts, tiny_llava
from _views import TOWER
from masked_reference import relative_error

import tokenprune
from tokenprune.capture import decoder_attention as decoder_signals
from tokenprune.interfaces.budget import Budget
from tokenprune.interfaces.pruner import ModelDepths
from tokenprune.interfaces.signals import INSTRUCTION_ATTENTION, Signal
from tokenprune.interfaces.view import View
from tokenprune.interfaces.visual import Raster
from tokenprune.methods.transprune import SCHEDULES, MultipleBudget, TransPrune

LLAVA = ModelDepths(vision=24, feature=22, decoder=32)
VARIANTS = ["official", "paper"]


# --- the reference: one prompt with one image, from the card ----------------------------------------------------------


def softmax(values: list[float]) -> list[float]:
    powers = [math.exp(value - max(values)) for value in values]
    return [power / sum(powers) for power in powers]


def variation(branches: list[list[tuple[float, float]]], visual: list[int], variant: str) -> list[float]:
    """TTV of one layer at `visual`: branches hold (m, c) of every position of the prompt."""
    total = [0.0] * len(visual)
    for branch in branches:
        if variant == "official":
            every = softmax([1 - c for _, c in branch])
            weights = [every[i] for i in visual]
        else:
            weights = softmax([1 - abs(branch[i][1]) for i in visual])
        total = [t + w * branch[i][0] for t, w, i in zip(total, weights, visual)]
    return total


def chosen(ttv: list[float], iga: list[float], keep: int, variant: str, alpha: float = 0.5) -> tuple[list[int], float]:
    """Kept places in order, and the gap between the last that stays and the first that leaves."""
    if variant == "official":
        ttv = [value / (sum(ttv) + 1e-8) for value in ttv]
        iga = [value / (sum(iga) + 1e-8) for value in iga]
    scores = [alpha * t + (1 - alpha) * a for t, a in zip(ttv, iga)]
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    gap = scores[order[keep - 1]] - scores[order[keep]] if keep < len(order) else 1.0
    return sorted(order[:keep]), gap / max(scores)


# --- the rule on signals, thousands of cases --------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("alpha", [0.5, 0.0, 1.0, 0.3])
def test_three_cuts_equal_the_reference_on_random_signals(variant, alpha):
    """Tokens in groups of exact copies, so that ties at the boundary are common; budgets from one token to all."""
    draw, compared, ties = random.Random(f"{variant}{alpha}"), 0, 0
    for _ in range(250):
        count, text = draw.randint(1, 40), draw.randint(1, 6)
        layers = sorted(draw.sample(range(1, 9), 3))
        keep = draw.choice([1, count, draw.randint(1, count)])
        schedule = (*sorted((draw.choice([13, 7, 2, 1]), draw.choice([5, 1.5, 1])), reverse=True), 1)
        method = TransPrune(schedule=schedule, layers=layers, variant=variant, alpha=alpha)
        kinds = [draw.randrange(count) if draw.random() < 0.5 else i for i in range(count)]
        passed = {
            layer: [
                [(draw.uniform(0.01, 2), draw.uniform(-1, 1)) for _ in range(count + text)]
                for _ in ("attention", "mlp")
            ]
            for layer in range(layers[0] - 1, layers[-1])
        }
        looks = {layer: [draw.uniform(0, 0.1) for _ in range(count)] for layer in layers}
        alive, acc, carry = list(range(count)), [0.0] * count, {}
        for stage, before in zip(method.stages(Budget(keep), LLAVA), [layers[0] - 1, *layers]):
            budget = min(stage.budget.tokens(count), len(alive))
            signals: dict[Signal, Any] = {}
            for layer in range(before, stage.depth):
                # what the layer held: the visual tokens alive, copies alike, and the text
                branches = [[b[kinds[i]] for i in alive] + b[count:] for b in passed[layer]]
                here = list(range(len(alive)))
                acc = [a + v for a, v in zip(acc, variation(branches, here, variant))]
                for name, branch in zip(("attention", "mlp"), branches):
                    turn = softmax([1 - c for _, c in branch])
                    signals[Signal(f"{name}_gain", layer)] = [m for m, _ in branch[: len(alive)]]
                    signals[Signal(f"{name}_cosine", layer)] = [c for _, c in branch[: len(alive)]]
                    signals[Signal(f"{name}_turn", layer)] = turn[: len(alive)]
            iga = [looks[stage.depth][kinds[i]] for i in alive]
            signals[Signal(INSTRUCTION_ATTENTION, stage.depth)] = iga
            wanted = stage.signals(TOWER)
            assert {signal.layer for signal in wanted} == {*range(before, stage.depth), stage.depth}
            view = View(
                features=torch.zeros(1, len(alive), 4),
                rasters=(Raster((1, count)),),
                budget=budget,
                tower=TOWER,
                signals={signal: torch.tensor([signals[signal]]) for signal in wanted},
                site=stage.site,
                tokens=None if len(alive) == count else torch.tensor([alive]),
                carry=carry,
            )
            selection = stage.pruner.select(view).validate(1, len(alive))
            torch.testing.assert_close(selection.carry["transprune"][0].double(), torch.tensor(acc).double(),
                                       rtol=1e-5, atol=1e-9)  # fmt: skip
            expected, gap = chosen(acc, iga, budget, variant, alpha)
            found = selection.indices[0].tolist()
            if gap > 1e-5 or gap == 0:
                compared, ties = compared + 1, ties + (gap == 0)
                assert found == expected
            carry = {name: values[:, found] for name, values in selection.carry.items()}
            alive, acc = [alive[i] for i in found], [acc[i] for i in found]
    assert compared > 700 and ties > 10


# --- the schedules ----------------------------------------------------------------------------------------------------


def counts(method: TransPrune, keep: int | float, num_tokens: int, depths: ModelDepths = LLAVA) -> dict[str, int]:
    return {stage.site: stage.budget.tokens(num_tokens) for stage in method.stages(Budget(keep), depths)}


def test_the_cards_schedules():
    high = {"layer:7": 504, "layer:9": 360, "layer:12": 72}
    assert counts(TransPrune(), 0.125, 576) == counts(TransPrune(), 72, 576) == high
    assert list(counts(TransPrune(), 0.125, 2880).values()) == [2520, 1800, 360]
    assert list(counts(TransPrune(schedule="low"), 0.05, 576).values()) == [374, 144, 28]
    assert list(counts(TransPrune(schedule="combined"), 36, 288).values()) == [144, 72, 36]
    assert list(counts(TransPrune(schedule="combined"), 24, 192).values()) == [96, 48, 24]
    # int(n0 r), ratios of the original count
    for num_tokens in range(1, 700):
        found = list(counts(TransPrune(), 0.125, num_tokens).values())
        assert found == [max(int(num_tokens * r), 1) for r in (0.875, 0.625, 0.125)]
    assert MultipleBudget(0.05, 13).tokens(100) == 65, "not one less for the rounding of 0.05"
    assert list(counts(TransPrune(), 400, 576).values()) == [576, 576, 400]


def test_shallow_decoders_take_the_same_parts_of_their_depth():
    left = [1.0] * 7 + [7 / 8] * 2 + [5 / 8] * 3 + [1 / 8] * 16
    assert round(100 * sum(left) / 28, 1) == 45.1, "the paper's FLOPs for Qwen2.5-VL, of 28 layers"
    sites = {24: [5, 7, 9], 28: [7, 9, 12], 32: [7, 9, 12], 40: [7, 9, 12], 8: [2, 3], 4: [1, 2]}
    for decoder, expected in sites.items():
        stages = TransPrune().stages(Budget(9), dataclasses.replace(LLAVA, decoder=decoder))
        assert [stage.depth for stage in stages] == expected
        assert stages[-1].budget.tokens(36) == 9
    late = TransPrune().stages(Budget(9), dataclasses.replace(LLAVA, decoder=4, first_cut=3))
    assert [stage.site for stage in late] == ["layer:3"] and late[0].budget.tokens(36) == 9


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"variant": "code"}, "variant must be one of official, paper, got 'code'"),
        ({"alpha": 1.5}, "alpha must be a weight"),
        ({"schedule": "hihg"}, "no schedule 'hihg'.*high"),
        ({"schedule": (5, 7, 1)}, "do not increase and end in 1"),
        ({"schedule": (7, 5, 2)}, "do not increase and end in 1"),
        ({"layers": [9, 7, 12]}, "layers must increase"),
        ({"layers": [7, 9]}, "one for each of the 3"),
        ({"layers": [0, 9, 12]}, "layers from 1 on"),
        ({"schedule": (2, 1)}, "one for each of the 2"),
    ],
)
def test_bad_options_are_refused(options, text):
    with pytest.raises(ValueError, match=text):
        TransPrune(**options)


def test_it_acts_inside_the_decoder_only():
    with pytest.raises(ValueError, match="acts at 'layer:K', not at 'input'"):
        tokenprune.apply(tiny_llava(), {"at": "input", "prune": "transprune", "keep": 9})


# --- inside a model ---------------------------------------------------------------------------------------------------


class Trace:
    """Every layer's input, and what enters and leaves its branches, read by hooks of the test's own."""

    def __init__(self, model: Any) -> None:
        self.seen: dict[tuple[str, int], torch.Tensor] = {}
        self.calls = 0
        self._handles = []
        for index, layer in enumerate(model.model.language_model.layers):
            self._listen(layer.input_layernorm, "attention_in", index)
            self._listen(layer.self_attn, "attention_out", index)
            self._listen(layer.post_attention_layernorm, "mlp_in", index)
            self._listen(layer.mlp, "mlp_out", index)
            self._listen(layer, "output", index)

    def _listen(self, module: Any, name: str, index: int) -> None:
        def keep(module: Any, args: Any, output: Any) -> None:
            self.seen[name, index] = (output[0] if isinstance(output, tuple) else output).detach()

        self._handles.append(module.register_forward_hook(keep))

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


def transition_rows(trace: Trace, layer: int, sample: int, places: list[int]) -> list[list[tuple[float, float]]]:
    """(m, c) of the tokens at `places` in both branches, in fp64."""
    found = []
    for name in ("attention", "mlp"):
        rows = []
        for place in places:
            x, y = (trace.seen[f"{name}_{end}", layer][sample, place].double() for end in ("in", "out"))
            rows.append((float(y.norm() / x.norm()), float((x @ y) / (x.norm() * y.norm()))))
        found.append(rows)
    return found


def instruction_rows(model: Any, layer: int, hidden: torch.Tensor, text: int) -> torch.Tensor:
    """`[n]`: attention of the last `text` rows of `[n, D]` to every token, mean over heads and rows, in fp64."""
    module = copy.deepcopy(model.model.language_model.layers[layer]).double()
    config = model.config.text_config
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    width = config.hidden_size // heads
    x = hidden.double()
    x = x * (x.square().mean(-1, keepdim=True) + config.rms_norm_eps).rsqrt() * module.input_layernorm.weight
    angles = torch.arange(len(x)).double()[:, None] * 10000.0 ** -(torch.arange(0, width, 2).double() / width)

    def heads_of(projection: Any, head: int) -> torch.Tensor:
        part = (x @ projection.weight.T)[:, head * width : (head + 1) * width]
        a, b = part[:, : width // 2], part[:, width // 2 :]
        return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], dim=1)

    total = torch.zeros(len(x), dtype=torch.float64)
    for head in range(heads):
        query = heads_of(module.self_attn.q_proj, head)
        key = heads_of(module.self_attn.k_proj, head * groups // heads)
        for row in range(len(x) - text, len(x)):
            total[: row + 1] += ((key[: row + 1] @ query[row]) / math.sqrt(width)).softmax(0)
    return total / heads / text


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_kept_tokens_of_every_cut_follow_from_the_models_own_tensors(side, variant):
    """Three cuts of six layers; rows of one picture with questions of different length, padded on either side."""
    model, compared = tiny_llava(layers=6), 0
    method = TransPrune(layers=(2, 3, 5), schedule=(4, 2, 1), variant=variant)
    for seed in range(6):
        batch = prompts([1, 1, 1], side, seed)
        trace = Trace(model)
        positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
        with tokenprune.applied(model, method, keep=4) as handle, torch.no_grad():
            model(**batch, position_ids=positions)
            prompt = handle.last
        trace.remove()
        for span in prompt.layout.spans:
            sample, length = span.sample, prompt.lengths[span.sample]
            first = int(span.places[0]) - (prompt.layout.length - length if side == "left" else 0)
            text = length - first - 36
            alive, acc, layer = list(range(36)), [0.0] * 36, 1
            for cut in prompt.cuts:
                depth = int(cut.site.partition(":")[2])
                count = length - 36 + len(alive)
                shift = trace.seen["output", depth - 1].shape[1] - count if side == "left" else 0
                row = list(range(shift, shift + count))  # where the prompt stands in what the layers held
                visual = list(range(first, first + len(alive)))
                while layer < depth:
                    branches = transition_rows(trace, layer, sample, row)
                    acc = [a + v for a, v in zip(acc, variation(branches, visual, variant))]
                    layer += 1
                hidden = trace.seen["output", depth - 1][sample, row]
                iga = instruction_rows(model, depth, hidden, text)[visual].tolist()
                keep = {2: 16, 3: 8, 5: 4}[depth]
                expected, gap = chosen(acc, iga, keep, variant)
                now = [alive[i] for i in expected]
                if gap > 1e-5:
                    compared += 1
                    assert cut.tokens[span.sample].tolist() == now
                alive, acc = cut.tokens[span.sample].tolist(), [acc[i] for i in expected]
    assert compared > 48


@pytest.mark.parametrize("chunk", [128, 2])
@pytest.mark.parametrize("side", ["left", "right"])
def test_instruction_attention_equals_the_eager_matrix(side, chunk, monkeypatch):
    """Mean over heads and over the rows behind the last picture, of what layer 2 has on the uncut state; also where the
    rows are read two at a time."""
    monkeypatch.setattr(decoder_signals, "_CHUNK", chunk)
    batch, views = prompts([1, 2, 1], side), []

    @dataclasses.dataclass
    class Watched(TransPrune):
        def select(self, view):
            views.append(view)
            return super().select(view)

    positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    model, plain = tiny_llava(), tiny_llava(attention="eager")
    with tokenprune.applied(model, Watched(layers=[2], schedule=[1]), keep=9) as handle, torch.no_grad():
        model(**batch, position_ids=positions)
        spans = handle.last.layout.spans
        matrix = plain(**batch, position_ids=positions, output_attentions=True).attentions[2].float().mean(1)
    found = views[0].signals[Signal(INSTRUCTION_ATTENTION, 2)]
    for span, values in zip(spans, found):
        last = max(int(other.places[-1]) for other in spans if other.sample == span.sample)
        real = batch["attention_mask"][span.sample].bool()
        rows = real & (torch.arange(len(real)) > last)
        assert 0 < int(rows.sum()) < 10
        assert relative_error(values, matrix[span.sample][rows].mean(0)[span.places]) < 1e-5


def test_a_picture_at_the_end_is_ranked_by_the_last_token():
    batch = prompts([1])
    end = int((batch["input_ids"] == 5).nonzero()[-1, 1]) + 1
    batch = {**batch, "input_ids": batch["input_ids"][:, :end], "attention_mask": batch["attention_mask"][:, :end]}
    with tokenprune.applied(tiny_llava(), TransPrune(alpha=0), 5) as handle, torch.no_grad():
        handle.model(**batch)
        first = handle.last.cuts[0].tokens[0]
        row = (
            tiny_llava(attention="eager")(**batch, output_attentions=True).attentions[1].mean(1)[0, -1, end - 36 : end]
        )
    assert first.tolist() == sorted(row.topk(len(first)).indices.tolist())


def test_without_the_instruction_the_first_cut_does_not_know_the_question():
    """Visual tokens stand before the question. In the paper's form nothing else enters; in the official one the text
    shifts the weight between the branches, and no more."""
    batch, other = prompts([1], seed=1), prompts([1], seed=1)
    other["input_ids"] = other["input_ids"].clone()
    other["input_ids"][:, -5:] = torch.tensor([9, 33, 12, 60, 41])
    model, kept = tiny_llava(layers=6), {}
    for alpha in (1.0, 0.5):
        for variant in VARIANTS:
            for index, inputs in enumerate((batch, other)):
                method = TransPrune(layers=(3, 4, 5), alpha=alpha, variant=variant)
                with tokenprune.applied(model, method, keep=2) as handle, torch.no_grad():
                    model(**inputs)
                    kept[alpha, variant, index] = set(handle.last.cuts[0].tokens[0].tolist())
    assert kept[1.0, "paper", 0] == kept[1.0, "paper", 1]
    assert len(kept[1.0, "official", 0] & kept[1.0, "official", 1]) >= 13 == len(kept[1.0, "official", 0]) - 1
    assert kept[0.5, "official", 0] != kept[0.5, "official", 1]


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_history_outlives_a_foreign_cut_and_moves_with_its_tokens(side):
    """Cuts before layers 1 and 3, and a random one before layer 2: the sum at layer 3 is that of layers 0 to 2,
    each over the tokens that the layer held."""
    seen: list[torch.Tensor] = []

    @dataclasses.dataclass
    class Watched(TransPrune):
        def select(self, view):
            selection = super().select(view)
            seen.append((selection.carry or {})["transprune"])
            return selection

    model, batch = tiny_llava(), prompts([1, 1, 1], side)
    plan = [
        {"prune": Watched(layers=(1, 3), schedule=(4, 1)), "keep": 4},
        {"at": "layer:2", "prune": "random", "keep": 9},
    ]
    trace, positions = Trace(model), (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with tokenprune.applied(model, plan) as handle, torch.no_grad():
        model(**batch, position_ids=positions)
        prompt = handle.last
    trace.remove()
    assert [tuple(values.shape) for values in seen] == [(3, 36), (3, 9)]
    for index, span in enumerate(prompt.layout.spans):
        length = prompt.lengths[span.sample]
        first = int(span.places[0]) - (prompt.layout.length - length if side == "left" else 0)
        total = dict.fromkeys(range(36), 0.0)
        for layer, tokens in enumerate([range(36), *(cut.tokens[index].tolist() for cut in prompt.cuts[:2])]):
            count = length - 36 + len(tokens)
            shift = trace.seen["output", layer].shape[1] - count if side == "left" else 0
            branches = transition_rows(trace, layer, span.sample, list(range(shift, shift + count)))
            now = variation(branches, list(range(first, first + len(tokens))), "official")
            total = {token: total[token] + value for token, value in zip(tokens, now)}
        assert relative_error(seen[1][index], torch.tensor(list(total.values()))) < 1e-5


def test_every_schedule_has_three_cuts():
    assert all(len(times) == 3 and times[-1] == 1 for times in SCHEDULES.values())
