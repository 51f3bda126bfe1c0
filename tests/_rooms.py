"""The rooms of the code, their floors, and a picture of both: `python tests/_rooms.py docs/rooms.svg`."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

from _imports import imports, sources

FLOORS: tuple[tuple[str, ...], ...] = (
    ("user_files", "_siblings"),
    ("kernels", "hooks", "seams", "registry", "cost", "relevance", "evals.statistics", "evals.errors"),
    ("wrappers", "interfaces"),
    ("state", "plan", "adapters", "methods", "interventions", "cache_policies"),
    ("capture",),
    ("engine",),
    ("vllm",),
    ("report",),
    ("prompt_view",),
    ("handle",),
    ("api",),
    ("calls",),
    ("frame_questions", "regions", "model_check"),
    ("evals.io",),
    ("evals.models", "evals.pocket"),
    ("evals.tasks",),
    ("evals.config",),
    ("evals.evaluation",),
    ("evals.profiling",),
    ("evals.results",),
    ("evals.report",),
    ("evals.one_prompt",),
    ("evals.single_image", "evals.ui", "evals.lmms", "evals.sweep", "evals.diagnose", "server"),
    ("evals.pocket_training", "evals.tuning", "evals.learned"),
    ("commands",),
    ("cli",),
    ("__main__", "evals.bench"),
)
"""Rooms, and modules that stand beside rooms, from the bottom up. Rooms of one floor know nothing of each other."""

FLOOR_OF = {room: number for number, floor in enumerate(FLOORS) for room in floor}


def room_of(module: str) -> str:
    """The room that a module stands in; "" for the package itself, which imports nothing while it loads.

    Raises:
        ValueError: none, or several.
    """
    rooms = [room for room in FLOOR_OF if f"{module}.".startswith(f"{room}.")]
    if module and len(rooms) != 1:
        raise ValueError(f"{module} stands in no room of FLOORS, or in several: {rooms}")
    return rooms[0] if rooms else ""


def module_arrows() -> list[tuple[str, str]]:
    """Every import of one module of the package by another."""
    return [(module, target) for module in imports() if module for target in imports()[module] if target]


def room_arrows() -> Counter[tuple[str, str]]:
    """Imports between rooms, counted by module."""
    pairs = ((room_of(module), room_of(target)) for module, target in module_arrows())
    return Counter(pair for pair in pairs if pair[0] != pair[1])


# --- the picture ------------------------------------------------------------------------------------------------------

WIDTH, STEP, HIGH = 1180, 58, 30
COLOURS = ("#1f6feb", "#8957e5", "#bf8700", "#1a7f37", "#cf222e", "#0a7ea4", "#6e7781")


def _needed(arrows: Counter[tuple[str, str]]) -> set[tuple[str, str]]:
    """Arrows that no path of others stands for: what one reads off the picture needs no more."""
    below: dict[str, set[str]] = {}
    for room in sorted(FLOOR_OF, key=FLOOR_OF.__getitem__):
        direct = {target for source, target in arrows if source == room}
        below[room] = direct.union(*(below[target] for target in direct)) if direct else set()
    return {
        (source, target)
        for source, target in arrows
        if not any(target in below[other] for other in (t for s, t in arrows if s == source) if other != target)
    }


def svg() -> str:
    """Rooms on their floors; an arrow where one imports another and no path of other arrows says so already."""
    files = Counter(room_of(module) for module in sources())
    arrows = room_arrows()
    top = len(FLOORS) * STEP + 40
    boxes: dict[str, tuple[float, float, float]] = {}
    for number, floor in enumerate(FLOORS):
        gap = WIDTH / len(floor)
        for place, room in enumerate(floor):
            wide = 7.6 * len(f"{room} {files[room]}") + 26
            # single rooms take turns left and right of the middle, so that arrows pass beside them
            shift = 150 * (-1) ** number if len(floor) == 1 else 0
            boxes[room] = (gap * (place + 0.5) + shift, top - (number + 1) * STEP, wide)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {top}" font-family="ui-monospace, monospace" '
        'font-size="13">',
        "<title>Rooms and the arrows between them; every arrow points down</title>",
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0L8 4L0 8z" fill="context-stroke"/></marker></defs>',
        f'<rect width="{WIDTH}" height="{top}" fill="#ffffff"/>',
    ]
    for source, target in sorted(_needed(arrows)):
        (x, y, _), (u, v, _) = boxes[source], boxes[target]
        colour = COLOURS[FLOOR_OF[source] % len(COLOURS)]
        middle = (y + HIGH + v) / 2
        lines.append(
            f'<path d="M{x:.0f} {y + HIGH:.0f}C{x:.0f} {middle:.0f} {u:.0f} {middle:.0f} {u:.0f} {v:.0f}" fill="none" '
            f'stroke="{colour}" stroke-width="1.4" marker-end="url(#tip)"/>'
        )
    for room, (x, y, wide) in boxes.items():
        fill = (
            "#eaf2ff" if room.startswith("evals") else "#fff4e0" if "." not in room and files[room] > 1 else "#f3f4f6"
        )
        count = files[room]
        lines.append(
            f'<rect x="{x - wide / 2:.0f}" y="{y:.0f}" width="{wide:.0f}" height="{HIGH}" rx="5" fill="{fill}" '
            f'stroke="#57606a"/><text x="{x:.0f}" y="{y + 20:.0f}" text-anchor="middle" fill="#1f2328">{room}'
            f'<tspan fill="#6e7781"> {count}</tspan></text>'
        )
    lines.append(
        f'<text x="12" y="{top - 8}" fill="#57606a">{len(FLOOR_OF)} rooms and single modules, {sum(files.values())} '
        f"files, {len(module_arrows())} imports, {len(arrows)} arrows between rooms ({len(_needed(arrows))} drawn: "
        "those that no path says), no circle</text>"
    )
    return "\n".join([*lines, "</svg>", ""])


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(svg(), encoding="utf-8")
