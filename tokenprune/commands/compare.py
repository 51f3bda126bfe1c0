"""`tokenprune compare`: the paired difference of two runs."""

from __future__ import annotations

import argparse
import sys
from typing import Any


def add(commands: argparse._SubParsersAction) -> None:
    """Declare the subcommand."""
    compare = commands.add_parser(
        "compare",
        help="the paired difference of two runs, or of two points of them",
        description="Over the samples that both answered: accuracy of A minus that of B with its 95 percent paired "
        "bootstrap interval, exact McNemar test, and how many samples a difference like this needs. Two folders: every "
        "point that both have. Two points: runs/x:holov@64 runs/y:fastv@64.",
    )
    for name in ("first", "second"):
        compare.add_argument(
            name, metavar="AB"[name == "second"], help="run folder, or FOLDER:POINT such as runs/x:holov@64"
        )
    compare.add_argument("--method", help="only this method, at every budget that both runs have")
    compare.add_argument("--seed", type=int, default=0, help="of the bootstrap (%(default)s)")
    compare.set_defaults(handler=_compare)


def _compare(args: argparse.Namespace) -> int:
    from rich.console import Console

    from tokenprune.evals.errors import as_user_error
    from tokenprune.evals.results.compare import OVERALL, compare
    from tokenprune.evals.statistics.verdict import LEAST

    with as_user_error():
        comparisons = compare(args.first, args.second, args.method, args.seed)
    console = Console() if sys.stdout.isatty() else Console(width=160)
    for task in dict.fromkeys(each.task for each in comparisons):
        of_task = [each for each in comparisons if each.task == task]
        console.print(f"\n{task}: A = {args.first}, B = {args.second}", highlight=False, markup=False)
        if len(of_task) == 1:
            rows = [
                (family, of_task[0].accuracies[family], comparison, None)
                for family, comparison in of_task[0].families.items()
            ]
            console.print(_table("family", rows))
        else:
            rows = [(_pair(each), each.accuracies[OVERALL], each.families[OVERALL], each.holm) for each in of_task]
            console.print(_table("point", rows))
        alone = max(of_task, key=lambda each: each.only_first + each.only_second)
        if alone.only_first or alone.only_second:
            console.print(
                f"{alone.only_first} samples are only in A and {alone.only_second} only in B; they were left out.",
                highlight=False,
            )
    for note in comparisons[0].notes:
        console.print(note, highlight=False, markup=False)
    console.print(
        "\ndifference: A minus B in points, with its 95 percent paired bootstrap interval. won / lost: samples on "
        "which A / B\nscores higher. p: exact McNemar, or flipped signs where scores are graded. needed: samples that "
        "show a difference like\nthis with 80 percent power at two-sided 5 percent; can show: the smallest difference "
        "that these samples show so. A is: by\np, corrected for all rows of its kind, and with at least "
        f"{LEAST} samples.\nThe two points may differ in cost; the leaderboard compares at equal cost.",
        highlight=False,
    )
    return 0


def _pair(each: Any) -> str:
    return each.first if each.first == each.second else f"{each.first} - {each.second}"


def _corrected(rows: list[Any]) -> list[float]:
    """The p-value that the verdict of each row goes by: corrected for all points, or, of question families, for all
    families; that of all samples of two points is one test."""
    from tokenprune.evals.results.compare import OVERALL
    from tokenprune.evals.statistics.significance import holm

    families = iter(holm([row[2].p for row in rows if row[3] is None and row[0] != OVERALL]))
    return [row[3] if row[3] is not None else row[2].p if row[0] == OVERALL else next(families) for row in rows]


def _said(paired: Any, corrected: float) -> str:
    from tokenprune.evals.statistics.verdict import verdict

    return verdict(paired.difference, corrected, paired.n, paired.needed).sentence("B")


def _table(head: str, rows: list[Any]) -> Any:
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    holm = any(row[3] is not None for row in rows)
    heads = [head, "n", "A %", "B %", "difference", "interval", "won / lost", "p", *(["p, Holm"] if holm else []),
             "A is", "needed", "can show"]  # fmt: skip
    for place, name in enumerate(heads):
        table.add_column(name, justify="right" if place else "left", no_wrap=True)
    for (name, (first, second), paired, adjusted), corrected in zip(rows, _corrected(rows), strict=True):
        cells = [
            escape(name), str(paired.n), f"{100 * first:.1f}", f"{100 * second:.1f}", f"{100 * paired.difference:+.1f}",
            f"{100 * paired.low:+.1f} to {100 * paired.high:+.1f}", f"{paired.won} / {paired.lost}", f"{paired.p:.2g}",
            *([f"{adjusted:.2g}"] if holm else []), _said(paired, corrected),
            "" if paired.needed is None else str(paired.needed),
            "" if paired.detectable is None else f"{100 * paired.detectable:.1f}",
        ]  # fmt: skip
        table.add_row(*cells)
    return table
