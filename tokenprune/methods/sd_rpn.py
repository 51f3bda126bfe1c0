"""Keeps what a branch of trained decoder layers expects the answer to look at (SD-RPN, one pass).

Paper: "Catching the Details: Self-Distilled RoI Predictors for Fine-Grained MLLM Perception", Shi et al., ICLR 2026,
https://arxiv.org/abs/2509.16944. Official code: YuHengsss/SD-RPN (read; Apache-2.0).
Licence: this file was written from the formulas, no code was copied.

What enters decoder layer K goes through T - 1 trained copies of layers K, K + 1, ...; of a T-th copy only the input
norm and the projections of queries and keys are used. The logit of a visual token is the product of its key with the
query of the prompt's last token over sqrt(d), mean over heads (code). Trained on labels that the model's own attention
gives, see `tokenprune.evals.learned.sd_rpn`.

    s_j = (1 / H) sum_h q_{h,last} k_{h,j} / sqrt(d)

The paper crops the picture where these logits are high, encodes the crops and runs the prompt again with both; that is
`tokenprune.regions.zoomed`. Keeping the tokens of the highest logits at layer K, in the same pass, is our extension.

Our choices, and deviations: K = 15 of 32 (LLaVA) and 16 of 28 (Qwen) become half the decoder's depth, T = 3 or what is
left; no norm of its own behind the T - 1 layers (as the official Qwen code; that for LLaVA has one, which the input
norm of the T-th layer follows); queries and keys are rotated on families with 3-D positions only (code); a branch sees
this call's tokens and not those of earlier turns; position ids stay.
"""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from tokenprune.interfaces.budget import Budget
from tokenprune.interfaces.pruner import ModelDepths, Pruner, Stage
from tokenprune.interfaces.signals import BRANCH_LOGITS, OWN_LAYERS, Signal, TowerInfo
from tokenprune.interfaces.view import View
from tokenprune.registry import register_method

COMMAND = "tokenprune train sd_rpn --model MODEL --data DATA --output FOLDER"
WEIGHTS = "branch.safetensors"
DEPTH = 3


def default_place(depths: ModelDepths) -> tuple[int, int]:
    """K and T for a decoder: half its depth, and three layers or what is left from there."""
    layer = max(depths.first_cut, depths.decoder // 2)
    return layer, min(DEPTH, depths.decoder - layer)


def branch_config(branch: str) -> dict[str, Any]:
    """`config.json` of the folder of a branch.

    Raises:
        ValueError: there is none.
    """
    file = Path(os.path.expanduser(branch)) / "config.json"
    said = json.loads(file.read_text(encoding="utf-8")) if os.path.isfile(file) else {}
    if not {"layer", "layers"} <= said.keys():
        raise ValueError(f"branch={branch!r} is no folder of a branch of sd_rpn. Make one with `{COMMAND}`.")
    return said


@register_method("sd_rpn")
@dataclass
class SdRpn(Pruner):
    """Ranks the visual tokens `[M, N]` by the logits of a branch that was trained to find what an answer looks at.

    Attributes:
        branch: the folder that `tokenprune train sd_rpn` wrote; it says K and T. "own" takes the model's own layers in
            its place, untrained: an ablation, not the published method.
        layers: T with branch="own"; None means 3 or what is left of the decoder, and 1 where the site is named (`at`).
    """

    site: ClassVar[str] = "layer"
    default_scope: ClassVar[str] = "visual"
    published_positions: ClassVar[str] = "keep"
    published: ClassVar[str] = "arXiv 2509.16944, YuHengsss/SD-RPN (one pass: our extension)"
    reproduces: ClassVar[str] = "two passes, LLaVA-1.5-7B: TextVQA 46.1 -> 58.8 (a secondary note, unverified)"
    text_aware: ClassVar[bool] = True

    branch: str | None = None
    layers: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.branch is None:
            raise ValueError(
                f"sd_rpn needs a branch, decoder layers that were trained for this model: make one with `{COMMAND}` "
                'and write branch="FOLDER".'
            )
        if self.layers is not None and (self.branch != OWN_LAYERS or self.layers < 1):
            raise ValueError(
                f"layers says how many of the model's own layers stand in (branch={OWN_LAYERS!r}), 1 or more, got "
                f"{self.layers!r} with branch={self.branch!r}."
            )
        if self.branch != OWN_LAYERS:
            branch_config(self.branch)

    @property
    def files(self) -> tuple[Path, ...]:
        return () if self.branch == OWN_LAYERS else (Path(os.path.expanduser(str(self.branch))) / WEIGHTS,)

    def place(self, depths: ModelDepths) -> tuple[int, int]:
        """K and T on a decoder."""
        if self.branch == OWN_LAYERS:
            layer, layers = default_place(depths)
            return layer, self.layers or layers
        said = branch_config(str(self.branch))
        return int(said["layer"]), int(said["layers"])

    def stages(self, budget: Budget, depths: ModelDepths) -> tuple[Stage, ...]:
        layer, layers = self.place(depths)
        pruner = dataclasses.replace(self, layers=layers) if self.branch == OWN_LAYERS else self
        return (Stage(f"layer:{layer}", pruner, budget),)

    def signals_at(self, tower: TowerInfo, place: str, depth: int) -> tuple[Signal, ...]:
        if place != "layer":
            raise ValueError(f"sd_rpn reads what enters a decoder layer, so it acts at 'layer:K', not at {place!r}.")
        return (self._signal(depth),)

    def _signal(self, depth: int) -> Signal:
        layers = self.layers or 1
        if self.branch != OWN_LAYERS:
            said = branch_config(str(self.branch))
            layers = int(said["layers"])
            if depth != said["layer"]:
                raise ValueError(
                    f"This branch was trained at 'layer:{said['layer']}', and 'layer:{depth}' was asked for."
                )
        return Signal(BRANCH_LOGITS, depth, (layers,), str(self.branch))

    def score(self, view: View) -> Tensor:
        wanted = self._signal(view.depth)
        return view.signal(wanted.name, wanted.layer, *wanted.settings, source=wanted.source)
