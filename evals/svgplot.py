"""The accuracy-versus-FLOPs plot of the report page: inline SVG that needs no library and no network."""

from __future__ import annotations

import math
from collections.abc import Callable
from html import escape
from typing import Any

from tokenprune.evals.config import NONE
from tokenprune.evals.plots import GREYS, flops_decoder, flops_total, series_of, styles

Record = dict[str, Any]
WIDTH, HEIGHT = 1130, 450  # pixels
LEFT, RIGHT, TOP, BOTTOM = 54, 190, 14, 46


def ticks(low: float, high: float, count: int = 6) -> list[float]:
    """Round numbers that cover low..high, about `count` of them."""
    if high <= low:
        return [low]
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


class _Scale:
    """Data to pixels, linear or logarithmic."""

    def __init__(self, low: float, high: float, start: float, end: float, log: bool = False) -> None:
        self.low, self.high, self.start, self.end, self.log = low, high, start, end, log

    def __call__(self, value: float) -> float:
        low, high = self.low, self.high
        if self.log:
            value, low, high = math.log(value), math.log(low), math.log(high)
        share = (value - low) / ((high - low) or 1.0)
        return self.start + share * (self.end - self.start)


def svg_plot(records: list[Record], decoder: bool) -> str:
    """One `<svg>` for the records of one model and task; "" if no FLOPs were counted.

    Args:
        decoder: x is what the kept tokens decide (selection and prefill, log scale, with one budget's points spread
            sideways); otherwise all FLOPs to the first token.
    """
    cost = flops_decoder if decoder else flops_total
    groups = series_of(records)
    unpruned = next((r for r in records if r["method"] == NONE and r.get("flops")), None)
    everything = [record for group in groups.values() for record in group] + ([unpruned] if unpruned else [])
    if not everything:
        return ""
    xs = [cost(record) for record in everything]
    pad = 0.06 * (max(xs) - min(xs)) or 0.1 * max(xs)
    ends = (min(xs) / 1.3, max(xs) * 1.15) if decoder else (min(xs) - pad, max(xs) + pad)
    lows = [100 * record["overall"]["ci_low"] for record in everything]
    highs = [100 * record["overall"]["ci_high"] for record in everything]
    x = _Scale(*ends, LEFT, WIDTH - RIGHT, log=decoder)
    y = _Scale(max(0.0, min(lows) - 3), min(100.0, max(highs) + 3), HEIGHT - BOTTOM, TOP)
    parts = [f'<svg class="plot" viewBox="0 0 {WIDTH} {HEIGHT}" width="100%" role="img" aria-label="the plot">']
    label = "GFLOPs of selection and prefill" if decoder else "GFLOPs to the first token, vision tower included"
    budgets = {cost(r): r["kept_tokens"] for r in records if r.get("flops") and r["method"] in (NONE, "random")}
    parts += _axes(x, y, label, budgets if decoder else {})
    looks = styles(list(groups))
    for index, (name, group) in enumerate(groups.items()):
        shift = (index - (len(groups) - 1) / 2) * 0.012 * (x.end - x.start) * decoder
        parts.append(_series(name, group, "currentColor" if name == "oracle" else looks[name][0], shift, x, y, cost))
    if unpruned:
        px, py = x(cost(unpruned)), y(100 * unpruned["overall"]["accuracy"])
        parts.append(f'<line class="unpruned" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{py:.1f}" y2="{py:.1f}" '
                     'stroke-width="1" stroke-dasharray="2 4"/>')  # fmt: skip
        parts.append(f'<g><path class="unpruned" d="M{px:.1f} {py - 8:.1f}l8 8l-8 8l-8-8z"/>{_title(unpruned)}</g>')
    parts += _legend(list(groups), looks, unpruned is not None)
    return "".join([*parts, "</svg>"])


def _axes(x: _Scale, y: _Scale, label: str, budgets: dict[float, float]) -> list[str]:
    parts = []
    for value in ticks(y.low, y.high):
        at = y(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text class="soft" x="{LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{value:g}</text>')
    for value in budgets or ticks(x.low, x.high, 8):
        at = x(value)
        parts.append(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        text = f"{value:.3g} ({budgets[value]:g} tokens)" if budgets else f"{value:.6g}"
        parts.append(f'<text class="soft" x="{at:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{text}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 8}" text-anchor="middle">{label}</text>')
    height = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(f'<text transform="translate(14 {height}) rotate(-90)" text-anchor="middle">accuracy, percent</text>')
    return parts


def _title(record: Record) -> str:
    scores = record["overall"]
    text = (
        f"{record['label']}: {100 * scores['accuracy']:.1f} percent "
        f"({100 * scores['ci_low']:.1f} to {100 * scores['ci_high']:.1f}), {flops_total(record):.3f} GFLOPs"
    )
    return f"<title>{escape(text)}</title>"


def _series(
    name: str,
    group: list[Record],
    colour: str,
    shift: float,
    x: _Scale,
    y: _Scale,
    cost: Callable[[Record], float],
) -> str:
    points = [(x(cost(record)) + shift, y(100 * record["overall"]["accuracy"])) for record in group]
    path = " ".join(f"{px:.1f},{py:.1f}" for px, py in points)
    dash = ' stroke-dasharray="5 4"' if name in GREYS else ""
    kind = "series black" if colour == "currentColor" else "series"
    parts = [f'<g class="{kind}" data-name="{escape(name)}" stroke="{colour}" fill="{colour}">']
    parts.append(f'<polyline points="{path}" fill="none" stroke-width="1.8"{dash}/>')
    for record, (px, py) in zip(group, points, strict=True):
        low, high = y(100 * record["overall"]["ci_low"]), y(100 * record["overall"]["ci_high"])
        parts.append(f'<line x1="{px:.1f}" x2="{px:.1f}" y1="{low:.1f}" y2="{high:.1f}" stroke-opacity="0.4"/>')
        parts.append(f'<circle cx="{px:.1f}" cy="{py:.1f}" r="4.2">{_title(record)}</circle>')
    return "".join([*parts, "</g>"])


def _legend(names: list[str], looks: dict[str, tuple[str, str]], unpruned: bool) -> list[str]:
    left = WIDTH - RIGHT + 16
    parts = []
    for index, name in enumerate(names):
        at = TOP + 10 + 19 * index
        colour = "currentColor" if name == "oracle" else looks[name][0]
        shown = name if len(name) <= 24 else name[:23] + "…"
        parts.append(
            f'<g class="key{" series black" if name == "oracle" else ""}" data-name="{escape(name)}">'
            f'<rect x="{left - 6}" y="{at - 9}" width="{RIGHT - 12}" height="18" fill="transparent"/>'
            f'<circle cx="{left}" cy="{at}" r="4.2" fill="{colour}"/><text x="{left + 12}" y="{at + 4}">{escape(shown)}'
            "</text></g>"
        )
    if unpruned:
        at = TOP + 10 + 19 * len(names)
        parts.append(f'<path class="unpruned" d="M{left} {at - 6}l6 6l-6 6l-6-6z"/>')
        parts.append(f'<text x="{left + 12}" y="{at + 4}">unpruned</text>')
    return parts
