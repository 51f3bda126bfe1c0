"""Reads one batch, prompt and answer, off the running layers and keeps sums: memory grows with the tokens, not with
their square."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from tokenprune.evals.diagnose.attention_tap import Call
from tokenprune.evals.diagnose.measures import concentration, outliers
from tokenprune.evals.diagnose.prompt_tokens import ANSWER, GROUPS, IMAGE, PromptTokens
from tokenprune.evals.diagnose.row_blocks import row_blocks, seen_rows
from tokenprune.interventions.var import sink_score

GUARD_LAYER = 2
"""Where the guard against sinks looks, as the card says; the last layer of a shorter decoder."""


@dataclass(frozen=True)
class Row:
    """One query row of every sample in one layer.

    Attributes:
        mass: `[B, H, 5]`, attention to each of `GROUPS`.
        focus: `[B, H]`, concentration on the image without guarded tokens.
        region: `[B, H]`, share of the attention to the image that falls on the boxes.
        rollout: `[B, 5]`, what the row is made of after the layer, by kind of prompt token.
    """

    mass: Tensor
    focus: Tensor
    region: Tensor
    rollout: Tensor


@dataclass
class LayerRecord:
    """What is kept of one layer of a batch.

    Attributes:
        places: `[B, K]` int64, where the keys of the prompt stood before any cut; -1 at padding.
        kinds: `[B, K, 5]` fp32, of which kind each is.
        entering: `[B, K, 5]` fp32, what each state that enters the layer is made of, by the rollout below it.
        flow: `[B, 5, 5]`, attention from the rows of a kind to the keys of a kind, mean over rows and heads.
        received: `[B, H, K]`, attention that keys get from the text behind the first image token, mean over its rows.
        last: `[B, H, K]`, attention of the last row of the prompt.
        outlying: `[B, K]` bool, see `measures.outliers`.
        sinks: `[B, K]` bool, image tokens that stand out in the sink channels; None: no channels are known.
    """

    places: Tensor
    kinds: Tensor
    entering: Tensor
    flow: Tensor
    received: Tensor
    last: Tensor
    outlying: Tensor
    sinks: Tensor | None


@dataclass
class BatchReader:
    """Listens to one batch.

    Args:
        tokens: of the prompts.
        layers: L.
        stays: which places `[B, S]` are there when a layer of the prompt runs; None: all.
        channels, tau: sink channels; () for none.

    Attributes:
        records: by layer.
        steps: by step, by layer: step 0 is the last row of the prompt, step t that of the t-th generated token.
    """

    tokens: PromptTokens
    layers: int
    stays: Callable[[], Tensor] | None = None
    channels: Sequence[int] = ()
    tau: float = 20.0
    records: list[LayerRecord] = field(default_factory=list)
    steps: list[list[Row]] = field(default_factory=list)
    _mixed: Tensor | None = None  # [B, S, 5], what each state is made of, by place in the prompt
    _later: list[Tensor] = field(default_factory=list)  # by layer [B, t, 5], of the generated tokens that enter it
    _hidden: Tensor | None = None

    def enter(self, hidden: Tensor) -> None:
        """Hidden states `[B, K, D]` are about to enter a layer."""
        self._hidden = hidden.detach()

    def read(self, call: Call) -> None:
        """See `attention_tap.Reader`.

        Raises:
            ValueError: the prompt comes in parts, or layers do not come in their order.
            RuntimeError: a layer holds other tokens than the report of the method says.
        """
        rows, keys = call.query.shape[2], call.key.shape[2]
        if rows > 1:
            if rows != keys or call.layer != len(self.records):
                raise ValueError(
                    f"Diagnostics read a prompt in one pass from the first layer on; layer {call.layer} was given "
                    f"{rows} rows and {keys} keys after {len(self.records)} layers."
                )
            self._read_prompt(call)
        else:
            self._read_token(call)

    # --- the prompt -------------------------------------------------------------------------------------------------

    def _read_prompt(self, call: Call) -> None:
        places = self._places(call)
        standing, at = places >= 0, places.clamp(min=0)
        groups = self.tokens.groups.gather(1, at) * standing
        kinds = one_hot(groups, len(GROUPS) + 1)[..., 1:].float()  # [B, K, 5]
        if self._mixed is None:
            self._mixed = one_hot(self.tokens.groups, len(GROUPS) + 1)[..., 1:].float()
        wide = at[..., None].expand_as(kinds)
        entering = self._mixed.gather(1, wide) * standing[..., None]
        visual = groups == IMAGE
        asking = standing & ~visual & (visual.cumsum(1) > 0)  # text behind the first image token
        record = self._added_up(call, places, kinds, entering, asking)
        leaving, record.outlying = record.entering, outliers(record.received, visual)
        record.entering = entering
        if self.channels and self._hidden is not None:
            index = torch.tensor(list(self.channels), device=self._hidden.device)
            record.sinks = (sink_score(self._hidden, index) >= self.tau) & visual
        # padding is written first, to place 0, and a real token of that place over it
        self._mixed = _scattered(self._mixed, at, standing, leaving)
        self.records.append(record)
        self._later.append(kinds.new_zeros(kinds.shape[0], 0, len(GROUPS)))
        if len(self.records) == self.layers:
            self.steps.append([self._row(one.last, layer, _rolled(one)) for layer, one in enumerate(self.records)])

    def _added_up(self, call: Call, places: Tensor, kinds: Tensor, entering: Tensor, asking: Tensor) -> LayerRecord:
        """One pass over the rows; `entering` of the record is what leaves the layer, for now."""
        batch, heads, length, _ = call.query.shape
        count = call.key.shape[2]
        flow = kinds.new_zeros(batch, len(GROUPS), len(GROUPS))
        received = kinds.new_zeros(batch, heads, count)
        leaving, last = torch.empty_like(entering), received
        for start, weights in row_blocks(call):
            rows = slice(start, start + weights.shape[2])
            mean = weights.mean(1)  # [B, r, K]
            leaving[:, rows] = (entering[:, rows] + mean @ entering) / 2
            flow += kinds[:, rows].transpose(1, 2) @ (mean @ kinds)
            received += (asking[:, None, None, rows].to(weights.dtype) @ weights)[:, :, 0]
            if rows.stop == length:
                last = weights[:, :, -1].clone()
        flow /= kinds.sum(1)[..., None].clamp(min=1)
        received /= asking.sum(1)[:, None, None].clamp(min=1)
        return LayerRecord(places, kinds, leaving, flow, received, last, places < 0, None)

    def _places(self, call: Call) -> Tensor:
        """`[B, K]`: where the keys of a layer stood before any cut, -1 at padding; rows end together."""
        real = self.tokens.groups > 0
        if self.stays is not None:
            real = real & self.stays().to(real.device)
        keys, counts = call.key.shape[2], real.sum(1)
        seen = seen_rows(call, keys - 1, keys)
        found = torch.full_like(counts, keys) if seen is None else seen[:, 0].sum(-1).expand_as(counts)
        if int(counts.max()) > keys or (call.window is None and not bool((found == counts).all())):
            raise RuntimeError(
                f"Layer {call.layer} sees {found.tolist()} keys from the last rows, and {counts.tolist()} tokens of "
                "the prompts should be there. Its mask hides tokens, or the method moved them in a way that is "
                "not followed here; leave --prune out, or use another method."
            )
        places = torch.full((real.shape[0], keys), -1, dtype=torch.int64, device=real.device)
        for row, number in enumerate(counts.tolist()):
            places[row, keys - number :] = real[row].nonzero()[:, 0]
        return places

    # --- a generated token ------------------------------------------------------------------------------------------

    def _read_token(self, call: Call) -> None:
        if len(self.records) < self.layers:
            raise ValueError(
                "A token was decoded before its prompt had passed all layers; read prompts from the start."
            )
        layer, record = call.layer, self.records[call.layer]
        if layer == 0:
            self.steps.append([])
        own = record.kinds.new_zeros(record.kinds.shape[0], 1, len(GROUPS))
        own[..., ANSWER - 1] = 1
        entering = own if layer == 0 else self.steps[-1][-1].rollout[:, None]
        self._later[layer] = torch.cat([self._later[layer], entering], dim=1)
        ((_, weights),) = row_blocks(call)
        weights = weights[:, :, 0]  # [B, H, K]
        below = torch.cat([record.entering, self._later[layer]], dim=1)
        if weights.shape[2] != below.shape[1]:
            raise RuntimeError(
                f"Layer {layer} has {weights.shape[2]} keys for a decoded token, and {below.shape[1]} were counted; "
                "diagnostics follow caches that keep every key."
            )
        rollout = (entering[:, 0] + (weights.mean(1)[:, None] @ below)[:, 0]) / 2
        self.steps[-1].append(self._row(weights, layer, rollout))

    # --- both -------------------------------------------------------------------------------------------------------

    def _row(self, weights: Tensor, layer: int, rollout: Tensor) -> Row:
        """From the weights `[B, H, K + t]` of a row, t generated tokens behind the prompt."""
        record = self.records[layer]
        prompt = record.kinds.shape[1]
        later = weights[..., prompt:].sum(-1)
        mass = weights[..., :prompt] @ record.kinds  # [B, H, 5]
        mass[..., ANSWER - 1] += later
        visual = record.kinds[..., IMAGE - 1] > 0
        at = record.places.clamp(min=0)
        free = visual & ~self.guarded().gather(1, at)
        here = weights[..., :prompt]
        image = (here * visual[:, None]).sum(-1)
        on_boxes = (here * (visual & self.tokens.region.gather(1, at))[:, None]).sum(-1)
        region = on_boxes / image.clamp(min=torch.finfo(image.dtype).tiny)
        return Row(mass, concentration(here, free[:, None]), region, rollout)

    def guarded(self) -> Tensor:
        """`[B, S]` bool: image tokens that the guard leaves out, by place in the prompt."""
        record = self.records[min(GUARD_LAYER, self.layers - 1)]
        marked = torch.zeros_like(self.tokens.groups, dtype=torch.bool)
        rows, columns = record.outlying.nonzero(as_tuple=True)
        marked[rows, record.places[rows, columns]] = True
        return marked

    def looks(self, layer: int) -> Tensor:
        """`[B, S]`: attention of the last row of the prompt, mean over heads, by place in the prompt."""
        record = self.records[layer]
        shown = torch.zeros(self.tokens.groups.shape, device=record.last.device)
        standing, at = record.places >= 0, record.places.clamp(min=0)
        return _scattered(shown[..., None], at, standing, record.last.mean(1)[..., None])[..., 0]


def _scattered(old: Tensor, at: Tensor, standing: Tensor, new: Tensor) -> Tensor:
    """`old` `[B, S, n]` with `new` `[B, K, n]` at the places `at` `[B, K]` that stand for a token."""
    rows, columns = standing.nonzero(as_tuple=True)
    changed = old.clone()
    changed[rows, at[rows, columns]] = new[rows, columns]
    return changed


def _rolled(record: LayerRecord) -> Tensor:
    """`[B, 5]`, what the last row of the prompt is made of after a layer."""
    mean = record.last.mean(1)
    return (record.entering[:, -1] + (mean[:, None] @ record.entering)[:, 0]) / 2
