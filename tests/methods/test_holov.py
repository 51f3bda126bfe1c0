import dataclasses
import math
from typing import Any

import pytest
import torch
from _views import TOWER, make_view
from torch import Tensor

from tokenprune.interfaces.signals import CLS_ATTENTION, SINK_ATTENTION, Signal
from tokenprune.methods import holov
from tokenprune.methods.holov import HoloV, fit_quotas, similarity_variance, strip_sizes

SIGNAL = Signal(CLS_ATTENTION, 4)
VARIANTS = ["paper", "official"]


class Reference:
    """One image, one strip and one token at a time, in fp64, from the card."""

    def __init__(self, features: Tensor, attention: Tensor, k: int, crops: int, variant: str, power: float) -> None:
        self.z, self.a = features.double(), [float(value) for value in attention]
        self.k, self.official, self.power = k, variant == "official", power
        self.doubt = 1.0  # how near the closest rounding or ranking decision was
        base, more = divmod(len(self.a), crops)
        starts = [0]
        for c in range(crops):
            starts.append(starts[-1] + base + (c < more))
        self.strips = [list(range(a, b)) for a, b in zip(starts, starts[1:]) if b > a]

    def variance(self, strip: list[int]) -> list[float]:
        unit = [self.z[i] / (self.z[i].norm() + 1e-6) for i in strip]
        out = []
        for i in range(len(strip)):
            row = [float(unit[i] @ unit[j]) if i != j else 0.0 for j in range(len(strip))]
            mean = sum(row) / (len(strip) - 1)
            out.append(sum((s - mean) ** 2 for s in row) / (len(strip) - 1))
        return out

    def holistic(self, strip: list[int]) -> list[float]:
        if len(strip) == 1:
            return [self.a[strip[0]] * (1 if self.official else 2)]
        variance = self.variance(strip)
        scale = 1000 if self.official else 1
        mean_a = sum(scale * self.a[i] for i in strip) / len(strip)
        mean_v = sum(variance) / len(strip)
        gamma = mean_a / (mean_v + 1e-6) * 0.09 if self.official else mean_a / mean_v
        return [scale * self.a[i] + gamma * v for i, v in zip(strip, variance)]

    def whole(self, share: float) -> int:
        share += 1e-4  # a share this little below a whole number counts as whole
        self.doubt = min(self.doubt, abs(share - max(round(share), 1)))
        return math.floor(share)

    def quotas(self, h: list[list[float]]) -> list[int]:
        raised = [(sum(strip) / len(strip)) ** self.power for strip in h]
        weight = [value / (sum(raised) + (1e-6 if self.official else 0)) for value in raised]
        ranked = sorted(range(len(h)), key=lambda c: (-weight[c], c))
        for left, right in zip(ranked, ranked[1:]):
            self.doubt = min(self.doubt, (weight[left] - weight[right]) * self.k)
        quota = [self.whole(w * self.k) for w in weight]
        left = self.k - sum(quota)
        for c in ranked[:left] if self.official else ranked[:1] * left:
            quota[c] += 1
        sizes = [len(strip) for strip in h]
        self.overflow = any(q > size for q, size in zip(quota, sizes))
        quota = [min(q, size) for q, size in zip(quota, sizes)]
        for _ in range(4):
            left = self.k - sum(quota)
            part = [w * (size - q) for w, q, size in zip(weight, quota, sizes)]
            if left == 0 or sum(part) == 0:
                break
            give = [self.whole(left * p / sum(part)) for p in part]
            quota = [min(q + g, size) for q, g, size in zip(quota, give, sizes)]
        if self.official:
            for c in [c for c in ranked if quota[c] < sizes[c]][: self.k - sum(quota)]:
                quota[c] += 1
        for c in ranked:
            quota[c] += min(sizes[c] - quota[c], self.k - sum(quota))
        return quota

    def select(self) -> list[int]:
        h = [self.holistic(strip) for strip in self.strips]
        kept = []
        for strip, score, quota in zip(self.strips, h, self.quotas(h)):
            if self.official:
                score = [self.a[i] for i in strip]
            order = sorted(range(len(strip)), key=lambda i: (-score[i], i))
            if 0 < quota < len(strip):
                best, next_best = score[order[quota - 1]], score[order[quota]]
                self.doubt = min(self.doubt, (best - next_best) / best)
            kept += [strip[i] for i in order[:quota]]
        return sorted(kept)


@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_the_definition(variant: str) -> None:
    compared = overflowed = 0
    for seed in range(120):
        grid = (2 + seed % 4, 2 + seed % 5)
        count = grid[0] * grid[1]
        crops = 1 + seed % 9
        power = (1.0, 1.0, 0.5, 2.0)[seed % 4]
        method = HoloV(variant=variant, crops=crops, power=power)
        features = torch.randn(2, count, 5, generator=torch.Generator().manual_seed(seed))
        view = make_view(method, grid, 1 + seed * 13 % (count - 1), images=2, seed=seed, features=features)
        kept = method.select(view).indices
        for image in range(2):
            truth = Reference(
                features[image], view.signals[SIGNAL][image], view.budget, min(crops, count), variant, power
            )
            wanted = truth.select()
            assert len(wanted) == view.budget
            if truth.doubt > 1e-5:
                compared += 1
                overflowed += truth.overflow
                assert kept[image].tolist() == wanted
    assert compared > 200 and overflowed > 30


def test_strips_cover_the_sequence_and_differ_by_one() -> None:
    for count in range(1, 60):
        for strips in range(1, 60):
            sizes = strip_sizes(count, strips)
            assert sum(sizes) == count and len(sizes) == min(strips, count)
            assert sizes == sorted(sizes, reverse=True) and sizes[0] - sizes[-1] <= 1 and sizes[-1] > 0


def test_default_numbers_of_strips() -> None:
    paper = HoloV(variant="paper")
    for budget, strips in ((192, 5), (128, 8), (64, 16), (320, 3), (4000, 1)):
        assert len(paper.strips(5000, budget)) == strips
    assert len(paper.strips(20, 3)) == 20
    assert HoloV().strips(576, 64) == HoloV().strips(576, 192) == [36] * 16
    assert HoloV(crops=5).strips(576, 64) == [116, 115, 115, 115, 115]


@pytest.mark.parametrize("variant", VARIANTS)
def test_quotas_are_exact_and_fit(variant: str) -> None:
    generator = torch.Generator().manual_seed(0)
    for seed in range(200):
        strips = 1 + seed % 18
        size = torch.randint(1, 9, (1,), generator=generator) + (torch.arange(strips) < seed % (strips + 1)).long()
        budget = int(torch.randint(1, int(size.sum()) + 1, (), generator=generator))
        means = torch.rand(3, strips, generator=generator).double() ** 6
        means[1] = 0  # no attention at all
        means[2, torch.randint(strips, (strips // 2,), generator=generator)] = 0
        quota = HoloV(variant=variant).quotas(means, size, budget)
        assert quota.sum(dim=1).tolist() == [budget] * 3
        assert bool(((quota >= 0) & (quota <= size)).all())


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("level", [1 / 576, 0.0])
def test_even_attention_gives_even_quotas(variant: str, level: float) -> None:
    method = HoloV(variant=variant, crops=16)
    view = make_view(method, (24, 24), 64, features=torch.randn(3, 576, 8))
    flat = dataclasses.replace(view, signals={SIGNAL: torch.full((3, 576), level)})
    kept = method.select(flat).indices
    assert torch.equal((kept // 36).view(3, 16, 4), torch.arange(16).view(1, 16, 1).expand(3, 16, 4))


def test_the_rest_after_rounding() -> None:
    """Weights .5, .3, .2 of 9: 4, 2 and 1 whole tokens, two left over."""
    means, size = torch.tensor([[0.3, 0.5, 0.2]]).double(), torch.tensor([9, 9, 9])
    assert HoloV(variant="paper").quotas(means, size, 9).tolist() == [[2, 6, 1]]
    assert HoloV(variant="official").quotas(means, size, 9).tolist() == [[3, 5, 1]]


def test_what_overflows_goes_where_weight_and_room_are() -> None:
    weight, size = torch.tensor([[0.7, 0.2, 0.1]]).double(), torch.tensor([4, 20, 20])
    # 14, 4, 2 of 20: ten too many, shared as .2 * 16 to .1 * 18, so 6.4 to 3.6
    for one_each, wanted in ((True, [4, 11, 5]), (False, [4, 11, 5])):
        assert fit_quotas(weight, torch.tensor([[14, 4, 2]]), size, 20, one_each).tolist() == [wanted]
    none = torch.tensor([[1.0, 0.0, 0.0]]).double()
    assert fit_quotas(none, torch.tensor([[20, 0, 0]]), size, 20, False).tolist() == [[4, 16, 0]]
    assert fit_quotas(none, torch.tensor([[6, 0, 0]]), size, 6, True).tolist() == [[4, 1, 1]]


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_budget_below_the_number_of_strips_goes_to_the_heaviest(variant: str) -> None:
    method = HoloV(variant=variant, crops=10)
    view = make_view(method, (5, 8), 3, features=torch.randn(3, 40, 8))
    attention = 0.02 + torch.rand(3, 40) / 200  # no strip has a share of a whole token
    kept = method.select(dataclasses.replace(view, signals={SIGNAL: attention})).indices // 4
    means = attention.view(3, 10, 4).mean(dim=2)
    if variant == "official":
        assert torch.equal(kept, means.topk(3, dim=1).indices.sort(dim=1).values)
    else:
        assert torch.equal(kept, means.argmax(dim=1, keepdim=True).expand(3, 3))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("crops", [4, 7, 16])
def test_the_variance_has_no_say_in_the_quotas(variant: str, crops: int) -> None:
    method = HoloV(variant=variant, crops=crops)
    view = make_view(method, (8, 9), 25, features=torch.randn(3, 72, 8))
    other = dataclasses.replace(view, features=torch.randn(3, 72, 8))
    edges = torch.tensor(strip_sizes(72, crops)).cumsum(0)

    def quotas(kept: Tensor) -> Tensor:
        return torch.stack(
            [torch.bincount(torch.searchsorted(edges, row, right=True), minlength=crops) for row in kept]
        )

    first, second = method.select(view).indices, method.select(other).indices
    assert torch.equal(quotas(first), quotas(second))
    # the paper ranks by it, the official code does not
    assert torch.equal(first, second) == (variant == "official")


@pytest.mark.parametrize("variant", VARIANTS)
def test_mean_scores_are_a_fixed_multiple_of_mean_attention(variant: str) -> None:
    features, attention = torch.randn(2, 6, 12, 8), torch.rand(2, 6, 12) / 100
    _, means = HoloV(variant=variant).scores(features, attention)
    factor = means / attention.double().mean(dim=2)
    wanted = 2.0 if variant == "paper" else 1090.0
    torch.testing.assert_close(factor, torch.full_like(factor, wanted), rtol=1e-4, atol=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_scaled_attention_selects_the_same(variant: str) -> None:
    for seed in range(10):
        method = HoloV(variant=variant)
        view = make_view(method, (8, 9), 25, seed=seed)
        for factor in (0.25, 8.0):
            scaled = dataclasses.replace(view, signals={SIGNAL: view.signals[SIGNAL] * factor})
            assert torch.equal(method.select(view).indices, method.select(scaled).indices)


def test_one_official_strip_is_plain_attention_ranking() -> None:
    method = HoloV(crops=1)
    view = make_view(method, (8, 9), 25)
    assert torch.equal(method.select(view).indices, view.signals[SIGNAL].topk(25, dim=1).indices.sort(dim=1).values)


def test_paper_prefers_variance_where_attention_is_flat() -> None:
    method = HoloV(variant="paper", crops=3)
    view = make_view(method, (6, 6), 9, images=1, features=torch.randn(1, 36, 8))
    flat = dataclasses.replace(view, signals={SIGNAL: torch.full((1, 36), 0.02)})
    variance = similarity_variance(view.features.view(3, 12, 8))
    wanted = variance.topk(3, dim=1).indices.sort(dim=1).values + torch.tensor([[0], [12], [24]])
    assert method.select(flat).indices.tolist() == [wanted.flatten().tolist()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 3, 160, 2048), (2, 16, 36, 4096), (3, 5, 100, 1024), (4, 170, 2048)])
def test_strip_by_strip_is_bit_equal_to_all_at_once(shape, dtype, monkeypatch) -> None:
    features = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    strips: list[int] = []
    one = holov._strip_variance
    monkeypatch.setattr(holov, "_strip_variance", lambda strip: strips.append(strip.numel()) or one(strip))
    found = similarity_variance(features)
    assert torch.equal(found, one(features)) and len(strips) == shape[-3]
    strips.clear()
    similarity_variance(features[..., :1, :])
    assert len(strips) == 1, "small strips are one product"


def test_variance_counts_the_zeroed_diagonal() -> None:
    # similarities 1 to the twin and 0 to the third: mean 1/2, and (0 - 1/2)^2 thrice, over 2
    twins = torch.tensor([[2.0, 0.0], [2.0, 0.0], [0.0, 3.0]])
    torch.testing.assert_close(similarity_variance(twins), torch.tensor([0.375, 0.375, 0.0]), atol=1e-5, rtol=0)
    assert similarity_variance(torch.randn(4, 1, 5)).tolist() == [[0.0]] * 4


@pytest.mark.parametrize("options", [{"variant": "paper"}, {"variant": "official"}, {"variant": "paper", "crops": 30}])
def test_tokens_without_length_or_strips_without_variance(options: dict[str, Any]) -> None:
    method = HoloV(**options)
    for features in (torch.zeros(3, 30, 4), torch.ones(3, 30, 4)):
        view = make_view(method, budget=11, features=features)
        kept = method.select(view).indices
        assert all(len(set(row)) == 11 for row in kept.tolist())


def test_strips_without_variance_weigh_as_much_as_their_attention_says() -> None:
    """Two strips with equal attention, one of equal tokens."""
    features = torch.randn(1, 20, 6)
    features[:, :10] = torch.eye(6)[0]
    features[:, :10, 0] = 0
    method = HoloV(variant="paper", crops=2)
    view = make_view(method, (4, 5), 8, images=1, features=features)
    kept = method.select(dataclasses.replace(view, signals={SIGNAL: torch.full((1, 20), 0.05)})).indices
    assert int((kept < 10).sum()) == 4


def test_an_official_strip_of_one_token_has_next_to_no_weight() -> None:
    """Strips of 2 and 1: attention of the short ones is not multiplied by 1000."""
    method = HoloV(crops=3)
    view = make_view(method, (1, 5), 3, images=1, features=torch.randn(1, 5, 4))
    attention = torch.tensor([[0.1, 0.2, 0.1, 0.19, 0.9]])
    assert method.select(dataclasses.replace(view, signals={SIGNAL: attention})).indices.tolist() == [[0, 1, 3]]


def test_what_it_asks_for() -> None:
    assert HoloV().signals(TOWER) == (SIGNAL,)
    without = dataclasses.replace(TOWER, has_cls=False)
    assert HoloV().signals(without) == (Signal(SINK_ATTENTION, TOWER.feature_layer, (0.0,)),)
    assert "extension" in HoloV().notes(without)[0] and not HoloV().notes(TOWER)


def test_strips_without_cls_are_those_of_the_port() -> None:
    """Card: 5, 8 and 16 at 33.3, 22.2 and 11.1 percent; float truncation can give one less; at least one."""
    for count, keep, strips in (
        (576, 192, 5),
        (576, 128, 8),
        (576, 64, 16),
        (1000, 111, 16),
        (1000, 999, 1),
        (9, 9, 1),
    ):
        assert len(HoloV().strips(count, keep, has_cls=False)) == strips == max(1, int((1024 / 576) * count / keep))
        assert len(HoloV().strips(count, keep)) == min(16, count)
        assert HoloV(crops=3).strips(count, keep, has_cls=False) == HoloV(crops=3).strips(count, keep)
    view = dataclasses.replace(make_view(HoloV(), (20, 20), 100), tower=dataclasses.replace(TOWER, has_cls=False))
    attention = torch.rand(3, 400) + (torch.arange(400) < 57) * 9.0
    view = dataclasses.replace(view, signals={Signal(SINK_ATTENTION, TOWER.feature_layer, (0.0,)): attention})
    assert torch.equal(HoloV().select(view).indices, HoloV(crops=7).select(view).indices)
    assert not torch.equal(HoloV().select(view).indices, HoloV(crops=16).select(view).indices)


def test_unknown_choices_are_refused() -> None:
    with pytest.raises(ValueError, match="paper, official"):
        HoloV(variant="clean")
    with pytest.raises(ValueError, match="crops must be"):
        HoloV(crops=0)
    for power in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="power must be"):
            HoloV(power=power)


@pytest.mark.parametrize("variant", VARIANTS)
def test_nan_features_are_refused(variant: str) -> None:
    view = make_view(HoloV(), (10, 10), 7)
    view.features[0, 3, 2] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        HoloV(variant=variant, crops=9).select(view)
