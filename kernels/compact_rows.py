"""Moving rows: several tensors that are aligned by row lose the same rows, and keep their order, in one launch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tokenprune.kernels.dispatch import Op
from tokenprune.kernels.launch import Kernel, ceil_div, power_of_two

if TYPE_CHECKING:
    import triton.language as tl

_AT_ONCE = 4  # tensors a launch
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes: the content of a row is not read


def compact_rows(index: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Take the rows `index` of each tensor.

    Args:
        index: `[B, P]` int64 in [-1, S), which row each new row comes from; -1 makes a row of zeros.
        tensors: `[B, S, ...]` each, of any dtypes and strides: hidden states, position ids, masks.

    Returns:
        `[B, P, ...]` each, of the tensors' dtypes.

    Raises:
        ValueError: a tensor's batch is not that of the index.
    """
    for tensor in tensors:
        if index.dim() != 2 or tensor.dim() < 2 or tensor.shape[0] != index.shape[0]:
            raise ValueError(
                f"compact_rows needs an index [B, P] and tensors [B, S, ...], got {tuple(index.shape)} and "
                f"{tuple(tensor.shape)}."
            )
    return _OP(index, list(tensors))


def reference(index: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    """`compact_rows` in PyTorch."""
    batch = torch.arange(index.shape[0], device=index.device)[:, None]
    if index.device.type == "cpu" and not torch.compiler.is_compiling() and not bool((index < 0).any()):
        return [tensor[batch, index] for tensor in tensors]
    missing, index = index < 0, index.clamp(min=0)
    return [
        tensor[batch, index].masked_fill_(missing.view(*missing.shape, *(1,) * (tensor.dim() - 2)), 0)
        for tensor in tensors
    ]


def launch(index: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    batch, places = index.shape
    index = index.contiguous()
    moved = []
    for start in range(0, len(tensors), _AT_ONCE):
        given = tensors[start : start + _AT_ONCE]
        rows = [tensor.view(_BITS[tensor.element_size()]) for tensor in given]
        rows = [row.unsqueeze(2) if row.dim() == 2 else row.flatten(2) for row in rows]
        out = [row.new_empty(batch, places, row.shape[2]) for row in rows]
        widest = max(row.shape[2] for row in rows)
        block = power_of_two(widest, 1, 1024)
        slots: list[object] = []
        for slot in range(_AT_ONCE):
            at = min(slot, len(rows) - 1)
            slots += [rows[at], out[at], rows[at].shape[2], *rows[at].stride()]
        rows_kernel[(places, ceil_div(widest, block), batch)](index, places, *slots, len(rows), block)
        moved += [o.view(tensor.dtype).view(batch, places, *tensor.shape[2:]) for o, tensor in zip(out, given)]
    return moved


@Kernel
def rows_kernel(
    p_index, places,
    p_a, p_a_out, width_a, a_b, a_s, a_w, p_b, p_b_out, width_b, b_b, b_s, b_w,
    p_c, p_c_out, width_c, c_b, c_s, c_w, p_d, p_d_out, width_d, d_b, d_s, d_w,
    COUNT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One new row of each tensor, one block of columns."""
    place, batch = tl.program_id(0), tl.program_id(2).to(tl.int64)
    o_w = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    line = batch * places + place
    source = tl.load(p_index + line)
    is_kept = (source >= 0).to(tl.int32)
    row = tl.load(p_a + batch * a_b + source * a_s + o_w * a_w, mask=o_w < width_a * is_kept, other=0)
    tl.store(p_a_out + line * width_a + o_w, row, mask=o_w < width_a)
    if COUNT > 1:
        row = tl.load(p_b + batch * b_b + source * b_s + o_w * b_w, mask=o_w < width_b * is_kept, other=0)
        tl.store(p_b_out + line * width_b + o_w, row, mask=o_w < width_b)
    if COUNT > 2:
        row = tl.load(p_c + batch * c_b + source * c_s + o_w * c_w, mask=o_w < width_c * is_kept, other=0)
        tl.store(p_c_out + line * width_c + o_w, row, mask=o_w < width_c)
    if COUNT > 3:
        row = tl.load(p_d + batch * d_b + source * d_s + o_w * d_w, mask=o_w < width_d * is_kept, other=0)
        tl.store(p_d_out + line * width_d + o_w, row, mask=o_w < width_d)


def _fake(index: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.new_empty(*index.shape, *tensor.shape[2:]) for tensor in tensors]


_OP = Op("compact_rows(Tensor index, Tensor[] tensors) -> Tensor[]", reference, launch, _fake)
