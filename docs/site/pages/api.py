"""The reference of the public names; mkdocstrings reads the docstrings."""

from __future__ import annotations

import tokenprune

GROUPS = {
    "Wrapping a model": ("apply", "applied", "Handle"),
    "Names": (
        "MethodName", "list_methods", "list_interventions", "list_models", "register_method", "register_intervention", "register_model",
    ),
    "Writing a method": (
        "Pruner", "View", "Selection", "Budget", "Stage", "ModelDepths", "Signal", "TowerInfo", "Visual", "Raster",
    ),
    "Writing an intervention or a family": ("Intervention", "Adapter"),
    "Hints": ("clip_relevance", "frame_scores", "zoomed"),
}  # fmt: skip


def pages() -> dict[str, str]:
    """Markdown by path.

    A public name that stands in no group comes at the end.
    """
    listed = {name for group in GROUPS.values() for name in group}
    others = tuple(sorted(set(tokenprune.__all__) - {"__version__"} - listed))
    lines = [
        "# Python API", "",
        "Everything that `import tokenprune` offers. Shapes: B rows, S tokens a row, N visual tokens of an image, D width.", "",
    ]  # fmt: skip
    for title, names in {**GROUPS, **({"More": others} if others else {})}.items():
        lines += [f"## {title}", ""]
        for name in names:
            module = getattr(tokenprune, name).__module__  # where it is written, not where it is handed on
            lines += [f"::: {module}.{name}", "    options: {heading_level: 3}", ""]
    return {"api.md": "\n".join(lines)}
