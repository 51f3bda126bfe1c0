import math

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tokenprune.kernels import greedy_diversity as module
from tokenprune.kernels.greedy_diversity import greedy_diversity, greedy_diversity_flops, needs_gram

OBJECTIVES = ["max_sum", "k_center"]


def by_hand(features: Tensor, k: int, objective: str, first: int | None) -> tuple[list[int], float]:
    """One image in plain loops and fp64, sums and maxima computed anew at every step.

    Returns the choice, and by how much the closest of all its decisions was won (0: there was a tie).
    """
    rows = features.double().tolist()
    lengths = [math.sqrt(sum(x * x for x in row)) for row in rows]
    unit = [[x / max(length, 1e-12) for x in row] for row, length in zip(rows, lengths)]
    n = len(unit)
    cosine = [[sum(a * b for a, b in zip(unit[i], unit[j])) for j in range(n)] for i in range(n)]
    gap = math.inf

    def lowest(values: dict[int, float]) -> int:
        nonlocal gap
        ranked = sorted(values.items(), key=lambda item: (item[1], item[0]))
        if len(ranked) > 1:
            gap = min(gap, ranked[1][1] - ranked[0][1])
        return ranked[0][0]

    if first is None:
        first = lowest({i: max([cosine[i][j] for j in range(n) if j != i], default=-1) for i in range(n)})
    chosen = [first]
    while len(chosen) < k:
        join = sum if objective == "max_sum" else max
        chosen.append(lowest({i: join(cosine[i][j] for j in chosen) for i in range(n) if i not in chosen}))
    return chosen, gap


def both_ways(features: Tensor, k: int, objective: str, first: Tensor | None) -> Tensor:
    """The CPU way; checked against the way of other devices, and with and without the Gram product."""
    chosen = greedy_diversity(features, k, objective, first)
    unit = features.float() / torch.linalg.vector_norm(features.float(), dim=2, keepdim=True).clamp_min(1e-12)
    assert torch.equal(module._batched(unit, k, objective, first), chosen)
    return chosen


@pytest.fixture(params=["gram", "rows"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways of getting the similarities, whatever k is."""
    monkeypatch.setattr(module, "_ROW_COST", 10**9 if request.param == "gram" else 0)
    return request.param


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("given", [True, False])
def test_equals_the_definition_on_random_features(objective: str, given: bool, way: str) -> None:
    compared = 0
    for seed in range(60):
        generator = torch.Generator().manual_seed(seed)
        n, width = (int(torch.randint(2, top, (), generator=generator)) for top in (24, 20))
        k = int(torch.randint(1, n + 1, (), generator=generator))
        features = torch.randn(2, n, width, generator=generator) * torch.rand(2, n, 1, generator=generator)
        first = torch.randint(n, (2,), generator=generator) if given else None
        chosen = both_ways(features, k, objective, first)
        for image in range(2):
            truth, gap = by_hand(features[image], k, objective, None if first is None else int(first[image]))
            if gap > 1e-5:
                compared += 1
                assert chosen[image].tolist() == truth
    assert compared > (90 if given else 50)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("width", [1, 4, 16])
def test_ties_go_to_the_lower_index(objective: str, width: int, way: str) -> None:
    """Entries of +-1 in 1, 4 or 16 dimensions have exact cosines, sums and so exact ties, in every float format."""
    ties = 0
    for seed in range(25):
        generator = torch.Generator().manual_seed(seed)
        n = int(torch.randint(2, 30, (), generator=generator))
        k = int(torch.randint(1, n + 1, (), generator=generator))
        features = torch.randint(2, (2, n, width), generator=generator) * 2.0 - 1
        first = torch.randint(n, (2,), generator=generator) if seed % 2 else None
        chosen = both_ways(features, k, objective, first)
        for image in range(2):
            truth, gap = by_hand(features[image], k, objective, None if first is None else int(first[image]))
            assert chosen[image].tolist() == truth
            ties += gap == 0
    assert ties > 10


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_one_token_of_each_orthogonal_group(objective: str, way: str) -> None:
    groups = torch.tensor([2, 0, 1, 1, 3, 0, 2, 2, 3, 1])
    features = torch.eye(4)[groups].unsqueeze(0) * torch.arange(1, 11).view(1, 10, 1)
    chosen = both_ways(features, 4, objective, torch.tensor([5]))[0]
    assert chosen.tolist() == [5, 0, 2, 4]
    assert sorted(groups[chosen].tolist()) == [0, 1, 2, 3]


def test_k_center_and_max_sum_differ() -> None:
    """Max-sum goes for the corner again and again, k-center covers the middle."""
    angles = torch.tensor([0.0, 0.6, 1.2, 1.50, 1.55, 1.57])
    features = torch.stack([angles.cos(), angles.sin()], dim=1).unsqueeze(0)
    first = torch.tensor([0])
    assert greedy_diversity(features, 3, "max_sum", first).tolist() == [[0, 5, 4]]
    assert greedy_diversity(features, 3, "k_center", first).tolist() == [[0, 5, 1]]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_all_and_one(objective: str, way: str) -> None:
    features = torch.randn(3, 19, 7)
    first = torch.tensor([4, 0, 18])
    assert greedy_diversity(features, 1, objective, first).tolist() == [[4], [0], [18]]
    everything = both_ways(features, 19, objective, first)
    assert torch.equal(everything.sort(dim=1).values, torch.arange(19).expand(3, -1))
    assert greedy_diversity(torch.randn(2, 1, 7), 1, objective).tolist() == [[0], [0]]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_length_does_not_matter(objective: str, way: str) -> None:
    features = torch.randn(2, 30, 9)
    scaled = features * 2.0 ** torch.randint(-6, 7, (2, 30, 1))
    first = torch.tensor([3, 7])
    assert torch.equal(greedy_diversity(features, 12, objective, first), greedy_diversity(scaled, 12, objective, first))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_half_precision_is_computed_in_fp32(dtype: torch.dtype, objective: str) -> None:
    features = torch.randn(2, 200, 33).to(dtype)
    assert torch.equal(greedy_diversity(features, 150, objective), greedy_diversity(features.float(), 150, objective))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_rows_of_zeros_are_similar_to_nothing(objective: str) -> None:
    features = torch.tensor([[[1.0, 0.0], [0.9, 0.1], [0.0, 0.0], [0.8, 0.6]]])
    assert greedy_diversity(features, 2, objective, torch.tensor([0])).tolist() == [[0, 2]]
    assert sorted(greedy_diversity(torch.zeros(1, 5, 3), 5, objective)[0].tolist()) == [0, 1, 2, 3, 4]


def test_the_pivotless_start_is_the_most_isolated_token() -> None:
    angles = torch.tensor([0.0, 0.1, 0.2, 0.9, 1.8, 1.85])
    features = torch.stack([angles.cos(), angles.sin()], dim=1).unsqueeze(0)
    assert greedy_diversity(features, 2, "k_center").tolist() == [[3, 5]]


def test_two_that_are_each_others_nearest_tie_though_a_product_rounds_them_apart() -> None:
    above = torch.nextafter(torch.tensor(0.375), torch.tensor(1.0))
    table = torch.tensor([[-torch.inf, 0.25, 0.5], [0.25, -torch.inf, 0.375], [0.5, float(above), -torch.inf]])
    assert module._nearest(table).tolist() == module._nearest(table.T).tolist() == [0.5, float(above), 0.5]
    pair = torch.tensor([[-torch.inf, 0.375], [float(above), -torch.inf]])
    assert int(module._nearest(pair).argmin()) == int(module._nearest(pair.T).argmin()) == 0


def test_a_sparse_choice_costs_k_rows_and_a_dense_one_a_gram_product() -> None:
    first = torch.zeros(2, dtype=torch.int64)
    for n, k, pivot in ((200, 5, first), (200, 150, first), (200, 5, None), (40, 40, first), (40, 1, first)):
        features = torch.randn(2, n, 12)
        with FlopCounterMode(display=False) as counter:
            greedy_diversity(features, k, "max_sum", pivot)
        assert counter.get_total_flops() == greedy_diversity_flops(2, n, 12, k, pivot is not None)
    assert not needs_gram(200, 5, True)
    assert greedy_diversity_flops(2, 200, 12, 5, True) == 2 * 2 * 4 * 200 * 12
    assert greedy_diversity_flops(2, 200, 12, 150, True) == 2 * 2 * 200 * 200 * 12


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_features_that_are_no_numbers_are_refused(value: float) -> None:
    features = torch.randn(2, 6, 4)
    features[1, 5, 0] = value
    with pytest.raises(ValueError, match="NaN or infinity"):
        greedy_diversity(features, 2, "k_center")


def test_arguments_out_of_range_are_refused() -> None:
    features = torch.randn(2, 6, 4)
    for k in (0, 7):
        with pytest.raises(ValueError, match="1 <= k <= N"):
            greedy_diversity(features, k, "k_center")
    with pytest.raises(ValueError, match="max_sum, k_center"):
        greedy_diversity(features, 2, "max_min")
    for first in (torch.tensor([0]), torch.tensor([0.0, 1.0])):
        with pytest.raises(ValueError, match="first must be int64"):
            greedy_diversity(features, 2, "k_center", first)
    for first in (torch.tensor([0, 6]), torch.tensor([-1, 2])):
        with pytest.raises(ValueError, match=r"first must be in \[0, 6\)"):
            greedy_diversity(features, 2, "k_center", first)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_another_default_dtype_changes_nothing(objective):
    """vLLM makes models with theirs as the default."""
    features = torch.randn(2, 40, 16, generator=torch.Generator().manual_seed(0))
    expected = greedy_diversity(features, 20, objective)
    torch.set_default_dtype(torch.float16)
    try:
        assert torch.equal(greedy_diversity(features, 20, objective), expected)
    finally:
        torch.set_default_dtype(torch.float32)
