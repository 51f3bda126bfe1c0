"""Keeps what a small convolutional net, trained on what supported the model's own answers, finds in layer 0 (GTC).

Paper: "Generic Token Compression in Multimodal Large Language Models from an Explainability Perspective",
https://arxiv.org/abs/2506.01097 (v2 and ICLR 2026: "Task-Related Token Compression ..."). No official code.
Licence: none to name; written from the formulas of a public note on the paper, whose text was not available.

A0 is the attention of the instruction to each visual token in decoder layer 0, before anything left: softmax over all
tokens that a row sees, mean over heads and over the text behind the visual tokens. Five blocks of depthwise-separable
1-D convolution (32, 64, 128, 256 and 512 channels) run along the visual tokens and give one score each; the k best
enter the decoder, in their order. The net ("student") is trained offline on a gradient x attention rollout, see
`tokenprune.evals.learned.rollout`; one for each model.

    A0_j = mean over heads h and text rows t of A_h[t, j],  s = net(log(A0 / mean A0))

Evidence: sites, A0, depth and channels of the net, label and loss come from the note (unverified against the paper).
Our choices, where it says nothing: kernel 3 with zero padding, GELU behind each block, no norm, a last 1 x 1
convolution, mean over heads; the logarithm of A0, scaled to mean 1 over the visual tokens, in place of A0 (a few tokens
get a hundred times the mean, and nets that were fed A0 itself learned little more than it says); the words of the chat
template behind the last picture count as instruction; a prompt whose text comes before its pictures asks with its last
token; `keep` in place of round(rho N); position ids stay (families with plain ids may renumber: positions="compact").

Deviation: each image or video has its own budget and runs through the net alone, where the paper's are one row.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from tokenprune.interfaces.pruner import Pruner
from tokenprune.interfaces.signals import INSTRUCTION_ATTENTION, Signal, TowerInfo
from tokenprune.interfaces.view import View
from tokenprune.registry import register_method

CHANNELS = (1, 32, 64, 128, 256, 512)
KERNEL = 3
FLOOR = 0.01  # of the mean: attention below it is not told apart
WEIGHTS, CONFIG = "student.safetensors", "config.json"
COMMAND = "tokenprune train gtc --model MODEL --data DATA --output FOLDER"


def student_scores(weights: Mapping[str, Tensor], attention: Tensor, real: Tensor | None = None) -> Tensor:
    """Scores of visual tokens, `[M, N]` fp32; their softmax is what the student was trained to predict.

    Args:
        weights: of the net, by the names of `new_student`.
        attention: `[M, N]`, A0.
        real: `[M, N]` bool, False at padding behind shorter rows, whose scores are -inf; None: there is none. A row
            gets the same scores with padding and without.
    """
    attention = attention.float()
    seen = torch.ones_like(attention) if real is None else real.to(torch.float32)
    total = (attention * seen).sum(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    scaled = attention * seen / total * seen.sum(dim=1, keepdim=True)  # mean 1
    hidden = ((scaled + FLOOR).log() * seen)[:, None]  # [M, 1, N]
    for number, channels in enumerate(CHANNELS[:-1]):
        depth, point = f"blocks.{number}.depthwise", f"blocks.{number}.pointwise"
        hidden = functional.conv1d(
            hidden, weights[f"{depth}.weight"], weights[f"{depth}.bias"], padding=KERNEL // 2, groups=channels
        )
        hidden = functional.gelu(functional.conv1d(hidden, weights[f"{point}.weight"], weights[f"{point}.bias"]))
        if real is not None:
            hidden = hidden * seen[:, None]
    scores = functional.conv1d(hidden, weights["head.weight"], weights["head.bias"])[:, 0]
    return scores if real is None else scores.masked_fill(~real, -torch.inf)


def new_student(seed: int) -> dict[str, Tensor]:
    """Random weights of a net, fp32: uniform, of the variance that keeps that of what passes (He), biases 0; with the
    usual smaller ones such a deep and narrow net begins flat and learned little (measured)."""
    generator = torch.Generator().manual_seed(seed)
    weights: dict[str, Tensor] = {}

    def layer(name: str, shape: tuple[int, int, int], gain: float) -> None:
        bound = (3 * gain / (shape[1] * shape[2])) ** 0.5
        weights[f"{name}.weight"] = (2 * torch.rand(shape, generator=generator) - 1) * bound
        weights[f"{name}.bias"] = torch.zeros(shape[0])

    for number, (before, after) in enumerate(zip(CHANNELS, CHANNELS[1:])):
        layer(f"blocks.{number}.depthwise", (before, 1, KERNEL), 1.0)
        layer(f"blocks.{number}.pointwise", (after, before, 1), 2.0)
    layer("head", (1, CHANNELS[-1], 1), 1.0)
    return weights


def student_folder(student: str) -> Path:
    """The folder of a student: a path, or the name of a model for which one ships with the package.

    Raises:
        ValueError: there is none, or it holds something else; the message says how to make one.
    """
    import tokenprune

    shipped = [
        Path(place) / "configs" / "learned" / f"gtc_{student.replace('-', '_')}" for place in tokenprune.__path__
    ]
    for folder in (Path(os.path.expanduser(student)), *shipped):
        if os.path.isfile(folder / WEIGHTS) and os.path.isfile(folder / CONFIG):
            return folder
    raise ValueError(
        f"student={student!r} is neither a folder with {WEIGHTS} and {CONFIG} nor a model whose student ships with the "
        f"package. Make one with `{COMMAND}`."
    )


@functools.lru_cache(maxsize=16)
def _weights(folder: Path, changed: float, device: Any) -> dict[str, Tensor]:
    """Weights of a student on a device; `changed` tells a file that was written anew."""
    if device is not None:
        return {name: value.to(device) for name, value in _weights(folder, changed, None).items()}
    from safetensors.torch import load_file

    read, wanted = load_file(folder / WEIGHTS), new_student(0)
    if {name: value.shape for name, value in read.items()} != {name: value.shape for name, value in wanted.items()}:
        raise ValueError(
            f"{folder / WEIGHTS} does not hold the weights of a student of gtc. Make one with `{COMMAND}`."
        )
    return {name: value.float() for name, value in read.items()}


@register_method("gtc")
@dataclass
class Gtc(Pruner):
    """Ranks the visual tokens `[M, N]` by a trained net that reads the instruction's attention in decoder layer 0.

    Attributes:
        student: the folder that `tokenprune train gtc` wrote, or the name of a model whose student ships with the
            package ("pocket-llava", "pocket-qwen"). There is no default: a student is trained for one model.
    """

    default_scope: ClassVar[str] = "visual"
    published_positions: ClassVar[str] = "keep"
    published: ClassVar[str] = "arXiv 2506.01097, no official code"
    reproduces: ClassVar[str] = "Qwen2-VL at 25 %: 55.8 of 61.1 on MMStar (a public note, unverified)"
    text_aware: ClassVar[bool] = True

    student: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.student is None:
            raise ValueError(
                f"gtc needs a student, the small net that was trained for this model: make one with `{COMMAND}` and "
                'write student="FOLDER"; those of pocket-llava and pocket-qwen ship with the package.'
            )
        student_folder(self.student)

    @property
    def files(self) -> tuple[Path, ...]:
        return (student_folder(str(self.student)) / WEIGHTS,)

    @property
    def trained(self) -> dict[str, Any]:
        """What `config.json` says of the student: model, text rule, what was measured."""
        return json.loads((student_folder(str(self.student)) / CONFIG).read_text(encoding="utf-8"))

    def signals_at(self, tower: TowerInfo, place: str, depth: int) -> tuple[Signal, ...]:
        if place != "input":
            raise ValueError(f"gtc reads what enters decoder layer 0, so it acts at 'input', not at {place!r}.")
        return (Signal(INSTRUCTION_ATTENTION, 0),)

    def score(self, view: View) -> Tensor:
        folder = student_folder(str(self.student))
        weights = _weights(folder, (folder / WEIGHTS).stat().st_mtime, view.features.device)
        return student_scores(weights, view.signal(INSTRUCTION_ATTENTION, 0))

    def flops(self, num_images: int, num_tokens: int, width: int, keep: int, tower: TowerInfo) -> int:
        pairs = zip(CHANNELS, CHANNELS[1:])
        products = sum(before * KERNEL + before * after for before, after in pairs) + CHANNELS[-1]
        return 2 * num_images * num_tokens * products
