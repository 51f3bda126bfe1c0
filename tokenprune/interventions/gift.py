"""Amplifies the image tokens to which the question's words turn one after the other (GIFT).

Source: "Capturing Gaze Shifts for Guidance: Cross-Modal Fusion Enhancement for VLM Hallucination Mitigation",
arXiv 2510.22067, and amazon-science/GIFT (CC BY-NC 4.0: this file was written from the formulas, nothing was copied).

Saliency, once per prompt in the layer `measured`, with A its attention:

    D[h, i, j] = max(A[h, i, j] - A[h, i - 1, j], 0)     question rows i, image tokens j

m_j is its mean over those rows and the half of the heads with the largest sum, clipped to 3 standard deviations about
the mean over j and scaled to [0, 1]: S. In the layers behind, in the last row of the prompt and in every decoded row:
the image entries of the half of the heads that look most at the image are multiplied by exp(alpha S), the question
entries of the half that look most at the question by beta r, r being what the image mass of the first half grew by, and
each head's row is scaled to sum to 1. Sinks draw attention from all rows alike, so their shifts are small.

- One pass: the code runs the prompt twice. All other rows keep their bits.
- alpha = 0 and layers = [] are stock bit for bit; so is a prompt whose map is flat.

Deviations:
- The question is all text behind a prompt's last image token of the call but for `skip` tokens at its ends (the code
  has offsets for two templates: skip=[2, 5] is that of LLaVA-1.5, [1, 5] that of Qwen2-VL). Choosing content words by a
  tagger is not there.
- Published layers are of two sizes of LLaVA-1.5 (12 to 22 of 32 measured in 11; 14 to 20 of 40 measured in 10), other
  decoders get the same shares: measured in 0.35 L, acting up to 0.7 L (our choice). Layers up to `measured`, which
  the code enhances in Qwen2-VL, are refused: in one pass they have run.
- Images and questions of earlier turns stay amplified by their own maps. r has no cap by default.
- A cut behind `measured` keeps the numbers of the map; one before it leaves a map of the tokens that stayed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokenprune.interfaces.intervention import Attended, DecoderInfo, Entering, Facts, Intervention
from tokenprune.interventions._rows import blocks, in_the_open, logits, writable
from tokenprune.registry import register_intervention

_PUBLISHED = {("llava", 32): (11, range(12, 23), 5.0), ("llava", 40): (10, range(14, 21), 5.0)}
"""By family and layers: the layer that is measured, those that act, alpha."""


@register_intervention("gift")
@dataclass
class GIFT(Intervention):
    """Gaze-shift guided amplification in the decoder layers behind `measured`.

    Attributes:
        alpha: the most a weight is multiplied by is e to this; 0 switches it off. None: 5, or 4 in decoders of Qwen.
        beta: factor of r on the question's weights.
        measured: the decoder layer in which shifts are measured, from 0. None: see the module.
        skip: how many tokens at the beginning and at the end of the text behind the picture are no part of the
            question; the first is compared with the one before, so it is 1 at least.
        cap: the most r may be; None: no bound.
    """

    published: ClassVar[str] = "arXiv 2510.22067, amazon-science/GIFT"
    acts_on: ClassVar[str] = "the last"
    answers_only: ClassVar[bool] = True

    alpha: float | None = None
    beta: float = 1.0
    measured: int | None = None
    skip: Sequence[int] = (1, 0)
    cap: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in (("alpha", self.alpha), ("beta", self.beta), ("cap", self.cap)):
            wrong = isinstance(value, bool) or not isinstance(value, (int, float)) or value < (name == "cap")
            if value is not None and wrong:
                raise ValueError(f"{name} must be a number of at least {int(name == 'cap')}, got {value!r}.")
        if self.measured is not None and (type(self.measured) is not int or self.measured < 0):
            raise ValueError(f"measured must be a decoder layer from 0 on, got {self.measured!r}.")
        ends = list(self.skip) if isinstance(self.skip, (list, tuple)) else []
        if len(ends) != 2 or any(type(end) is not int for end in ends) or ends[0] < 1 or ends[1] < 0:
            raise ValueError(f"skip must be two numbers, the first of at least 1, got {self.skip!r}.")
        self._measured, self._alpha = -1, 0.0

    def default_layers(self, decoder: DecoderInfo) -> Sequence[int]:
        measured, layers, _ = self._defaults(decoder)
        return layers if measured == self._measured else range(self._measured + 1, layers[-1] + 1)

    @staticmethod
    def _defaults(decoder: DecoderInfo) -> tuple[int, range, float]:
        count = decoder.layers
        first = min(int(0.35 * count), max(count - 2, 0))
        ours = first, range(first + 1, max(int(0.7 * count) + 1, first + 2)), 4.0 if "qwen" in decoder.text else 5.0
        return _PUBLISHED.get((decoder.family, count), ours)

    def prepare(self, decoder: DecoderInfo) -> tuple[int, ...]:
        measured, _, alpha = self._defaults(decoder)
        self._measured = measured if self.measured is None else self.measured
        self._alpha = alpha if self.alpha is None else self.alpha
        layers = super().prepare(decoder)
        if not layers or self._alpha == 0:
            return ()
        if layers[0] <= self._measured:
            raise ValueError(
                f"gift measures in layer {self._measured} and can change the layers behind it, and layers names "
                f"{layers[0]}. Name later ones, or measure earlier."
            )
        return (self._measured, *layers)

    def note(self, entering: Entering) -> dict[str, Tensor]:
        if entering.layer == self._measured:
            visual = entering.visual
            entering.carried["image"] = visual if entering.attended is None else visual & entering.attended
            return {}
        names = ("image", "question", "saliency")
        # a prompt of text alone was not measured, and nothing of it is amplified
        return {name: entering.carried[name] for name in names if "saliency" in entering.carried}

    def measures(self, layer: int) -> bool:
        return layer == self._measured

    def measured_rows(self, visual: Tensor, attended: Tensor, before: Tensor) -> Tensor:
        """Text behind the last image token."""
        behind = visual.flip(1).cumsum(1).flip(1) == 0
        return attended & behind & visual.any(1, keepdim=True)

    def measure(self, given: Attended) -> dict[str, Tensor]:
        image = given.carried["image"]
        batch, heads, rows, _ = given.query.shape
        held = given.key.shape[2] - image.shape[1]
        places = torch.arange(rows, device=image.device).expand(batch, -1) if given.places is None else given.places
        real = image.new_ones(batch, rows) if given.real is None else given.real
        real = real & (places < image.shape[1] - given.drafted)
        number = real.cumsum(1)
        asks = real & (number > self.skip[0]) & (number <= real.sum(1, keepdim=True) - self.skip[1])  # [B, R]
        parts = [logits(given, part).softmax(-1)[..., held:] for part in blocks(rows)]
        weights = parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)  # [B, H, R, S]
        shifts = (weights[:, :, 1:] - weights[:, :, :-1]).clamp(min=0)
        shifts = shifts * (asks[:, None, 1:, None] & image[:, None, None])
        best = shifts.sum((2, 3)).argsort(dim=1, descending=True, stable=True)[:, : max(heads // 2, 1)]
        by_head = shifts.sum(2) / asks.sum(1).clamp(min=1)[:, None, None]  # [B, H, S]
        mean = by_head.gather(1, best[..., None].expand(-1, -1, image.shape[1])).mean(1)
        question = torch.zeros_like(image).scatter(1, places, asks)
        given.carried["question"], given.carried["saliency"] = question, scaled(mean, image)
        return {}

    def applies(self, facts: Facts) -> Tensor:
        return facts["saliency"].amax(1) > 0

    def attend(self, given: Attended) -> Tensor | None:
        if given.layer == self._measured:
            return None
        sums, gains = self._tables(given)
        known = sums.shape[1]

        def change(scores: Tensor, part: slice) -> Tensor:
            weights = scores.softmax(-1)
            batch, heads, rows, _ = weights.shape
            masses = torch.bmm(weights[..., :known].flatten(1, 2), sums).view(batch, heads, rows, 3)
            picked = most(masses[..., :2])  # [B, H, R, 2]
            looking, asking = picked.unbind(-1)
            looks, asks, raised = masses.unbind(-1)
            before, after = (looks * looking).sum(1, keepdim=True), (raised * looking).sum(1, keepdim=True)
            ratio = torch.where(before > 0, after / before, 1.0)
            more = self.beta * (ratio if self.cap is None else ratio.clamp(max=self.cap)) - 1  # [B, 1, R]
            asking = asking * more
            factors = torch.bmm(torch.stack([looking, asking], dim=-1).flatten(1, 2), gains) + 1
            total = 1 + looking * (raised - looks) + asking * asks  # what the row sums to then
            weights = writable(weights)
            weights[..., :known] *= factors.view(batch, heads, rows, known)
            return weights.div_(total[..., None])

        return in_the_open(given, change)

    def _tables(self, given: Attended) -> tuple[Tensor, Tensor]:
        """`[B, P, 3]`, by which weights are summed over image, question and the raised image, and `[B, 2, P]`, by how
        much more a head has of the image and of the question."""
        if "gift" not in given.made:
            image, question = given.facts["image"].float(), given.facts["question"].float()
            gain = (self._alpha * given.facts["saliency"]).exp()
            sums = torch.stack([image, question, image * gain], dim=-1)
            given.made["gift"] = sums, torch.stack([image * (gain - 1), question], dim=1)
        return given.made["gift"]

    def flops(self, given: Attended) -> int:
        batch, heads, rows, _ = given.query.shape
        # three sums over the keys whose facts are known, and two gains for each
        return super().flops(given) + 10 * batch * heads * rows * given.facts["image"].shape[1]

    def summary(self, noted: Mapping[int, Facts]) -> str:
        said = f"alpha {self._alpha:g}, beta {self.beta:g}, measured in layer {self._measured}"
        facts = noted.get(max(noted)) if noted else None
        if facts is None or "saliency" not in facts:
            return said
        rows = facts["image"].any(1)
        asked = facts["question"][rows].sum(1).float()
        flat = int((facts["saliency"][rows].amax(1) == 0).sum())
        return f"{said}; {float(asked.mean()) if len(asked) else 0:.1f} question tokens" + f", {flat} flat maps" * (
            flat > 0
        )


def most(mass: Tensor) -> Tensor:
    """Of `[B, H, ...]` the half of the heads with the most, 1 there and 0 elsewhere; the earlier of equals first."""
    best = mass.argsort(dim=1, descending=True, stable=True)[:, : max(mass.shape[1] // 2, 1)]
    return torch.zeros_like(mass).scatter_(1, best, 1.0)


def scaled(mean: Tensor, image: Tensor) -> Tensor:
    """`[B, S]` in [0, 1]: clipped to 3 standard deviations over the image tokens and stretched; zeros where flat."""
    count = image.sum(1, keepdim=True)
    mean = mean * image
    centre = mean.sum(1, keepdim=True) / count.clamp(min=1)
    spread = (((mean - centre) * image).square().sum(1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()
    clipped = mean.clamp(centre - 3 * spread, centre + 3 * spread)
    low = clipped.masked_fill(~image, torch.inf).amin(1, keepdim=True)
    high = clipped.masked_fill(~image, -torch.inf).amax(1, keepdim=True)
    width = high - low
    found = (clipped - low) / torch.where(width > 0, width, torch.inf)
    return found.masked_fill(~image, 0).nan_to_num(0.0)
