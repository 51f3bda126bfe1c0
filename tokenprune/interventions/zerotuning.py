"""Scales the attention weight of the first key of a row, in some heads (ZeroTuning).

Source: "ZeroTuning: Unlocking the Initial Token's Power to Enhance Large Language Models Without Training", Han et al.,
arXiv 2505.11739, and FeijiangHan/ZeroTuning. The repository has no licence: this file was written from the formula.

With a_0 the weight of the first key in one row of one head and D = 1 + (gamma - 1) a_0, it becomes gamma a_0 / D
and all others a_i / D: log gamma on one logit. gamma > 1 draws attention to the first key and so flattens the rest,
gamma < 1 sharpens it. All rows, in prefill and while decoding; nothing depends on pictures.

- No matrix: rows of a prompt run through the layer's own attention with columns of the bias behind each head (log gamma
  over the scale in the query, 1 in the first key), decoded rows have their logits in the open. Equal to the paper's
  scaling and renormalising; no clamp of D is needed.
- gamma = 1, heads=[] or layers=[] act in no layer, and the model is stock bit for bit.

Deviations:
- The first key is the first token of a row that is no padding, as it stands in the layer: a prompt that begins with a
  picture of which tokens leave has another one then. Where a sliding window has let it go nothing changes.
- gamma may differ by head (paper); the code has one gamma and a list of heads.
- Use on vision-language models is ours: the published numbers are of language models.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from tokenprune.interfaces.intervention import Attended, DecoderInfo, Facts, Intervention
from tokenprune.interventions._rows import check_heads, in_the_open
from tokenprune.registry import register_intervention

COMMAND = "tokenprune calibrate zerotuning --model MODEL --data DATA --output FILE.json"
_FORM = '{"gamma": 2.0, "heads": [0, 3], "decoder": {"layers": 32, "heads": 32}}'
_FEW = 4  # rows, up to which logits in the open cost less than a copy of the keys with columns behind them
_COLUMNS = 8  # of which two hold the bias; fast kernels want multiples of 8


@register_intervention("zerotuning")
@dataclass
class ZeroTuning(Intervention):
    """The first key of every row weighs gamma times as much.

    Attributes:
        gamma: above 0; 1 switches it off. A list has one for each query head.
        heads: query heads in which it acts, the same in all layers; None: all.
        calibration: the JSON file that `tokenprune calibrate zerotuning` wrote: it says gamma and heads in their place,
            and of which decoder they are.
    """

    published: ClassVar[str] = "arXiv 2505.11739, FeijiangHan/ZeroTuning"
    acts_on: ClassVar[str] = "all"
    visual_only: ClassVar[bool] = False
    widens_heads: ClassVar[bool] = True

    gamma: float | Sequence[float] = 1.0
    heads: Sequence[int] | None = None
    calibration: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        gammas = list(self.gamma) if isinstance(self.gamma, (list, tuple)) else [self.gamma]
        if not gammas or any(isinstance(g, bool) or not isinstance(g, (int, float)) or not g > 0 for g in gammas):
            raise ValueError(f"gamma must be above 0, or a list of such numbers by head, got {self.gamma!r}.")
        check_heads(self.heads)
        if self.calibration is not None and (self.gamma != 1.0 or self.heads is not None):
            raise ValueError("calibration says gamma and heads, so leave them out, or leave calibration out.")
        self._log_gamma: tuple[float, ...] = ()
        self._tables: dict[tuple[Any, ...], Tensor] = {}
        self._said = ""

    @property
    def files(self) -> tuple[Path, ...]:
        return () if self.calibration is None else (Path(self.calibration).expanduser(),)

    def prepare(self, decoder: DecoderInfo) -> tuple[int, ...]:
        layers = super().prepare(decoder)
        gamma, heads = self.gamma, self.heads
        if self.calibration is not None:
            gamma, heads = read_calibration(self.calibration, decoder)
        gammas = [gamma] * decoder.heads if isinstance(gamma, (int, float)) else list(gamma)
        if len(gammas) != decoder.heads:
            raise ValueError(f"gamma has {len(gammas)} numbers, and this decoder has {decoder.heads} query heads.")
        check_heads(heads, decoder.heads)
        chosen = range(decoder.heads) if heads is None else heads
        self._log_gamma = tuple(math.log(g) if head in chosen else 0.0 for head, g in enumerate(gammas))
        self._tables = {}
        self._said = f"gamma {gamma if isinstance(gamma, (int, float)) else 'by head'}, heads " + (
            "all" if heads is None else ", ".join(map(str, heads))
        )
        return layers if any(self._log_gamma) else ()

    def rows(self, visual: Tensor, attended: Tensor, before: Tensor) -> None:
        return None

    def measures(self, layer: int) -> bool:
        return True

    def measure(self, given: Attended) -> dict[str, Tensor]:
        batch, _, rows, _ = given.query.shape
        first = torch.zeros(batch, rows, dtype=torch.bool, device=given.query.device)
        if given.key.shape[2] > rows:
            return {"first": first}  # it came with an earlier turn
        if given.real is None:
            first[:, 0] = True
            return {"first": first}
        return {"first": given.real & (given.real.cumsum(1) == 1)}

    def measured_flops(self, given: Attended) -> int:
        return 0

    def attend(self, given: Attended) -> Tensor | None:
        first = given.facts["first"]
        if given.whole and given.query.shape[2] > _FEW:
            query, key, value = self._widened(given, first)
            return given.stock(query, key, value)[..., : given.value.shape[-1]]
        if "zerotuning" not in given.made:
            bias = self._by_head(given.query.device)[None, :, None, None] * first[:, None, None].float()
            given.made["zerotuning"] = bias  # [B, H, 1, P]
        bias = given.made["zerotuning"]

        def change(scores: Tensor, part: slice) -> Tensor:
            scores[..., : first.shape[1]] += bias
            return scores.softmax(-1)

        return in_the_open(given, change)

    def _by_head(self, device: torch.device) -> Tensor:
        """`[H]` fp32, log gamma."""
        if (device,) not in self._tables:
            self._tables[device,] = torch.tensor(self._log_gamma, device=device)
        return self._tables[device,]

    def _widened(self, given: Attended, first: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value with columns whose products are the bias."""
        query, key = given.query, given.key
        wanted = self._by_head(query.device) / given.scale
        # in half precision one column would lose digits that a second one has room for
        high = wanted.to(query.dtype)
        low = (wanted - high.float()).to(query.dtype)
        columns = torch.stack([high, low], dim=-1)[None, :, None].expand(query.shape[0], -1, query.shape[2], -1)
        ones = pad(first, (0, key.shape[2] - first.shape[1])).to(key.dtype)[:, None, :, None]
        ones = ones.expand(-1, key.shape[1], -1, 2)
        rest = (0, _COLUMNS - 2)
        return (
            pad(torch.cat([query, columns], dim=-1), rest),
            pad(torch.cat([key, ones], dim=-1), rest),
            pad(given.value, (0, _COLUMNS)),
        )

    def flops(self, given: Attended) -> int:
        batch, heads, rows, _ = given.query.shape
        return 4 * batch * heads * rows * given.key.shape[2] * _COLUMNS

    def summary(self, noted: Mapping[int, Facts]) -> str:
        return self._said if any(self._log_gamma) else "off: gamma is 1 in every head"


def read_calibration(path: str, decoder: DecoderInfo) -> tuple[float, list[int]]:
    """gamma and heads of a file of the form `_FORM`.

    Raises:
        ValueError: there is no such file, or it is of a decoder of other sizes.
    """
    file = Path(path).expanduser()
    try:
        said = json.loads(file.read_text(encoding="utf-8"))
        gamma, heads, sizes = float(said["gamma"]), [int(h) for h in said["heads"]], said["decoder"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} holds no calibration of zerotuning ({error}). Make one with `{COMMAND}`, or write {_FORM}."
        ) from None
    if not gamma > 0:
        raise ValueError(f"gamma in {path} is {gamma}, and must be above 0.")
    own = {"layers": decoder.layers, "heads": decoder.heads}
    if sizes != own:
        raise ValueError(f"{path} was made on a decoder of {sizes}, and this one has {own}. Use one of this model.")
    return gamma, heads
