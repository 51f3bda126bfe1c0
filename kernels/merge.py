"""Merging: the weighted mean of the tokens that share a target."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tokenprune.kernels.dispatch import Op
from tokenprune.kernels.launch import Kernel, ceil_div, power_of_two

if TYPE_CHECKING:
    import triton.language as tl


def merge(features: Tensor, target: Tensor, count: int, weights: Tensor | None = None) -> Tensor:
    """Average the tokens of each target, in fp32 and in a fixed order.

    Args:
        features: `[M, N, D]`, any float dtype, any strides.
        target: `[M, N]` int64 in [-1, K), which target each token goes to; -1 leaves it out.
        count: K, how many targets each image has.
        weights: `[M, N]`, any float dtype, at least 0; None weighs all alike.

    Returns:
        `[M, K, D]` of the dtype of the features; zeros for a target whose weights sum to zero.

    Raises:
        ValueError: the shapes do not fit each other, or (CPU tensors, where a check costs no read) a target is out of
            range.
    """
    shape = features.shape[:2]
    if features.dim() != 3 or target.shape != shape or (weights is not None and weights.shape != shape):
        raise ValueError(
            f"merge needs features [M, N, D], target and weights [M, N], got {tuple(features.shape)}, "
            f"{tuple(target.shape)} and {None if weights is None else tuple(weights.shape)}."
        )
    looks = target.device.type == "cpu" and target.numel() and not torch.compiler.is_compiling()
    if looks and int(target.max()) >= count:
        raise ValueError(f"Targets must be in [-1, {count}), got {int(target.max())}.")
    return _OP(features, target, count, weights)


def reference(features: Tensor, target: Tensor, count: int, weights: Tensor | None) -> Tensor:
    """`merge` in PyTorch."""
    num_images, _, width = features.shape
    if not count:
        return features.new_empty(num_images, 0, width)
    if num_images > 1 and features.device.type == "cpu":  # the intermediate result is as large as the features
        parts = zip(features.split(1), target.split(1), [None] * num_images if weights is None else weights.split(1))
        return torch.cat([reference(f, t, count, w) for f, t, w in parts])
    first = torch.arange(0, num_images * count, max(count, 1), device=target.device)[:, None]
    # what is left out goes to a spare last target
    place = torch.where(target < 0, num_images * count, target + first).flatten()
    weight = features.new_ones(target.shape, dtype=torch.float32) if weights is None else weights.float()
    total = weight.new_zeros(num_images * count + 1).index_add(0, place, weight.flatten())
    rows = (features.float() * weight[:, :, None]).flatten(0, 1)
    merged = rows.new_zeros(num_images * count + 1, width).index_add(0, place, rows)
    merged = merged / torch.where(total == 0, 1, total)[:, None]
    return merged[:-1].view(num_images, count, width).to(features.dtype)


def launch(features: Tensor, target: Tensor, count: int, weights: Tensor | None) -> Tensor:
    num_images, num_tokens, width = features.shape
    # sorted by target, the members of each are neighbours: no atomic additions, whose order is open
    ordered = target.sort(dim=1, stable=True)
    targets = torch.arange(count + 1, device=target.device).expand(num_images, -1).contiguous()
    # sort keeps the strides of its input
    starts, order = torch.searchsorted(ordered.values.contiguous(), targets), ordered.indices.contiguous()
    merged = features.new_empty(num_images, count, width)
    block = power_of_two(width, 16, 512)
    weight = features if weights is None else weights.contiguous()
    members_kernel[(count, ceil_div(width, block), num_images)](
        features, weight, order, starts, merged, num_tokens, count, width, *features.stride(),
        weights is not None, block,
    )  # fmt: skip
    return merged


@Kernel
def members_kernel(
    p_x, p_weights, p_order, p_starts, p_merged, tokens, count, width, x_m, x_n, x_d,
    WEIGHTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One target of one image, one block of columns: a loop over its members."""
    target, image = tl.program_id(0), tl.program_id(2).to(tl.int64)
    o_d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = o_d < width
    begin = tl.load(p_starts + image * (count + 1) + target)
    end = tl.load(p_starts + image * (count + 1) + target + 1)
    b_sum = tl.zeros([BLOCK], tl.float32)
    total = tl.zeros([], tl.float32)
    for member in range(begin, end):
        token = tl.load(p_order + image * tokens + member)
        b_x = tl.load(p_x + image * x_m + token * x_n + o_d * x_d, mask=inside, other=0.0).to(tl.float32)
        weight = tl.full([], 1.0, tl.float32)
        if WEIGHTED:
            weight = tl.load(p_weights + image * tokens + token).to(tl.float32)
        b_sum += weight * b_x
        total += weight
    b_sum = b_sum / tl.where(total == 0.0, 1.0, total)
    tl.store(p_merged + (image * count + target) * width + o_d, b_sum.to(p_merged.dtype.element_ty), mask=inside)


def _fake(features: Tensor, target: Tensor, count: int, weights: Tensor | None) -> Tensor:
    return features.new_empty(features.shape[0], count, features.shape[2])


_OP = Op("merge(Tensor features, Tensor target, SymInt count, Tensor? weights) -> Tensor", reference, launch, _fake)
