import dataclasses

import pytest
import torch
from _views import make_view, random_boxes

import tokenprune
from tokenprune.methods._places import spread
from tokenprune.methods.oracle import Oracle, coverage, keep_covered, keep_covered_and_diverse


def covered_by_hand(boxes: list[list[float]], grid: tuple[int, int]) -> list[float]:
    """Area of each patch inside the boxes, in patches, one patch and box at a time."""
    rows, cols = grid
    areas = []
    for i in range(rows):
        for j in range(cols):
            area = 0.0
            for x0, y0, x1, y1 in boxes:
                wide = min(x1, (j + 1) / cols) - max(x0, j / cols)
                high = min(y1, (i + 1) / rows) - max(y0, i / rows)
                area += max(wide, 0) * max(high, 0) * rows * cols
            areas.append(area)
    return areas


def test_touched_patches_come_first() -> None:
    few = many = 0
    for seed in range(150):
        generator = torch.Generator().manual_seed(seed)
        grid = (2 + seed % 5, 2 + seed % 7)
        boxes = random_boxes(generator)
        k = 1 + seed * 7 % (grid[0] * grid[1])
        areas = covered_by_hand(boxes, grid)
        torch.testing.assert_close(coverage(boxes, grid), torch.tensor(areas, dtype=torch.float64))
        kept = keep_covered(boxes, grid, k).tolist()
        assert kept == sorted(set(kept)) and len(kept) == k
        touched = [place for place, area in enumerate(areas) if area > 1e-4]
        if len(touched) <= k:
            few += 1
            assert set(touched) <= set(kept)
        else:
            many += 1
            most = sorted(areas, reverse=True)[:k]
            assert sorted((areas[place] for place in kept), reverse=True) == pytest.approx(most)
    assert few > 40 and many > 40


def test_a_box_on_the_border_of_patches_touches_only_its_own() -> None:
    for count in (3, 7, 12, 24, 49):
        for i in range(count):
            left, right = torch.tensor([i / count, (i + 1) / count]).tolist()  # rounded to fp32
            for box in ([left, 0.0, right, 1.0], [i / count, 0.0, (i + 1) / count, 1.0]):
                middle = spread((1, count), 1).tolist()
                kept = keep_covered([box], (1, count), 2).tolist()
                assert kept == sorted([i, *middle]) or [i] == middle and i in kept


def test_without_boxes_the_spread_is_even() -> None:
    for k in range(1, 48):
        assert torch.equal(keep_covered([], (6, 8), k), spread((6, 8), k))


def test_the_rest_is_spread_over_the_whole_image() -> None:
    kept = keep_covered([[0.0, 0.0, 0.25, 0.25]], (16, 16), 16 + 48)
    at = torch.stack([kept // 16, kept % 16], dim=1).double()
    everywhere = torch.cartesian_prod(torch.arange(16), torch.arange(16)).double()
    assert torch.cdist(everywhere, at).amin(dim=1).max() <= 2.9


def test_any_number_of_other_patches_can_be_filled() -> None:
    for seed in range(12):
        boxes = random_boxes(torch.Generator().manual_seed(seed))
        for k in range(1, 36):
            assert len(set(keep_covered(boxes, (5, 7), k).tolist())) == k


def test_the_rest_is_what_is_least_like_what_is_kept() -> None:
    filled = 0
    for seed in range(100):
        generator = torch.Generator().manual_seed(seed)
        grid = (2 + seed % 5, 2 + seed % 6)
        count = grid[0] * grid[1]
        boxes, k = random_boxes(generator), 1 + seed * 7 % count
        features = 2.0 * torch.randint(0, 2, (count, 16), generator=generator) - 1  # of length 4: exact cosines
        kept = keep_covered_and_diverse(boxes, grid, features, k).tolist()
        areas = covered_by_hand(boxes, grid)
        chosen = [place for place, area in enumerate(areas) if area > 1e-4]
        assert len(set(kept)) == k and kept == sorted(kept)
        if not chosen or len(chosen) >= k:
            continue
        filled += 1
        while len(chosen) < k:
            near = {i: max(float(features[i] @ features[j]) for j in chosen) for i in range(count) if i not in chosen}
            chosen.append(min(near, key=lambda i: (near[i], i)))
        assert kept == sorted(chosen), seed
    assert filled > 20
    method = Oracle(fill="diversity")
    view = dataclasses.replace(
        make_view(method, (4, 4), 6), hints={"boxes": [[[0, 0, 0.5, 0.5]], [], [[0.5, 0.5, 1, 1]]]}
    )
    kept = method.select(view).indices.tolist()
    assert {0, 1, 4, 5} <= set(kept[0]) and {10, 11, 14, 15} <= set(kept[2])
    with pytest.raises(ValueError, match="Did you mean"):
        Oracle(fill="diverse")


def test_boxes_reaching_out_of_the_image_are_cut() -> None:
    assert coverage([[-1.0, -1.0, 0.5, 0.5], [2.0, 0.0, 3.0, 1.0]], (2, 2)).tolist() == [1, 0, 0, 0]


def test_every_image_has_its_own_boxes() -> None:
    view = make_view(Oracle(), (4, 4), 4)
    boxes = [[[0.0, 0.0, 0.5, 0.5]], [], [[0.5, 0.5, 1.0, 1.0]]]
    kept = Oracle().select(dataclasses.replace(view, hints={"boxes": boxes})).indices.tolist()
    assert kept == [[0, 1, 4, 5], spread((4, 4), 4).tolist(), [10, 11, 14, 15]]


@pytest.mark.parametrize(
    "box", [[0.1, 0.1, 0.3], [0.3, 0.1, 0.1, 0.4], [0.1, 0.2, 0.3, 0.2], [0.1, 0.2, float("nan"), 1]]
)
def test_what_is_no_box_is_refused(box: list[float]) -> None:
    with pytest.raises(ValueError, match="A box is"):
        coverage([[0.0, 0.0, 1.0, 1.0], box], (3, 3))


def test_missing_hints_are_refused() -> None:
    view = make_view(Oracle())
    for hints in ({}, {"boxes": [[]]}):
        with pytest.raises(ValueError, match="3 images"):
            Oracle().select(dataclasses.replace(view, hints=hints))


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_pictures_and_videos_of_a_batch_get_their_own_boxes(name):
    """Pictures and videos go through the tower apart; the boxes come in the order of the batch."""
    from _families import SAMPLES, batch_of, family

    model, batch = family(name), batch_of(name, "mixed_left")
    sizes = [visual[-2:] for prompt in SAMPLES[name]["mixed"] for visual in prompt]
    corners = [(0.0, 0.0), (0.75, 0.75), (0.0, 0.75), (0.75, 0.0)]
    boxes = [[[x + 0.01, y + 0.01, x + 0.2, y + 0.2]] for x, y in corners[: len(sizes)]]
    with tokenprune.applied(model, "oracle@0.3") as handle, torch.no_grad():
        handle.set_hints(boxes=boxes)
        model(**batch)
        kept = [indices for prompt in handle.kept for indices in prompt]
    for (rows, cols), own, indices in zip(sizes, boxes, kept, strict=True):
        touched = coverage(own[0:1], (rows, cols)).nonzero().squeeze(1)
        assert set(touched.tolist()) <= set((indices[indices < rows * cols]).tolist())
