"""`tokenprune parity`: a finished run compared with published numbers."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any


def add(commands: argparse._SubParsersAction) -> None:
    """Declare the subcommand."""
    parity = commands.add_parser(
        "parity",
        help="a finished run beside published numbers: ours, theirs, difference, inside our interval or not",
        description="Compares with the targets of the run's sweep file, and writes parity.csv beside it.",
    )
    parity.add_argument("run", help="folder of a finished run")
    parity.add_argument("--targets", help="a sweep file with other targets, or the name of a packaged one")
    parity.set_defaults(handler=_parity)


def _parity(args: argparse.Namespace) -> int:
    from tokenprune.evals.errors import as_user_error
    from tokenprune.evals.io.outputs import check_file
    from tokenprune.evals.results.parity import compare, read_run, read_targets

    with as_user_error():
        records, targets = read_run(args.run)
        check_file(Path(args.run) / "parity.csv", "the run's folder")
        if args.targets:
            targets = read_targets(args.targets)
        if not targets:
            raise ValueError(f"The sweep file of {args.run} names no targets; give a file that does with --targets.")
    show_parity(compare(records, targets), Path(args.run))
    return 0


def show_parity(comparisons: Any, folder: Path) -> None:
    """Print the comparison and write parity.csv."""
    from rich.console import Console

    from tokenprune.evals.results.parity import parity_lines, parity_table, write_parity

    console = Console() if sys.stdout.isatty() else Console(width=200)
    console.print(parity_table(comparisons))
    for line in [*parity_lines(comparisons), f"Written: {write_parity(folder / 'parity.csv', comparisons)}"]:
        console.print(line, soft_wrap=True, highlight=False, markup=False)
