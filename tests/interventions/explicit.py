"""VAR with the attention matrix in the open, in float64, written from its card: what the closed form must equal.

It shares no code with the library. Hooks on a full-length model read hidden states, projections, rotary tables and the
mask of each layer, and write the rows that go into the output projection.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor


def redistributed(
    a: Tensor, groups: Tensor, p: float, most_sink: float, s_min: float, slack: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Rows `[..., K]` float64 of softmax weights after VAR, and which of them changed `[...]` bool; `groups` `[K]`:
    0 O, 1 N, 2 S, 3 T."""
    _, normal, visual_sink, text_sink = ((a * (groups == kind)).sum(-1) for kind in range(4))
    seen = normal + visual_sink
    keys = int(((groups == 1) | (groups == 2)).sum())
    looks = (seen >= s_min) & (visual_sink <= most_sink * (seen + slack * keys)) & (normal > 0)
    freed = p * (visual_sink + text_sink)
    gain = torch.where(normal > 0, freed / normal, 0.0)[..., None]
    out = torch.where(groups >= 2, (1 - p) * a, torch.where(groups == 1, a + a * gain, a))
    return torch.where(looks[..., None], out, a), looks


class Explicit:
    """Settings, and what the reference saw: pairs of head and row that were asked about, and that were changed."""

    def __init__(self, layers: list[int], channels: list[int], tau: float, p: float, most_sink: float, s_min: float,
                 strict: bool = False, slack: float = 0.0, need_sink: bool = True) -> None:  # fmt: skip
        self.layers, self.channels, self.tau = layers, channels, tau
        self.p, self.most_sink, self.s_min = p, most_sink, s_min
        self.strict, self.slack, self.need_sink = strict, slack, need_sink
        self.pairs = self.changed = 0
        self.worst_sum = 0.0
        self.sinks: dict[int, Tensor] = {}


@contextlib.contextmanager
def explicit_var(adapter: Any, batch: dict[str, Tensor], rule: Explicit, detect: Tensor | None = None):
    """Every decoder call is VAR's.

    Args:
        batch: of the prompts; columns behind them are decoded tokens.
        detect: `[B, S]` bool, columns in which sinks are looked for; all of the prompt by default.
    """
    ids, real = batch["input_ids"], batch["attention_mask"].bool()
    visual = torch.zeros_like(real)
    for number in adapter.placeholder_ids.values():
        visual |= ids == number
    detect = torch.ones_like(real) if detect is None else detect
    handles, taken = [], {}

    def note(layer: int, hidden: Tensor) -> None:
        more = hidden.shape[1] - ids.shape[1]
        look = torch.nn.functional.pad(detect & real, (0, more))
        groups = torch.nn.functional.pad(visual, (0, more)).long()
        x = hidden.detach().double()
        phi = x[..., rule.channels].abs().amax(-1) / (x.square().mean(-1) + 1e-6).sqrt()
        sink = ((phi > rule.tau) if rule.strict else (phi >= rule.tau)) & look
        groups = torch.where(sink, 2 + (groups == 0).long(), groups * look)
        taken["groups"], rule.sinks[layer] = groups, groups
        text = torch.nn.functional.pad(real & ~visual, (0, more), value=True)
        taken["rows"] = text & (torch.nn.functional.pad(visual, (0, more)).cumsum(1) > 0)

    @torch.no_grad()
    def output(module: Any, flat: Tensor) -> Tensor:
        q, k, v = taken["q"], taken["k"], taken["v"]
        cos, sin = taken["rotation"]
        batch_size, length, _ = flat.shape
        width = module.head_dim

        def heads(x: Tensor, turn: bool) -> Tensor:
            x = x.reshape(batch_size, length, -1, width).double()
            if not turn:
                return x
            half = torch.cat([-x[..., width // 2 :], x[..., : width // 2]], -1)
            return x * cos[:, :, None].double() + half * sin[:, :, None].double()

        q, k, v = heads(q, True), heads(k, True), heads(v, False)
        mask = taken["mask"]
        if mask is None:
            mask = torch.ones(length, length).bool().tril().expand(batch_size, 1, -1, -1)
        mask = (mask if mask.dtype == torch.bool else mask >= 0).expand(batch_size, -1, -1, -1)[:, 0]
        result = flat.reshape(batch_size, length, -1, width).clone()
        group = q.shape[2] // k.shape[2]
        for b in range(batch_size):
            groups = taken["groups"][b].masked_fill(~mask[b].any(0), 0)  # a key that no row sees is not there
            rows = taken["rows"][b].nonzero()[:, 0]
            if rule.need_sink:
                rows = rows[(mask[b, rows] & (groups == 2)).any(-1)]
            if len(rows) == 0:
                continue
            for h in range(q.shape[2]):
                s = (q[b, rows, h] @ k[b, :, h // group].T) * module.scaling
                a = s.masked_fill(~mask[b, rows], float("-inf")).softmax(-1)
                after, looks = redistributed(a, groups, rule.p, rule.most_sink, rule.s_min, rule.slack)
                rule.pairs += len(rows)
                rule.changed += int(looks.sum())
                rule.worst_sum = max(rule.worst_sum, float((after.sum(-1) - 1).abs().max()))
                result[b, rows, h] = (after @ v[b, :, h // group]).to(result.dtype)
        return result.reshape(flat.shape)

    def before(module: Any, args: Any, kwargs: Any) -> None:
        taken["rotation"], taken["mask"] = kwargs["position_embeddings"], kwargs.get("attention_mask")

    try:
        for layer in rule.layers:
            block = adapter.layers[layer]
            attn = block.self_attn
            handles.append(
                block.register_forward_pre_hook(
                    lambda m, a, k, layer=layer: note(layer, a[0] if a else k["hidden_states"]), with_kwargs=True
                )
            )
            handles.append(attn.register_forward_pre_hook(before, with_kwargs=True))
            for name in "qkv":
                own = getattr(attn, f"{name}_norm", None) or getattr(attn, f"{name}_proj")
                handles.append(own.register_forward_hook(lambda m, a, out, name=name: taken.__setitem__(name, out)))
            handles.append(attn.o_proj.register_forward_pre_hook(lambda m, a, attn=attn: (output(attn, a[0]), *a[1:])))
        yield rule
    finally:
        for handle in handles:
            handle.remove()
