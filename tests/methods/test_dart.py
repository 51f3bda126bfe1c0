"""DART against an independent reference in plain loops, on signals and inside running models."""

from __future__ import annotations

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
from tokenprune.interfaces.budget import Budget
from tokenprune.interfaces.pruner import ModelDepths
from tokenprune.interfaces.signals import DECODER_KEY_NORM, FINAL_STATES, TEXT_PIVOT_COSINE, Signal
from tokenprune.interfaces.view import View
from tokenprune.interfaces.visual import Raster
from tokenprune.methods.dart import DART

LLAVA = ModelDepths(vision=24, feature=22, decoder=32)


# --- the reference: one image, from the card --------------------------------------------------------------------------


def ranked(norms: list[float]) -> list[int]:
    return sorted(range(len(norms)), key=lambda i: (-norms[i], i))


def chosen(norms: list[float], likeness: Any, text: int, keep: int, pivots: int = 4) -> list[int]:
    """Kept places; `likeness(pivot)` gives cosines of all tokens, with a visual pivot for an int, with text pivot j for
    ("text", j). The budget is exact."""
    image = ranked(norms)[: min(pivots, keep)]
    asking: list[Any] = [*image, *(("text", j) for j in range(text))]
    rest = keep - len(image)
    kept = set(image)
    for turn, pivot in enumerate(asking):
        quota = rest // len(asking) + (1 if turn < rest % len(asking) else 0)
        cosines = likeness(pivot)
        pool = sorted((i for i in range(len(norms)) if i not in kept), key=lambda i: (cosines[i], i))
        kept |= set(pool[:quota])
    return sorted(kept)


def cosine(a: list[float], b: list[float]) -> float:
    lengths = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(x * x for x in b))
    return sum(x * y for x, y in zip(a, b)) / max(lengths, 1e-30)


# --- the rule on signals ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [4, 0, 1])
@pytest.mark.parametrize("pivots", [4, 1, 6])
def test_selections_equal_the_reference_on_random_signals(text, pivots):
    """States of +-1, so that cosines are exact and ties common; from one token to all but one, two images."""
    draw, compared = random.Random(f"{text}{pivots}"), 0
    for _ in range(250):
        count, width = draw.randint(2, 40), draw.choice([4, 16])
        keep = draw.choice([1, count - 1, draw.randint(1, count - 1)])
        states = [[[draw.choice([-1.0, 1.0]) for _ in range(width)] for _ in range(count)] for _ in range(2)]
        norms = [[float(draw.randint(1, 9)) for _ in range(count)] for _ in range(2)]
        words = [[[draw.randint(-8, 8) / 8 for _ in range(text)] for _ in range(count)] for _ in range(2)]
        signals = {Signal(DECODER_KEY_NORM, 1): torch.tensor(norms), Signal(FINAL_STATES, 2): torch.tensor(states)}
        if text:
            signals[Signal(TEXT_PIVOT_COSINE, 2, (text,))] = torch.tensor(words)
        method = DART(image_pivots=pivots, text_pivots=text)
        assert set(method.signals_at(TOWER, "layer", 2)) == set(signals)
        view = View(torch.zeros(2, count, 4), (Raster((1, count)),), keep, TOWER, signals, site="layer:2")
        found = method.select(view).validate(2, count).indices.tolist()
        for image in range(2):

            def likeness(pivot: Any, states: Any = states[image], words: Any = words[image]) -> list[float]:
                if isinstance(pivot, tuple):
                    return [word[pivot[1]] for word in words]
                return [cosine(state, states[pivot]) for state in states]

            assert found[image] == chosen(norms[image], likeness, text, keep, pivots)
            compared += 1
    assert compared == 500


def test_quotas_and_counts_of_the_card():
    official = DART(variant="official")
    for keep, count in ((128, 132), (64, 68), (192, 196), (7, 4), (8, 12)):
        assert official.stages(Budget(keep), LLAVA)[0].budget.tokens(576) == count
        assert DART().stages(Budget(keep), LLAVA)[0].budget.tokens(576) == keep
    assert official.quotas(132) == [16] * 8
    assert DART().quotas(128) == [16, 16, 16, 16, 15, 15, 15, 15]
    assert official.stages(Budget(320), LLAVA)[0].budget.tokens(2880) == 4 + 8 * (320 // 8)
    assert official.stages(Budget(320), LLAVA)[0].budget.tokens(200) == 4 + 8 * ((200 - 4) // 8)
    assert official.stages(Budget(0.222), LLAVA)[0].budget.tokens(576) == 4 + 8 * int(576 * 0.222 // 8)
    for num_tokens in range(1, 100):
        for keep in range(1, num_tokens + 1):
            assert 1 <= official.stages(Budget(keep), LLAVA)[0].budget.tokens(num_tokens) <= num_tokens
            assert sum(DART().quotas(keep)) + min(4, keep) == keep
    assert [stage.site for stage in DART().stages(Budget(9), LLAVA)] == ["layer:2"]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"layer": 0}, "layer must be a whole number from 1 on, got 0"),
        ({"image_pivots": 0}, "image_pivots must be a whole number from 1 on"),
        ({"text_pivots": -1}, "text_pivots must be a whole number from 0 on"),
        ({"variant": "oficial"}, "oficial.*official"),
    ],
)
def test_bad_options_are_refused(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        DART(**options)


# --- inside a model ---------------------------------------------------------------------------------------------------


def truth_of(model: Any, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """L1 norms of layer 1's keys `[B, S]` and what enters layer 2 behind the final norm `[B, S, D]`, of a plain run."""
    entering = []
    decoder = model.model.language_model
    hook = decoder.layers[2].register_forward_pre_hook(lambda module, args: entering.append(args[0]))
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        out = model(**batch, position_ids=positions, use_cache=True)
        states = decoder.norm(entering[0])
    hook.remove()
    keys = out.past_key_values.layers[1].keys
    return keys.abs().sum(dim=(1, 3)), states


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("images", [[1], [1, 2, 1]])
@pytest.mark.parametrize(("keep", "text"), [(9, 4), (35, 4), (1, 4), (20, 9)])
def test_a_running_model_keeps_what_the_reference_keeps(images, side, attention, keep, text):
    """Nine text pivots are more than the six words behind the pictures."""
    batch, model = prompts(images, side), tiny_llava(attention=attention)
    norms, states = truth_of(model, batch)
    with tokenprune.applied(model, DART(text_pivots=text), keep=keep) as handle, torch.no_grad():
        model(**batch, position_ids=(batch["attention_mask"].cumsum(1) - 1).clamp(min=0))
        spans, kept = handle.last.layout.spans, handle.kept
    last = {span.sample: int(span.places[-1]) for span in spans}
    for span in spans:
        row = span.sample
        after = [p for p in range(last[row] + 1, norms.shape[1]) if batch["attention_mask"][row, p]]
        words = [after[i] for i in ranked([float(norms[row, p]) for p in after])]
        words = [words[j % len(words)] for j in range(text)]
        places = span.places.tolist()

        def likeness(pivot: Any, row: int = row, words: Any = words, places: Any = places) -> list[float]:
            at = words[pivot[1]] if isinstance(pivot, tuple) else places[pivot]
            return [cosine(states[row, p].tolist(), states[row, at].tolist()) for p in places]

        expected = chosen([float(norms[row, p]) for p in places], likeness, text, keep)
        assert kept[row][span.image].tolist() == expected


def test_signals_equal_those_of_a_plain_run_without_a_cache():
    seen: list[View] = []

    @dataclasses.dataclass
    class Watched(DART):
        def select(self, view):
            seen.append(view)
            return super().select(view)

    batch, model = prompts([1, 2]), tiny_llava()
    norms, states = truth_of(model, batch)
    with tokenprune.applied(model, Watched(), keep=9) as handle, torch.no_grad():
        model(**batch, position_ids=(batch["attention_mask"].cumsum(1) - 1).clamp(min=0), use_cache=False)
        spans = handle.last.layout.spans
    (view,) = seen
    expected = torch.stack([norms[span.sample, span.places] for span in spans])
    assert relative_error(view.signal(DECODER_KEY_NORM, 1), expected) < 1e-5
    expected = torch.stack([states[span.sample, span.places] for span in spans])
    assert relative_error(view.signal(FINAL_STATES, 2), expected) < 1e-5


def test_dart_acts_nowhere_else():
    with pytest.raises(ValueError, match="'layer:K', not at 'input'"):
        tokenprune.apply(tiny_llava(), {"at": "input", "prune": "dart", "keep": 9})
