"""What a prompt costs: floating-point operations by part, KV-cache bytes and visual tokens averaged over layers.

Conventions, the same as torch's `FlopCounterMode`:

- Matrix products only (linear layers, convolutions, attention), 2 operations per multiply-add. Norms, activations,
  softmax, embeddings and rotary angles are left out; they are well below 1 percent.
- Attention of n queries over m keys counts the full n x m rectangle, also where a causal mask hides half of it.
- The language-model head counts for the positions whose logits are computed: one per sample in a `generate` prefill,
  and all of them where a class cannot leave the others out.
- Everything is per batch row as it is computed: padding that runs through a layer costs what a token costs.
- Of experts, a token costs those that it is sent to and those that all share, and the router.
- Linear attention is counted in the blocks of 64 tokens that it is computed in over a prompt, the triangular solves in
  them left out; a decode step of it has no matrix product besides its linear layers.
- Left out is what finds out how pictures of a new size are laid out, where tokens leave inside a tower without a file
  of its own: the features call without its blocks, once for each size.

What the sizes of a model do not say is not modelled, and is None here in place of a number, as is every sum over it.

Published tables use a simplified formula instead: per layer 4nd^2 + 2n^2d + 2ndm, with 3ndm for a gated MLP, where
n is the sequence length, d the width and m the MLP width (FastV, arXiv 2403.06764). It takes a multiply-add as one
operation, ignores grouped key/value heads, the vision tower, the projector and the head, so it is about half of
`prefill_flops` and is printed next to it, never mixed with it.

Lengths are lists with one entry per decoder layer, because a method may drop tokens inside the decoder.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

NOT_MODELLED = "not modelled"
"""What a report says of a part without a number."""
BLOCK = 64
"""Tokens that linear attention computes together."""


@dataclass(frozen=True)
class LayerShape:
    """The sizes that decide the cost of one decoder layer, in multiply-adds and in numbers that are cached.

    Attributes:
        linear: multiply-adds for each new position: all linear layers, and of experts those that a token is sent to.
        scores: for each pair of a query and a key, in the scores and in the sum of values.
        expanded: for each key that is attended to, new or cached, where keys and values are made of cached latents.
        scanned: for each block of `BLOCK` positions, where linear attention runs over a prompt.
        convolved: for each position of a causal convolution, which computes the place before the new ones as well.
        cached: numbers that the cache keeps of a position: keys, values, latents, keys of an indexer.
        window: positions that a query sees at most; None means all.
        state: numbers that the cache keeps of a row, however long it is, in the model's dtype.
        state_fp32: the same of what is kept in fp32.
    """

    linear: int
    scores: int
    expanded: int = 0
    scanned: int = 0
    convolved: int = 0
    cached: int = 0
    window: int | None = None
    state: int = 0
    state_fp32: int = 0

    def flops(self, queries: int, before: int = 0) -> int:
        """Of `queries` new positions behind `before` others."""
        keys = queries + self.held(before)
        blocks = -(-queries // BLOCK) if queries > 1 else 0
        attention = queries * keys * self.scores + keys * self.expanded
        return 2 * (queries * self.linear + attention + (queries + 1) * self.convolved + blocks * self.scanned)

    def held(self, length: int) -> int:
        """Positions that the cache holds after `length` of them: it drops those that no later query sees."""
        return length if self.window is None else min(length, self.window - 1)

    def bytes(self, length: int, itemsize: int) -> int:
        """Of the cache after `length` positions."""
        return itemsize * (self.held(length) * self.cached + self.state) + 4 * self.state_fp32


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """The sizes that decide the cost of a vision-language model. Plain integers; filled in by the adapter.

    Attributes:
        vision_layers: transformer blocks of the vision tower.
        vision_blocks_run: how many of them are computed for a prompt (a tower may run more than it uses).
        vision_hidden: width of the tower.
        vision_mlp: width of its MLP.
        patch: side of a patch, pixels.
        channels: colour channels.
        image_patches: patches of one image (a [CLS] token not counted).
        has_cls: whether a [CLS] token runs along.
        vision_gated: whether the tower's MLP is gated (three matrices in place of two).
        projector: widths along the projector: (in, hidden, ..., out), or its multiply-adds for each visual token; ()
            means there is none, None that it is not modelled.
        layers: decoder layers.
        hidden: width of the decoder.
        heads: query heads.
        kv_heads: key and value heads.
        head_dim: width of a head.
        intermediate: width of the MLP.
        gated: whether the MLP is gated (Llama: yes).
        vocab: rows of the language-model head; None means that it is not modelled.
        by_layer: decoder layers that differ from each other or from Llama's; None in place of one that is not modelled.
            () means that all are as the sizes above say.
        beside: multiply-adds of the decoder for each position outside of its layers; None: not modelled.
        all_logits: whether a prompt's logits are computed at every position, because the class takes no
            `logits_to_keep`.
    """

    vision_layers: int = 0
    vision_blocks_run: int = 0
    vision_hidden: int = 0
    vision_mlp: int = 0
    patch: int = 0
    channels: int = 0
    image_patches: int = 0
    has_cls: bool = False
    projector: tuple[int, ...] | int | None
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    gated: bool
    vocab: int | None
    vision_gated: bool = False
    by_layer: tuple[LayerShape | None, ...] = ()
    beside: int | None = 0
    all_logits: bool = False

    def layer_shapes(self) -> tuple[LayerShape | None, ...]:
        """Of each decoder layer; None where it is not modelled."""
        return self.by_layer or (self.plain_layer(),) * self.layers

    def plain_layer(self) -> LayerShape:
        """A layer of Llama's kind: grouped heads that see everything, and one MLP."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        matrices = 3 if self.gated else 2
        linear = self.hidden * (2 * q + 2 * kv) + matrices * self.hidden * self.intermediate
        return LayerShape(linear=linear, scores=2 * q, cached=2 * kv)


@dataclass(frozen=True)
class Flops:
    """Floating-point operations by part; None where a part is not modelled.

    Attributes:
        vision: vision tower, patch embedding included.
        projector: between tower and decoder.
        selection: the matrix products of the method and of the signals recorded for it.
        prefill: decoder layers and head over the prompt.
        decode: one generated token, at the length right after the prompt.
    """

    vision: int | None
    projector: int | None
    selection: int
    prefill: int | None
    decode: int | None

    @property
    def total(self) -> int | None:
        """Everything up to the first token: vision + projector + selection + prefill; None if one of them is."""
        return total((self.vision, self.projector, self.selection, self.prefill))

    def as_dict(self) -> dict[str, int | None]:
        """The parts and `total`, by name."""
        return {**asdict(self), "total": self.total}


def total(parts: Iterable[int | None]) -> int | None:
    """The sum; None if a part is not modelled."""
    counted = 0
    for part in parts:
        if part is None:
            return None
        counted += part
    return counted


def share(part: float | None, whole: float | None) -> float | None:
    """`part / whole`; None where one of them is not modelled, or there is nothing to have a share in."""
    return part / whole if part is not None and whole else None


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


def projector_flops(shape: ModelShape, tokens: int) -> int | None:
    """The projector over `tokens` visual tokens in all."""
    if shape.projector is None:
        return None
    if isinstance(shape.projector, int):
        return 2 * tokens * shape.projector
    return sum(2 * tokens * a * b for a, b in zip(shape.projector[:-1], shape.projector[1:], strict=True))


def _check(shape: ModelShape, lengths: Sequence[int]) -> None:
    if len(lengths) != shape.layers:
        raise ValueError(f"Give one length per decoder layer: {shape.layers} are needed, got {len(lengths)}.")


def layer_flops(shape: ModelShape, lengths: Sequence[int], cached: Sequence[int] | None = None) -> list[int | None]:
    """Each decoder layer over one prompt, whose length may differ by layer.

    Args:
        lengths: new positions in each decoder layer.
        cached: positions that each layer has had before; none by default.
    """
    before = [0] * shape.layers if cached is None else cached
    for each in (lengths, before):
        _check(shape, each)
    layers = zip(shape.layer_shapes(), lengths, before, strict=True)
    return [None if layer is None else layer.flops(n, m) for layer, n, m in layers]


def head_flops(shape: ModelShape, positions: int = 1) -> int | None:
    """The language-model head at `positions` positions."""
    return None if shape.vocab is None else 2 * positions * shape.hidden * shape.vocab


def prefill_flops(
    shape: ModelShape, lengths: Sequence[int], logits: int | None = None, cached: Sequence[int] | None = None
) -> int | None:
    """The decoder over one prompt, head included.

    Args:
        lengths, cached: as for `layer_flops`.
        logits: positions whose logits are computed; by default as many as `generate` asks for.
    """
    if logits is None:
        logits = lengths[-1] if shape.all_logits else 1
    layers = layer_flops(shape, lengths, cached)
    beside = None if shape.beside is None else 2 * lengths[0] * shape.beside
    return total([*layers, beside, head_flops(shape, logits)])


def decode_flops(shape: ModelShape, keys: Sequence[int]) -> int | None:
    """One decode step of one sample, head included; `keys` per layer, the new token's key among them."""
    return prefill_flops(shape, [1] * len(keys), cached=[m - 1 for m in keys])


def kv_bytes_per_layer(shape: ModelShape, lengths: Sequence[int], itemsize: int = 2) -> list[int | None]:
    """Bytes of each layer's cache for one sample: keys and values, of a window what it holds, and states of linear
    attention; `itemsize` in bytes (2 for bf16 and fp16)."""
    _check(shape, lengths)
    layers = zip(shape.layer_shapes(), lengths, strict=True)
    return [None if layer is None else layer.bytes(n, itemsize) for layer, n in layers]


def kv_bytes(shape: ModelShape, lengths: Sequence[int], itemsize: int = 2) -> int | None:
    """Bytes of the whole KV cache of one sample."""
    return total(kv_bytes_per_layer(shape, lengths, itemsize))


def equivalent_tokens(visual_lengths: Sequence[float]) -> float:
    """Visual tokens averaged over decoder layers: the number that published tables call the budget.

    576 tokens in 2 of 32 layers and 167 in the other 30 are equivalent to 192.6.
    """
    if not visual_lengths:
        raise ValueError("equivalent_tokens needs at least one decoder layer.")
    return sum(visual_lengths) / len(visual_lengths)


def paper_flops(shape: ModelShape, lengths: Sequence[int]) -> int | None:
    """The simplified formula of published tables, a multiply-add as one operation (see the module's conventions); None
    for decoders that it was not made for: with experts, with layers of several kinds."""
    _check(shape, lengths)
    plain = shape.plain_layer().linear
    if any(layer is None or layer.linear != plain for layer in shape.layer_shapes()):
        return None
    d, m, matrices = shape.hidden, shape.intermediate, 3 if shape.gated else 2
    return sum(4 * n * d * d + 2 * n * n * d + matrices * n * d * m for n in lengths)
