"""Interventions on every family with a file: one cell each, of an intervention and a layout that its name draws."""

from __future__ import annotations

import random
import zlib

import pytest
from _families import BUILDERS, batch_of, family, layouts
from interventions import test_act, test_gift, test_zerotuning
from interventions.open_attention import open_attention
from masked_reference import compare, run_pruned

TOLERANCE = 1e-5  # relative, fp32
RULES = {
    "act(theta=0.06, layers=[1, 2, 3])": lambda: test_act.Reference(),
    "gift(alpha=3.0, measured=1, layers=[2, 3])": lambda: test_gift.Reference(),
    "zerotuning(gamma=3.0, layers=[1, 2, 3])": lambda: test_zerotuning.scaled([3.0] * 4),
}


def drawn(name):
    dice = random.Random(zlib.crc32(name.encode()))
    return sorted(RULES)[dice.randrange(len(RULES))], dice.choice(layouts(name))


def test_every_intervention_of_these_is_drawn():
    assert {drawn(name)[0] for name in BUILDERS} == set(RULES)


@pytest.mark.parametrize("name", BUILDERS)
def test_equals_the_explicit_matrix(name):
    method, layout = drawn(name)
    batch = batch_of(name, layout)
    run = run_pruned(family(name), [method], None, batch, tokens=2)
    with open_attention(run["adapter"], batch, [1, 2, 3], RULES[method]()) as worst:
        compare(run, batch, TOLERANCE)
    assert worst[0] < 1e-12
