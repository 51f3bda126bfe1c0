"""The picture of a run: accuracy against the FLOPs to the first token, with intervals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenprune.evals.config import NONE

# distinguishable with the usual colour-vision deficiencies in neighbouring pairs; markers tell the rest apart
COLOURS = (
    "#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#ee7733", "#117733", "#882255", "#44aa99",
    "#332288", "#999933",
)  # fmt: skip
MARKERS = "os^Dv<>Phpd*X"
GREYS = {"random": "#777777", "oracle": "#111111"}


def series_of(records: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Records by series, each sorted by FLOPs; the unpruned model left out."""
    found: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        if record["method"] != NONE and record.get("flops"):
            found.setdefault(record["series"], []).append(record)
    return {name: sorted(group, key=flops_total) for name, group in found.items()}


def flops_total(record: dict[str, Any]) -> float:
    """FLOPs to the first token, in units of 1e9: tower, projector, selection and prefill."""
    return record["flops"]["analytic"]["total"] / 1e9


def styles(names: list[str]) -> dict[str, tuple[str, str]]:
    """(colour, marker) by series; the controls are grey and black so that methods stand out."""
    colours = iter(COLOURS * 3)
    return {name: (GREYS.get(name) or next(colours), MARKERS[index % len(MARKERS)]) for index, name in enumerate(names)}


def plot_pareto(records: list[dict[str, Any]], path: Path) -> Path:
    """Write the plot: one panel per model and task."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = list(dict.fromkeys((record["model"], record["task"]) for record in records))
    figure, axes = plt.subplots(1, len(panels), figsize=(8.6 * len(panels), 5.2), squeeze=False, layout="constrained")
    for (model, task), ax in zip(panels, axes[0], strict=True):
        _panel(ax, [r for r in records if (r["model"], r["task"]) == (model, task)])
        ax.set_title(f"{Path(model).name} on {task}", loc="left", fontsize=11)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def _panel(ax: Any, records: list[dict[str, Any]]) -> None:
    groups = series_of(records)
    looks = styles(list(groups))
    unpruned = next((record for record in records if record["method"] == NONE), None)
    xs = [flops_total(record) for group in groups.values() for record in group]
    width = (max(xs) - min(xs)) if xs else 0.0
    for index, (name, group) in enumerate(groups.items()):
        # one budget costs every method nearly the same, so points are spread sideways to be told apart
        shift = (index - (len(groups) - 1) / 2) * 0.012 * width
        colour, marker = looks[name]
        y = [100 * record["overall"]["accuracy"] for record in group]
        low = [100 * record["overall"]["ci_low"] for record in group]
        high = [100 * record["overall"]["ci_high"] for record in group]
        x = [flops_total(record) + shift for record in group]
        style = "--" if name in GREYS else "-"
        ax.plot(x, y, style, color=colour, marker=marker, ms=5.5, lw=1.3, label=name, zorder=3)
        ax.vlines(x, low, high, color=colour, lw=1.0, alpha=0.45, zorder=2)
    if unpruned is not None and unpruned.get("flops"):
        scores = unpruned["overall"]
        level = 100 * scores["accuracy"]
        ax.axhspan(100 * scores["ci_low"], 100 * scores["ci_high"], color="#000000", alpha=0.05, lw=0, zorder=0)
        ax.axhline(level, color="#000000", lw=0.8, ls=":", zorder=1)
        ax.plot([flops_total(unpruned)], [level], "*", color="#000000", ms=12, label="unpruned", zorder=4)
    ax.set_xlabel("GFLOPs to the first token (vision tower + projector + selection + prefill)")
    ax.set_ylabel("accuracy, percent (bars: 95 percent bootstrap)")
    ax.grid(True, color="#dddddd", lw=0.6)
    ax.set_axisbelow(True)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    ax.legend(fontsize=8.5, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
