"""From batches to numbers: sums over samples, means at the end. Ratios are formed by sample and layer, then averaged
(our choice); MDI has its geometric mean beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tokenprune.evals.diagnose.batch_reader import BatchReader, LayerRecord, Row
from tokenprune.evals.diagnose.measures import head_scores, rank_correlation, stage_layers, text_dominance
from tokenprune.evals.diagnose.prompt_tokens import FIRST, GROUPS, IMAGE, QUESTION, TEMPLATE

SETS = ("writing", "generated")
"""Which rows: those that predict the tokens of the answer, and those of its tokens."""
LEAST = 200
"""Samples that the card of visual heads wants."""
Found = dict[str, Any]


@dataclass
class Gathered:
    """Numbers of samples, to be averaged.

    Args:
        layers, key_heads: L, and Hk of each layer.
    """

    layers: int
    key_heads: int
    samples: list[dict[str, Tensor]] = field(default_factory=list)
    right: list[bool | None] = field(default_factory=list)
    boxed: list[bool] = field(default_factory=list)
    by_step: list[list[Tensor]] = field(default_factory=list)

    def add(self, reader: BatchReader, row: int, sets: Mapping[str, Sequence[int]], right: bool | None) -> None:
        """One sample of a batch; `sets` has the steps of `SETS`, `right` is None where nobody can say."""
        found: dict[str, Tensor] = {}
        for name, steps in sets.items():
            rows = [reader.steps[step] for step in steps]
            mass = _stacked(rows, row, "mass").mean(0)  # [L, H, 5]
            found[f"{name} mass"] = mass
            found[f"{name} rollout"] = _stacked(rows, row, "rollout").mean(0)  # [L, 5]
            for part in ("mass", "focus", "region"):  # of one row: the first
                found[f"{name} first {part}"] = _stacked(rows[:1], row, part)[0]
        counts = torch.stack([record.kinds[row].sum(0) for record in reader.records]).double().cpu()  # [L, 5]
        found["counts"] = counts
        found["flow"] = torch.stack([record.flow[row] for record in reader.records]).double().cpu()
        found["sinks"] = torch.stack([_sinks(record, row) for record in reader.records])
        self.samples.append(found)
        self.right.append(right)
        self.boxed.append(bool(reader.tokens.boxed[row]))
        for step in sets["writing"]:
            while len(self.by_step) <= step:
                self.by_step.append([])
            self.by_step[step].append(_stacked([reader.steps[step]], row, "mass")[0, ..., IMAGE - 1].mean(1))

    def summary(self) -> Found:
        """Every number of one run, as JSON holds it."""
        marked = [right for right in self.right if right is not None]
        flow = self._mean("flow")
        counts = self._mean("counts")
        return {
            "samples": len(self.samples),
            "marked": len(marked),
            "accuracy": sum(marked) / len(marked) if marked else None,
            "tokens": {name: _list(counts[:, number]) for number, name in enumerate(GROUPS)},
            "text_dominance": {name: self._dominance(name) for name in SETS},
            "image_attention": {name: _list(self._mean(f"{name} mass").mean(1)[:, IMAGE - 1]) for name in SETS},
            "lookback": {name: self._lookback(name) for name in SETS},
            "lookback_by_step": [_list(torch.stack(each).mean(0)) for each in self.by_step],
            "lookback_samples": [len(each) for each in self.by_step],
            "heads": {name: self._heads(name) for name in SETS},
            "flow": {
                one: {to: _list(flow[:, i, j]) for j, to in enumerate(GROUPS)} for i, one in enumerate(GROUPS[:4])
            },
            "rollout": {name: self._rollout(name) for name in SETS},
            "sinks": self._sinks(),
        }

    def _mean(self, name: str) -> Tensor:
        return torch.stack([sample[name] for sample in self.samples]).mean(0)

    def _dominance(self, name: str) -> Found:
        values: dict[str, list[Tensor]] = {}
        for sample in self.samples:
            mass, counts = sample[f"{name} mass"].mean(1), sample["counts"]  # [L, 5]
            image, n_image = mass[:, IMAGE - 1], counts[:, IMAGE - 1]
            for kind, groups in (("", (FIRST, TEMPLATE, QUESTION)), ("_question", (QUESTION,))):
                text = sum((mass[:, group - 1] for group in groups), torch.zeros_like(image))
                n_text = sum((counts[:, group - 1] for group in groups), torch.zeros_like(image))
                mdi, aei_text, aei_image = text_dominance(text, image, n_text, n_image)
                for title, value in (("mdi", mdi), ("aei_text", aei_text), ("aei_image", aei_image)):
                    values.setdefault(f"{title}{kind}", []).append(value)
        found: Found = {}
        stages = stage_layers(self.layers)
        for title, each in values.items():
            stacked = torch.stack(each)  # [n, L]
            found[title] = _list(stacked.mean(0))
            found[f"{title}_stages"] = {stage: float(stacked[:, at].mean()) for stage, at in stages.items()}
            if title.startswith("mdi"):
                logs = stacked.clamp(min=1e-10).log()
                found[f"{title}_geometric"] = _list(logs.mean(0).exp())
                found[f"{title}_geometric_stages"] = {
                    stage: float(logs[:, at].mean().exp()) for stage, at in stages.items()
                }
        return found

    def _lookback(self, name: str) -> Found:
        """By layer and head: the share of its attention that looks back at the picture, mean over the rows of a
        sample, then over samples."""
        shares = self._mean(f"{name} mass")[..., IMAGE - 1]
        return {"share": [_list(each) for each in shares]}

    def _heads(self, name: str) -> Found:
        """W, C, R and the score of each head over the samples that were answered right, all where none was."""
        chosen = [i for i, right in enumerate(self.right) if right] or list(range(len(self.right)))
        boxed = [i for i in chosen if self.boxed[i]]
        use_boxes = len(boxed) == len(chosen)

        def parts(numbers: Sequence[int]) -> tuple[Tensor, Tensor, Tensor | None]:
            image, focus = (
                torch.stack([self.samples[i][f"{name} first {part}"] for i in numbers]).mean(0)
                for part in ("mass", "focus")
            )
            region = None
            if use_boxes:
                region = torch.stack([self.samples[i][f"{name} first region"] for i in numbers]).mean(0)
            return image[..., IMAGE - 1], focus, region

        image, focus, region = parts(chosen)
        score, rank, visual = head_scores(image, focus if region is None else region)
        halves = []
        for half in (chosen[::2], chosen[1::2]):
            if half:
                one, other, boxes = parts(half)
                halves.append(one * (other if boxes is None else boxes))
        groups = score.unflatten(1, (self.key_heads, -1)).amax(-1)
        return {
            "samples": len(chosen),
            "right_only": any(self.right),
            "enough": len(chosen) >= LEAST,
            "score_of": "image x concentration" if region is None else "image x region",
            "image": [_list(each) for each in image],
            "concentration": [_list(each) for each in focus],
            "region": None if region is None else [_list(each) for each in region],
            "score": [_list(each) for each in score],
            "rank": rank.tolist(),
            "visual": [[int(layer), int(head)] for layer, head in visual.nonzero().tolist()],
            "key_head_score": [_list(each) for each in groups],
            "split_half": rank_correlation(*halves) if len(halves) == 2 else None,
        }

    def _rollout(self, name: str) -> Found:
        mean = self._mean(f"{name} rollout")  # [L, 5]
        return {title: _list(mean[:, number]) for number, title in enumerate(GROUPS)}

    def _sinks(self) -> Found:
        """Of the image tokens in each layer, those attended far above the mean and those that stand out in the sink
        channels: their share of the tokens, and of the attention of the text that the image gets."""
        mean = self._mean("sinks")
        names = ("outlier_tokens", "outlier_attention", "channel_tokens", "channel_attention")
        return {name: _list(mean[:, number]) for number, name in enumerate(names)}


def _stacked(rows: Sequence[Sequence[Row]], sample: int, part: str) -> Tensor:
    """`[steps, L, ...]` fp64 on the CPU."""
    return torch.stack([torch.stack([getattr(row, part)[sample].double() for row in layers]) for layers in rows]).cpu()


def _sinks(record: LayerRecord, row: int) -> Tensor:
    """`[4]` fp64, see `Gathered._sinks`; shares of nothing are 0."""
    visual = record.kinds[row, :, IMAGE - 1] > 0
    received = record.received[row].mean(0).double() * visual
    found = []
    for marked in (record.outlying[row], record.sinks[row] if record.sinks is not None else torch.zeros_like(visual)):
        found.append(float((marked & visual).sum() / visual.sum().clamp(min=1)))
        found.append(float((received * marked).sum() / received.sum().clamp(min=1e-30)))
    return torch.tensor(found, dtype=torch.float64)


def _list(values: Tensor) -> list[float]:
    return [float(value) for value in values]
