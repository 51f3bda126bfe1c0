"""Write the README's tables: `python -m tokenprune.evals.report.readme README.md [--results runs/demo]`.

The table of methods comes from the registry, the table of results from a run's summary.csv; nobody types a number.
"""

from __future__ import annotations

import argparse
import csv
import re
from pathlib import Path

from tokenprune.interfaces.budget import budget_size, read_budget
from tokenprune.registry import METHODS


def between(text: str, name: str, table: str) -> str:
    """`text` with what is between the lines `<!-- name:begin -->` and `<!-- name:end -->` replaced.

    Raises:
        ValueError: `text` lacks the two lines.
    """
    pattern = re.compile(rf"(<!-- {name}:begin -->\n).*?(<!-- {name}:end -->)", re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"The file has no lines <!-- {name}:begin --> and <!-- {name}:end --> to write between.")
    return pattern.sub(lambda match: f"{match[1]}{table}\n{match[2]}", text)


def methods_table() -> str:
    """One row a registered built-in method: name, first docstring line, source."""
    lines = ["| name | what it does | source |", "|---|---|---|"]
    for name in METHODS.names():
        lines.append(f"| `{name}` | {METHODS.describe(name)} | {METHODS.get(name).published} |")
    return "\n".join(lines)


def results_table(rows: list[dict[str, str]], command: str) -> str:
    """Methods down, budgets across: accuracy in percent, with its change against random at the same tokens.

    Args:
        rows: the `overall` rows of a summary.csv.
        command: what made them, printed below.
    """
    asked = {row["keep"] for row in rows if row["keep"]}
    budgets = sorted(asked, key=lambda keep: budget_size(read_budget(keep)), reverse=True)
    cells = {(row["method"], row["keep"]): row for row in rows}
    share = {keep: next(row["flops_share"] for row in rows if row["keep"] == keep) for keep in budgets}
    heads = [f"{keep} tokens" + (f" ({float(share[keep]):.0%} of FLOPs)" if share[keep] else "") for keep in budgets]
    lines = ["| method | " + " | ".join(heads) + " |", "|---|" + "---:|" * len(budgets)]
    for row in rows:
        if row["method"] == "none":
            lines.append(
                f"| unpruned ({float(row['visual_tokens']):.0f} tokens) | {_percent(row)} |" + " |" * (len(budgets) - 1)
            )
    for method in dict.fromkeys(row["method"] for row in rows if row["method"] != "none"):
        in_budgets = [cells.get((method, keep)) for keep in budgets]
        lines.append(f"| {method} | " + " | ".join("" if row is None else _percent(row) for row in in_budgets) + " |")
    samples = rows[0]["n"]
    lines += [
        "",
        f"Accuracy on {samples} questions with its 95 percent bootstrap interval, by `{command}`; the share of",
    ]
    lines += [f"FLOPs is that of the first method of the column ({_first(rows, budgets)}), up to the first token."]
    return "\n".join(lines)


def _first(rows: list[dict[str, str]], budgets: list[str]) -> str:
    return next(row["method"] for row in rows if row["keep"] == budgets[0])


def _percent(row: dict[str, str]) -> str:
    low, high = float(row["ci_low"]), float(row["ci_high"])
    return f"{100 * float(row['accuracy']):.1f} ({100 * low:.0f}-{100 * high:.0f})"


def main() -> None:
    """Rewrite the tables in place."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("readme", type=Path, help="file with the markers")
    parser.add_argument("--results", type=Path, help="folder of a run; without it the results stay as they are")
    options = parser.parse_args()
    text = between(options.readme.read_text(encoding="utf-8"), "methods", methods_table())
    if options.results is not None:
        with (options.results / "summary.csv").open(encoding="utf-8") as stream:
            rows = [row for row in csv.DictReader(stream) if row["family"] == "overall"]
        name = options.results.name
        command = "make demo" if name == "demo" else f"tokenprune sweep configs/{name}.yaml"
        text = between(text, "results", results_table(rows, command))
    options.readme.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
