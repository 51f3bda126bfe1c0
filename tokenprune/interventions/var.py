"""Moves a share of the attention that sinks get to the picture's other tokens (VAR, visual attention redistribution).

Paper: "See What You Are Told: Visual Attention Sink in Large Multimodal Models", Kang, Kim, Kim and Hwang, ICLR 2025,
https://arxiv.org/abs/2503.03321.
Official code: seilk/VisAttnSink, src/logic/logic.py (Apache-2.0); this file was written from the formulas, no code was
copied.

Per layer, on the residual stream that enters it: phi_j = max over the sink channels of |x_j| / rms(x_j); tokens with
phi >= tau are sinks. A (head, row) pair whose attention to the picture is at least s_min, with at least rho of it on
tokens that are no sinks, takes p of what visual and text sinks get and hands it to the visual non-sinks in proportion.
Sinks are found when a prompt comes in and kept for all decoded tokens. Rows: text after a visual token, and every
decoded token; visual rows never.

Readings, where paper and code differ:
- "paper": p = 0.6, phi >= tau, share of non-sinks >= rho = 0.8 (0.5 for hallucination and 0.9 for vision-centric tasks;
  all second-hand), layers 2 to L - 2.
- "official": moves 0.4 (the shipped 0.6 is the share that stays), phi > tau, share of sinks <= rho = 0.5 with 1e-6 per
  visual token in the denominator, layers 2 to L - 1 (the exclusion of the last layer has no effect as released).
- Both leave a layer alone in which no visual token is a sink, as the code does; the paper's formula would still move
  the text sinks' share: require_visual_sink=False.

Deviations:
- The released code keeps the first sample's sinks for all later ones and never changes channels with the model. Here
  sinks belong to a prompt, and channels to a model (a table with evidence labels, else discovery; see `_sinks.py`).
- Any batch, several pictures, pruned prompts and further turns. Tokens of later text-only calls, decoded ones included,
  are never sinks (our choice for a further turn). Row-end tokens of a picture count as its tokens (our choice).
- With a cut at "input" or before, sinks are found among the tokens that are left: they show from layer 2 on only.
- Where all visual tokens of a prompt are sinks, or a row sees no others, nothing could receive what the sinks give:
  such a pair keeps its attention as it is, whatever rho and s_min (m_N > 0 is required). Pictures count together: one
  with other tokens takes what the sinks of all give.
- The attention matrix is never formed, see `tokenprune.kernels.redistribute_attention`.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from tokenprune.interfaces.intervention import Attended, DecoderInfo, Entering, Facts, Intervention
from tokenprune.interventions._sinks import Discovery, SinkSearch, known_channels, sink_score
from tokenprune.kernels.attention_rows import attention_rows
from tokenprune.kernels.redistribute_attention import OTHER, TEXT_SINK, VISUAL, VISUAL_SINK, redistribute_attention
from tokenprune.registry import register_intervention

_DEFAULTS = {"paper": {"p": 0.6, "rho": 0.8}, "official": {"p": 0.4, "rho": 0.5}}


@register_intervention("var")
@dataclass
class VAR(Intervention):
    """Attention redistribution in decoder layers 2 to L - 2 (0-based, of L).

    Attributes:
        p: share of the sinks' attention that moves, in [0, 1]; 0 switches it off. None: 0.6 ("paper"), 0.4
            ("official").
        rho: "paper": least share of non-sinks in a pair's attention to the picture; "official": largest share of sinks
            in it. None: 0.8 and 0.5.
        tau: threshold of phi; at most sqrt(D) of it can be reached. None: 20, or what discovery finds.
        s_min: least attention to the picture.
        channels: sink channels; "discover" searches them on the first prompts, which run unchanged meanwhile; None
            takes them from the table, and discovers them where it has no row for the model.
        calibrate: prompts with pictures that discovery reads.
        variant: "paper" or "official", see the module.
        require_visual_sink: in a layer, leave rows alone that see no visual sink.
        visual_sinks: what a stage at "layer:K" does with visual sinks: "rank" them like any other token, "keep" them
            outside its budget, or "drop" them.
    """

    published: ClassVar[str] = "arXiv 2503.03321, seilk/VisAttnSink"

    p: float | None = None
    rho: float | None = None
    tau: float | None = None
    s_min: float = 0.2
    channels: Any = None
    calibrate: int = 32
    variant: str = "paper"
    require_visual_sink: bool = True
    visual_sinks: str = "rank"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.variant not in _DEFAULTS:
            raise ValueError(f"variant must be 'paper' or 'official', got {self.variant!r}.")
        if self.visual_sinks not in ("rank", "keep", "drop"):
            raise ValueError(f"visual_sinks must be 'rank', 'keep' or 'drop', got {self.visual_sinks!r}.")
        if self.p is not None and not 0 <= self.p <= 1:
            raise ValueError(f"p is the share of the sinks' attention that moves, in [0, 1], got {self.p!r}.")
        for name in ("rho", "tau", "s_min"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0):
                raise ValueError(f"{name} must be a number of at least 0, got {value!r}.")
        if isinstance(self.calibrate, bool) or not isinstance(self.calibrate, int) or self.calibrate < 1:
            raise ValueError(f"calibrate must be a number of prompts, got {self.calibrate!r}.")
        numbers = self.channels if isinstance(self.channels, (list, tuple)) else [None]
        listed = len(numbers) > 0 and all(type(number) is int and number >= 0 for number in numbers)
        if self.channels is not None and self.channels != "discover" and not listed:
            raise ValueError(f"channels must be a list of channel numbers or 'discover', got {self.channels!r}.")
        self._search: SinkSearch | None = None
        self._channels: tuple[int, ...] = ()
        self._index = torch.empty(0, dtype=torch.int64)
        self._source = ""
        self._start = -1
        self.discovery: Discovery | None = None

    # --- the model --------------------------------------------------------------------------------------------------

    def default_layers(self, decoder: DecoderInfo) -> Sequence[int]:
        return range(2, decoder.layers - (self.variant == "paper"))

    def prepare(self, decoder: DecoderInfo) -> tuple[int, ...]:
        layers = super().prepare(decoder)
        self._search, self._channels, self.discovery, self._start = None, (), None, -1
        known = known_channels(decoder) if self.channels is None else None
        if isinstance(self.channels, (list, tuple)):
            if max(self.channels) >= decoder.width:
                raise ValueError(f"channels name {max(self.channels)}, and hidden states here have {decoder.width}.")
            self._channels, self._source = tuple(self.channels), "given by the caller"
        elif known is not None:
            self._channels = known.channels
            self._source = f"table row {known.model}, taken for the model's sizes; evidence: {known.evidence}"
        else:
            self._search = SinkSearch()
        if self._share == 0 or self.s_min > 1 or (self.variant == "paper" and self._rho > 1):
            self._search = None  # off: nothing to discover channels for
            return ()
        if not layers:
            self._search = None
        else:
            self._start = layers[0]
        return layers

    def check_cuts(self, layers: Sequence[int], cuts: Sequence[int]) -> None:
        if self.visual_sinks != "rank" and not set(layers) & set(cuts):
            raise ValueError(
                f"visual_sinks={self.visual_sinks!r} says what stages at 'layer:K' do with sinks, K being one of var's "
                f"layers ({layers[0]} to {layers[-1]}), and the method cuts at "
                f"{', '.join(f'layer:{cut}' for cut in cuts) or 'no layer'}. Cut there, or leave the option out."
            )

    @property
    def _share(self) -> float:
        return _DEFAULTS[self.variant]["p"] if self.p is None else self.p

    @property
    def _rho(self) -> float:
        return _DEFAULTS[self.variant]["rho"] if self.rho is None else self.rho

    @property
    def _tau(self) -> float:
        if self.tau is not None:
            return self.tau
        return self.discovery.tau if self.discovery else 20.0

    @property
    def wants_prompts(self) -> int:
        """Prompts with pictures that it still has to see before it acts."""
        return 0 if self._search is None else max(self.calibrate - self._search.prompts, 0)

    def settled(self) -> VAR:
        """A copy that needs no discovery: with what was discovered so far, switched off where that failed."""
        self._decide()
        if self.discovery is None:
            return replace(self)
        discovery = self.discovery
        settled = replace(self, channels=list(discovery.channels) or None, tau=self._tau)
        if discovery.channels and not discovery.reason:
            return settled
        return replace(settled, channels=self.channels, p=0.0)

    def _decide(self) -> None:
        if self._search is None:
            return
        self.discovery, self._search = self._search.decide(), None
        if self.discovery.reason:
            warnings.warn(f"var is off for this model: {self.discovery.reason}.", stacklevel=2)
            return
        self._channels, self._source = self.discovery.channels, "discovered"

    # --- a prompt ---------------------------------------------------------------------------------------------------

    def note(self, entering: Entering) -> dict[str, Tensor]:
        if self._search is not None:
            if entering.layer == self._start:
                if not self.wants_prompts:
                    self._decide()
                else:
                    self._search.begin(entering)
            if self._search is not None:
                self._search.look(entering)
        visual, hidden = entering.visual, entering.hidden
        if not self._channels:
            # places count from 1: where tokens leave before this layer runs, they say whose attention it is
            places = visual.cumsum(1, dtype=torch.int32) * visual
            return {"groups": visual.to(torch.int8) * VISUAL, "places": places}
        if self._index.device != hidden.device or self._index.shape[0] != len(self._channels):
            self._index = torch.tensor(self._channels, device=hidden.device)
        phi = sink_score(hidden, self._index)
        sink = phi >= self._tau if self.variant == "paper" else phi > self._tau
        groups = torch.where(visual, torch.where(sink, VISUAL_SINK, VISUAL), torch.where(sink, TEXT_SINK, OTHER))
        if entering.attended is not None:
            groups = groups.masked_fill(~entering.attended, OTHER)
        return {"groups": groups.to(torch.int8)}

    def applies(self, facts: Facts) -> Tensor:
        groups = facts["groups"]
        if self._search is None and not self._channels:
            return torch.zeros(groups.shape[0], dtype=torch.bool, device=groups.device)
        wanted = VISUAL_SINK if self._channels and self.require_visual_sink else VISUAL
        return (groups == wanted).any(1)

    def attend(self, given: Attended) -> Tensor | None:
        groups = given.facts["groups"]
        if not self._channels:
            if self._search is not None and given.prompt:
                self._search.listen(given.layer, self._received(given)[:, : groups.shape[1]], given.facts["places"])
            return None
        gate = None
        if self.require_visual_sink and given.prompt and given.allowed is not None:
            # a row before the first sink is as if there were none
            sinks = torch.nn.functional.pad(groups == VISUAL_SINK, (0, given.key.shape[2] - groups.shape[1]))
            gate = (given.allowed & sinks[:, None]).any(-1)
        paper = self.variant == "paper"
        return redistribute_attention(
            given.query,
            given.key,
            given.value,
            groups,
            given.allowed,
            gate,
            share=self._share,
            least_mass=self.s_min,
            most_sink=1 - self._rho if paper else self._rho,
            slack=0.0 if paper else 1e-6,
            scale=given.scale,
        )

    @staticmethod
    @torch.no_grad()
    def _received(given: Attended) -> Tensor:
        """`[B, K]`: attention that keys get, mean over heads and over the real rows."""
        allowed = given.allowed
        if allowed is not None:
            allowed = allowed.expand(given.query.shape[0], -1, -1)
        weights = attention_rows(given.query, given.key, given.scale, allowed)
        if given.real is None:
            return weights.mean(1)
        # a place that is no real row may be padding, which sees no key
        weights = weights.masked_fill(~given.real[..., None], 0.0)
        return weights.sum(1) / given.real.sum(1, keepdim=True).clamp(min=1)

    def kept_out(self, facts: Facts) -> tuple[Tensor, bool] | None:
        if self.visual_sinks == "rank" or not self._channels:
            return None
        return facts["groups"] == VISUAL_SINK, self.visual_sinks == "keep"

    def flops(self, given: Attended) -> int:
        batch, heads, rows, _ = given.query.shape
        # four sums over the keys whose groups are known
        return super().flops(given) + 8 * batch * heads * rows * given.facts["groups"].shape[1]

    def summary(self, noted: Mapping[int, Facts]) -> str:
        if self.discovery is not None and self.discovery.reason:
            return f"off: {self.discovery.reason}"
        if self._start < 0:
            return "off: p, rho, s_min or layers leave nothing to change"
        if self._search is not None:
            return (
                f"not acting yet: {self.wants_prompts} more prompts with pictures are needed to discover sink channels"
            )
        tau = f"tau {self._tau:.3g}, p {self._share:g}, rho {self._rho:g} ({self.variant})"
        about = str(self.discovery) if self.discovery else f"channels {_list(self._channels)} ({self._source})"
        return f"{about}; {tau}; {_sinks_per_layer(noted)}"


def _list(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


def _sinks_per_layer(noted: Mapping[int, Facts]) -> str:
    if not noted:
        return "no picture in the last prompts"
    groups = [facts["groups"] for facts in noted.values()]
    rows = sum(groups_of_layer.shape[0] for groups_of_layer in groups)
    visual, text = (
        sum(int((groups_of_layer == kind).sum()) for groups_of_layer in groups) / rows
        for kind in (VISUAL_SINK, TEXT_SINK)
    )
    acting = sum(int((groups_of_layer == VISUAL_SINK).any(1).sum()) for groups_of_layer in groups)
    return f"sinks per prompt and layer: {visual:.1f} visual, {text:.1f} text; visual ones in {acting} of {rows} layers"
