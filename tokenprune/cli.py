"""The command `tokenprune`; its subcommands are the files of `tokenprune/commands/`."""

from __future__ import annotations

import argparse
import os
import sys
from importlib import import_module

from tokenprune import __version__
from tokenprune.commands import NAMES

_EXAMPLES = """examples:
  tokenprune demo
  tokenprune ls methods
  tokenprune run --method vtc_cls --keep 64
  tokenprune eval --model pocket-llava --tasks pocket --method holov --keep 64 --limit 150 --output runs/holov
  tokenprune sweep configs/pocket_llava.yaml
  tokenprune report runs/demo
  tokenprune compare runs/demo:vtc_cls@64 runs/demo:holov@64
  tokenprune tune vflowopt --model pocket-llava --data pocket --budget 0.25
  tokenprune train gtc --model pocket-llava --data pocket --output runs/gtc
"""


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="tokenprune",
        description="Prune visual tokens of Hugging Face vision-language models, and measure what it costs.",
        epilog=_EXAMPLES,
        formatter_class=raw,
    )
    parser.add_argument("--version", action="version", version=f"tokenprune {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name in NAMES:
        import_module(f"tokenprune.commands.{name}").add(commands)
    for subcommand in commands.choices.values():  # each takes methods by name, or reads results of them
        subcommand.add_argument(
            "--import", dest="imports", action="append", default=[], metavar="FILE.py",
            help="a Python file that registers a method, intervention or family of your own; several times for several",
        )  # fmt: skip
    return parser


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status. What the user got wrong is one sentence on stderr and status 2."""
    args = _parser().parse_args(argv)
    from contextlib import ExitStack

    from tokenprune.evals.errors import UserError, as_user_error
    from tokenprune.user_files import importing

    imports = args.__dict__.pop("imports", [])  # no setting of a command
    try:
        with ExitStack() as stack:
            with as_user_error():
                stack.enter_context(importing(imports))
            status = args.handler(args)
        sys.stdout.flush()  # here, so that a closed pipe is met below and not while the interpreter ends
        return status
    except BrokenPipeError:  # `tokenprune ls methods | head`: who reads has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except UserError as error:
        print(f"tokenprune: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        goes_on = args.command in ("eval", "sweep", "demo", "tune", "train", "recommend")
        print("\nStopped." + " The same command goes on where it was." * goes_on, file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
