"""Hides from each text token the image tokens that it and the text it reads look at least (CMAI, our reconstruction).

Source: the second half of "Enhancing Instruction-Following Capability of Visual-Language Models by Reducing Image
Redundancy", Yang et al., arXiv 2411.15453 (the first, VMTC, is the method `vmtc`). No code was found and the paper's
body could not be read: known are the propagation of text-to-image attention through text-to-text attention, that pairs
with low scores are inhibited, and that this is a change of the causal mask. Every number and the exact form below are
ours; results are of "CMAI-style (our reconstruction)" and not of the authors'.

In the layer `measured`, with A the attention, mean over heads, T the text behind a prompt's first image token and I the
image tokens: A_tt and A_ti are its parts with each row scaled to sum to 1, and

    F = own A_ti + (1 - own) A_tt A_ti

A row keeps the ceil(rho M) of the M image tokens it sees that have the most of F, or, with theta, those with at least
theta / M and always the first. In the layers behind, the other pairs are hidden before the softmax. Decoded tokens, and
text of later turns, are hidden what the last token of the prompt is. Image and other rows never change.

- Saves nothing: image tokens stay in all other rows. rho = 1, theta = 0 and layers = [] are stock bit for bit.
- Scores are measured once, and after a cut are those of the tokens that are left. Pictures of earlier turns are hidden
  as they were for the turn that brought them, and take no part in the scores of a later one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from tokenprune.interfaces.intervention import Attended, DecoderInfo, Entering, Facts, Intervention
from tokenprune.interventions._rows import in_the_open
from tokenprune.kernels.attention_rows import attention_rows
from tokenprune.registry import register_intervention


@register_intervention("cmai")
@dataclass
class CMAI(Intervention):
    """Inhibition of text-image pairs in the decoder layers behind `measured`.

    Attributes:
        rho: share of the image tokens a row sees that it keeps, in (0, 1]; 1 switches it off.
        theta: in place of rho, the least score, as a share of 1 / M; 0 switches it off.
        own: weight of a row's own attention in its score, in [0, 1].
        measured: the decoder layer whose attention is scored, from 0; it is not changed.
    """

    published: ClassVar[str] = "arXiv 2411.15453, no code: reconstructed"

    rho: float = 0.5
    theta: float | None = None
    own: float = 0.0
    measured: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value, least in (("rho", self.rho, 1e-9), ("own", self.own, 0.0)):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= 1:
                raise ValueError(f"{name} must be {'above' if least else 'from'} 0 and at most 1, got {value!r}.")
        theta = self.theta
        if theta is not None and (isinstance(theta, bool) or not isinstance(theta, (int, float)) or theta < 0):
            raise ValueError(f"theta must be a number of at least 0, got {theta!r}.")
        if isinstance(self.measured, bool) or not isinstance(self.measured, int) or self.measured < 0:
            raise ValueError(f"measured must be a decoder layer from 0 on, got {self.measured!r}.")

    def default_layers(self, decoder: DecoderInfo) -> Sequence[int]:
        return range(self.measured + 1, decoder.layers)

    def prepare(self, decoder: DecoderInfo) -> tuple[int, ...]:
        layers = super().prepare(decoder)
        if not layers or self.theta == 0 or (self.theta is None and self.rho == 1):
            return ()
        if layers[0] <= self.measured:
            raise ValueError(
                f"cmai measures in layer {self.measured} and can change the layers behind it, and layers names "
                f"{layers[0]}. Name later ones, or measure earlier."
            )
        return (self.measured, *layers)

    def note(self, entering: Entering) -> dict[str, Tensor]:
        if entering.layer == self.measured:
            visual = entering.visual
            entering.carried["visual"] = visual if entering.attended is None else visual & entering.attended
            return {}
        # a prompt of text alone was not measured, and nothing is hidden from it
        return {name: entering.carried[name] for name in ("visual", "hidden") if "hidden" in entering.carried}

    def measures(self, layer: int) -> bool:
        return layer == self.measured

    def measure(self, given: Attended) -> dict[str, Tensor]:
        visual = given.carried["visual"]
        scores, seen = focus(given, visual, self.own)
        counts = seen.sum(-1, keepdim=True)
        best = scores.masked_fill(~seen, -1.0).argsort(dim=-1, descending=True, stable=True)
        ranks = best.argsort(dim=-1)
        if self.theta is None:
            stays = ranks < (self.rho * counts.double() - 1e-9).ceil()
        else:
            stays = (scores >= self.theta / counts.clamp(min=1)) | (ranks == 0)
        pairs = seen & ~stays  # [B, R, S]
        last = (seen.any(-1).sum(1) + _before(seen)).sub(1).clamp(min=0)
        hidden = pairs[torch.arange(len(pairs), device=pairs.device), last]  # [B, S]
        if given.drafted and given.places is not None:  # decoded tokens, that come early
            late = given.places >= visual.shape[1] - given.drafted
            pairs = torch.where(late[..., None], hidden[:, None], pairs)
        given.carried["hidden"], given.carried["pairs"] = hidden, pairs.transpose(1, 2)
        return {}

    def measured_flops(self, given: Attended) -> int:
        rows = given.query.shape[2]
        return super().measured_flops(given) + 2 * given.query.shape[0] * rows * rows * given.key.shape[2]

    def applies(self, facts: Facts) -> Tensor:
        return facts["visual"].any(1)

    def attend(self, given: Attended) -> Tensor | None:
        if given.layer == self.measured:
            return None
        hidden, count = given.facts["hidden"], given.key.shape[2]
        if given.prompt:
            pairs = given.carried["pairs"].transpose(1, 2)
            held = count - pairs.shape[2]
            hide = torch.cat([hidden[:, None, :held].expand(-1, pairs.shape[1], -1), pairs], dim=2)
        elif given.allowed is None:  # a decoded token: nothing as wide as the keys is made

            def change(scores: Tensor, part: slice) -> Tensor:
                scores[..., : hidden.shape[1]].masked_fill_(hidden[:, None, None], torch.finfo(scores.dtype).min)
                return scores.softmax(-1)

            return in_the_open(given, change)
        else:
            hide = pad(hidden, (0, count - hidden.shape[1]))[:, None].expand(-1, given.query.shape[2], -1)
        allowed = ~hide if given.allowed is None else given.allowed & ~hide
        return in_the_open(replace(given, allowed=allowed), lambda scores, part: scores.softmax(-1))

    def summary(self, noted: Mapping[int, Facts]) -> str:
        rule = f"rho {self.rho:g}" if self.theta is None else f"theta {self.theta:g}"
        facts = noted.get(max(noted)) if noted else None
        if facts is None or "hidden" not in facts:
            return f"{rule}, measured in layer {self.measured}; our reconstruction"
        hidden, images = int(facts["hidden"].sum()), int(facts["visual"].sum())
        return (
            f"{rule}, measured in layer {self.measured}; {hidden} of {images} image tokens are hidden from decoded "
            "tokens; our reconstruction"
        )


def focus(given: Attended, visual: Tensor, own: float) -> tuple[Tensor, Tensor]:
    """`[B, R, S]` fp32, how much each row looks at each image token, and bool, which of them it sees; both empty at
    rows that are no text behind an image token of this call.

    Args:
        given: rows of text.
        visual: `[B, S]` bool, image tokens of the call.
    """
    batch, _, rows, _ = given.query.shape
    held = given.key.shape[2] - visual.shape[1]
    places = torch.arange(rows, device=visual.device).expand(batch, -1) if given.places is None else given.places
    allowed = given.allowed
    allowed = visual.new_ones(batch, rows, given.key.shape[2]) if allowed is None else allowed.expand(batch, -1, -1)
    seen = allowed[:, :, held:] & visual[:, None]
    if given.real is not None:
        seen = seen & given.real[..., None]
    if given.drafted:
        seen = seen & (places < visual.shape[1] - given.drafted)[..., None]
    text = seen.any(-1)  # [B, R]
    # a place that is no row may see nothing, and its softmax would be of nothing
    weights = attention_rows(given.query, given.key, given.scale, allowed | ~allowed.any(-1, keepdim=True))
    images = _to_one(weights[:, :, held:] * seen)
    index = (held + places)[:, None].expand(-1, rows, -1)
    words = _to_one(weights.gather(2, index) * (text[:, None] & text[:, :, None]))
    return own * images + (1 - own) * (words @ images), seen


def _to_one(weights: Tensor) -> Tensor:
    total = weights.sum(-1, keepdim=True)
    return weights / torch.where(total > 0, total, math.inf)


def _before(seen: Tensor) -> Tensor:
    """`[B]`: rows before the first that sees an image token; those that do stand side by side."""
    return seen.any(-1).to(torch.int8).argmax(dim=1)
