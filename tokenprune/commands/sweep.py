"""`tokenprune sweep`: the grid of a YAML file."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from tokenprune.commands._shared import execute, force_argument


def add(commands: argparse._SubParsersAction) -> None:
    """Declare the subcommand."""
    sweep = commands.add_parser("sweep", help="run the grid of a YAML file", description="Command line wins over file.")
    sweep.add_argument("config", help="a YAML file, or the name of a packaged one, see `tokenprune ls sweeps`")
    sweep_arguments(sweep)
    sweep.add_argument(
        "--executor",
        choices=("local", "ray"),
        default="local",
        help="local: this process, or all that accelerate launch or torchrun started; ray: points spread over a "
        "cluster (%(default)s)",
    )
    sweep.add_argument("--gpus-per-point", type=float, help="ray: share of a GPU for each point; one if there are any")
    sweep.add_argument("--cpus-per-point", type=float, default=1, help="ray: cores for each point (%(default)s)")


def sweep_arguments(parser: argparse.ArgumentParser) -> None:
    """What a file can be overruled with."""
    parser.add_argument("--limit", type=int, help="samples per task")
    parser.add_argument("--output", help="folder of the results")
    parser.add_argument("--device", help="torch device")
    parser.add_argument(
        "--dry-run", action="store_true", help="print the plan, its estimated FLOPs and what is done; run nothing"
    )
    force_argument(parser)
    parser.set_defaults(handler=_sweep)


def _sweep(args: argparse.Namespace) -> int:
    from tokenprune.evals.config.sweep_file import read_config
    from tokenprune.evals.errors import as_user_error

    with as_user_error():
        config = read_config(args.config, limit=args.limit, output=args.output, device=args.device)
    if args.dry_run:
        return _show_plan(config)
    if getattr(args, "executor", "local") == "local":
        return execute(config, force=args.force)
    from tokenprune.evals.sweep.executors.ray import RayCluster

    return execute(config, RayCluster(args.gpus_per_point, args.cpus_per_point), args.force)


def _show_plan(config: Any) -> int:
    """Print the plan; the exit status is 1 if a point cannot run."""
    from rich.console import Console

    from tokenprune.evals.sweep.dry_run import make_plan, plan_lines, plan_tables

    console = Console() if sys.stdout.isatty() else Console(width=160)
    plan = make_plan(config)
    for table in plan_tables(plan):
        console.print(table)
        console.print()
    for line in plan_lines(plan):
        console.print(line, soft_wrap=True, highlight=False, markup=False)
    return 1 if plan.refused else 0
