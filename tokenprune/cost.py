"""What a prompt costs: floating-point operations by part, KV-cache bytes and visual tokens averaged over layers.

Conventions, the same as torch's `FlopCounterMode`:

- Matrix products only (linear layers, convolutions, attention), 2 operations per multiply-add. Norms, activations,
  softmax, embeddings and rotary angles are left out; they are well below 1 percent.
- Attention of n queries over m keys counts the full n x m rectangle, also where a causal mask hides half of it.
- The language-model head counts for the positions whose logits are computed: one per sample in a `generate` prefill.
- Everything is per batch row as it is computed: padding that runs through a layer costs what a token costs.

Published tables use a simplified formula instead: per layer 4nd^2 + 2n^2d + 2ndm, with 3ndm for a gated MLP, where
n is the sequence length, d the width and m the MLP width (FastV, arXiv 2403.06764). It takes a multiply-add as one
operation, ignores grouped key/value heads, the vision tower, the projector and the head, so it is about half of
`prefill_flops` and is printed next to it, never mixed with it.

Lengths are lists with one entry per decoder layer, because a method may drop tokens inside the decoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class ModelShape:
    """The sizes that decide the cost of a vision-language model. Plain integers; filled in by the adapter.

    Attributes:
        vision_layers: transformer blocks of the vision tower.
        vision_blocks_run: how many of them are computed for a prompt (a tower may run more than it uses).
        vision_hidden: width of the tower.
        vision_mlp: width of its MLP.
        vision_heads: attention heads of a block.
        patch: side of a patch, pixels.
        channels: colour channels.
        image_patches: patches of one image (a [CLS] token not counted).
        has_cls: whether a [CLS] token runs along.
        vision_gated: whether the tower's MLP is gated (three matrices in place of two).
        projector: widths along the projector: (in, hidden, ..., out); () means there is none.
        layers: decoder layers.
        hidden: width of the decoder.
        heads: query heads.
        kv_heads: key and value heads.
        head_dim: width of a head.
        intermediate: width of the MLP.
        gated: whether the MLP is gated (Llama: yes).
        vocab: rows of the language-model head.
    """

    vision_layers: int
    vision_blocks_run: int
    vision_hidden: int
    vision_mlp: int
    vision_heads: int
    patch: int
    channels: int
    image_patches: int
    has_cls: bool
    projector: tuple[int, ...]
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    gated: bool
    vocab: int
    vision_gated: bool = False


@dataclass(frozen=True)
class Flops:
    """Floating-point operations by part.

    Attributes:
        vision: vision tower, patch embedding included.
        projector: between tower and decoder.
        selection: the matrix products of the method and of the signals recorded for it.
        prefill: decoder layers and head over the prompt.
        decode: one generated token, at the length right after the prompt.
    """

    vision: int
    projector: int
    selection: int
    prefill: int
    decode: int

    @property
    def total(self) -> int:
        """Everything up to the first token: vision + projector + selection + prefill."""
        return self.vision + self.projector + self.selection + self.prefill

    def as_dict(self) -> dict[str, int]:
        """The parts and `total`, by name."""
        return {**asdict(self), "total": self.total}


def tower_flops(
    shape: ModelShape, pictures: Sequence[int], blocks: Sequence[Sequence[int]] = (), first: int = 0
) -> int:
    """The vision tower over pictures of different sizes, from which tokens may leave inside it.

    Args:
        pictures: patches of each picture before any leave.
        blocks: patches of each picture in the blocks `first`, `first + 1`, ...; () means all stay.
        first: the block that `blocks` begins with.
    """
    d, matrices = shape.vision_hidden, 3 if shape.vision_gated else 2
    total = sum(2 * patches * shape.channels * shape.patch**2 * d for patches in pictures)
    for block in range(shape.vision_blocks_run):
        counts = blocks[block - first] if blocks and block >= first else pictures
        for patches in counts:
            n = patches + int(shape.has_cls)
            total += 8 * n * d * d + 4 * n * n * d + 2 * matrices * n * d * shape.vision_mlp
    return total


def projector_flops(shape: ModelShape, tokens: int) -> int:
    """The projector over `tokens` visual tokens in all."""
    return sum(2 * tokens * a * b for a, b in zip(shape.projector[:-1], shape.projector[1:], strict=True))


def _check(shape: ModelShape, lengths: Sequence[int]) -> None:
    if len(lengths) != shape.layers:
        raise ValueError(f"Give one length per decoder layer: {shape.layers} are needed, got {len(lengths)}.")


def _layer_flops(shape: ModelShape, queries: int, keys: int) -> int:
    """One decoder layer for `queries` new positions that attend to `keys` positions each."""
    d, q, kv = shape.hidden, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    linear = 2 * queries * d * (2 * q + 2 * kv)
    attention = 4 * queries * keys * q
    mlp = 2 * (3 if shape.gated else 2) * queries * d * shape.intermediate
    return linear + attention + mlp


def layer_flops(shape: ModelShape, lengths: Sequence[int]) -> list[int]:
    """Each decoder layer over one prompt, whose length may differ by layer; nothing is cached before."""
    _check(shape, lengths)
    return [_layer_flops(shape, n, n) for n in lengths]


def head_flops(shape: ModelShape, positions: int = 1) -> int:
    """The language-model head at `positions` positions."""
    return 2 * positions * shape.hidden * shape.vocab


def prefill_flops(
    shape: ModelShape, lengths: Sequence[int], logits: int = 1, cached: Sequence[int] | None = None
) -> int:
    """The decoder over one prompt, head included.

    Args:
        lengths: new positions in each decoder layer.
        logits: positions whose logits are computed.
        cached: positions already in the KV cache of each layer; none by default.
    """
    _check(shape, lengths)
    before = [0] * shape.layers if cached is None else list(cached)
    _check(shape, before)
    layers = sum(_layer_flops(shape, n, n + m) for n, m in zip(lengths, before, strict=True))
    return layers + head_flops(shape, logits)


def decode_flops(shape: ModelShape, keys: Sequence[int]) -> int:
    """One decode step of one sample, head included; `keys` per layer, the new token's key among them."""
    _check(shape, keys)
    return sum(_layer_flops(shape, 1, m) for m in keys) + head_flops(shape, 1)


def kv_bytes_per_layer(shape: ModelShape, lengths: Sequence[int], itemsize: int = 2) -> list[int]:
    """Bytes of keys and values in each layer's cache for one sample; `itemsize` in bytes (2 for bf16 and fp16)."""
    _check(shape, lengths)
    return [2 * shape.kv_heads * shape.head_dim * n * itemsize for n in lengths]


def kv_bytes(shape: ModelShape, lengths: Sequence[int], itemsize: int = 2) -> int:
    """Bytes of the whole KV cache of one sample."""
    return sum(kv_bytes_per_layer(shape, lengths, itemsize))


def equivalent_tokens(visual_lengths: Sequence[int]) -> float:
    """Visual tokens averaged over decoder layers: the number that published tables call the budget.

    576 tokens in 2 of 32 layers and 167 in the other 30 are equivalent to 192.6.
    """
    if not visual_lengths:
        raise ValueError("equivalent_tokens needs at least one decoder layer.")
    return sum(visual_lengths) / len(visual_lengths)


def paper_flops(shape: ModelShape, lengths: Sequence[int]) -> int:
    """The simplified formula of published tables, a multiply-add as one operation (see the module's conventions)."""
    _check(shape, lengths)
    d, m, matrices = shape.hidden, shape.intermediate, 3 if shape.gated else 2
    return sum(4 * n * d * d + 2 * n * n * d + matrices * n * d * m for n in lengths)
