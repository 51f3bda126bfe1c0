"""Sink channels of a decoder: the committed table, and discovery on the prompts that a model gets, with the checks that
it must pass (our choice throughout; the paper names channels of a few models and no routine)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tokenprune.interfaces.intervention import DecoderInfo, Entering

TAU = 20.0
_PRESENT = 0.6  # part of (prompt, layer) pairs in which a channel must stand out
_MOST_CHANNELS = 4
_TOP = 8  # largest channels of an image token that are remembered
_SHARE = (0.001, 0.05)  # of image tokens that may be sinks
_RATIO = 3.0  # attention that sinks must get, over that of the mean image token
_LIKE_TEXT = 0.5  # phi of sinks that only a lowered threshold marks, over that of text sinks
_OVERLAP = 0.5  # of the sinks of one picture under two questions, intersection over union


@dataclass(frozen=True)
class Known:
    """A row of the table."""

    model: str
    channels: tuple[int, ...]
    evidence: str


def known_channels(decoder: DecoderInfo) -> Known | None:
    """The row for a decoder of this family and these sizes, or None."""
    import yaml

    rows = yaml.safe_load(Path(__file__).with_name("var_channels.yaml").read_text(encoding="utf-8"))
    for row in rows:
        sizes = (row["family"], row["width"], row["layers"])
        fits = all(row.get(name, getattr(decoder, name)) == getattr(decoder, name) for name in ("text", "key_heads"))
        if fits and sizes == (decoder.family, decoder.width, decoder.layers):
            return Known(row["model"], tuple(row["channels"]), row["evidence"])
    return None


def normalised(hidden: Tensor) -> Tensor:
    """|x| / rms(x) of `[..., D]` in fp32, rms with 1e-6 under the root and no learned weight; at most sqrt(D)."""
    wide = hidden.float()
    return wide.abs() * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)


def sink_score(hidden: Tensor, channels: Tensor) -> Tensor:
    """phi `[...]` fp32 of hidden states `[..., D]`: the largest normalised value among `channels` `[C]` int64."""
    wide = hidden.float()
    largest = wide.index_select(-1, channels).abs().amax(-1)
    return largest * torch.rsqrt(wide.square().mean(-1) + 1e-6)


@dataclass(frozen=True)
class Discovery:
    """The outcome of a discovery.

    Attributes:
        channels: sink channels; () where it failed.
        tau: the threshold that goes with them.
        reason: why it failed; "" where it did not.
        prompts: how many were looked at.
        share: part of the image tokens that are sinks.
        ratio: attention that sinks get from text, over that of the mean image token.
        overlap: intersection over union of the sinks of one picture under two questions; None if no picture came twice.
    """

    channels: tuple[int, ...]
    tau: float
    reason: str
    prompts: int
    share: float = 0.0
    ratio: float = 0.0
    overlap: float | None = None

    def __str__(self) -> str:
        if self.reason:
            return self.reason
        overlap = "not checked" if self.overlap is None else f"{self.overlap:.0%}"
        return (
            f"channels {', '.join(map(str, self.channels))} discovered on {self.prompts} prompts: tau {self.tau:.3g}, "
            f"{self.share:.2%} of image tokens, {self.ratio:.1f} x the mean attention, same under another question: "
            f"{overlap}"
        )


@dataclass
class _Record:
    """One prompt in one layer: flags `[D]` of the first token and of text tokens by the two rules, the largest channels
    of its image tokens `[N, 8]`, which of these were left when the layer ran `[n]`, and the attention that they
    got from text `[n]`."""

    first: tuple[Tensor, Tensor]
    text: tuple[Tensor, Tensor]
    peak: tuple[float, float]
    values: Tensor
    indices: Tensor
    picture: int
    present: Tensor | None = None
    attention: Tensor | None = None


class SinkSearch:
    """Collects prompts, then decides. It reads prompts with pictures only; hidden states are those of the stock
    model."""

    def __init__(self) -> None:
        self._records: dict[tuple[int, int], _Record] = {}  # by (prompt, layer)
        self._now: list[tuple[int, int]] = []  # prompt and row of the batch, of the call at work
        self.prompts = 0

    def begin(self, entering: Entering) -> None:
        """A new batch of prompts; beams of one prompt count once."""
        rows: list[int] = []
        for row in entering.visual.any(1).nonzero()[:, 0].tolist() if entering.first else []:
            if not any(torch.allclose(entering.hidden[row], entering.hidden[other], rtol=1e-3) for other in rows):
                rows.append(row)
        self._now = [(self.prompts + number, row) for number, row in enumerate(rows)]
        self.prompts += len(rows)

    def look(self, entering: Entering) -> None:
        """Remember what a layer's hidden states show."""
        keys = entering.pictures().tolist() if self._now else []
        for prompt, row in self._now:
            hidden, visual = entering.hidden[row].float(), entering.visual[row]
            real = torch.ones_like(visual) if entering.attended is None else entering.attended[row]
            relative = normalised(hidden)
            text = (real & ~visual).nonzero()[:, 0]
            top = text[relative[text].amax(-1).topk(min(5, text.shape[0])).indices]
            values, indices = relative[visual].topk(min(_TOP, hidden.shape[1]), dim=-1)
            first = text[:1] if text.shape[0] else visual.nonzero()[:1, 0]
            self._records[prompt, entering.layer] = _Record(
                _flags(hidden[first], relative[first]), _flags(hidden[top], relative[top]),
                (float(relative[top].amax()), float(hidden[top].abs().amax())) if len(top) else (0.0, 0.0),
                values.cpu(), indices.cpu(), keys[row],
            )  # fmt: skip

    def listen(self, layer: int, received: Tensor, places: Tensor) -> None:
        """Remember the attention that keys get from text rows, `[B, P]`; `places` `[B, P]` int counts image tokens as
        they were when looked at, from 1; 0 at other keys."""
        for prompt, row in self._now:
            record = self._records.get((prompt, layer))
            if record is not None:
                visual = places[row] > 0
                record.present = places[row][visual].long().cpu() - 1
                record.attention = received[row][visual].cpu()

    # --- the decision -----------------------------------------------------------------------------------------------

    def decide(self) -> Discovery:
        """Channels, threshold and checks over everything that was seen."""
        records = list(self._records.values())
        if not records:
            return Discovery((), TAU, "no prompt with a picture was seen", 0)
        channels = self._channels(records)
        if not channels:
            relative, absolute = (max(record.peak[kind] for record in records) for kind in (0, 1))
            return Discovery(
                (), TAU,
                f"no channel stands out in the first text tokens of {self.prompts} prompts: the largest is "
                f"{relative:.1f} times the rms of its hidden state (20 needed, at most sqrt(D) = "
                f"{records[0].first[0].shape[0] ** 0.5:.1f} possible) and {absolute:.1f} in absolute value (more than "
                "100, and 1000 times the median, needed)",
                self.prompts,
            )  # fmt: skip
        wanted = torch.tensor(channels)
        scores = [record.values.masked_fill(~torch.isin(record.indices, wanted), 0.0).amax(-1) for record in records]
        tau = _threshold(torch.cat(scores))
        flagged = [score >= tau for score in scores]
        share = float(torch.cat(flagged).float().mean())
        ratio = _ratio(records, flagged)
        overlap = self._overlap(tau, dict(zip(self._records, flagged)))
        reason = _complaint(channels, tau, share, ratio, overlap)
        marked, peak = torch.cat(scores)[torch.cat(flagged)], max(record.peak[0] for record in records)
        if not reason and tau < TAU and float(marked.mean()) < _LIKE_TEXT * peak:
            reason = (
                f"channels {', '.join(map(str, channels))} stand out in text tokens with phi {peak:.1f}, but the image "
                f"tokens above the largest gap have {float(marked.mean()):.1f} only"
            )
        return Discovery(channels, tau, reason, self.prompts, share, ratio, overlap)

    @staticmethod
    def _channels(records: list[_Record]) -> tuple[int, ...]:
        for rule in (0, 1):
            for tokens in ("first", "text"):  # models without a BOS token show them in other text tokens
                present = torch.stack([getattr(record, tokens)[rule] for record in records]).float().mean(0)
                best = present.argsort(descending=True, stable=True)[:_MOST_CHANNELS]
                channels = [int(channel) for channel in best if present[channel] >= _PRESENT]
                if channels:
                    return tuple(channels)
        return ()

    def _overlap(self, tau: float, flagged: dict[tuple[int, int], Tensor]) -> float | None:
        seen: dict[tuple[int, int], Tensor] = {}
        overlaps = []
        for (prompt, layer), marked in flagged.items():
            picture = self._records[prompt, layer].picture
            other = seen.setdefault((picture, layer), marked)
            if other is not marked and other.shape == marked.shape and bool((marked | other).any()):
                overlaps.append(float((marked & other).sum() / (marked | other).sum()))
        return sum(overlaps) / len(overlaps) if overlaps else None


def _flags(hidden: Tensor, relative: Tensor) -> tuple[Tensor, Tensor]:
    """`[D]` bool twice: channels that stand out in any of the tokens `[T, D]`, by the normalised and by the absolute
    rule of the massive-activation literature."""
    standing = relative >= (0.5 * relative.amax(-1, keepdim=True)).clamp(min=TAU)
    size = hidden.abs()
    massive = (size > 100) & (size > 1000 * size.median(-1, keepdim=True).values)
    return standing.any(0).cpu(), massive.any(0).cpu()


def _threshold(scores: Tensor) -> float:
    """tau = 20, or the middle of the largest gap in sorted phi where no image token reaches that."""
    if bool((scores >= TAU).any()) or scores.shape[0] < 2:
        return TAU
    ordered = scores.sort().values
    gaps = ordered[1:] - ordered[:-1]
    at = int(gaps.argmax())
    return float((ordered[at] + ordered[at + 1]) / 2)


def _ratio(records: list[_Record], flagged: list[Tensor]) -> float:
    ratios = []
    for record, marked in zip(records, flagged):
        if record.attention is None or record.present is None:
            continue
        left = marked[record.present]
        if bool(left.any()) and float(record.attention.mean()) > 0:
            ratios.append(float(record.attention[left].mean() / record.attention.mean()))
    return sum(ratios) / len(ratios) if ratios else 0.0


def _complaint(channels: tuple[int, ...], tau: float, share: float, ratio: float, overlap: float | None) -> str:
    start = f"channels {', '.join(map(str, channels))} stand out in text tokens, but with tau {tau:.3g}"
    if not _SHARE[0] <= share <= _SHARE[1]:
        return f"{start} they mark {share:.2%} of the image tokens (0.1% to 5% expected)"
    if ratio < _RATIO:
        return f"{start} the image tokens that they mark get {ratio:.1f} times the mean attention (3 expected)"
    if overlap is not None and overlap < _OVERLAP:
        return f"{start} only {overlap:.0%} of the marked image tokens stay the same under another question"
    return ""
