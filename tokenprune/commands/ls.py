"""`tokenprune ls`: names that can be written elsewhere."""

from __future__ import annotations

import argparse


def add(commands: argparse._SubParsersAction) -> None:
    """Declare the subcommand."""
    ls = commands.add_parser("ls", help="list methods, interventions, models, tasks or sweeps")
    ls.add_argument("what", choices=("methods", "interventions", "models", "tasks", "sweeps"))
    ls.set_defaults(handler=_ls)


def _ls(args: argparse.Namespace) -> int:
    what: str = args.what
    from tokenprune.registry import INTERVENTIONS, METHODS, MODELS

    if what in ("methods", "interventions"):
        registry = METHODS if what == "methods" else INTERVENTIONS
        for name in registry.names():
            print(f"{name:<17} {registry.describe(name)}")
    elif what == "models":
        from tokenprune.evals.models.load import pocket_names

        for name in pocket_names():
            print(f"{name:<17} ships with tokenprune")
        for name in MODELS.names():
            print(f"{name:<17} family: {MODELS.describe(name)}")
        print(f"{'OWNER/NAME':<17} a hub id or a local folder of one of the families")
    elif what == "tasks":
        from tokenprune.evals.tasks.load import task_names

        for name in task_names():
            print(name)
        print("lmms:NAME       a task of lmms-eval, see `lmms-eval tasks list`")
        print("PATH.yaml       a task of your own")
    else:
        from tokenprune.evals.config.sweep_file import packaged_configs

        for name, file in packaged_configs().items():
            first = file.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")
            print(f"{name:<21} {first}")
    return 0
