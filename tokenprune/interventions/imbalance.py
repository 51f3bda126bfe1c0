"""Raises the logits of image tokens that the vision tower finds important (imbalance, later PAINT).

Source: "Fixing Imbalanced Attention to Mitigate In-Context Hallucination of Large Vision-Language Model", Arif et al.,
arXiv 2501.12206, and hasanar1f/PAINT (Apache-2.0; this file was written from the formulas).

Of the tower's attention, c1 is that of [CLS] in the first block and c2 in the block whose output becomes the tokens. Of
each grid of N tokens L is the floor(0.25 N) with the most of c1 and G those of c2 above Q3 + 1.5 (Q3 - Q1); L loses
what is in G. In the last row of a prompt and in every decoded row, layers 2 to L - 1, the scaled logits s become

    s + alpha |s| on L,   s + beta |s| on G

before the softmax. The term depends on |s|, so it is no bias, and adding a constant to all logits changes the result.

- alpha = beta = 0 and layers = [] are stock bit for bit; all other rows keep their bits.

Readings and deviations:
- beta is 0.3 in the code and 0.4 where the paper is best; 0.3 here. The spatial set is not there: as released its score
  is constant, and it is off by default.
- The abstract's modulation by head has no formula and no code. head_modulation=True is our reconstruction: alpha and
  beta times the head's attention to the image over the mean of all heads, within [0.5, 1.5], by row.
- A tower without [CLS] gives the mean attention that a patch gets (our choice); tokens that are mixed of several
  patches get theirs mixed alike. Crops and frames are judged one by one.
- Sets are those of the whole picture: what left is missing from them, and nothing takes its place. Cuts before or
  inside the tower are refused.
- Guidance against an image-free prompt is not there (off by default in the code).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokenprune.interfaces.intervention import Attended, DecoderInfo, Entering, Facts, Intervention, VisualTokens
from tokenprune.interfaces.signals import Signal, TowerInfo, summary_attention
from tokenprune.interventions._rows import in_the_open
from tokenprune.registry import register_intervention

LOCAL, SUMMARY = 1, 2


@register_intervention("imbalance")
@dataclass
class Imbalance(Intervention):
    """Raised logits of local and summary tokens in decoder layers 2 to L - 1 (0-based, of L).

    Attributes:
        alpha: of local tokens.
        beta: of summary tokens; 0 for both switches it off.
        ratio: share of a grid's tokens that are local, in [0, 1].
        outlier: quartile distances above the third quartile from which a token is a summary token.
        head_modulation: whether heads that look more at the image are raised more.
    """

    published: ClassVar[str] = "arXiv 2501.12206, hasanar1f/PAINT"
    acts_on: ClassVar[str] = "the last"
    answers_only: ClassVar[bool] = True

    alpha: float = 0.7
    beta: float = 0.3
    ratio: float = 0.25
    outlier: float = 1.5
    head_modulation: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("alpha", "beta", "ratio", "outlier"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0:
                raise ValueError(f"{name} must be a number of at least 0, got {value!r}.")
        if self.ratio > 1:
            raise ValueError(f"ratio is a share, in [0, 1], got {self.ratio!r}.")
        if not isinstance(self.head_modulation, bool):
            raise ValueError(f"head_modulation must be true or false, got {self.head_modulation!r}.")
        self._reads: tuple[Signal, Signal] | None = None

    def default_layers(self, decoder: DecoderInfo) -> Sequence[int]:
        return range(2, decoder.layers)

    def prepare(self, decoder: DecoderInfo) -> tuple[int, ...]:
        layers = super().prepare(decoder)
        return layers if self.alpha or self.beta else ()

    def signals(self, tower: TowerInfo) -> tuple[Signal, ...]:
        self._reads = summary_attention(tower, 0), summary_attention(tower, tower.feature_layer)
        return self._reads

    def note(self, entering: Entering) -> dict[str, Tensor]:
        carried = entering.carried
        if "groups" not in carried:
            groups = torch.zeros(entering.visual.shape, dtype=torch.int8, device=entering.hidden.device)
            for visual in entering.visuals():
                found = self._groups(visual).to(groups.device)
                groups[visual.sample, visual.places.to(groups.device)] = found
            carried["groups"] = groups
            carried["image"] = entering.visual.clone()
        return {"groups": carried["groups"], "image": carried["image"]}

    def _groups(self, visual: VisualTokens) -> Tensor:
        """`[n]` int8 of the tokens that are left."""
        if self._reads is None:
            raise ValueError("imbalance was not told of the vision tower; apply it with tokenprune.apply.")
        early, late = (visual.signal(signal).float() for signal in self._reads)
        found = [
            chosen(early[of], late[of], self.ratio, self.outlier)
            for raster in visual.rasters
            for of in [slice(raster.start, raster.start + raster.num_tokens)]
        ]
        groups = torch.cat(found)
        return groups if visual.tokens is None else groups[visual.tokens.to(groups.device)]

    def applies(self, facts: Facts) -> Tensor:
        return (facts["groups"] > 0).any(1)

    def attend(self, given: Attended) -> Tensor | None:
        groups = given.facts["groups"]
        known = groups.shape[1]
        if "imbalance" not in given.made:
            strength = torch.where(groups == LOCAL, self.alpha, torch.where(groups == SUMMARY, self.beta, 0.0))
            given.made["imbalance"] = strength[:, None, None].float(), given.facts["image"][:, None, None].float()
        strength, image = given.made["imbalance"]  # [B, 1, 1, P]

        def change(scores: Tensor, part: slice) -> Tensor:
            raised = strength
            if self.head_modulation:
                looks = (scores.softmax(-1)[..., :known] * image).sum(-1, keepdim=True)  # [B, H, R, 1]
                mean = looks.mean(1, keepdim=True).clamp(min=torch.finfo(looks.dtype).tiny)
                raised = strength * (looks / mean).clamp(0.5, 1.5)
            own = scores[..., :known]
            if given.allowed is None and not own.requires_grad:
                own.addcmul_(raised.expand_as(own), own.abs())
                return scores.softmax(-1)
            hidden = own == torch.finfo(scores.dtype).min  # a key that a row does not see stays so
            more = torch.where(hidden, own, own + raised * own.abs())
            return torch.cat([more, scores[..., known:]], dim=-1).softmax(-1)

        return in_the_open(given, change)

    def summary(self, noted: Mapping[int, Facts]) -> str:
        said = f"alpha {self.alpha:g}, beta {self.beta:g}" + ", by head (reconstructed)" * self.head_modulation
        facts = noted.get(max(noted)) if noted else None
        if facts is None:
            return said
        local, large = (int((facts["groups"] == kind).sum()) for kind in (LOCAL, SUMMARY))
        return f"{said}; {local} local and {large} summary tokens of {int(facts['image'].sum())}"


def chosen(early: Tensor, late: Tensor, ratio: float, outlier: float) -> Tensor:
    """`[N]` int8, `LOCAL`, `SUMMARY` or 0, of the tokens of one grid; the earlier of equals first."""
    count = int(ratio * len(early))
    groups = torch.zeros(len(early), dtype=torch.int8, device=early.device)
    groups[early.argsort(descending=True, stable=True)[:count]] = LOCAL
    first, third = torch.quantile(late, torch.tensor([0.25, 0.75], device=late.device))
    return groups.masked_fill(late > third + outlier * (third - first), SUMMARY)
