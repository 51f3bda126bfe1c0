"""`tokenprune ls`: names that can be written elsewhere."""

from __future__ import annotations

import argparse
from pathlib import Path


def add(commands: argparse._SubParsersAction) -> None:
    """Declare the subcommand."""
    ls = commands.add_parser("ls", help="list methods, interventions, models, tasks or sweeps")
    ls.add_argument("what", choices=("methods", "interventions", "models", "tasks", "sweeps"))
    ls.add_argument("name", nargs="?", help="with methods and interventions: all of one, its options, source and notes")
    ls.add_argument("--missing", action="store_true", help="with models: the classes that cannot be pruned, and why")
    ls.add_argument("--json", action="store_true", help="with methods: as JSON, for other programs")
    ls.set_defaults(handler=_ls)


def _ls(args: argparse.Namespace) -> int:
    what: str = args.what
    from tokenprune.evals.errors import UserError
    from tokenprune.registry import MODELS

    if what != "methods" and (args.json or (args.name is not None and what != "interventions")):
        raise UserError(f"A name and --json go with `ls methods`, not with `ls {what}`.")
    if what != "models" and args.missing:
        raise UserError(f"--missing goes with `ls models`, not with `ls {what}`.")
    if what == "methods":
        _methods(args.name, args.json)
    elif what == "interventions":
        from tokenprune.commands._interventions import intervention_details, intervention_lines
        from tokenprune.evals.errors import as_user_error

        with as_user_error():
            print("\n".join(intervention_lines() if args.name is None else intervention_details(args.name)))
    elif args.missing:
        from tokenprune.adapters.generic import MISSING

        for name, why in sorted(MISSING.items()):
            print(f"{name}: {why}")
    elif what == "models":
        from tokenprune.evals.models.load import pocket_names

        for name in pocket_names():
            print(f"{name:<17} ships with tokenprune")
        for name in MODELS.names():
            print(f"{name:<17} family: {MODELS.describe(name)}")
        print(f"{'OWNER/NAME':<17} a hub id or a local folder of one of the families")
        _classes()
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


def _classes() -> None:
    """What tests prove of each class."""
    import importlib

    import yaml

    from tokenprune.interfaces.capability import CAPABILITIES

    folder = Path(next(iter(importlib.import_module("tokenprune.adapters").__path__)))
    rows = yaml.safe_load((folder / "capabilities.yaml").read_text(encoding="utf-8"))
    wide = max(map(len, rows)) + 2
    print(f"\n{'class':<{wide}}" + "  ".join(f"{name:<19}" for name in CAPABILITIES).rstrip())
    for cls, row in rows.items():
        print(f"{cls:<{wide}}" + "  ".join(f"{row[name]:<19}" for name in CAPABILITIES).rstrip())
    print(f"{'any other':<{wide}}read off the model and tried when a method is applied; see `tokenprune check-model`")


def _methods(name: str | None, as_json: bool) -> None:
    import json

    from tokenprune.commands._methods import detail_lines, method_details, method_lines, method_rows
    from tokenprune.evals.errors import as_user_error

    if name is None:
        print(json.dumps(method_rows(), indent=1) if as_json else "\n".join(method_lines()))
        return
    with as_user_error():
        details = method_details(name)
    print(json.dumps(details, indent=1, default=str) if as_json else "\n".join(detail_lines(details)))
