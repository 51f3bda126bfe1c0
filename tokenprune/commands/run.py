"""`tokenprune run`: one picture, one question."""

from __future__ import annotations

import argparse
from typing import Any

from tokenprune.commands._shared import budget_argument, check_keep, model_arguments, parse_options


def add(commands: argparse._SubParsersAction) -> None:
    """Declare the subcommand."""
    run = commands.add_parser(
        "run",
        help="one picture, one question: the answer with and without pruning, and a picture of what was kept",
        description="Without --image and --question a sign of the model's pocket suite is to be read: a picture that "
        "pruning can get wrong. Prints tokens, FLOPs, KV bytes and times of both; the times are of one run each, see "
        "`tokenprune sweep` for measured ones.",
    )
    model_arguments(run)
    run.add_argument(
        "--method",
        required=True,
        help='holov, var, "vtc_cls+var(p=0.4)", a YAML file as apply takes it, or none for the unpruned model alone',
    )
    run.add_argument("--keep", type=budget_argument, help="tokens per image (64) or kept fraction (0.25)")
    run.add_argument("--set", action="append", default=[], metavar="OPTION=VALUE", help="an option of the method")
    run.add_argument("--image", help="path of a picture")
    run.add_argument("--question", help="what to ask about it")
    run.add_argument("--sample", type=int, help="without --image: number of a suite sample (by default a sign)")
    run.add_argument("--max-new-tokens", type=int, default=32, help="length of the answer (%(default)s)")
    run.add_argument("--output", default="runs/overlay.png", help="where the overlay goes (%(default)s)")
    run.set_defaults(handler=_run)


def _run(args: argparse.Namespace) -> int:
    from tokenprune.evals.errors import as_user_error

    with as_user_error():
        if (args.image is None) != (args.question is None):
            raise ValueError("Give both --image and --question, or neither to ask about a picture of the pocket suite.")
        options = parse_options(args.set)
        settings: Any = {"dtype": args.dtype, "max_new_tokens": args.max_new_tokens, "references": False}
        _check_method(args, options, settings)
        _check_output(args.output)
    from tokenprune.evals.single_image import run_single

    return run_single(
        model=args.model,
        method=args.method,
        keep=args.keep,
        options=options,
        image=args.image,
        question=args.question,
        sample=args.sample,
        output=args.output,
        dtype=args.dtype,
        device=args.device,
        max_new_tokens=args.max_new_tokens,
    )


def _check_method(args: argparse.Namespace, options: dict[str, Any], settings: dict[str, Any]) -> None:
    """Raise ValueError for a method, budget or setting that cannot work, before a model is loaded for it."""
    from tokenprune.evals.config.points import NONE, check_method_name
    from tokenprune.evals.config.run_config import RunConfig

    budgets = [] if args.keep is None else [args.keep]
    entry: Any = {"method": args.method, **options}
    if args.method.endswith((".yaml", ".yml")):
        from tokenprune.plan.parse import parse_method

        parse_method(args.method, args.keep, **options)
        entry, budgets = NONE, []
    else:
        check_method_name(args.method)
        check_keep(args.method, args.keep)
    if args.method == NONE and (budgets or options):
        raise ValueError("none is the unpruned model, which takes no --keep and no --set; leave them out.")
    RunConfig("run", args.model, ["pocket"], [entry], budgets, **settings).check()


def _check_output(path: str) -> None:
    """Raise ValueError if no picture can be written under that name, before a model has run for it."""
    from pathlib import Path

    from PIL import Image

    Image.init()
    known = [ending for ending, kind in Image.registered_extensions().items() if kind in Image.SAVE]
    if Path(path).suffix.lower() not in known:
        raise ValueError(f"--output names a picture, such as runs/overlay.png, got {path!r}.")
