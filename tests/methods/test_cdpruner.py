"""CDPruner against its card: the determinant by the determinant, and where its relevance comes from."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from _families import BUILDERS, batch_of, family
from _tiny import prompts, tiny_llava
from _views import make_view
from masked_reference import relative_error
from torch.utils.flop_counter import FlopCounterMode

import tokenprune
from tokenprune.interfaces.signals import INSTRUCTION_EMBEDDING, Signal
from tokenprune.methods import cdpruner
from tokenprune.methods.cdpruner import CdPruner, take_row


def greedy_determinant(kernel: torch.Tensor, k: int) -> torch.Tensor:
    diagonal = kernel.diagonal(dim1=1, dim2=2)
    return cdpruner.greedy_determinant(diagonal, lambda best: take_row(kernel, best), k)


def by_hand(kernel: np.ndarray, k: int) -> tuple[list[int], float]:
    """Each step takes the token with which the determinant of the chosen rows and columns is largest."""
    order, gap, before = [], 1.0, 1.0
    for _ in range(k):
        left = [i for i in range(len(kernel)) if i not in order]
        value = {i: np.linalg.det(kernel[np.ix_([*order, i], [*order, i])]) / before for i in left}
        ranked = sorted(left, key=lambda i: (-value[i], i))
        if len(ranked) > 1 and (order or value[ranked[0]] != value[ranked[1]]):  # a tie at first is exact
            gap = min(gap, value[ranked[0]] - value[ranked[1]])
        order.append(ranked[0])
        before *= value[ranked[0]]
    return order, gap


@pytest.mark.parametrize("whole", [4096, 0])
@pytest.mark.parametrize("relevance", ["embedding", "hint", "none"])
def test_equals_the_greedy_maximum_of_the_determinant(
    relevance: str, whole: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where rows of the kernel are computed when they are chosen, as of many tokens."""
    monkeypatch.setattr(cdpruner, "_WHOLE", whole)
    compared = 0
    for seed in range(150):
        draw = torch.Generator().manual_seed(seed)
        grid = (2 + seed % 4, 2 + seed % 5)
        n = grid[0] * grid[1]
        features, text = torch.randn(2, n, 24, generator=draw), torch.randn(2, 24, generator=draw)
        hint = torch.randn(2, n, generator=draw)
        k = min(1 + seed * 5 % (n - 1), 8)
        method = CdPruner(relevance=relevance)
        signals = {Signal(INSTRUCTION_EMBEDDING, 0): text}
        view = make_view(method, grid, k, images=2, features=features, signals=signals, hints={"relevance": list(hint)})
        order = method.order(view)
        for image in range(2):
            x = features[image].double().numpy()
            unit = x / np.linalg.norm(x, axis=1, keepdims=True)
            r = np.ones(n)
            if relevance != "none":
                t = text[image].double().numpy()
                raw = unit @ t / np.linalg.norm(t) if relevance == "embedding" else hint[image].double().numpy()
                r = (raw - raw.min() + 1e-6) / (raw.max() - raw.min())
            kernel = r[:, None] * (unit @ unit.T) * r[None]
            np.fill_diagonal(kernel, r**2)
            truth, gap = by_hand(kernel, k)
            if gap > 1e-4:
                compared += 1
                assert order[image].tolist() == truth, seed
    assert compared > 150


def test_more_tokens_than_directions_are_still_distinct() -> None:
    features = torch.randn(2, 40, 3)
    weighed = torch.nn.functional.normalize(features, dim=2)
    order = greedy_determinant(weighed @ weighed.transpose(1, 2), 40)
    assert all(sorted(row) == list(range(40)) for row in order.tolist())
    assert sorted(greedy_determinant(torch.zeros(1, 5, 5), 5)[0].tolist()) == list(range(5))
    same = greedy_determinant(torch.ones(1, 6, 6), 6)
    assert sorted(same[0].tolist()) == list(range(6)) and bool(same.isfinite().all())


def test_the_formula_counts_what_is_multiplied(monkeypatch: pytest.MonkeyPatch) -> None:
    method = CdPruner(relevance="none")
    view = make_view(method, (5, 6), 9, images=2, width=16)
    for whole in (4096, 0):
        monkeypatch.setattr(cdpruner, "_WHOLE", whole)
        with FlopCounterMode(display=False) as counter:
            method.select(view)
        assert counter.get_total_flops() == method.flops(2, 30, 16, 9, view.tower)


def test_hints_of_the_wrong_length_and_unknown_sources_are_refused() -> None:
    method = CdPruner(relevance="hint")
    assert method.hints == ("relevance",) and CdPruner().hints == ()
    with tokenprune.applied(tiny_llava(), method, keep=9) as handle, torch.no_grad():
        handle.set_hints(relevance=[[1.0, 2.0]])
        with pytest.raises(ValueError, match="one number for each of a visual's 36 tokens, got 2"):
            handle.model(**prompts([1], "left"))
    with pytest.raises(ValueError, match="Did you mean"):
        CdPruner(relevance="embeding")


@pytest.mark.parametrize("layout", [([1, 3, 0, 2], "left"), ([1, 3, 0, 2], "right"), ([2], "left")])
def test_the_instruction_is_the_text_behind_the_last_picture(layout) -> None:
    model, batch = tiny_llava(), prompts(*layout)
    seen = {}

    class Spy(CdPruner):
        def scores(self, view):
            seen.update({INSTRUCTION_EMBEDDING: view.signal(INSTRUCTION_EMBEDDING, 0)})
            return super().scores(view)

    with tokenprune.applied(model, Spy(), keep=9), torch.no_grad():
        model(**batch)
    table, image = model.get_input_embeddings().weight, model.config.image_token_id
    truth = []
    for ids, mask in zip(batch["input_ids"], batch["attention_mask"]):
        places = (ids == image).nonzero()[:, 0]
        if len(places):
            after = torch.arange(len(ids)) > places[-1]
            text = after & mask.bool()
            text = text if text.any() else mask.bool() & (ids != image)
            pictures = len(places) // 36
            truth += [table[ids[text]].mean(0)] * pictures
    assert relative_error(seen[INSTRUCTION_EMBEDDING], torch.stack(truth)) < 1e-6


@pytest.mark.parametrize("site", ["input", "vision", "layer"])
@pytest.mark.parametrize("name", ["llava", "llava_next", "llava_onevision", "qwen2_vl"])
def test_hints_follow_crops_and_what_an_earlier_cut_left(name: str, site: str) -> None:
    """The hint of a token says which it is: every view must have the numbers of its own tokens."""
    model, batch, seen = family(name), batch_of(name, "one_left"), []

    class Spy(CdPruner):
        def select(self, view):
            start = [0]
            for raster in view.rasters:
                start.append(start[-1] + raster.num_tokens)
            whole = torch.arange(view.num_tokens).expand(view.num_images, -1)
            own = whole if view.tokens is None else view.tokens
            given = zip(view.hints["relevance"], own, strict=True)
            seen.extend((start[-1], view.tokens is None, hint - mine) for hint, mine in given)
            return super().select(view)

    spy = Spy(relevance="hint")
    plan = {
        "input": [{"at": "input", "prune": spy, "keep": 0.5}],
        "vision": [{"at": "vision:0", "prune": spy, "keep": 0.5}],
        "layer": [{"at": "input", "prune": "random", "keep": 0.5}, {"at": "layer:2", "prune": spy, "keep": 0.2}],
    }[site]
    with tokenprune.applied(model, plan) as handle, torch.no_grad():
        sizes = []
        for _ in range(2):  # the first run tells how many tokens the visual has
            handle.set_hints(relevance=[torch.arange(float(sizes[0] if sizes else 1))])
            try:
                handle.model(**batch)
            except ValueError as error:
                sizes.append(int(str(error).split("visual's ")[1].split()[0]))
    (total,) = sizes
    # within a view the numbers go up with its tokens, from where its first crop begins
    offsets = []
    for _, _, offset in seen:
        assert float(offset.amin()) == float(offset.amax())
        offsets.append(int(offset[0]))
    assert seen and offsets[0] == 0
    if site == "layer":
        assert offsets == [0] and not seen[0][1]
    else:
        assert sum(size for size, *_ in seen) == total
        running = 0
        for offset, (size, *_) in sorted(zip(offsets, seen), key=lambda pair: pair[0]):
            assert offset == running
            running += size


@pytest.mark.parametrize("name", sorted(BUILDERS))
def test_other_words_choose_other_tokens_in_every_family(name) -> None:
    """What the text says must reach the choice: with other words behind the picture, something else stays."""
    model, kept = family(name), []
    batch = batch_of(name, "one_left")
    special = {value for key, value in vars(model.config).items() if "_token" in key}
    special |= set(batch["input_ids"][0].tolist())
    for shift in (0, 1):
        words = dict(batch)
        words["input_ids"] = batch["input_ids"].clone()
        if shift:
            other = next(i for i in range(5, 60) if i not in special)
            words["input_ids"][:, -2:] = other
        with tokenprune.applied(model, "cdpruner", keep=0.3) as handle, torch.no_grad():
            model(**words)
        kept.append([indices.tolist() for images in handle.kept for indices in images])
    assert kept[0] != kept[1]
