"""The reference of the public names; mkdocstrings reads the docstrings."""

from __future__ import annotations

import tokenprune

GROUPS = {
    "Wrapping a model": ("apply", "applied", "Handle"),
    "Names": (
        "list_methods", "list_interventions", "list_models", "register_method", "register_intervention", "register_model",
    ),
    "Writing a method": (
        "Pruner", "View", "Selection", "Budget", "Stage", "ModelDepths", "Signal", "TowerInfo", "Visual", "Raster",
    ),
    "Writing an intervention or a family": ("Intervention", "Adapter"),
    "Hints": ("clip_relevance", "frame_scores", "zoomed"),
}  # fmt: skip


def pages() -> dict[str, str]:
    """Markdown by path.

    Raises:
        ValueError: a public name stands in no group, or in one of them stands a name that is not public.
    """
    listed = {name for group in GROUPS.values() for name in group}
    public = set(tokenprune.__all__) - {"__version__"}
    if listed != public:
        raise ValueError(
            f"docs/site/pages/api.py must list each public name once; differing: {sorted(listed ^ public)}."
        )
    lines = [
        "# Python API", "",
        "Everything that `import tokenprune` offers. Shapes: B rows, S tokens a row, N visual tokens of an image, D width.", "",
    ]  # fmt: skip
    for title, names in GROUPS.items():
        lines += [f"## {title}", ""]
        for name in names:
            module = tokenprune._public[name]
            lines += [f"::: {module}.{name}", "    options: {heading_level: 3}", ""]
    return {"api.md": "\n".join(lines)}
