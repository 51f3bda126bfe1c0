"""`tokenprune demo`: the packaged sweep for newcomers."""

from __future__ import annotations

import argparse

from tokenprune.commands.sweep import sweep_arguments


def add(commands: argparse._SubParsersAction) -> None:
    """Declare the subcommand."""
    demo = commands.add_parser("demo", help="the sweep configs/demo.yaml: minutes on a laptop, no GPU, no download")
    demo.set_defaults(config="demo")
    sweep_arguments(demo)
