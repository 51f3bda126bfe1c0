"""Who may import whom: rooms stand on floors, and no arrow points up, to its own floor, or in a circle.

The picture of the same arrows is `docs/rooms.svg`, see docs/architecture.md.
"""

from __future__ import annotations

import pytest
from _imports import ROOT, imports, sources
from _rooms import FLOOR_OF, module_arrows, room_of, svg

APART = ("methods", "interventions", "adapters")
"""Rooms whose public files do not import each other: each is a plug-in. Helpers begin with an underscore."""


ARROWS = module_arrows()


def test_every_module_stands_in_a_room():
    assert {room_of(module) for module in sources()} == {"", *FLOOR_OF}


def test_no_arrow_points_up_or_to_its_own_floor():
    wrong = [
        f"{module} imports {target}"
        for module, target in ARROWS
        if room_of(module) != room_of(target) and FLOOR_OF[room_of(module)] <= FLOOR_OF[room_of(target)]
    ]
    assert wrong == []


def test_no_circle_inside_a_room():
    graph = {module: {target for target in imports()[module] if target} for module in sources() if module}
    while free := {module for module, targets in graph.items() if not targets & graph.keys()}:
        graph = {module: targets for module, targets in graph.items() if module not in free}
    assert sorted(graph) == []


@pytest.mark.parametrize("room", APART)
def test_a_plug_in_imports_no_other(room):
    public = {module for module in sources() if module.startswith(f"{room}.") and "._" not in module}
    assert len(public) > (1 if room != "interventions" else 0)
    assert [pair for pair in ARROWS if set(pair) <= public] == []


def test_no_private_name_is_taken_across_rooms():
    wrong = [
        f"{module} takes {target}.{name}"
        for module, target in ARROWS
        for name in imports()[module][target]
        if room_of(module) != room_of(target) and (name.startswith("_") and name != "__version__" or "._" in target)
    ]
    assert wrong == []


def test_every_room_says_its_subject():
    for room in sorted(set(map(room_of, sources())) - {""}):
        folder = (
            ROOT / ("" if room.startswith(("adapters", "kernels", "evals")) else "tokenprune") / room.replace(".", "/")
        )
        if folder.is_dir():
            said = folder / "__init__.py" if (folder / "__init__.py").is_file() else folder / "README.md"
            text = said.read_text(encoding="utf-8")
            assert "In:" in text and "Out:" in text and len(text.splitlines()) <= 15, f"{said}: subject, In:, Out:"


def test_a_file_is_short():
    long = {module: len(file.read_text(encoding="utf-8").splitlines()) for module, file in sources().items()}
    assert {module: lines for module, lines in long.items() if lines > 450} == {}


def test_the_picture_of_the_rooms_is_that_of_today():
    drawn = (ROOT / "docs" / "rooms.svg").read_text(encoding="utf-8")
    assert drawn == svg(), "draw it anew: python tests/_rooms.py docs/rooms.svg"
