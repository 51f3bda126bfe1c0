"""Shrinks attention on keys that everybody attends to, and gives it to all other keys (ACT).

Source: "Unveiling and Harnessing Hidden Attention Sinks: Enhancing Large Language Models without Training through
Attention Calibration", Yu et al., arXiv 2406.15765 (ICML 2024), and GATECH-EIC/ACT, whose README says Apache-2.0; this
file was written from the formulas. Use on vision-language models is ours: the authors tested language models.

In one head, c_k is the mean of the weights of key k over the rows that see it, and S the keys with c_k > theta, the
first of a row never among them. With m_S the weights of a row on S,

    a_k' = beta a_k on S,   a_k' = a_k (1 - beta m_S) / (1 - m_S) elsewhere

in all rows of a prompt, and in decoded rows with the S of the prompt (the code's rule breaks there). Layers 2 to L - 2.

- No full matrix: column means and rows are computed 64 rows at a time, of the heads in question.
- beta = 1, theta >= 1, heads = [] and layers = [] are stock bit for bit; so are heads that are not listed.

Deviations:
- theta: the code has 0.1 (0.15 in one script), a port of the paper alpha / N; None is max(0.02, 5 / T) here, T the keys
  of a row, because a prompt with a picture is long (our choice).
- The code drops the first of the keys above theta, whichever it is. Here the first key is protected by name, also where
  it is not above theta, and no other is.
- Columns that fewer than 8 rows see have no mean to speak of and are never sinks (our choice). Rows that see sinks
  alone keep their weights.
- The published head lists are of language models and are not used: all heads act unless told otherwise.
- Tokens of a further turn with a picture are judged by that turn's rows alone; those of text-only turns are no sinks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokenprune.interfaces.intervention import Attended, DecoderInfo, Facts, Intervention
from tokenprune.interventions._rows import blocks, check_heads, in_the_open, logits, of_heads, writable
from tokenprune.registry import register_intervention

_LEAST_ROWS = 8


@register_intervention("act")
@dataclass
class ACT(Intervention):
    """Attention calibration in decoder layers 2 to L - 2 (0-based, of L).

    Attributes:
        beta: share of a sink's attention that stays, in [0, 1]; 1 switches it off.
        theta: least mean attention of a sink; 1 switches it off. None: max(0.02, 5 / T).
        heads: query heads in which it acts, the same in all layers; None: all.
    """

    published: ClassVar[str] = "arXiv 2406.15765, GATECH-EIC/ACT"
    acts_on: ClassVar[str] = "all"
    visual_only: ClassVar[bool] = False

    beta: float = 0.4
    theta: float | None = None
    heads: Sequence[int] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in (("beta", self.beta), ("theta", 0.0 if self.theta is None else self.theta)):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {value!r}.")
        check_heads(self.heads)

    def default_layers(self, decoder: DecoderInfo) -> Sequence[int]:
        return range(2, decoder.layers - 1)

    def prepare(self, decoder: DecoderInfo) -> tuple[int, ...]:
        layers = super().prepare(decoder)
        check_heads(self.heads, decoder.heads)
        off = self.beta == 1 or self.theta == 1 or (self.heads is not None and not self.heads)
        return () if off else layers

    def rows(self, visual: Tensor, attended: Tensor, before: Tensor) -> None:
        return None

    def measures(self, layer: int) -> bool:
        return True

    def measure(self, given: Attended) -> dict[str, Tensor]:
        batch, heads, rows, _ = given.query.shape
        held = given.key.shape[2] - rows
        real = given.query.new_ones(batch, rows, dtype=torch.bool) if given.real is None else given.real
        counted = real.clone()
        counted[:, rows - given.drafted :] = False
        sums = torch.zeros(batch, heads, rows, device=real.device)
        seers = torch.zeros(batch, rows, device=real.device)
        for part in blocks(rows):
            weights = logits(given, part).softmax(-1)[..., held:]
            sums += (weights * counted[:, None, part, None]).sum(2)
            seen = counted[:, part, None] if given.allowed is None else given.allowed[:, part, held:]
            seers += (seen & counted[:, part, None]).sum(1)
        theta = self.theta if self.theta is not None else (5 / (held + real.sum(1))).clamp(min=0.02)[:, None, None]
        sinks = (sums / seers.clamp(min=1)[:, None] > theta) & (seers >= _LEAST_ROWS)[:, None]
        if not held:
            sinks &= ~(real & (real.cumsum(1) == 1))[:, None]
        if self.heads is not None:
            chosen = torch.zeros(heads, dtype=torch.bool, device=real.device)
            chosen[list(self.heads)] = True
            sinks &= chosen[:, None]
        return {"sinks": sinks.transpose(1, 2)}  # [B, S, H]

    def applies(self, facts: Facts) -> Tensor:
        return facts["sinks"].flatten(1).any(1)

    def attend(self, given: Attended) -> Tensor | None:
        if "act" not in given.made:
            sinks = given.facts["sinks"].transpose(1, 2)[:, :, None].float()  # [B, H, 1, P]
            given.made["act"] = sinks if self.heads is None else sinks[:, list(self.heads)]
        sinks = given.made["act"]
        if self.heads is None:
            return self._calibrated(given, sinks)
        out = given.stock(given.query, given.key, given.value).clone()
        out[:, list(self.heads)] = self._calibrated(of_heads(given, self.heads), sinks).to(out.dtype)
        return out

    def _calibrated(self, given: Attended, sinks: Tensor) -> Tensor:
        known = sinks.shape[3]

        def change(scores: Tensor, part: slice) -> Tensor:
            weights = writable(scores.softmax(-1))
            seen = weights[..., :known]
            mass = (seen * sinks).sum(-1, keepdim=True)
            rest = 1 - mass
            gain = torch.where(rest > 1e-6, (1 - self.beta * mass) / rest, 1.0)
            stays = torch.where(rest > 1e-6, self.beta - gain, 0.0)
            seen *= torch.addcmul(gain, sinks, stays)
            weights[..., known:] *= gain
            return weights

        return in_the_open(given, change)

    def flops(self, given: Attended) -> int:
        heads = given.query.shape[1]
        return super().flops(given) * (heads if self.heads is None else len(self.heads)) // heads

    def summary(self, noted: Mapping[int, Facts]) -> str:
        theta = "max(0.02, 5 / T)" if self.theta is None else f"{self.theta:g}"
        heads = "all heads" if self.heads is None else "heads " + ", ".join(map(str, self.heads))
        counts = [
            float(facts["sinks"].sum()) / facts["sinks"].shape[0] / facts["sinks"].shape[2] for facts in noted.values()
        ]
        found = f"; {sum(counts) / len(counts):.1f} sinks per prompt, layer and head" if counts else ""
        return f"beta {self.beta:g}, theta {theta}, {heads}{found}"
