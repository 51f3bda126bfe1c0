"""The class that an intervention derives from which lets visual tokens pass decoder layers by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from tokenprune.interfaces.intervention import Attended, Facts, Intervention

Mode = Literal["still", "mlp", "mask"]
"""What becomes of visual tokens in a layer, whose keys and values text reads as ever.

still: they leave it as they entered.
mlp: they ask nothing, and pass its MLP: x + MLP(norm(x)).
mask: they run, and see text before them and themselves, no other visual token. Saves nothing.
"""


@dataclass
class Bypass(Intervention):
    """Decoder layers in which visual tokens issue no queries: text runs alone, over the keys and values of all.

    No token leaves: the KV cache is as long as without it, and decode steps are untouched. What a layer saves are the
    visual tokens' queries, attention, output projection and (in mode "still") MLP; their keys and values are made as
    ever.

    Attributes:
        layers: decoder layers in which it acts, from 0; None is the intervention's default, [] switches it off.
    """

    visual_only: ClassVar[bool] = True

    @property
    def mode(self) -> Mode:
        """What becomes of visual tokens in its layers."""
        return "still"

    def attend(self, given: Attended) -> Tensor | None:
        return None

    def summary(self, noted: Mapping[int, Facts]) -> str:
        return {"still": "visual tokens stand still", "mlp": "visual tokens pass the MLP alone",
                "mask": "visual tokens see no other visual token"}[self.mode]  # fmt: skip
