import math

import pytest
import torch

from tokenprune.kernels.token_transition import token_transition


def by_hand(before: torch.Tensor, after: torch.Tensor) -> tuple[list[list[float]], list[list[float]]]:
    """Loops in fp64: ratio of lengths and cosine of each token."""
    gains, cosines = [], []
    for rows_in, rows_out in zip(before.tolist(), after.tolist()):
        gains.append([])
        cosines.append([])
        for x, y in zip(rows_in, rows_out):
            length_in, length_out = (math.sqrt(sum(v * v for v in row)) for row in (x, y))
            gains[-1].append(length_out / length_in)
            cosines[-1].append(sum(a * b for a, b in zip(x, y)) / (length_in * length_out))
    return gains, cosines


def four(*shape: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator) for _ in range(4)]


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 37, 8), (3, 5, 48), (1, 65, 3), (2, 1, 1025), (2, 0, 4)])
def test_equals_loops_in_fp64(shape):
    given = four(*shape, seed=sum(shape))
    gain, cosine = token_transition(*given)
    assert gain.dtype == cosine.dtype == torch.float32 and gain.shape == cosine.shape == (2, *shape[:2])
    for branch in range(2):
        gains, cosines = by_hand(*given[2 * branch : 2 * branch + 2])
        torch.testing.assert_close(
            gain[branch].double(), torch.tensor(gains).double().view(shape[:2]), rtol=1e-5, atol=0
        )
        truth = torch.tensor(cosines).double().view(shape[:2])
        torch.testing.assert_close(cosine[branch].double(), truth, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_fp32(dtype):
    given = [300 * part.to(dtype) for part in four(2, 9, 64)]  # squares overflow fp16
    for found, truth in zip(token_transition(*given), token_transition(*(part.float() for part in given))):
        assert torch.equal(found, truth) and bool(found.isfinite().all())


def test_scaling_an_output_scales_its_gain_and_leaves_its_cosine():
    given = four(2, 9, 16)
    gain, cosine = token_transition(*given)
    scale = torch.ones(2, 9, 1)
    scale[1, 4] = 8.0
    scaled, same = token_transition(given[0], given[1] * scale, *given[2:])
    assert torch.equal(scaled[0], gain[0] * scale[..., 0]) and torch.equal(scaled[1], gain[1])
    torch.testing.assert_close(same, cosine)


def test_a_tokens_values_do_not_depend_on_the_others():
    given = four(2, 9, 16)
    order = torch.randperm(9)
    for found, truth in zip(token_transition(*(part[:, order] for part in given)), token_transition(*given)):
        assert torch.equal(found, truth[..., order])


def test_rows_of_zeros_give_no_nan():
    given = four(1, 4, 8)
    given[0][0, 1], given[1][0, 2] = 0, 0
    given[2][0, 3], given[3][0, 3] = 0, 0
    gain, cosine = token_transition(*given)
    assert bool(gain.isfinite().all()) and bool(cosine.isfinite().all())
    assert gain[0, 0, 2] == 0 == cosine[0, 0, 2] and gain[1, 0, 3] == 0 == cosine[1, 0, 3]


def test_strided_views_give_the_same():
    given = [part[:, ::2, ::3] for part in four(2, 18, 48)]
    for found, truth in zip(token_transition(*given), token_transition(*(part.contiguous() for part in given))):
        torch.testing.assert_close(found, truth)


def test_shapes_that_differ_are_named():
    given = four(2, 9, 16)
    with pytest.raises(ValueError, match=r"four tensors of one shape .*\(2, 8, 16\)"):
        token_transition(*given[:3], given[3][:, :8])
