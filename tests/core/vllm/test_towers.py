"""Signals of vLLM's towers, on modules that are called as vLLM calls its attention, against the plain computation."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tokenprune.capture.vision import vision_signal
from tokenprune.interfaces.signals import (
    ATTENTION_BY_HEAD,
    CLS_ATTENTION,
    MEAN_QUERY_ATTENTION,
    SINK_ATTENTION,
    TOWER_KEYS,
    TOWER_STATES,
    Signal,
    TowerInfo,
)
from tokenprune.interfaces.visual import Raster, Visual, one_raster
from tokenprune.vllm.selection import Row, Selector
from tokenprune.vllm.settings import ModelFacts, Setting, read_setting
from tokenprune.vllm.towers import CLS_SIGNALS, PATCH_ONLY_SIGNALS, BatchTower, PackedTower

HEADS, WIDTH = 4, 32


class Attention(nn.Module):
    def forward(self, query, key, value, cu_seqlens=None):
        return query


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn, self.norm1 = Attention(), nn.Identity()

    def forward(self, hidden):
        return hidden * 2


class Merger(nn.Module):
    def __init__(self):
        super().__init__()
        self.ln_q = nn.Identity()


class Tower(nn.Module):
    def __init__(self, depth):
        super().__init__()
        self.merger = Merger()
        self.blocks = nn.ModuleList(Block() for _ in range(depth))


class Wanting:
    """A stage that asks for signals and keeps nothing apart."""

    def __init__(self, *signals):
        self.wanted = signals

    def signals(self, tower):
        return self.wanted


def read(tower, signals, visuals, run):
    setting = Setting(("x",), (1,), (Wanting(*signals),))
    return Selector(setting, tower).watch(visuals, [torch.zeros(8)] * len(visuals), run)[1]


@pytest.mark.parametrize("form", ["flat", "heads", "sharded"])
def test_a_batch_of_pictures_with_a_class_token(form):
    torch.manual_seed(0)
    module = Tower(2)
    parts = [torch.randn(3, 1 + 12, HEADS, WIDTH // HEADS) for _ in range(3)]
    given = [part.flatten(2) for part in parts] if form == "flat" else parts
    shards, gathered = [part[:, :, :2] for part in parts], iter(parts)
    facts = TowerInfo(2, 1, True, HEADS, WIDTH)
    tower = BatchTower(module, module.blocks, lambda block: block.attn, facts, 7, gather=lambda part: next(gathered))
    signals = [Signal(name, 1) for name in (CLS_ATTENTION, TOWER_KEYS, ATTENTION_BY_HEAD)] + [Signal(TOWER_STATES, 0)]
    hidden = torch.randn(3, 13, WIDTH)

    def run():
        module.blocks[0](hidden)
        module.blocks[1].attn(*(shards if form == "sharded" else given))

    recording = read(tower, signals, [one_raster((3, 4))] * 3, run)
    stacked = [part.transpose(1, 2) for part in parts]
    for signal in signals[:3]:
        expected = vision_signal(signal, *stacked, before=1)[0]
        for picture in range(3):
            assert torch.equal(recording.signal(signal, picture), expected[picture]), signal.name
    assert torch.equal(recording.signal(signals[3], 2), hidden[2, 1:] * 2)


@pytest.mark.parametrize("windows", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_pictures_in_one_row_sorted_by_windows(windows, batch_first):
    torch.manual_seed(0)
    module, merge = Tower(1), 2
    grids = [(3, 4), (2, 5), (3, 4)]
    visuals = [one_raster(grid) for grid in grids[:2]]
    visuals.append(Visual(tuple(Raster(grids[2], 12 * frame, "frame") for frame in range(2)), kind="video"))
    per_picture = [*grids, grids[2]]

    def order(rows, cols):
        return torch.randperm(rows * cols, generator=torch.Generator().manual_seed(rows * cols)) if windows else None

    facts = TowerInfo(1, 0, False, HEADS, WIDTH)
    tower = PackedTower(module, lambda block: block.attn, facts, merge, 3, 2, order if windows else None)
    wanted = [Signal(MEAN_QUERY_ATTENTION, 0), Signal(SINK_ATTENTION, 0, (0.0,)), Signal(TOWER_KEYS, 0)]
    states = Signal(TOWER_STATES, 0)
    raster = [[torch.randn(rows * cols, 4, HEADS, WIDTH // HEADS) for _ in range(3)] for rows, cols in per_picture]
    cells = [torch.randn(rows * cols, 4, WIDTH) for rows, cols in per_picture]

    def row(values, grid):  # as the tower has it
        return (values[order(*grid)] if windows else values).flatten(0, 1)

    def run():
        packed = [torch.cat([row(one[part], grid) for one, grid in zip(raster, per_picture)]) for part in range(3)]
        lead = 0 if batch_first else 1
        query, key, value = (part.unsqueeze(lead) for part in packed)
        module.blocks[0].attn(query=query, key=key, value=value, cu_seqlens=None)
        hidden = torch.cat([row(one, grid) for one, grid in zip(cells, per_picture)])
        module.merger.ln_q(module.blocks[0].forward(hidden.unsqueeze(1)))  # no hook of the block runs

    recording = read(tower, [*wanted, states], visuals, run)
    pictures = [[0], [1], [2, 3]]
    for signal in wanted:
        for visual, own in enumerate(pictures):
            expected = []
            for picture in own:
                parts = [part.flatten(0, 1).transpose(0, 1)[None] for part in raster[picture]]
                expected.append(vision_signal(signal, *parts, before=0)[0][0].unflatten(0, (-1, 4)).mean(dim=1))
            assert torch.allclose(recording.signal(signal, visual), torch.cat(expected), atol=1e-6), signal.name
    for visual, own in enumerate(pictures):
        expected = torch.cat([cells[picture].mean(dim=1) * 2 for picture in own])
        assert torch.allclose(recording.signal(states, visual), expected, atol=1e-6)


def test_each_picture_is_cut_by_its_own_method_and_budget(caplog):
    facts = ModelFacts(TowerInfo(1, 0, False, HEADS, WIDTH), PATCH_ONLY_SIGNALS, 1, 4, mrope=True, one_size=False)
    module = Tower(1)
    tower = PackedTower(module, lambda block: block.attn, facts.tower, 2, 3, 2, None)
    setting = read_setting("uniform@6 | divprune | pool", facts)
    visual = one_raster((4, 6))
    torch.manual_seed(0)
    features = [torch.randn(24, 16) for _ in range(4)]
    selector = Selector(setting, tower)
    _, recording = selector.watch([visual] * 4, [torch.zeros(8)] * 4, lambda: None)
    rows = [Row(6, 6, 0, 24), Row(24, 24, 0, 24), Row(9, 9, 1, 24), Row(6, 7, 2, 24)]
    found = selector.select(rows, features, recording, 12)
    assert [kept.embeddings.shape[0] for kept in found] == [6, 24, 9, 6]
    assert found[1].tokens is None and torch.equal(found[1].embeddings, features[1])
    for index in (0, 2):
        assert torch.equal(found[index].embeddings, features[index][found[index].tokens])
    merged = found[3]  # the first columns are means, the others go with the token
    assert not torch.equal(merged.embeddings[:, :12], features[3][merged.tokens, :12])
    assert torch.equal(merged.embeddings[:, 12:], features[3][merged.tokens, 12:])
    # an error would end the engine for all others
    (wrong, *_) = selector.select([Row(7, 6, 0, 24), *rows[1:]], features, recording, 12)
    assert "does not keep the number" in caplog.text
    assert torch.equal(wrong.embeddings, features[0][wrong.tokens]) and len(wrong.tokens) == 7


def test_a_picture_that_a_method_cannot_choose_in_ends_no_engine(caplog):
    facts = ModelFacts(TowerInfo(1, 0, False, HEADS, WIDTH), PATCH_ONLY_SIGNALS, 1, 4, mrope=True, one_size=False)
    tower = PackedTower(Tower(1), lambda block: block.attn, facts.tower, 2, 3, 2, None)
    selector = Selector(read_setting("divprune@6", facts), tower)
    torch.manual_seed(0)
    good, bad = torch.randn(24, 16), torch.randn(24, 16)
    bad[3, 3] = float("nan")
    _, recording = selector.watch([one_raster((4, 6))] * 2, [torch.zeros(8)] * 2, lambda: None)
    with pytest.raises(ValueError, match="NaN|nan"):  # at start it is said
        selector.try_all([good, bad], recording, 16)
    alone = selector.select([Row(6, 6, 0, 24)] * 2, [good, good], recording, 16)[0]
    assert not caplog.records
    found = selector.select([Row(6, 6, 0, 24)] * 2, [good, bad], recording, 16)
    assert torch.equal(found[0].embeddings, alone.embeddings)
    assert found[1].tokens.tolist() == [0, 4, 8, 12, 16, 20]
    assert "divprune: evenly spread tokens of one picture stay, because: " in caplog.text


def test_signals_of_both_kinds_of_tower_are_named():
    assert CLS_ATTENTION in CLS_SIGNALS and MEAN_QUERY_ATTENTION in PATCH_ONLY_SIGNALS
    assert CLS_ATTENTION not in PATCH_ONLY_SIGNALS
