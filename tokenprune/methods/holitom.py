"""Merges what stays the same over windows of frames, then selects and clusters within frames (HoliTom).

Paper: "HoliTom: Holistic Token Merging for Fast Video Large Language Models", Shao et al., NeurIPS 2025,
https://arxiv.org/abs/2505.21334 (abstract and README were read, not the paper).
Official code: cokeshao/HoliTom at e9b2972 (10 Oct 2025); what is marked "code" below was looked up again in
holitom/llava_arch.py at b1d1412 and modeling_qwen2.py at e5f7da2.
Licence: Apache-2.0 upstream; this file was written from the formulas, no code was copied.

1. c is the cosine of a token with the one at the same place of the frame before. Within a window of L frames a place is
   static where all its L - 1 cosines are above tau; the window then spares L - 1 tokens there. Windows are those that
   spare most together (dynamic programming; of equal ones the shorter last window, code).
2. A static place becomes one token, the mean over its window, in the window's first frame. What is left, C tokens, is
   to be k: each of them stays with the rate r' = k / C, at most 1.
3. The dynamic tokens of a frame, P of them, leave n = ceil(P r'): round(n (1 - D)) by the attention that patches
   receive in the block that makes the visual tokens, the others as centres of clusters of the rest. With D = 0, the
   default, nothing of a frame is clustered and the rest is dropped (code).
4. The static tokens of a window leave round(P r') centres of clusters.
5. Clusters are by density peaks (`_density_peaks`): density over min(7, clusters) neighbours, the token itself among
   them (code); all others go to the nearest centre. A centre becomes beta x centre + (1 - beta) x the mean of what goes
   to it, or with merge="mean" the mean of all (the code's NO_BETA=1).

`total="exact"` (ours) deals the budget to frames and windows so that the counts are nearest to those and add up to it,
at least one each where there is room. Where C is below the budget, as many tokens as are missing stay out of their
window's mean and stay themselves: those that are least like the one before. `total="official"` rounds each frame and
window by itself, so the total is about the budget, and C where that is less; it keeps at least one token (ours).

Inside the decoder, `inner` > 0: before the layer at `depth` of the depth, 18 of 28 in the scripts (3 in the code), the
tokens with the highest attention of the last token in the layer before stay, `inner` of them leave, 0.5 in the scripts,
and each goes to the kept one with the largest cosine. A kept token becomes the mean of itself and all that goes to it
(the code averages in pairs one after the other, so that the order decides), with its position id. Off by default (the
paper's "w/o M"), so that `keep` is what all layers have; with it `keep` is what enters the decoder.

Deviations:
- Kept tokens stand in the order of the video; the official code puts a window's static ones first where no row ends
  are added. Row-end tokens leave with the first cut, as everywhere here.
- The official code adds noise of 1e-6 to densities, without a seed: here the earlier of equals counts as the denser.
- Pictures are one frame, their crops one each, without windows; the official code leaves pictures whole.
- Where an earlier cut left, a place counts as static where all its tokens are left.
- r' is k / C, in whole numbers; the code's floating point may round a ceil up. The code's windows are at most 1024
  frames long.
- Attention is taken as received from all patches on towers with [CLS] too.
- With total="official" `inner` is of the budget, not of what it came to. A decoder whose layers do not reach the inner
  cut has none.
- Ties go to the lower raster index, of groups to the earlier, a window's static tokens before the dynamic ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from tokenprune.interfaces.budget import Budget
from tokenprune.interfaces.pruner import ModelDepths, Pruner, Stage
from tokenprune.interfaces.selection import Selection, refuse_nan, topk_indices
from tokenprune.interfaces.signals import LAST_ATTENTION, SINK_ATTENTION, Signal, TowerInfo
from tokenprune.interfaces.view import View
from tokenprune.kernels.merge import merge
from tokenprune.methods._density_peaks import distances, reach
from tokenprune.methods._frames import counts_by_size, in_frames
from tokenprune.registry import near, register_method

MERGES = ("beta", "mean")
TOTALS = ("exact", "official")
SIZES = "holitom_sizes"
_CELLS = 1 << 24  # distances at a time


def alike_before(states: Tensor, standing: Tensor, view: View) -> Tensor:
    """`[M, F, P]` fp32: cosine of each token with the one at its place of the frame before; -inf where there is none.

    Args:
        states: `[M, F, P, D]` fp32.
        standing: `[M, F, P]` bool, where a token stands.
    """
    unit = normalize(states, dim=3)
    cosine = torch.full(standing.shape, -torch.inf, device=states.device)
    cosine[:, 1:] = (unit[:, 1:] * unit[:, :-1]).sum(dim=3)
    follows = [one.grid == other.grid and one.kind == other.kind == "frame" for one, other in pairwise(view.rasters)]
    pair = standing & torch.tensor([False, *follows]).to(standing.device)[:, None]
    pair[:, 1:] &= standing[:, :-1]
    return cosine.masked_fill(~pair, -torch.inf)


def windows(run: Tensor) -> tuple[Tensor, Tensor]:
    """The windows that spare most tokens, as the first and the last frame of each frame's, `[M, F]` int64 each.

    Args:
        run: `[M, F, P]` int64, for how many frames before this one a place has not changed.
    """
    images, frames, _ = run.shape
    device = run.device
    by_run = torch.zeros(images, frames, frames, dtype=torch.int64, device=device)
    by_run = by_run.scatter_add(2, run, torch.ones_like(run))
    static = by_run.flip(2).cumsum(dim=2).flip(2)  # [M, F, n]: places that have not changed for n frames or more
    at = torch.arange(frames, device=device)
    most = [torch.zeros(images, dtype=torch.int64, device=device)]
    first = []
    for end in range(frames):
        before = at[: end + 1]
        spared = torch.stack(most, dim=1) + (end - before) * static[:, end, : end + 1].flip(1)  # by the first frame
        # the number of the frame breaks ties, for the shorter window
        best = (spared * frames + before).amax(dim=1)
        first.append(best % frames)
        most.append(best // frames)
    begin, last = torch.full_like(first[0], frames), torch.zeros_like(first[0])
    begins, lasts = [begin] * frames, [last] * frames
    for frame in reversed(range(frames)):
        ends = begin == frame + 1
        begin, last = torch.where(ends, first[frame], begin), torch.where(ends, frame, last)
        begins[frame], lasts[frame] = begin, last
    return torch.stack(begins, dim=1), torch.stack(lasts, dim=1)


def static_places(cosine: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    """Which tokens are static, `[M, F, P]` bool, and the first frame of each frame's window, `[M, F]` int64."""
    at = torch.arange(cosine.shape[1], device=cosine.device)[:, None]
    changed = torch.where(cosine > tau, 0, at)
    run = at - changed.cummax(dim=1).values
    begin, end = windows(run)
    at_end = run.gather(1, end[..., None].expand_as(run))
    length = (end - begin)[..., None]
    return (length > 0) & (at_end >= length), begin


def first_of(score: Tensor, among: Tensor, counts: Tensor) -> Tensor:
    """`[R, P]` bool: of each row the `counts`, `[R]` or by token `[R, P]`, highest `among` `[R, P]`; ties go to the
    lower index."""
    order = score.masked_fill(~among, -torch.inf).sort(dim=1, descending=True, stable=True).indices
    at = torch.arange(score.shape[1], device=score.device).expand_as(order)
    rank = torch.empty_like(order).scatter(1, order, at)
    return among & (rank < (counts[:, None] if counts.dim() == 1 else counts))


def rounded_part(size: Tensor, budget: int, total: Tensor) -> Tensor:
    """size x budget / total, rounded to the nearest whole number, of two the even one."""
    whole, rest = size * budget // total, size * budget % total
    return whole + ((2 * rest > total) | ((2 * rest == total) & (whole % 2 == 1))).long()


class InnerBudget(Budget):
    """What stays of k tokens of which a share leaves."""

    def __init__(self, keep: int | float, leaves: float) -> None:
        super().__init__(keep)
        self._leaves = leaves

    def tokens(self, num_tokens: int) -> int:
        return max(1, round(super().tokens(num_tokens) * (1 - self._leaves)))


@dataclass(frozen=True)
class Video:
    """Tokens by place, `[M, F, P]`, after what is static was merged.

    Attributes:
        token_at: int64, which of the N tokens stands there, 0 where none does.
        states: `[M, F P, D]` fp32.
        static: bool, what stands for a static place of a window.
        left: bool, where a token is.
        sizes: fp32, how many tokens it stands for.
    """

    token_at: Tensor
    states: Tensor
    static: Tensor
    left: Tensor
    sizes: Tensor


@register_method("holitom")
@dataclass
class HoliTom(Pruner):
    """Merges the tokens of a video `[M, F P, D]` over time, and picks k of what is left, clusters among them.

    Attributes:
        tau: the cosine above which a place does not change, in [-1, 1].
        beta: the weight of a centre against the mean of what goes to it, in [0, 1].
        contextual: D, the share of a frame's kept dynamic tokens that are centres of clusters, in [0, 1].
        neighbours: that density is of, at most, from 1 on.
        merge: "beta" or "mean", see above.
        total: "exact" or "official", see above.
        inner: the share of the tokens that leave inside the decoder, in [0, 1); 0 leaves that part out.
        depth: where, as a part of the decoder's depth, between 0 and 1.
    """

    default_scope: ClassVar[str] = "visual"
    merges: ClassVar[bool] = True
    published: ClassVar[str] = "arXiv 2505.21334, cokeshao/HoliTom"
    reproduces: ClassVar[str] = (
        "LLaVA-OneVision-7B, with the part inside the decoder (inner=0.5): 99.1 % of the unpruned average at 6.9 % of "
        "the FLOPs (README)"
    )
    plan_options: ClassVar[tuple[str, ...]] = ("inner", "depth")
    text_aware: ClassVar[bool] = False  # the part inside the decoder is, and it is off by default

    tau: float = 0.8
    beta: float = 0.6
    contextual: float = 0.0
    neighbours: int = 7
    merge: str = "beta"
    total: str = "exact"
    inner: float = 0.0
    depth: float = 18 / 28

    def __post_init__(self) -> None:
        super().__post_init__()
        if not -1 <= self.tau <= 1:
            raise ValueError(f"tau must be a cosine in [-1, 1], got {self.tau!r}.")
        for name in ("beta", "contextual"):
            value = getattr(self, name)
            if isinstance(value, bool) or not 0 <= value <= 1:
                raise ValueError(f"{name} must be a share in [0, 1], got {value!r}.")
        if isinstance(self.neighbours, bool) or not isinstance(self.neighbours, int) or self.neighbours < 1:
            raise ValueError(f"neighbours must be a number of tokens from 1 on, got {self.neighbours!r}.")
        for name, known in (("merge", MERGES), ("total", TOTALS)):
            value = getattr(self, name)
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}.{near(value, known)}")
        if isinstance(self.inner, bool) or not 0 <= self.inner < 1:
            raise ValueError(f"inner must be the share of the tokens that leave, in [0, 1), got {self.inner!r}.")
        if not 0 < self.depth < 1:
            raise ValueError(f"depth must be a part of the decoder's depth between 0 and 1, got {self.depth!r}.")

    @property
    def is_adaptive(self) -> bool:
        return self.total == "official"

    def stages(self, budget: Budget, depths: ModelDepths) -> tuple[Stage, ...]:
        outer = Stage("input", self, budget)
        layer = int(self.depth * depths.decoder + 0.5)
        if not self.inner or not max(1, depths.first_cut) <= layer < depths.decoder:
            return (outer,)
        inner = InnerMerge(positions="keep", key_bias=self.key_bias)
        return (outer, Stage(f"layer:{layer}", inner, InnerBudget(budget.keep, self.inner)))

    def signals(self, tower: TowerInfo) -> tuple[Signal, ...]:
        return (Signal(SINK_ATTENTION, tower.feature_layer, (0.0,)),)

    def select(self, view: View) -> Selection:
        (signal,) = self.signals(view.tower)
        attention = view.signal(signal.name, signal.layer, *signal.settings)
        refuse_nan(attention)
        refuse_nan(view.features)
        if not view.budget:
            return Selection(torch.empty(view.num_images, 0, dtype=torch.int64, device=attention.device))
        video = self.over_time(view)
        counts = self.counts(video, view.budget)
        score = _rows(attention[..., None], video.token_at.flatten(1)).view(video.token_at.shape)
        kept, goes_to = self.within_frames(video, score, counts)
        return self._selection(view, video, kept, goes_to)

    def over_time(self, view: View) -> Video:
        """The tokens of the view, those of static places merged."""
        at = in_frames(view)
        standing, at = at >= 0, at.clamp_min(0)
        images, frames, places = at.shape
        states = _rows(view.features, at.flatten(1)).float()  # [M, F P, D]
        static = torch.zeros_like(standing)
        if frames == 1:
            return Video(at, states, static, standing, standing.float())
        cosine = alike_before(states.view(*at.shape, -1), standing, view)
        static, begin = static_places(cosine, self.tau)
        later = static & (torch.arange(frames, device=begin.device) > begin)[..., None]
        if self.total == "exact":  # some stay themselves, so that no fewer than the budget are left
            missing = view.budget - (standing & ~later).sum(dim=(1, 2))
            later = later & ~first_of(-cosine.flatten(1), later.flatten(1), missing).view_as(later)
        place = torch.arange(frames * places, device=at.device).view(frames, places)
        goes_to = torch.where(later, begin[..., None] * places + place[0], place).flatten(1)  # [M, F P]
        states = merge(states, goes_to, frames * places)
        sizes = torch.zeros(goes_to.shape, device=at.device).scatter_add(1, goes_to, standing.flatten(1).float())
        left = standing & ~later
        return Video(at, states, static & left, left, sizes.view(at.shape))

    def counts(self, video: Video, budget: int) -> Tensor:
        """`[M, F, 2]` int64: how many of the static and of the dynamic tokens of each frame stay."""
        dynamic = video.left & ~video.static
        sizes = torch.stack([video.static.sum(dim=2), dynamic.sum(dim=2)], dim=2)
        if self.total == "exact":
            return counts_by_size(sizes.flatten(1), dynamic.shape[2], budget).view_as(sizes)
        total = sizes.sum(dim=(1, 2))[:, None]
        of_static = rounded_part(sizes[..., 0], budget, total)
        of_dynamic = (sizes[..., 1] * budget + total - 1) // total
        counts = torch.stack([of_static, of_dynamic], dim=2).minimum(sizes)
        # windows in which all is static may have less than half a token each
        there = sizes.flatten(1) > 0
        first = there & (there.long().cumsum(dim=1) == 1)
        lacks = counts.sum(dim=(1, 2)) == 0
        return counts + (first & lacks[:, None]).long().view_as(counts)

    def within_frames(self, video: Video, score: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Which tokens stay, `[M, F, P]` bool, and the place in its frame that each goes to, `[M, F, P]` int64: its own
        for one that goes nowhere.

        Args:
            score: `[M, F, P]`, what dynamic tokens are ranked by.
            counts: `[M, F, 2]`, see `counts`.
        """
        shape, places = video.left.shape, video.left.shape[2]
        static, left, score = (part.reshape(-1, places) for part in (video.static, video.left, score))
        of_static, of_dynamic = counts.view(-1, 2).unbind(1)
        by_attention = (of_dynamic.double() * (1 - self.contextual)).round().long()
        kept = first_of(score, left & ~static, by_attention)
        own = torch.arange(places, device=left.device).expand_as(left)
        if not self.contextual and shape[1] == 1:
            return kept.view(shape), own.view(shape)
        loose = left & ~kept if self.contextual else static
        clusters = torch.where(static, of_static[:, None], (of_dynamic - by_attention)[:, None])
        centres, goes_to = torch.zeros_like(kept), own.clone()
        states = video.states.view(len(own), places, -1)
        for rows in _parts(len(own), places):
            centres[rows], goes_to[rows] = clustered(
                states[rows], static[rows], loose[rows], clusters[rows], self.neighbours
            )
        return (kept | centres).view(shape), goes_to.view(shape)

    def _selection(self, view: View, video: Video, kept: Tensor, goes_to: Tensor) -> Selection:
        images, frames, places = kept.shape
        kept, most, counts = kept.flatten(1), view.budget, None
        if self.total == "official" and frames > 1:
            counts = kept.sum(dim=1).tolist()
            most = max(counts)
        slots = (~kept).to(torch.int8).sort(dim=1, stable=True).indices[:, :most]  # [M, k]
        tokens = video.token_at.flatten(1).gather(1, slots)
        here = torch.arange(frames * places, device=kept.device)
        to = (goes_to + places * torch.arange(frames, device=kept.device)[:, None]).flatten(1)  # [M, F P]
        had = video.sizes.flatten(1)
        number = kept.long().cumsum(dim=1) - 1
        target = torch.where(to == here, -1, number.gather(1, to))
        sizes = had + torch.zeros_like(had).scatter_add(1, to, had.masked_fill(to == here, 0))
        carry = {SIZES: _by_token(sizes, video, view.num_tokens)} if self.inner else None
        sizes = sizes.gather(1, slots)
        if frames == 1 and not self.contextual:
            return Selection(tokens, carry=carry, sizes=sizes)
        own = _rows(video.states, slots)
        means = merge(video.states, target, most)
        going = torch.zeros(images, most + 1, device=kept.device)
        going = going.scatter_add(1, target + 1, torch.ones_like(had))[:, 1:, None]
        if self.merge == "mean":
            merged = (own + going * means) / (going + 1)
        else:
            merged = torch.where(going > 0, self.beta * own + (1 - self.beta) * means, own)
        # a token that nothing was merged into goes on bit for bit
        features = torch.where(sizes[..., None] == 1, _rows(view.features, tokens), merged.to(view.features.dtype))
        return Selection(tokens, features, counts, carry, sizes)


@dataclass
class InnerMerge(Pruner):
    """The part inside the decoder: `[M, N]` by attention of the last token, the others merged into those."""

    name: ClassVar[str] = "holitom_inner"
    default_scope: ClassVar[str] = "visual"
    published_positions: ClassVar[str] = "keep"
    merges: ClassVar[bool] = True
    text_aware: ClassVar[bool] = True

    def signals_at(self, tower: TowerInfo, place: str, depth: int) -> tuple[Signal, ...]:
        return (Signal(LAST_ATTENTION, depth - 1),)

    def select(self, view: View) -> Selection:
        attention = view.signal(LAST_ATTENTION, view.depth - 1)
        refuse_nan(view.features)
        kept = topk_indices(attention, view.budget)
        unit = normalize(view.features.float(), dim=2)
        cosine = unit @ _rows(unit, kept).transpose(1, 2)  # [M, N, k]
        number = torch.arange(view.budget, device=kept.device)
        nearest = torch.where(cosine == cosine.amax(dim=2, keepdim=True), number, view.budget).amin(dim=2)
        goes_to = nearest.scatter(1, kept, number.expand_as(kept))
        merged = merge(view.features, goes_to, view.budget)
        had = view.carry[SIZES].to(kept.device) if SIZES in view.carry else torch.ones_like(attention)
        has = torch.zeros_like(had[:, : view.budget]).scatter_add(1, goes_to, had)
        members = torch.zeros_like(has).scatter_add(1, goes_to, torch.ones_like(had))
        features = torch.where(members[..., None] == 1, _rows(view.features, kept), merged)
        left = torch.full((view.num_images,), view.num_tokens - view.budget, device=kept.device)
        return Selection(kept, features, sizes=has / had.gather(1, kept), merged=left)

    def flops(self, num_images: int, num_tokens: int, width: int, keep: int, tower: TowerInfo) -> int:
        return 2 * num_images * num_tokens * keep * width


def clustered(
    states: Tensor, static: Tensor, loose: Tensor, clusters: Tensor, neighbours: int
) -> tuple[Tensor, Tensor]:
    """Centres by density peaks, of the static and of the other tokens of each frame apart.

    Args:
        states: `[R, P, D]` fp32.
        static: `[R, P]` bool.
        loose: `[R, P]` bool, those that are clustered.
        clusters: `[R, P]` int64, how many clusters a token's kind forms in its frame.
        neighbours: that density is of, at most.

    Returns:
        `[R, P]` bool, the centres, and `[R, P]` int64, the centre that each token goes to, or its own place.
    """
    at = torch.arange(loose.shape[1], device=loose.device)
    together = (static[..., None] == static[:, None]) & loose[..., None] & loose[:, None]  # [R, P, P]
    distance = distances(states)
    near_by = distance.square().masked_fill(~together, torch.inf)
    near_by = near_by.topk(min(neighbours, len(at)), dim=2, largest=False).values
    count = clusters.clamp(1, neighbours)[..., None]
    near_by = near_by.masked_fill(torch.arange(near_by.shape[2], device=at.device) >= count, 0)
    density = (-near_by.sum(dim=2) / count.squeeze(2)).exp()
    score = density * reach(distance, density, together)
    centres = first_of(score, loose & static, clusters) | first_of(score, loose & ~static, clusters)
    distance = distance.masked_fill(~(together & centres[:, None]), torch.inf)
    nearest = distance.amin(dim=2, keepdim=True)
    goes_to = torch.where(distance == nearest, at, len(at)).amin(dim=2)
    goes = loose & ~centres & nearest.squeeze(2).isfinite()
    return centres, torch.where(goes, goes_to, at)


def _parts(rows: int, places: int) -> Iterator[slice]:
    """Rows whose distances are formed together."""
    step = max(1, _CELLS // places**2)
    return (slice(first, first + step) for first in range(0, rows, step))


def _by_token(values: Tensor, video: Video, num_tokens: int) -> Tensor:
    """`[M, N]` of values by place `[M, F P]`; 1 for tokens that are not left."""
    place = video.token_at.masked_fill(~video.left, num_tokens).flatten(1)
    return values.new_ones(len(values), num_tokens + 1).scatter(1, place, values)[:, :num_tokens]


def _rows(features: Tensor, places: Tensor) -> Tensor:
    """`[M, n, D]` of `[M, N, D]` at `[M, n]`."""
    return features.gather(1, places[..., None].expand(-1, -1, features.shape[2]))
