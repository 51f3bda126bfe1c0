"""The picture of a run: accuracy against the FLOPs to the first token, with intervals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from tokenprune.evals.config.points import NONE
from tokenprune.evals.io.atomic_files import replaced
from tokenprune.evals.io.rows import FlopsCosts
from tokenprune.evals.results.records import ResultRecord
from tokenprune.evals.results.summary import title_of

# distinguishable with the usual colour-vision deficiencies in neighbouring pairs; markers tell the rest apart
COLOURS = (
    "#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#ee7733", "#332288", "#44aa99", "#882255",
    "#7ba800", "#b07d48",
)  # fmt: skip
MARKERS = "os^Dv<>Phpd*X"
GREYS = {"random": "#777777", "oracle": "#111111"}


def series_of(records: list[ResultRecord]) -> dict[str, list[ResultRecord]]:
    """Records by series, each sorted by FLOPs; the unpruned model left out."""
    series: dict[str, list[ResultRecord]] = {}
    for record in records:
        if record["method"] != NONE:
            series.setdefault(record["series"], []).append(record)
    return {name: sorted(group, key=flops_decoder) for name, group in series.items()}


def _analytic(record: ResultRecord, *parts: str) -> float:
    """FLOPs of these parts in units of 1e9; only for records that have them."""
    counted = cast(FlopsCosts, record.get("flops"))["analytic"]
    return sum(cast(float, counted[part]) for part in parts) / 1e9


def _has(record: ResultRecord, part: str) -> bool:
    """Whether a part of a record's FLOPs was counted and is modelled."""
    flops = record.get("flops")
    return bool(flops) and flops["analytic"][part] is not None


def flops_decoder(record: ResultRecord) -> float:
    """FLOPs that the number of kept tokens decides, in units of 1e9: selection and prefill."""
    return _analytic(record, "selection", "prefill")


def flops_total(record: ResultRecord) -> float:
    """FLOPs to the first token, in units of 1e9: tower, projector, selection and prefill."""
    return _analytic(record, "total")


def styles(names: list[str]) -> dict[str, tuple[str, str]]:
    """(colour, marker) by series; the controls are grey and black so that methods stand out."""
    colours = iter(COLOURS * 3)
    return {name: (GREYS.get(name) or next(colours), MARKERS[index % len(MARKERS)]) for index, name in enumerate(names)}


def plot_pareto(records: list[ResultRecord], path: Path) -> Path:
    """Write the plot: a row per model and task; left the decoder's FLOPs, right all up to the first token. Points
    without FLOPs, or whose FLOPs are not modelled, are left out."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = list(dict.fromkeys((record["model"], record["task"]) for record in records))
    figure, axes = plt.subplots(
        len(panels),
        2,
        figsize=(13, 5.2 * len(panels)),
        squeeze=False,
        layout="constrained",
        sharey="row",
        width_ratios=[8, 5],
    )
    for (model, task), (left, right) in zip(panels, axes, strict=True):
        whole = [r for r in records if (r["model"], r["task"]) == (model, task)]
        counted = [record for record in whole if _has(record, "prefill") and _has(record, "selection")]
        in_all = [record for record in whole if _has(record, "total")]
        _panel(left, counted, flops_decoder, spread=0.022)
        _panel(right, in_all, flops_total, spread=0.0)
        left.set_title(title_of(whole[0]), loc="left", fontsize=11)
        left.set_xscale("log")
        left.set_xlabel("GFLOPs of selection and prefill (log; one budget's points are spread sideways)")
        left.set_ylabel("accuracy, percent (bars: 95 percent bootstrap)")
        right.set_xlabel("GFLOPs to the first token, vision tower included")
        low, high = left.get_ylim()
        left.set_ylim(max(0.0, min(low, high - 4)), min(100.0, max(high, low + 4)))
        ticks_of_budgets(left, counted)
        if in_all:
            right.legend(fontsize=8.5, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    with replaced(path) as partial:
        figure.savefig(partial, dpi=130)
    plt.close(figure)
    return path


def ticks_of_budgets(ax: Any, records: list[ResultRecord]) -> None:
    """Label the x axis where the budgets are."""
    places: dict[float, str] = {}
    for record in records:
        if record["method"] in (NONE, "random"):
            places[flops_decoder(record)] = f"{flops_decoder(record):.3g}\n{record['kept_tokens']:g} tokens"
    ax.set_xticks(list(places), list(places.values()))
    ax.minorticks_off()


def _panel(ax: Any, records: list[ResultRecord], cost: Callable[[ResultRecord], float], spread: float) -> None:
    """Series over `cost`; `spread` moves the points of neighbouring series apart, in shares of the log range."""
    groups = series_of(records)
    looks = styles(list(groups))
    unpruned = next((record for record in records if record["method"] == NONE), None)
    xs = [cost(record) for group in [*groups.values(), [unpruned] if unpruned else []] for record in group]
    step = (max(xs) / min(xs)) ** spread if xs else 1.0
    for index, (name, group) in enumerate(groups.items()):
        # one budget costs every method nearly the same, so points are spread sideways to be told apart
        shift = step ** (index - (len(groups) - 1) / 2)
        colour, marker = looks[name]
        y = [100 * record["overall"]["accuracy"] for record in group]
        low = [100 * record["overall"]["ci_low"] for record in group]
        high = [100 * record["overall"]["ci_high"] for record in group]
        x = [cost(record) * shift for record in group]
        style = "--" if name in GREYS else "-"
        ax.plot(x, y, style, color=colour, marker=marker, ms=5.5, lw=1.3, label=name, zorder=3)
        ax.vlines(x, low, high, color=colour, lw=1.0, alpha=0.45, zorder=2)
    if unpruned is not None:
        scores = unpruned["overall"]
        level = 100 * scores["accuracy"]
        ax.axhspan(100 * scores["ci_low"], 100 * scores["ci_high"], color="#000000", alpha=0.05, lw=0, zorder=0)
        ax.axhline(level, color="#000000", lw=0.8, ls=":", zorder=1)
        ax.plot([cost(unpruned)], [level], "*", color="#000000", ms=12, label="unpruned", zorder=4)
    ax.grid(True, color="#dddddd", lw=0.6)
    ax.set_axisbelow(True)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
