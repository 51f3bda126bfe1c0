"""What several subcommands take and do."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from tokenprune.interfaces.budget import read_budget
from tokenprune.plan.expression import yaml_value


def model_arguments(parser: argparse.ArgumentParser) -> None:
    """--model, --dtype, --device."""
    parser.add_argument("--model", default="pocket-llava", help="pocket name, local folder or hub id (%(default)s)")
    parser.add_argument("--dtype", default="float32", help="float32, bfloat16 or float16 (%(default)s)")
    parser.add_argument("--device", help="torch device; a GPU where there is one by default")


def budget_argument(text: str) -> int | float | str:
    """Type of --keep."""
    try:
        return read_budget(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def parse_options(pairs: list[str], option: str = "--set") -> dict[str, Any]:
    """`["variant=official", "layers=[1, 2]"]` to a mapping; values are read as YAML.

    Raises:
        ValueError: an entry without `=`, an option given twice, or a value that is no YAML.
    """
    options: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise ValueError(f"{option} takes OPTION=VALUE, got {pair!r}.")
        if name in options:
            raise ValueError(f"{option} {name} was given twice.")
        options[name] = yaml_value(value, f"The value in {option} {pair}")
    return options


def check_keep(method: str, keep: Any) -> None:
    """Raise ValueError if the method needs a budget and has none, or the other way round."""
    from tokenprune.evals.config.points import NONE, needs_budget
    from tokenprune.plan.expression import pruner_parts

    if needs_budget(method) and keep is None:
        raise ValueError(f"Say how many visual tokens {method} keeps: --keep 64 or --keep 0.25.")
    said = [part for part in pruner_parts(method) if "@" in part]
    if keep is not None and said:
        raise ValueError(f"{method} says its own budget, {said[0]}; leave --keep {keep} out.")
    if keep is not None and method != NONE and not pruner_parts(method):
        raise ValueError(f"{method} changes attention and keeps every token; leave --keep out.")


def force_argument(parser: argparse.ArgumentParser) -> None:
    """--force."""
    parser.add_argument(
        "--force", action="store_true", help="replace finished results of other settings that the folder holds"
    )


def execute(config: Any, executor: Any = None, force: bool = False) -> int:
    """Run a grid and print its tables; the exit status.

    Args:
        executor: who does the work, see `evals/sweep/executors/`.
        force: see `sweep.run`.
    """
    from tokenprune.evals.errors import as_user_error
    from tokenprune.evals.io.outputs import check_folder

    with as_user_error():
        config.check()
        check_folder(config.folder)
    from rich.console import Console

    from tokenprune.evals.report.tables import result_tables
    from tokenprune.evals.results.over_seeds import seed_tables
    from tokenprune.evals.sweep.sweep import run
    from tokenprune.evals.tasks.load import cut_short

    console = Console() if sys.stdout.isatty() else Console(width=160)
    done = run(config, console, executor, force)
    if not done.files:
        return 0  # one of several processes, not the one that writes
    for table in [*result_tables(done.records, console.width), *seed_tables(done.records)]:
        console.print()
        console.print(table)
    if config.targets:
        from tokenprune.commands.parity import show_parity
        from tokenprune.evals.results.parity import compare

        console.print()
        show_parity(compare(done.records, config.targets), config.folder)
    console.print()
    if cut_short(config.all_tasks, config.limit):
        console.print(f"A limit of {config.limit} samples was set: these are not the numbers of the whole task.")
    for note in done.warnings:
        console.print(note, style="yellow", markup=False)
    console.print(f"{done.seconds:.0f} s. Written:")
    for file in done.files:
        console.print(f"  {file}", soft_wrap=True, highlight=False, markup=False)
    return 0
