"""How much the two branches of a decoder layer change each token: norms and cosines from four tensors in one read.

The raw material of TransPrune's token transition variation (https://arxiv.org/abs/2507.20630): for a branch with input
and output vectors of a token, the ratio of their lengths and the cosine between them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tokenprune.kernels.dispatch import Op
from tokenprune.kernels.launch import Kernel, power_of_two

if TYPE_CHECKING:
    import triton.language as tl

_TINY = 1e-12  # a product of lengths below this is that of a zero vector


def token_transition(
    attention_in: Tensor, attention_out: Tensor, mlp_in: Tensor, mlp_out: Tensor
) -> tuple[Tensor, Tensor]:
    """Length ratio and cosine of output against input, for the attention and the MLP branch of a layer, in fp32.

    Args:
        attention_in, attention_out, mlp_in, mlp_out: `[B, N, D]` each, any float dtype, any strides. Inputs are what
            the branch is given (after its norm), outputs are taken before the residual addition.

    Returns:
        Magnitude `[2, B, N]`, |out| / |in|, and cosine `[2, B, N]`; attention first. Both 0 where `in` is zero, the
        cosine also where `out` is.

    Raises:
        ValueError: the shapes differ.
    """
    given = (attention_in, attention_out, mlp_in, mlp_out)
    if attention_in.dim() != 3 or any(tensor.shape != attention_in.shape for tensor in given):
        raise ValueError(
            f"token_transition needs four tensors of one shape [B, N, D], got {[tuple(t.shape) for t in given]}."
        )
    return _OP(*given)


def reference(attention_in: Tensor, attention_out: Tensor, mlp_in: Tensor, mlp_out: Tensor) -> tuple[Tensor, Tensor]:
    """`token_transition` in PyTorch."""
    magnitudes, cosines = [], []
    for before, after in ((attention_in.float(), attention_out.float()), (mlp_in.float(), mlp_out.float())):
        lengths = torch.linalg.vector_norm(before, dim=2), torch.linalg.vector_norm(after, dim=2)
        product = (before * after).sum(dim=2)
        zero = lengths[0] == 0
        magnitudes.append((lengths[1] / lengths[0].masked_fill(zero, 1)).masked_fill(zero, 0))
        cosines.append(product / (lengths[0] * lengths[1]).clamp_min(_TINY))
    return torch.stack(magnitudes), torch.stack(cosines)


def launch(attention_in: Tensor, attention_out: Tensor, mlp_in: Tensor, mlp_out: Tensor) -> tuple[Tensor, Tensor]:
    batch, count, width = attention_in.shape
    given = (attention_in, attention_out, mlp_in, mlp_out)
    # two tensors: outputs of an op must not share memory
    outputs = [attention_in.new_empty(2, batch, count, dtype=torch.float32) for _ in range(2)]
    strides = [step for tensor in given for step in tensor.stride()]
    transition_kernel[(count, batch)](
        *given, outputs[0], outputs[1], count, width, batch * count, *strides, power_of_two(width, 16, 1024)
    )
    return outputs[0], outputs[1]


@Kernel
def transition_kernel(
    p_a, p_b, p_c, p_d, p_magnitude, p_cosine, count, width, tokens,
    a_b, a_n, a_d, b_b, b_n, b_d, c_b, c_n, c_d, d_b, d_n, d_d, BLOCK: tl.constexpr,
):  # fmt: skip
    """One token: six sums in one pass over its four vectors."""
    token, batch = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    p_a += batch * a_b + token * a_n
    p_b += batch * b_b + token * b_n
    p_c += batch * c_b + token * c_n
    p_d += batch * d_b + token * d_n
    s_aa = tl.zeros([BLOCK], tl.float32)
    s_bb, s_ab, s_cc, s_dd, s_cd = s_aa, s_aa, s_aa, s_aa, s_aa
    for start in range(0, width, BLOCK):
        o_d = start + tl.arange(0, BLOCK)
        inside = o_d < width
        x_a = tl.load(p_a + o_d * a_d, mask=inside, other=0.0).to(tl.float32)
        x_b = tl.load(p_b + o_d * b_d, mask=inside, other=0.0).to(tl.float32)
        x_c = tl.load(p_c + o_d * c_d, mask=inside, other=0.0).to(tl.float32)
        x_d = tl.load(p_d + o_d * d_d, mask=inside, other=0.0).to(tl.float32)
        s_aa += x_a * x_a
        s_bb += x_b * x_b
        s_ab += x_a * x_b
        s_cc += x_c * x_c
        s_dd += x_d * x_d
        s_cd += x_c * x_d
    line = batch * count + token
    before, after = tl.sqrt(tl.sum(s_aa, axis=0)), tl.sqrt(tl.sum(s_bb, axis=0))
    tl.store(p_magnitude + line, tl.where(before == 0.0, 0.0, after / tl.where(before == 0.0, 1.0, before)))
    tl.store(p_cosine + line, tl.sum(s_ab, axis=0) / tl.maximum(before * after, 1e-12))
    before, after = tl.sqrt(tl.sum(s_cc, axis=0)), tl.sqrt(tl.sum(s_dd, axis=0))
    tl.store(p_magnitude + tokens + line, tl.where(before == 0.0, 0.0, after / tl.where(before == 0.0, 1.0, before)))
    tl.store(p_cosine + tokens + line, tl.sum(s_cd, axis=0) / tl.maximum(before * after, 1e-12))


def _fake(attention_in: Tensor, attention_out: Tensor, mlp_in: Tensor, mlp_out: Tensor) -> tuple[Tensor, Tensor]:
    shape = (2, *attention_in.shape[:2])
    return attention_in.new_empty(shape, dtype=torch.float32), attention_in.new_empty(shape, dtype=torch.float32)


_OP = Op(
    "token_transition(Tensor attention_in, Tensor attention_out, Tensor mlp_in, Tensor mlp_out) -> (Tensor, Tensor)",
    reference,
    launch,
    _fake,
)
