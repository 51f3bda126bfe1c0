"""`tokenprune report`: the page of finished runs, written anew from their files."""

from __future__ import annotations

import argparse


def add(commands: argparse._SubParsersAction) -> None:
    """Declare the subcommand."""
    report = commands.add_parser(
        "report",
        help="write the report page of one or more finished runs",
        description="One self-contained HTML page that opens from disk. Several runs share one leaderboard, and every "
        "comparison is made anew over the samples that both sides answered. Loads no model and no data.",
    )
    report.add_argument("runs", nargs="+", metavar="FOLDER", help="folder of a finished run, such as runs/demo")
    report.add_argument(
        "--output",
        help="where it goes; report.html in the folder of the first run by default. A name that ends in .md gets the "
        "leaderboard as Markdown in place of the page",
    )
    report.set_defaults(handler=_report)


def _report(args: argparse.Namespace) -> int:
    from pathlib import Path

    from tokenprune.evals.errors import as_user_error
    from tokenprune.evals.io.outputs import check_file
    from tokenprune.evals.report.markdown import write_markdown
    from tokenprune.evals.report.page import write_report
    from tokenprune.evals.results.run_folder import read_run

    with as_user_error():
        path = check_file(Path(args.output) if args.output else Path(args.runs[0]) / "report.html")
        runs = [read_run(folder) for folder in args.runs]
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".md":
            write_markdown(path, runs)
            print(path)
            return 0
        write_report(path, runs)
    print(f"{path}  {path.stat().st_size / 1e6:.1f} MB, opens without a network")
    return 0
