"""Write the README's result table from a run: `python -m tokenprune.evals.readme runs/demo README.md`."""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"


def markdown_table(rows: list[dict[str, str]], budgets: list[str]) -> str:
    """Methods down, budgets across: accuracy in percent, and prefill FLOPs as a share of the unpruned model's.

    Args:
        rows: the `overall` rows of a summary.csv.
        budgets: values of `keep`, in the order of the columns.
    """
    cells = {(row["method"], row["keep"]): row for row in rows}
    methods = list(dict.fromkeys(row["method"] for row in rows if row["method"] != "none"))
    lines = ["| method | " + " | ".join(f"{keep} tokens" for keep in budgets) + " |", "|---|" + "---:|" * len(budgets)]
    for method in methods:
        found = [cells.get((method, keep)) for keep in budgets]
        lines.append(f"| {method} | " + " | ".join("" if row is None else _cell(row) for row in found) + " |")
    unpruned = next((row for row in rows if row["method"] == "none"), None)
    if unpruned is not None:
        lines.insert(
            2,
            f"| unpruned, {float(unpruned['visual_tokens']):.0f} tokens | {_cell(unpruned)} |"
            + " |" * (len(budgets) - 1),
        )
    return "\n".join(lines)


def _cell(row: dict[str, str]) -> str:
    share = f" ({float(row['flops_share']):.0%} FLOPs)" if row.get("flops_share") else ""
    return f"{float(row['accuracy']):.1%}{share}"


def main() -> None:
    """Replace what stands between the two markers of the README."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="folder of a run, with summary.csv")
    parser.add_argument("readme", type=Path, help="file with the two markers")
    options = parser.parse_args()
    with (options.run / "summary.csv").open(encoding="utf-8") as stream:
        rows = [row for row in csv.DictReader(stream) if row["family"] == "overall"]
    budgets = sorted({row["keep"] for row in rows if row["keep"]}, key=float, reverse=True)
    text = options.readme.read_text(encoding="utf-8")
    if BEGIN not in text or END not in text:
        raise ValueError(f"{options.readme} has no lines {BEGIN} and {END} to write the table between.")
    head, rest = text.split(BEGIN, 1)
    tail = rest.split(END, 1)[1]
    options.readme.write_text(f"{head}{BEGIN}\n{markdown_table(rows, budgets)}\n{END}{tail}", encoding="utf-8")


if __name__ == "__main__":
    main()
