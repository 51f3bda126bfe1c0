"""Every kernel against its reference: on a GPU where there is one, else in Triton's interpreter (TRITON_INTERPRET=1),
which `test_interpreter.py` starts. Without either these tests are skipped."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tokenprune.kernels import (
    attention_received,
    attention_rows,
    compact_rows,
    greedy_coverage,
    greedy_diversity,
    merge,
    redistribute_attention,
    segmented_topk,
    token_transition,
)
from tokenprune.kernels.launch import INTERPRETED

DEVICE = "cpu" if INTERPRETED else "cuda"
HALF = [torch.float16, torch.bfloat16]
DTYPES = [torch.float32, *HALF]
# of the largest value: fp32 sums in another order; one rounding to the output's format, which is that of the input
ROUNDING = {torch.float32: 1e-5, torch.float16: 2**-10, torch.bfloat16: 2**-7}

pytestmark = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(), reason="needs a GPU, or TRITON_INTERPRET=1 before the start"
)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Memory that a kernel is handed holds NaN or nonsense, so what it leaves unwritten shows."""

    def poison(tensor: Tensor) -> Tensor:
        if tensor.dtype.is_floating_point:
            return tensor.fill_(torch.nan)
        return tensor.fill_(True) if tensor.dtype == torch.bool else tensor.fill_(113)

    empty, new_empty = torch.empty, Tensor.new_empty
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: poison(empty(*args, **kwargs)))
    monkeypatch.setattr(Tensor, "new_empty", lambda *args, **kwargs: poison(new_empty(*args, **kwargs)))
    torch.manual_seed(0)
    yield


def on_device(value: Any) -> Any:
    if isinstance(value, list):
        return [on_device(item) for item in value]
    return value.to(DEVICE) if isinstance(value, Tensor) else value


def both(module: Any, *args: Any) -> tuple[Any, Any]:
    """Kernel and reference, on the CPU."""
    launched = module._OP(*[on_device(arg) for arg in args])
    expected = module.reference(*args)
    if isinstance(launched, Tensor):
        return launched.cpu(), expected
    return [tensor.cpu() for tensor in launched], list(expected)


def assert_near(found: Tensor, expected: Tensor, rounding: float = 1e-5) -> None:
    """Equal within `rounding` of the largest value."""
    assert found.dtype == expected.dtype and found.shape == expected.shape
    error = (found.double() - expected.double()).abs().max()
    assert error <= rounding * expected.double().abs().max(), f"{float(error)}"


def heads(
    batch: int, query_heads: int, key_heads: int, rows: int, count: int, width: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key, value as models hold them: tokens before heads, so every one is strided."""
    sizes = ((rows, query_heads), (count, key_heads), (count, key_heads))
    query, key, value = (torch.randn(batch, n, h, width).to(dtype).transpose(1, 2) for n, h in sizes)
    return query, key, value


def some_seen(batch: int, rows: int, count: int) -> Tensor:
    seen = torch.rand(batch, rows, count) < 0.7
    seen[..., 0] = True
    return seen


# --- attention rows ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "batch", "query_heads", "key_heads", "rows", "count", "width", "masked"),
    [
        *[(dtype, 2, 4, 2, 3, 63, 20, True) for dtype in DTYPES],
        (torch.bfloat16, 1, 2, 2, 1, 577, 64, False),
        (torch.float16, 2, 6, 2, 1, 1, 8, False),
        (torch.float32, 1, 6, 1, 7, 65, 72, True),
    ],
)
def test_attention_rows(
    dtype: torch.dtype, batch: int, query_heads: int, key_heads: int, rows: int, count: int, width: int, masked: bool
) -> None:
    query, key, _ = heads(batch, query_heads, key_heads, rows, count, width, dtype)
    mask = some_seen(batch, rows, count) if masked else None
    assert_near(*both(attention_rows, query, key, width**-0.5, mask))


def test_attention_rows_of_2880_keys_that_a_tile_of_which_no_row_sees() -> None:
    query, key, _ = heads(1, 1, 1, 1, 2880, 16, torch.float16)
    mask = torch.ones(1, 1, 2880, dtype=torch.bool)
    mask[..., :200] = False
    found, expected = both(attention_rows, query, key, 0.25, mask)
    assert_near(found, expected)
    assert bool((found[..., :200] == 0).all())


def test_attention_rows_takes_a_query_of_another_format() -> None:
    """The mean query of a picture is fp32, its keys are what the tower holds."""
    query, key, _ = heads(1, 2, 2, 1, 63, 16, torch.bfloat16)
    assert_near(*both(attention_rows, query.float() * 1.001, key, 0.25, None))


def test_attention_rows_does_not_overflow() -> None:
    query, key = torch.full((1, 2, 1, 4), 60.0), torch.full((1, 2, 5, 4), 60.0)
    key[:, :, 2] = 61.0
    found, _ = both(attention_rows, query.half(), key.half(), 1.0, None)
    assert found[0, 0].tolist() == [0, 0, 1, 0, 0]


# --- attention received -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "batch", "query_heads", "key_heads", "count", "width", "ragged"),
    [
        *[(dtype, 3, 2, 1, 63, 20, True) for dtype in DTYPES],
        (torch.float16, 2, 2, 2, 1, 8, False),
        (torch.bfloat16, 1, 1, 1, 130, 72, False),
    ],
)
def test_attention_received(
    dtype: torch.dtype, batch: int, query_heads: int, key_heads: int, count: int, width: int, ragged: bool
) -> None:
    query, key, _ = heads(batch, query_heads, key_heads, count, count, width, dtype)
    lengths = torch.tensor([count, 1, count // 2]) if ragged else None
    found, expected = both(attention_received, query, key, width**-0.5, lengths)
    assert_near(found, expected)
    wanted = torch.full((batch,), count) if lengths is None else lengths
    torch.testing.assert_close(found.sum(dim=1), wanted.float(), rtol=1e-5, atol=0)


# --- greedy diversity -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", greedy_diversity.OBJECTIVES)
@pytest.mark.parametrize(
    ("images", "count", "k", "ragged"),
    [(2, 1, 1, False), (2, 63, 63, True), (1, 577, 10, False), (1, 2880, 6, True)],
)
@pytest.mark.parametrize("given", [True, False])
def test_greedy_diversity(objective: str, images: int, count: int, k: int, ragged: bool, given: bool) -> None:
    # entries of +-1 in 16 dimensions: cosines are exact, so ties are, and every choice must agree
    features = torch.randint(2, (images, count, 16)) * 2.0 - 1
    lengths = torch.randint(1, count + 1, (images,)) if ragged else None
    first = torch.zeros(images, dtype=torch.int64) if given else None
    if lengths is not None:
        features[0, int(lengths[0]) :] = torch.nan
    found, expected = both(greedy_diversity, features, k, objective, first, lengths)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", HALF)
def test_greedy_diversity_of_half_precision(dtype: torch.dtype) -> None:
    features = (torch.randint(2, (1, 63, 16)) * 2.0 - 1).to(dtype)
    assert torch.equal(*both(greedy_diversity, features, 20, "k_center", None, None))


# --- greedy coverage --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("add", [True, False])
@pytest.mark.parametrize(("images", "count", "k"), [(2, 1, 1), (3, 23, 23), (2, 63, 40), (1, 300, 10)])
def test_greedy_coverage(images: int, count: int, k: int, add: bool) -> None:
    # entries of +-1 in 16 dimensions: cosines and their sums are exact, so ties are, and every choice must agree
    features = torch.randint(2, (images, count, 16)) * 2.0 - 1
    features[:, ::7] = 0
    weights = torch.randint(-3, 9, (images, count)).clamp_min(0) / 8  # many of 0: at last gains and weights decide
    found, expected = both(greedy_coverage, features, weights, k, add)
    assert torch.equal(found, expected)
    table = greedy_coverage.cosines(features)
    assert torch.equal(greedy_coverage._batched(table, weights, k, add), expected)


@pytest.mark.parametrize("case", ["alike", "opposite", "no weights", "strides"])
def test_greedy_coverage_where_nothing_is_gained(case: str) -> None:
    features, weights = torch.ones(2, 40, 16), torch.randint(5, (2, 40)) / 4
    if case == "opposite":
        features[:, 20:] = -1
    elif case == "no weights":
        features, weights = torch.randint(2, (2, 40, 16)) * 2.0 - 1, torch.zeros(2, 40)
    elif case == "strides":
        features, weights = features.transpose(0, 1).contiguous().transpose(0, 1), torch.ones(1).expand(2, 40)
    found, expected = both(greedy_coverage, features, weights, 40, False)
    assert torch.equal(found, expected) and torch.equal(found.sort(1).values, torch.arange(40).expand(2, -1))


def test_greedy_coverage_of_nan_ends() -> None:
    """Features that are no numbers cannot be seen on a device: the choice means nothing, but it is within range."""
    features, weights = torch.randn(1, 40, 16), torch.rand(1, 40)
    features[0, 3] = torch.nan
    for add in (True, False):
        chosen = greedy_coverage.launch(on_device(features), on_device(weights), 9, add)
        assert bool(((chosen >= 0) & (chosen < 40)).all())


@pytest.mark.parametrize("dtype", HALF)
def test_greedy_coverage_of_half_precision(dtype: torch.dtype) -> None:
    features = (torch.randint(2, (1, 63, 16)) * 2.0 - 1).to(dtype)
    assert torch.equal(*both(greedy_coverage, features, torch.rand(1, 63).round(decimals=1), 20, False))


# --- segmented top-k and the move -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "sizes"),
    [*[(dtype, [5, 1, 30, 27]) for dtype in DTYPES], *[(torch.float32, sizes) for sizes in ([1], [577], [576] * 5)]],
)
def test_segmented_topk(dtype: torch.dtype, sizes: list[int]) -> None:
    # few values, both signs, zeros of both signs: ties everywhere
    scores = (torch.randint(-3, 4, (2, sum(sizes))) * (torch.randint(2, (2, sum(sizes))) * 2.0 - 1)).to(dtype)
    scores[0, -1], scores[1, 0] = torch.nan, -torch.inf
    quotas = torch.stack([torch.randint(0, size + 1, (2,)) for size in sizes], dim=1)
    quotas[1] = torch.tensor(sizes)
    assert torch.equal(*both(segmented_topk, scores, sizes, quotas, int(quotas[0].sum())))


@pytest.mark.parametrize("count", [1, 63, 577, 2880])
def test_topk_of_whole_rows(count: int) -> None:
    scores = torch.randn(1, 2 * count)[:, ::2]
    for k in {1, (count + 1) // 2, count}:
        assert torch.equal(*both(segmented_topk, scores, [count], None, k))


def test_compact_rows() -> None:
    index = torch.tensor([[0, 3, 4, 62], [-1, -1, 5, 6]])
    tensors = [
        torch.randn(2, 63, 33),
        torch.randn(2, 63, 16).bfloat16(),
        torch.arange(126).view(2, 63),
        torch.rand(2, 63) < 0.5,
        torch.randint(9, (3, 2, 63)).movedim(0, 2),
        torch.randn(2, 63, 2, 3).half(),
    ]
    for found, expected in zip(*both(compact_rows, index, tensors)):
        assert found.dtype == expected.dtype and torch.equal(found, expected)


@pytest.mark.parametrize(("dtype", "count", "targets"), [*[(dtype, 63, 7) for dtype in DTYPES], (torch.float16, 1, 1)])
def test_merge(dtype: torch.dtype, count: int, targets: int) -> None:
    images = 2 if dtype == torch.float32 else 1
    features = torch.randn(images, 33, count).to(dtype).transpose(1, 2)
    target = torch.randint(-1, targets, (images, count))
    weights = torch.rand(images, count) * (target != 0)
    for given in (None, weights):
        found, expected = both(merge, features, target, targets, given)
        assert_near(found, expected, ROUNDING[dtype])
        assert given is None or bool((found[:, 0] == 0).all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_token_transition(dtype: torch.dtype) -> None:
    tensors = [torch.randn(2, 10, 63).to(dtype)[:, ::2] for _ in range(2)]
    tensors += [torch.randn(2, 5, 126).to(dtype)[..., ::2] for _ in range(2)]
    tensors[0][0, 0] = tensors[3][0, 1] = 0
    for found, expected in zip(*both(token_transition, *tensors)):
        assert_near(found, expected)


# --- redistribution ---------------------------------------------------------------------------------------------------


def redistributed(
    query: Tensor, key: Tensor, value: Tensor, groups: Tensor, allowed: Tensor | None, gate: Tensor | None,
    *rule: float,
) -> Tensor:  # fmt: skip
    """What the kernels make, after a comparison with the reference in fp32: the reference in half precision rounds
    logits and weights, so it may judge a pair by other masses, and the kernels do not."""
    dtype, args = value.dtype, [on_device(arg) for arg in (query, key, value, groups, allowed, gate)]
    found = redistribute_attention._OP(*args, *rule).cpu()
    wide = redistribute_attention.reference(query.float(), key.float(), value.float(), groups, allowed, gate, *rule)
    assert found.dtype == dtype
    assert_near(found.float(), wide, ROUNDING[dtype] * (1 if dtype == torch.float32 else 2))
    return found.float()


def changed(args: tuple[Any, ...], share: float, *rule: float) -> Tensor:
    """`[B, H, R]`, the pairs that the reference changes."""
    query, key, value, *rest = args
    wide = (query.float(), key.float(), value.float(), *rest)
    parts = [redistribute_attention.reference(*wide, part, *rule) for part in (share, 0.0)]
    return (parts[0] != parts[1]).any(dim=-1)


@pytest.mark.parametrize(
    ("dtype", "batch", "query_heads", "key_heads", "rows", "count", "known", "width", "masks"),
    [
        *[(dtype, 2, 4, 2, 3, 63, 50, 20, 2) for dtype in DTYPES],
        *[(dtype, 3, 6, 2, 1, 65, 65, 24, 0) for dtype in DTYPES],
        (torch.float32, 2, 2, 1, 19, 40, 33, 24, 1),
        (torch.bfloat16, 1, 1, 1, 1, 577, 570, 16, 0),
        (torch.float16, 2, 6, 2, 1, 1, 1, 8, 0),
        (torch.float32, 1, 3, 1, 70, 37, 31, 72, 1),
    ],
)
def test_redistribute_attention(
    dtype: torch.dtype, batch: int, query_heads: int, key_heads: int, rows: int, count: int, known: int, width: int,
    masks: int,
) -> None:  # fmt: skip
    """Masks of one sample and of all, keys beyond the groups, a gate a row, heads that share keys, odd sizes."""
    query, key, value = heads(batch, query_heads, key_heads, rows, count, width, dtype)
    groups = torch.randint(-3, 4, (known, batch), dtype=torch.int8).clamp(min=1).t()  # strided, mostly non-sinks
    groups[:, ::5] = 0
    allowed = some_seen(1 if masks == 1 else batch, count, rows).transpose(1, 2) if masks else None
    if allowed is not None:
        allowed[..., 0] = True
    gate = (torch.rand(rows, batch) < 0.7).t() if masks else None
    rule = (0.6, 0.4, 0.25, 1e-3, width**-0.5)
    args = (query, key, value, groups, allowed, gate)
    redistributed(*args, *rule)
    pairs = changed(args, *rule)
    assert batch * rows == 1 or count == 1 or (bool(pairs.any()) and not bool(pairs.all()))
    if gate is not None:
        assert not bool(pairs.transpose(1, 2)[~gate].any())


@pytest.mark.parametrize("kind", [None, 0, 1, 2, 3])
def test_redistribute_attention_where_groups_are_empty(kind: int | None) -> None:
    """No group is known, or all keys are in one: nothing can move, whatever the test allows."""
    query, key, value = heads(2, 2, 2, 3, 37, 8, torch.float32)
    groups = torch.full((2, 0 if kind is None else 37), kind or 0, dtype=torch.int8)
    found = redistributed(query, key, value, groups, None, None, 1.0, 0.0, 1.0, 1.0, 0.3)
    stock = torch.nn.functional.scaled_dot_product_attention(query, key, value, scale=0.3)
    torch.testing.assert_close(found, stock, rtol=1e-5, atol=1e-6)


def test_redistribute_attention_leaves_rows_alone_whose_gate_is_closed() -> None:
    query, key, value = heads(2, 2, 1, 3, 37, 8, torch.float32)
    groups = torch.randint(1, 4, (2, 30), dtype=torch.int8)
    rule = (1.0, 0.0, 1.0, 0.0, 0.3)
    shut = redistributed(query, key, value, groups, None, torch.zeros(2, 3, dtype=torch.bool), *rule)
    stock = torch.nn.functional.scaled_dot_product_attention(query, key, value, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(shut, stock, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(redistributed(query, key, value, groups, None, None, *rule), stock, rtol=1e-2)


@pytest.mark.parametrize(("share", "least_mass", "most_sink", "slack"), [
    (0.6, 0.5, 1.0, 0.0), (0.6, 0.0, 0.2, 0.0), (0.6, 0.0, 0.2, 0.02), (0.0, 0.0, 1.0, 0.0), (1.0, 1.1, 1.0, 0.0),
])  # fmt: skip
def test_redistribute_attention_by_each_part_of_its_test(
    share: float, least_mass: float, most_sink: float, slack: float
) -> None:
    query, key, value = heads(3, 2, 1, 4, 45, 8, torch.float32)
    groups = torch.randint(4, (3, 40), dtype=torch.int8)
    groups[1, 20:] = groups[2, 10:] = 0  # fewer visual keys that count for the slack
    rule = (share, least_mass, most_sink, slack, 0.5)
    redistributed(query, key, value, groups, None, None, *rule)
    # the settings matter: with and without the slack, other pairs change
    if slack:
        args = (query, key, value, groups, None, None)
        less = changed(args, share, least_mass, most_sink, 0.0, 0.5)
        assert not torch.equal(less, changed(args, *rule))


def test_redistribute_attention_with_a_part_of_the_keys_out_of_sight() -> None:
    query, key, value = heads(1, 2, 2, 2, 300, 16, torch.float32)
    allowed = torch.zeros(1, 2, 300, dtype=torch.bool)
    allowed[:, 0, 290:] = allowed[:, 1, :10] = True
    groups = (torch.arange(300)[None] % 3).to(torch.int8)
    args = (query, key, value, groups, allowed, None)
    rule = (0.5, 0.2, 0.9, 0.0, 0.25)
    redistributed(*args, *rule)
    assert bool(changed(args, *rule).any())


@pytest.mark.parametrize("dtype", HALF)
def test_redistribute_attention_where_non_sinks_get_little(dtype: torch.dtype) -> None:
    """Powers of e^-14 are no normal fp16 numbers, and here they grow by a factor of 10^4."""
    _, key, value = heads(1, 1, 1, 1, 200, 16, dtype)
    key = torch.zeros_like(key)
    key[..., 1:, 0] = -14 + 0.5 * torch.randn(199).to(dtype)
    query = torch.zeros(1, 1, 1, 16, dtype=dtype)
    query[..., 0] = 1
    groups = torch.ones(1, 200, dtype=torch.int8)
    groups[:, 0] = 2
    value[:, :, 0] = 0
    found = redistributed(query, key, value, groups, None, None, 1.0, 0.0, 1.0, 0.0, 1.0)
    assert float(found.abs().max()) > 0.05


def test_redistribute_attention_of_a_row_that_sees_nothing_is_finite() -> None:
    query, key, value = heads(1, 2, 2, 2, 40, 8, torch.float32)
    allowed = torch.ones(1, 2, 40, dtype=torch.bool)
    allowed[:, 0] = False
    groups = torch.randint(4, (1, 40), dtype=torch.int8)
    args = [on_device(arg) for arg in (query, key, value, groups, allowed, None)]
    assert bool(redistribute_attention._OP(*args, 0.6, 0.1, 0.9, 0.0, 0.3).isfinite().all())


# --- all of them ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call",
    [
        lambda x: attention_rows.attention_rows(x[:, :, :1], x, 1.0),
        lambda x: attention_received.attention_received(x, x, 1.0),
        lambda x: merge.merge(x[0], torch.zeros(2, 5, dtype=torch.int64, device=x.device), 1),
        lambda x: compact_rows.compact_rows(torch.tensor([[0, 3], [1, 2]], device=x.device), [x[0] * 1, x[0]])[1],
        lambda x: token_transition.token_transition(x[0], x[0] + 1, x[0], x[0] - 1)[0],
        lambda x: redistribute_attention.redistribute_attention(
            x,
            x,
            x,
            torch.ones(1, 5, dtype=torch.int8, device=x.device),
            None,
            share=0.6,
            least_mass=0.0,
            most_sink=1.0,
            slack=0.0,
            scale=1.0,
        ),
    ],
)
def test_gradients_go_through_the_reference(call: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(1, 2, 5, 4, device=DEVICE, requires_grad=True)
    call(x).sum().backward()
    assert x.grad is not None


# --- layouts and formats that no model has, and no check forbids -----------------------------------------------------


def test_arguments_of_any_strides() -> None:
    features, table = torch.randn(3, 40, 8), torch.tensor([[3, 20], [5, 15], [7, 10]])
    for first in (table[:, 0], torch.tensor(4).expand(3)):
        found, expected = both(greedy_diversity, features, 9, "k_center", first, table[:, 1])
        assert torch.equal(found, expected)
    query, key, _ = heads(3, 2, 2, 20, 20, 8, torch.float32)
    for lengths in (table[:, 1], torch.tensor(11).expand(3)):
        assert_near(*both(attention_received, query, key, 0.3, lengths))
    target = torch.randint(-1, 4, (40, 3)).t()
    assert_near(*both(merge, features, target, 4, torch.rand(40, 3).t()))


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float64, torch.int8, torch.float16, torch.float8_e4m3fn])
def test_rows_of_any_format_are_moved(dtype: torch.dtype) -> None:
    source = torch.randn(2, 9, 3, dtype=torch.float32).mul(50).to(dtype)
    index = torch.tensor([[8, 0, 3], [1, 2, 5]])
    (found,) = compact_rows._OP(on_device(index), [on_device(source)])
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[source.element_size()]
    expected = torch.stack([row[places] for row, places in zip(source.view(bits), index)])
    assert found.dtype == dtype and torch.equal(found.cpu().view(bits), expected)


@pytest.mark.parametrize("name", ["attention_rows", "attention_received"])
def test_float64_is_taken(name: str) -> None:
    query, key, _ = heads(2, 2, 1, 5, 33, 8, torch.float64)
    module = attention_rows if name == "attention_rows" else attention_received
    assert_near(*both(module, query, key, 0.3, None))


def test_outputs_share_no_memory() -> None:
    tensors = [on_device(torch.randn(1, 5, 16)) for _ in range(4)]
    torch.library.opcheck(token_transition._OP._op, tuple(tensors), test_utils=("test_schema",))


def test_kernels_have_nothing_to_do() -> None:
    x, keys = torch.randn(2, 2, 0, 4), torch.randn(2, 1, 3, 4)
    groups = torch.zeros(2, 3, dtype=torch.int8)
    settings = (None, None, 0.6, 0.1, 0.9, 0.0, 0.5)
    for given in ((x, keys, keys, groups), (x[:0], keys[:0], keys[:0], groups[:0])):
        found = redistribute_attention._OP(*[on_device(part) for part in given], *settings)
        assert found.shape == (*given[0].shape[:3], 4)
    for rows in (0, 2):
        scores, quotas = torch.randn(rows, 5), torch.zeros(rows, 2, dtype=torch.int64)
        found = segmented_topk._OP(on_device(scores), [2, 3], on_device(quotas), 0)
        assert found.shape == (rows, 0)
