"""What the methods of a page are called and look like, the same in every plot, table and list of it."""

from __future__ import annotations

from collections.abc import Sequence

from tokenprune.evals.config.points import NONE
from tokenprune.evals.results.records import ResultRecord
from tokenprune.interfaces.budget import budget_size, budget_text
from tokenprune.plan.expression import pruner_parts, split_name, split_outside
from tokenprune.registry import METHODS, UnknownName

# pairs for a light and a dark page; neighbours differ for the usual colour-vision deficiencies, markers tell the rest
COLOURS = (
    ("#2f6fd0", "#6ea8ff"), ("#d1495b", "#ff8793"), ("#1b8a5a", "#4fd19a"), ("#b7791f", "#f0b84f"),
    ("#7b3fc4", "#bf94ff"), ("#0e8aa6", "#52d0e8"), ("#c2410c", "#ff9b5e"), ("#b83280", "#ff86c8"),
    ("#5f7f0f", "#b4d84f"), ("#4c51bf", "#99a0ff"), ("#8a5a3c", "#d9a883"), ("#00796b", "#4fd1c5"),
)  # fmt: skip
GREYS = (("#6b7280", "#a1a7b3"), ("#8b93a1", "#868d9a"), ("#565d69", "#bcc2cc"), ("#9aa1ad", "#747b88"))
INK = ("#111418", "#f3f4f6")
MARKERS = ("circle", "square", "triangle", "diamond", "cross", "down")


def kind_of(method: str) -> str:
    """ "unpruned", "control" (random, fewer pixels, ...), "reference" (is told where the answer is) or "method"."""
    if method == NONE:
        return "unpruned"
    try:
        pruners = [METHODS.get(split_name(part)[0]) for part in pruner_parts(method)]
    except UnknownName:  # a method of the user's own, in another process
        return "method"
    if any("boxes" in pruner.hints for pruner in pruners):
        return "reference"
    alone = len(pruners) == len(split_outside(method, "+"))  # what stands beside a control is what is looked at
    return "control" if alone and all(pruner.published.startswith("control") for pruner in pruners) else "method"


def name_of(record: ResultRecord) -> str:
    """The series of a record, as people read it."""
    return "unpruned" if record["method"] == NONE else record["series"]


def budget_of(record: ResultRecord) -> str:
    """The budget of a record as text; "" for the unpruned model."""
    return "" if record["keep"] is None else budget_text(record["keep"])


def off_budget(record: ResultRecord, panel: Sequence[ResultRecord]) -> str:
    """The budget asked for, where the mean tokens over layers are more than 1 percent off it; else "".

    What a budget stands for is what `random` held with it; without that, the number itself or the share of tokens.
    """
    keep = record["keep"]
    same = [one for one in panel if one["method"] == "random" and not one["options"] and one["keep"] == keep]
    if same:
        asked = float(same[0]["kept_tokens"])
    elif isinstance(keep, (int, float)):
        asked = float(keep) if isinstance(keep, int) else keep * record["visual_tokens"]
    else:
        return ""
    return budget_of(record) if abs(record["kept_tokens"] - asked) > 0.01 * asked else ""


def budget_title(keep: str) -> str:
    """`64 tokens`, `25 % of the tokens`, `avg64`."""
    if keep.isdigit():
        return f"{keep} tokens"
    try:
        return f"{100 * float(keep):g} % of the tokens"
    except ValueError:
        return keep


def budgets(records: list[ResultRecord]) -> list[str]:
    """Budgets of the records as text, the largest first."""
    keeps = {budget_of(record): record["keep"] for record in records if record["keep"] is not None}
    return sorted(keeps, key=lambda text: budget_size(keeps[text]), reverse=True)


def series_styles(records: list[ResultRecord]) -> list[dict[str, str]]:
    """One entry per series, in the order of the records: `name`, `kind`, `light` and `dark` colour, `marker`."""
    series: dict[str, dict[str, str]] = {}
    used = {"method": 0, "control": 0}
    for record in records:
        name = name_of(record)
        if name in series:
            continue
        kind = kind_of(record["method"])
        place = used.get(kind, 0)
        used[kind] = place + 1
        palette = COLOURS if kind == "method" else GREYS if kind == "control" else (INK,)
        light, dark = palette[place % len(palette)]
        marker = "star" if kind == "unpruned" else "circle" if kind == "reference" else MARKERS[place % len(MARKERS)]
        series[name] = {"name": name, "kind": kind, "light": light, "dark": dark, "marker": marker}
    return list(series.values())
