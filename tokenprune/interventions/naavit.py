"""No attention among visual tokens: text reads their keys and values, and they read nothing (NAAViT, EE-MLLM).

Papers: "SAISA: Towards Multimodal Large Language Models with Both Training and Inference Efficiency", Yuan et al.,
2025, https://arxiv.org/abs/2502.02458 (NAAViT is its pilot study, of which no code was released); "EE-MLLM: A
Data-Efficient and Compute-Efficient Multimodal Large Language Model", Ma et al., 2024, https://arxiv.org/abs/2408.11795
(no code; the variant "composite" is a reconstruction from the abstract).
Official code: icip-cas/SAISA, llava/model/language_model/llava_llama.py (Apache-2.0 headers), for the attention of
"skip"; this file was written from the formulas, no code was copied.

Variants, in the layers where it acts:
- "skip": visual tokens issue no queries and skip the MLP, so that they leave a layer as they entered. SAISA does this
  in all layers and makes their states anew for each by trained projectors, which are not here.
- "composite": they issue no queries and pass the MLP, x + MLP(norm(x)) (our reading of EE-MLLM, whose published saving
  of 24 % of the FLOPs fits an MLP that is kept).
- "mask": the pilot's attention. A visual token sees the text before it and itself (our choice: the paper's text leaves
  open whether it sees text); visual tokens of other pictures are hidden too (our choice). Nothing is saved.

Default layers: the last 60 percent (our choice; layers near the input matter most). The papers train with their
attention. Nothing promises that a model which was not loses nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from tokenprune.interfaces.bypass import Bypass, Mode
from tokenprune.interfaces.intervention import DecoderInfo
from tokenprune.registry import near, register_intervention

_MODES: dict[str, Mode] = {"skip": "still", "composite": "mlp", "mask": "mask"}


@register_intervention("naavit")
@dataclass
class NAAViT(Bypass):
    """Visual tokens do not attend in the last 60 percent of the decoder layers.

    Attributes:
        variant: "skip", "composite" or "mask", see above.
        layers: decoder layers in which it acts, from 0; None is the last 60 percent, [] switches it off.
    """

    published: ClassVar[str] = "arXiv 2502.02458, icip-cas/SAISA; arXiv 2408.11795"

    variant: str = "skip"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.variant not in _MODES:
            meant = near(str(self.variant), list(_MODES))
            raise ValueError(f"variant must be one of {', '.join(_MODES)}, got {self.variant!r}.{meant}")

    @property
    def mode(self) -> Mode:
        return _MODES[self.variant]

    def default_layers(self, decoder: DecoderInfo) -> Sequence[int]:
        return range(decoder.layers - (6 * decoder.layers + 5) // 10, decoder.layers)
