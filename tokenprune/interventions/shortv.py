"""Visual tokens stand still in decoder layers that calibration found to do little with them (ShortV).

Paper: "ShortV: Efficient Multimodal Large Language Models by Freezing Visual Tokens in Ineffective Layers", Yuan et
al., 2025, https://arxiv.org/abs/2504.00502 (not read by us; the rule is second-hand, see below).
Official code: icip-cas/ShortV (not opened); this file was written from the formulas, no code was copied.

The contribution of layer l is the KL divergence of the unpruned model's next-token distribution from the one with
visual tokens standing still in l alone, averaged over calibration samples; the N layers with the least are frozen
together. Published: N = 19 of 32 for LLaVA-1.5-7B, 24 of 40 for LLaVA-NeXT-13B, found on 2,000 samples of Flickr30K and
GQA (second-hand).

Our choices: `share` of the layers in place of N, 0.6 by default (19 of 32); the divergence at the last token of the
prompt, KL(dense || frozen).
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from tokenprune.interfaces.bypass import Bypass
from tokenprune.interfaces.intervention import DecoderInfo
from tokenprune.registry import register_intervention

COMMAND = "tokenprune calibrate shortv --model MODEL --data DATA --output FILE.json"


@functools.lru_cache(maxsize=16)
def _read(file: Path, changed: float) -> tuple[float, ...]:
    """Contributions by layer; `changed` tells a file that was written anew."""
    try:
        said: Any = json.loads(file.read_text(encoding="utf-8"))
        return tuple(float(value) for value in said["contributions"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} holds no contributions of layers ({error!r}). Make one with `{COMMAND}`.") from None


def _file(calibration: str) -> Path:
    """A path, or what ships for the model of that name."""
    import tokenprune

    name = f"shortv_{calibration.replace('-', '_')}"
    shipped = [Path(place) / "configs" / "learned" / name / "contributions.json" for place in tokenprune.__path__]
    for file in (Path(os.path.expanduser(calibration)), *shipped):
        if os.path.isfile(file):
            return file
    raise ValueError(
        f"calibration={calibration!r} is neither a file nor a model whose calibration ships with the package. Make one "
        f"with `{COMMAND}`."
    )


@register_intervention("shortv")
@dataclass
class ShortV(Bypass):
    """Visual tokens stand still in a share of the decoder layers.

    Attributes:
        calibration: the file that `tokenprune calibrate shortv` wrote for this model, or the name of a model whose file
            ships with the package ("pocket-llava", "pocket-qwen"). Not needed with `layers`.
        share: of the decoder layers that are frozen, in [0, 1], rounded to the nearest number; 0 switches it off.
        layers: decoder layers that are frozen, from 0, in place of both.
    """

    published: ClassVar[str] = "arXiv 2504.00502, icip-cas/ShortV"

    calibration: str | None = None
    share: float = 0.6

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.share <= 1:
            raise ValueError(f"share is that of the decoder layers that are frozen, in [0, 1], got {self.share!r}.")
        if self.calibration is None and self.layers is None:
            raise ValueError(
                f"shortv needs to know which layers do little with visual tokens in this model: make a file with "
                f'`{COMMAND}` and write calibration="FILE.json", or name the layers, layers=[20, 21, 22].'
            )
        if self.calibration is not None:
            self._contributions()

    def _contributions(self) -> tuple[float, ...]:
        (file,) = self.files
        return _read(file, file.stat().st_mtime)

    @property
    def files(self) -> tuple[Path, ...]:
        """What its layers are read from."""
        return () if self.calibration is None else (_file(str(self.calibration)),)

    def default_layers(self, decoder: DecoderInfo) -> Sequence[int]:
        found = self._contributions()
        if len(found) != decoder.layers:
            raise ValueError(
                f"{self.calibration} is of a decoder with {len(found)} layers, and this one has {decoder.layers}. Make "
                f"one for this model with `{COMMAND}`."
            )
        return sorted(range(decoder.layers), key=lambda layer: found[layer])[: round(self.share * decoder.layers)]
