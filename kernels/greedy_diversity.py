"""Greedy selection of mutually dissimilar tokens: max-sum diversification and k-center (farthest point).

Both start from one token and then add, k - 1 times, the token that is least similar to those chosen: by the sum of its
cosine similarities to them ("max_sum") or by the largest of these ("k_center"). The similarities come from one Gram
product of N x N, or, on a CPU where k is small compared with N, from one matrix-vector product a step. On a GPU all k
steps of all images are one launch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from tokenprune.kernels.dispatch import Op
from tokenprune.kernels.launch import Kernel, power_of_two, runs_triton

if TYPE_CHECKING:
    import triton.language as tl

OBJECTIVES = ("max_sum", "k_center")

_TINY = 1e-12  # rows shorter than this are padding: they become zero vectors instead of NaN

# One row of similarities at a time reads all features anew; the full Gram product reuses them from cache. Measured on
# AVX-512 (N = 576 and 2880, D = 256, 1024 and 4096), a row alone costs 1.2 to 4 times a row of the product on one core
# and 2.4 to 6 times on two; 9 times where the features do not fit into the cache.
_ROW_COST = 5


def needs_gram(num_tokens: int, k: int, has_first: bool) -> bool:
    """Whether the reference forms all N x N similarities: yes unless k is small compared with N and the first token is
    given. The kernel always does."""
    return not has_first or _ROW_COST * k > num_tokens


def greedy_diversity_flops(num_images: int, num_tokens: int, width: int, k: int, has_first: bool) -> int:
    """Floating-point operations of the matrix products in the reference, 2 per multiply-add; of ragged batches at most
    as many, since their lengths are not read."""
    rows = num_tokens if needs_gram(num_tokens, k, has_first) else k - 1
    return 2 * num_images * rows * num_tokens * width


def greedy_diversity(
    features: Tensor, k: int, objective: str, first: Tensor | None = None, lengths: Tensor | None = None
) -> Tensor:
    """Choose k tokens of each image, every one the least similar to those chosen before it.

    Similarity is the cosine, in fp32; equal values go to the lower index (copies of a token need not have equal values:
    matrix products may round them by where they stand). Costs 2 N^2 D floating-point operations and
    N^2 numbers of memory an image (2 (k - 1) N D and O(N) where `needs_gram` says no), then k steps of O(N). The first
    j of the k are the choice for a budget of j, so images with different budgets need only one call.

    Args:
        features: `[M, N, D]`, any float dtype; rows need not be normalised, and a row of zeros is similar to nothing.
        k: tokens to choose, 1 <= k <= N.
        objective: "max_sum" takes the token with the smallest sum of similarities to the chosen ones, "k_center" the
            one whose largest similarity to a chosen one is smallest.
        first: `[M]` int64, the token that each image starts from; None starts from the token whose nearest neighbour
            is farthest.
        lengths: `[M]` int64, at least 1, for ragged batches: only the first lengths[m] tokens of image m are real.
            The others may be anything.

    Returns:
        `[M, k]` int64 in the order of choice, without duplicates; -1 after an image's last token.

    Raises:
        ValueError: an argument is out of range, or (CPU tensors, where looking is free) a feature is NaN or infinite.
    """
    if features.dim() != 3 or not 1 <= k <= features.shape[1]:
        raise ValueError(
            f"greedy_diversity needs features [M, N, D] and 1 <= k <= N, got {tuple(features.shape)} and k={k}."
        )
    if objective not in OBJECTIVES:
        raise ValueError(f"objective must be one of {', '.join(OBJECTIVES)}, got {objective!r}.")
    for name, given in (("first", first), ("lengths", lengths)):
        if given is not None and (given.shape != features.shape[:1] or given.dtype != torch.int64):
            raise ValueError(f"{name} must be int64 [{features.shape[0]}], got {given.dtype} {tuple(given.shape)}.")
    return _OP(features.detach(), k, objective, first, lengths)


def reference(features: Tensor, k: int, objective: str, first: Tensor | None, lengths: Tensor | None) -> Tensor:
    """`greedy_diversity` in PyTorch and NumPy."""
    unit, norms = _normalised(features, lengths)
    if unit.device.type != "cpu":
        return _batched(unit, k, objective, first, lengths)
    if not bool(norms.isfinite().all()):
        raise ValueError("Features hold NaN or infinity, so they rank nothing. Check the model's weights and input.")
    sizes = [unit.shape[1]] * unit.shape[0] if lengths is None else lengths.tolist()
    if not all(1 <= size <= unit.shape[1] for size in sizes):
        raise ValueError(f"lengths must be in [1, {unit.shape[1]}], got {sizes}.")
    if first is not None and not all(0 <= place < size for place, size in zip(first.tolist(), sizes)):
        raise ValueError(f"first must be in [0, {min(sizes)}), got {first.tolist()}.")
    return _one_by_one(unit, k, objective, first, sizes)


def _normalised(features: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    """Rows of length 1 `[M, N, D]` in fp32, those of padding zero, and the lengths that they had."""
    unit = features.float()
    if lengths is not None:
        unit = unit.masked_fill(_padding(unit, lengths)[:, :, None], 0)
    norms = torch.linalg.vector_norm(unit, dim=2, keepdim=True)
    return unit / norms.clamp_min(_TINY), norms


def _padding(unit: Tensor, lengths: Tensor) -> Tensor:
    """`[M, N]` bool, True at padding."""
    return torch.arange(unit.shape[1], device=unit.device) >= lengths[:, None]


def _one_by_one(unit: Tensor, k: int, objective: str, first: Tensor | None, sizes: list[int]) -> Tensor:
    """For CPU tensors: image by image, so that a batch gives the very bits of its images alone.

    The steps run in NumPy on the tensors' own memory. A step is two operations on N numbers, and for so few NumPy takes
    1.5 us where starting the operations of PyTorch takes 20; and its product of a matrix with a vector takes 6 us
    where that of PyTorch takes 11 (N = 576, D = 256, one core; 17 and 44 us at D = 1024).
    """
    chosen = torch.full((len(sizes), k), -1, dtype=torch.int64)
    tables = [size * size for size in sizes if needs_gram(size, k, first is not None)]
    memory = torch.empty(max(tables, default=0), dtype=torch.float32)
    join = np.add if objective == "max_sum" else np.maximum
    for image, size in enumerate(sizes):
        x, out = unit[image, :size], chosen[image].numpy()
        has_gram = needs_gram(size, k, first is not None)
        gram = memory[: size * size if has_gram else 0].view(-1, size)
        rows, vectors, row = gram.numpy(), x.numpy(), np.empty(size, dtype=np.float32)
        if has_gram:
            torch.mm(x, x.T, out=gram)
        if first is None:
            place = int(_nearest(gram.fill_diagonal_(-torch.inf)).argmin())
        else:
            place = int(first[image])
        if has_gram:
            # a chosen token leaves the race by its own similarity: infinity survives both addition and maximum
            gram.fill_diagonal_(torch.inf)
        out[0] = place
        total = np.full(size, 0 if objective == "max_sum" else -np.inf, dtype=np.float32)
        for step in range(1, min(k, size)):
            if has_gram:
                join(total, rows[place], out=total)
            else:
                join(total, np.dot(vectors, vectors[place], out=row), out=total)
                total[place] = np.inf
            # NumPy documents that the first of equal values wins, as PyTorch does
            out[step] = place = int(total.argmin())
    return chosen


def _similarities(unit: Tensor, first: Tensor | None, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    """The Gram product `[M, N, N]`, and the first tokens `[M]`: those given, or those most alone."""
    table = torch.bmm(unit, unit.transpose(1, 2))
    if first is not None:
        return table, first
    table.diagonal(dim1=1, dim2=2).fill_(-torch.inf)
    if lengths is None:
        return table, _nearest(table).argmin(dim=1)
    padding = _padding(unit, lengths)
    table.masked_fill_(padding[:, None], -torch.inf)
    table.masked_fill_(padding[:, :, None], -torch.inf)
    return table, _nearest(table).masked_fill_(padding, torch.inf).argmin(dim=1)


def _nearest(table: Tensor) -> Tensor:
    """`[..., N]`: similarity of each token to the one nearest to it; the same for two that are each other's nearest,
    though a product may round them apart."""
    return torch.maximum(table.amax(dim=-1), table.amax(dim=-2))


def _batched(unit: Tensor, k: int, objective: str, first: Tensor | None, lengths: Tensor | None = None) -> Tensor:
    """For any device: all images at once, and no value is read back to the host."""
    num_images, num_tokens, _ = unit.shape
    total = unit.new_full((num_images, num_tokens), 0 if objective == "max_sum" else -torch.inf)
    padding = None if lengths is None else _padding(unit, lengths)
    if first is None or needs_gram(num_tokens, k, True):
        table, place = _similarities(unit, first, lengths)
        table.diagonal(dim1=1, dim2=2).fill_(torch.inf)
        if padding is not None:
            table.masked_fill_(padding[:, None], torch.inf)
        has_gram = True
    else:
        table, place, has_gram = unit, first, False
        if padding is not None:
            total.masked_fill_(padding, torch.inf)
    table = table.flatten(0, 1)
    start = torch.arange(0, num_images * num_tokens, num_tokens, device=unit.device)
    chosen = torch.empty(num_images, k, dtype=torch.int64, device=unit.device)
    chosen[:, 0] = place
    for step in range(1, k):
        row = table.index_select(0, start + place)
        if not has_gram:
            row = torch.bmm(unit, row.unsqueeze(2)).squeeze(2)
        total = torch.add(total, row, out=total) if objective == "max_sum" else torch.maximum(total, row, out=total)
        if not has_gram:
            total.scatter_(1, place.unsqueeze(1), torch.inf)
        place = total.argmin(dim=1)
        chosen[:, step] = place
    if lengths is not None:
        chosen.masked_fill_(torch.arange(k, device=chosen.device) >= lengths[:, None], -1)
    return chosen


def launch(features: Tensor, k: int, objective: str, first: Tensor | None, lengths: Tensor | None) -> Tensor:
    num_images, num_tokens, _ = features.shape
    table, first = _similarities(_normalised(features, lengths)[0], first, lengths)
    first, lengths = first.contiguous(), None if lengths is None else lengths.contiguous()
    chosen = torch.empty(num_images, k, dtype=torch.int64, device=features.device)
    block = power_of_two(num_tokens, 16)
    steps_kernel[(num_images,)](
        table, first, first if lengths is None else lengths, chosen, num_tokens, k,
        lengths is not None, objective == "max_sum", block, num_warps=power_of_two(block // 512, 1, 16),
    )  # fmt: skip
    return chosen


@Kernel
def steps_kernel(
    p_table, p_first, p_lengths, p_chosen, count, k,
    RAGGED: tl.constexpr, SUM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """All k steps of one image; what decides stays in registers."""
    image = tl.program_id(0).to(tl.int64)
    o_n = tl.arange(0, BLOCK)
    size = count
    if RAGGED:
        size = tl.load(p_lengths + image).to(tl.int32)
    place = tl.load(p_first + image).to(tl.int32)
    p_table += image * count * count
    p_chosen += image * k
    tl.store(p_chosen, place.to(tl.int64))
    b_total = tl.where(o_n < size, 0.0 if SUM else float("-inf"), float("inf"))
    for step in range(1, k):
        row = tl.load(p_table + place.to(tl.int64) * count + o_n, mask=o_n < size, other=float("inf"))
        b_total = b_total + row if SUM else tl.maximum(b_total, row)
        b_total = tl.where(o_n == place, float("inf"), b_total)
        # NaN among the features must not lead out of the table
        place = tl.minimum(tl.argmin(b_total, axis=0, tie_break_left=True), count - 1)
        tl.store(p_chosen + step, tl.where(step < size, place, -1).to(tl.int64))


def _fake(features: Tensor, k: int, objective: str, first: Tensor | None, lengths: Tensor | None) -> Tensor:
    return features.new_empty(features.shape[0], k, dtype=torch.int64)


def _flops(features: Tensor, k: int, objective: str, first: Tensor | None, lengths: Tensor | None) -> int:
    num_images, num_tokens, width = features.shape
    if runs_triton(features):
        return 2 * num_images * num_tokens * num_tokens * width
    return greedy_diversity_flops(num_images, num_tokens, width, k, first is not None)


_OP = Op(
    "greedy_diversity(Tensor features, int k, str objective, Tensor? first, Tensor? lengths) -> Tensor",
    reference,
    launch,
    _fake,
    _flops,
    hidden=True,
)
