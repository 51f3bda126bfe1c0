import itertools

import pytest
import torch
from _views import make_view

from tokenprune.methods._places import spread
from tokenprune.methods.uniform import Uniform


def test_exactly_k_places_for_every_k_and_grid() -> None:
    for height, width in itertools.chain(itertools.product(range(1, 9), range(1, 9)), [(1, 40), (40, 1), (3, 29)]):
        for k in range(1, height * width + 1):
            places = spread((height, width), k).tolist()
            assert places == sorted(set(places)) and len(places) == k
            assert places[0] >= 0 and places[-1] < height * width


def test_rows_and_gaps_are_as_even_as_integers_allow() -> None:
    for grid, k in itertools.product([(24, 24), (12, 12), (17, 31), (9, 5)], range(1, 45)):
        height, width = grid
        rows: dict[int, list[int]] = {}
        for place in spread(grid, k).tolist():
            rows.setdefault(place // width, []).append(place % width)
        counts = [len(columns) for columns in rows.values()]
        assert max(counts) - min(counts) <= 1
        gaps = [b - a for a, b in itertools.pairwise(rows)]
        assert not gaps or max(gaps) - min(gaps) <= 1
        # centred: as far from the first edge as from the last one
        assert abs(min(rows) - (height - 1 - max(rows))) <= 1
        for columns in rows.values():
            gaps = [b - a for a, b in itertools.pairwise(columns)]
            assert not gaps or max(gaps) - min(gaps) <= 1
            assert abs(columns[0] - (width - 1 - columns[-1])) <= 1


@pytest.mark.parametrize("k", [16, 36, 64, 100, 128, 192, 288])
def test_no_patch_is_far_from_a_kept_one(k: int) -> None:
    places = spread((24, 24), k)
    at = torch.stack([places // 24, places % 24], dim=1).double()
    everywhere = torch.cartesian_prod(torch.arange(24), torch.arange(24)).double()
    farthest = torch.cdist(everywhere, at).amin(dim=1).max()
    # half the diagonal of a square cell of N / k patches, and one patch for rounding
    assert farthest <= (24 * 24 / k / 2) ** 0.5 + 1


def test_known_places() -> None:
    assert spread((3, 3), 1).tolist() == [4]
    assert spread((4, 4), 4).tolist() == [5, 7, 13, 15]
    assert spread((1, 6), 3).tolist() == [1, 3, 5]
    assert spread((2, 3), 6).tolist() == [0, 1, 2, 3, 4, 5]


def test_impossible_counts_are_refused() -> None:
    for k in (0, 13):
        with pytest.raises(ValueError, match="no 0 different|no 13 different"):
            spread((3, 4), k)


def test_all_images_keep_the_same_places() -> None:
    kept = Uniform().select(make_view(Uniform(), (6, 7), 11)).indices
    assert torch.equal(kept, spread((6, 7), 11).expand(3, -1))
