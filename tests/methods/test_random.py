import dataclasses

import pytest
import torch
from _views import make_view

from tokenprune.methods._places import _mix, _signed, hash_tokens
from tokenprune.methods.random import Random
from tokenprune.state.tower_recording import Recording

BITS = (1 << 64) - 1


def splitmix(x: int) -> int:
    """The finaliser of splitmix64 in Python integers."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & BITS
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & BITS
    return x ^ (x >> 31)


def test_the_hash_is_splitmix64() -> None:
    # the generator's first outputs for seed 1234567, as every implementation of it prints them
    states = torch.tensor([_signed(1234567 + j * 0x9E3779B97F4A7C15) for j in range(1, 6)])
    assert [value & BITS for value in _mix(states).tolist()] == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    values = torch.randint(-(2**63), 2**63 - 1, (100,))
    assert [value & BITS for value in _mix(values).tolist()] == [splitmix(value & BITS) for value in values.tolist()]


def test_tokens_rank_by_the_hash_of_seed_image_and_place() -> None:
    golden = 0x9E3779B97F4A7C15
    keys = [0, 1, -1, 2**62, -(2**63)]
    for seed in (0, 3, -7, 2**80):
        rows = hash_tokens(torch.tensor(keys), 40, seed)
        for key, row in zip(keys, rows.tolist()):
            start = splitmix((key & BITS) ^ ((seed + 1) * golden & BITS))
            assert [value & BITS for value in row] == [splitmix((start + j * golden) & BITS) for j in range(1, 41)]
            assert len(set(row)) == 40


def test_every_place_and_every_pair_is_equally_likely() -> None:
    view = make_view(Random(), (4, 5), 6, images=6000, width=1)
    kept = torch.zeros(6000, 20).scatter_(1, Random().select(view).indices, 1.0)
    # 5 standard deviations of a binomial share
    assert (kept.mean(dim=0) - 0.3).abs().max() < 5 * (0.3 * 0.7 / 6000) ** 0.5
    together = kept.T @ kept / 6000
    pair = 6 * 5 / (20 * 19)
    others = ~torch.eye(20, dtype=torch.bool)
    assert (together[others] - pair).abs().max() < 5 * (pair * (1 - pair) / 6000) ** 0.5


def test_seed_and_image_both_decide() -> None:
    view = make_view(Random(), (12, 12), 40, images=2)
    first, second = Random().select(view).indices
    assert not torch.equal(first, second)
    assert not torch.equal(Random(seed=1).select(view).indices[0], first)
    same = dataclasses.replace(view, make_keys=lambda: torch.tensor([9, 9]))
    assert torch.equal(*Random().select(same).indices)


def test_features_do_not_matter() -> None:
    view = make_view(Random())
    other = dataclasses.replace(view, features=torch.randn_like(view.features))
    assert torch.equal(Random().select(view).indices, Random().select(other).indices)


def test_larger_budgets_keep_what_smaller_ones_kept() -> None:
    view = make_view(Random(), (6, 6))
    kept = [set(Random().select(dataclasses.replace(view, budget=k)).indices[0].tolist()) for k in range(1, 36)]
    assert all(small < large for small, large in zip(kept, kept[1:]))


@pytest.mark.parametrize("shape", [(3, 42, 42), (600, 96), (7,), (1024,), (2, 1025)])
def test_the_key_of_a_picture_is_the_weighted_sum_of_its_bits(shape: tuple[int, ...]) -> None:
    """Seeds of published runs rest on it: the same number however it is added up, modulo 2^64."""
    pixels = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    bits = pixels.view(torch.int32).flatten().tolist()
    total = sum(bit * place for place, bit in enumerate(bits, 1)) * 2654435761 % 2**64
    key = int(Recording([], pixels, [pixels]).pixel_key(0))
    assert key % 2**64 == total
    assert key == int(Recording([], pixels, [pixels.flatten()]).pixel_key(0))
