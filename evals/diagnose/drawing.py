"""Charts as inline SVG whose colours are those of the page, so that they turn dark with it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

CELL, EDGE = 34, 30
_WIDE, _HIGH = 360, 190
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 10, 10, 30


def heat_map(
    values: Sequence[Sequence[float]], marked: Sequence[Sequence[int]] = (), largest: float | None = None
) -> str:
    """Layers down, heads across; the darker, the more of `largest` (the largest value of all by default).

    Args:
        values: `[L][H]`, at least 0.
        marked: pairs (layer, head) with a frame.
    """
    layers, heads = len(values), len(values[0])
    most = max(max(map(max, values)), 1e-30) if largest is None else largest
    cell = min(CELL, 1088 / heads)
    width, height = EDGE + heads * cell, EDGE + layers * min(cell, 22)
    tall, numbers = min(cell, 22), cell >= 26
    every = max(1, math.ceil(heads / 16))
    parts = [_text(EDGE + (head + 0.5) * cell, 12, str(head)) for head in range(0, heads, every)]
    for layer, row in enumerate(values):
        y = 18 + layer * tall
        if layer % max(1, math.ceil(layers / 32)) == 0:
            parts.append(_text(EDGE - 6, y + tall / 2 + 4, str(layer), "end"))
        for head, value in enumerate(row):
            x, share = EDGE + head * cell, min(max(value / most, 0.0), 1.0)
            parts.append(
                f'<g><title>layer {layer}, head {head}: {value:.3g}</title><rect x="{x:.1f}" y="{y:.1f}" '
                f'width="{cell - 1:.1f}" height="{tall - 1:.1f}" class="cell"/><rect x="{x:.1f}" y="{y:.1f}" '
                f'width="{cell - 1:.1f}" height="{tall - 1:.1f}" class="heat" style="opacity:{share:.3f}"/>'
                + (
                    _text(x + cell / 2, y + tall / 2 + 3.5, _in_cell(value), kind="on" if share > 0.55 else "off")
                    if numbers
                    else ""
                )
                + "</g>"
            )
    for layer, head in marked:
        parts.append(
            f'<rect x="{EDGE + head * cell + 0.5:.1f}" y="{18 + layer * tall + 0.5:.1f}" width="{cell - 2:.1f}" '
            f'height="{tall - 2:.1f}" class="frame"/>'
        )
    shown = min(width, 560)
    box = f'viewBox="0 0 {width:.0f} {height:.0f}" style="max-width:{shown:.0f}px"'
    return f'<svg class="map" {box} role="img">{"".join(parts)}</svg>'


def line_chart(series: Mapping[str, tuple[str, Sequence[float]]], log: bool = False, x: str = "layer") -> str:
    """Values by layer.

    Args:
        series: by name, a CSS class and the values.
        log: whether the axis is logarithmic; else it begins at 0.
    """
    every = [value for _, values in series.values() for value in values if not log or value > 0]
    low, high = (min(every), max(every)) if log else (0.0, max(*every, 1e-9))
    ticks = _log_ticks(low, high) if log else _ticks(high)
    low, high = min(low, ticks[0]), max(high, ticks[-1])
    count = max(len(values) for _, values in series.values())

    def across(number: int) -> float:
        return _LEFT + (_WIDE - _LEFT - _RIGHT) * (number + 0.5) / count

    def up(value: float) -> float:
        share = math.log(max(value, 1e-12) / low) / math.log(high / low) if log else value / high
        return _HIGH - _BOTTOM - (_HIGH - _TOP - _BOTTOM) * share

    parts = []
    for tick in ticks:
        parts.append(f'<line x1="{_LEFT}" x2="{_WIDE - _RIGHT}" y1="{up(tick):.1f}" y2="{up(tick):.1f}" class="grid"/>')
        parts.append(_text(_LEFT - 6, up(tick) + 4, _short(tick), "end"))
    step = max(1, math.ceil(count / 12))
    parts += [_text(across(number), _HIGH - 14, str(number)) for number in range(0, count, step)]
    parts.append(_text((_LEFT + _WIDE - _RIGHT) / 2, _HIGH - 1, x))
    for name, (kind, values) in series.items():
        points = [(across(i), up(value), value, i) for i, value in enumerate(values)]
        path = " ".join(f"{px:.1f},{py:.1f}" for px, py, _, _ in points)
        dots = "".join(
            f'<circle cx="{px:.1f}" cy="{py:.1f}" r="3.2"><title>{escape(name)}, {x} {i}: {value:.4g}</title></circle>'
            for px, py, value, i in points
        )
        parts.append(f'<g class="series {kind}"><polyline points="{path}"/>{dots}</g>')
    return f'<svg class="chart" viewBox="0 0 {_WIDE} {_HIGH + 4}" role="img">{"".join(parts)}</svg>'


def stacked_bars(rows: Sequence[tuple[str, Mapping[str, float]]], kinds: Mapping[str, str]) -> str:
    """A bar of shares for each row.

    Args:
        rows: a name and the shares, by kind.
        kinds: by kind, its CSS class.
    """
    high = 20
    height = len(rows) * high + 20
    parts = []
    for number, (name, shares) in enumerate(rows):
        x, y = float(EDGE), number * high
        parts.append(_text(EDGE - 6, y + 13, name, "end"))
        for kind, css in kinds.items():
            wide = (_WIDE - EDGE - _RIGHT) * shares[kind]
            parts.append(
                f'<rect x="{x:.1f}" y="{y + 2}" width="{max(wide, 0):.1f}" height="{high - 4}" class="{css}">'
                f"<title>layer {escape(name)}: {shares[kind]:.1%} {escape(kind)}</title></rect>"
            )
            x += wide
    for share in (0, 0.5, 1):
        parts.append(
            _text(EDGE + (_WIDE - EDGE - _RIGHT) * share, height - 6, f"{share:.0%}", "end" if share == 1 else "middle")
        )
    return f'<svg class="chart" viewBox="0 0 {_WIDE} {height}" role="img">{"".join(parts)}</svg>'


def _text(x: float, y: float, text: str, anchor: str = "middle", kind: str = "") -> str:
    css = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{css}>{escape(text)}</text>'


def _short(value: float) -> str:
    if value == 0:
        return "0"
    if abs(value) >= 1000 or abs(value) < 0.0005:
        return f"{value:.0e}".replace("e-0", "e\N{MINUS SIGN}").replace("e+0", "e")
    return f"{value:.2g}" if abs(value) < 10 else f"{value:.0f}"


def _in_cell(value: float) -> str:
    """Shares fit a cell without their zero."""
    return f"{value:.2f}".removeprefix("0") if 0.005 <= value < 1 else "0" if value < 0.005 else f"{value:.2g}"


def _ticks(high: float) -> list[float]:
    """From 0 on, three to six round numbers up to at least `high`."""
    step = 10 ** math.floor(math.log10(high / 3))
    for factor in (1, 2, 5, 10):
        if high / (step * factor) <= 5:
            step *= factor
            break
    return [step * number for number in range(math.ceil(high / step - 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    return [10.0**power for power in range(first, max(last, first + 1) + 1)]
