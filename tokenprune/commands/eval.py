"""`tokenprune eval`: one model x method x budget."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from tokenprune.commands._shared import (
    budget_argument,
    check_keep,
    execute,
    force_argument,
    model_arguments,
    parse_options,
)


def add(commands: argparse._SubParsersAction) -> None:
    """Declare the subcommand."""
    evaluate = commands.add_parser(
        "eval",
        help="accuracy and cost of one model x method x budget on tasks",
        description="Also runs what the result is compared with, the unpruned model and random at the same budget; "
        "--no-references leaves them out. A killed run goes on where it was.",
    )
    model_arguments(evaluate)
    evaluate.add_argument(
        "--tasks", help="task names, YAML files or lmms:NAME, comma separated (the model's pocket suite)"
    )
    evaluate.add_argument("--include-path", metavar="FOLDER", help="a folder of your own tasks for lmms: names")
    evaluate.add_argument(
        "--method", required=True, help="a method or intervention, several joined by plus signs, a YAML file, or none"
    )
    evaluate.add_argument("--keep", type=budget_argument, help="tokens per image (64) or kept fraction (0.25)")
    evaluate.add_argument("--set", action="append", default=[], metavar="OPTION=VALUE", help="an option of the method")
    evaluate.add_argument("--limit", type=int, help="samples per task; all by default")
    evaluate.add_argument("--seed", type=int, default=0, help="of methods that draw, and of intervals (%(default)s)")
    evaluate.add_argument("--batch-size", type=int, help="prompts given to the engine together (8; 256 with vllm)")
    evaluate.add_argument("--engine", default="transformers", help="who answers: transformers or vllm (%(default)s)")
    evaluate.add_argument(
        "--engine-set", action="append", default=[], metavar="NAME=VALUE", help="vllm: an argument of vllm.LLM"
    )
    evaluate.add_argument("--max-new-tokens", type=int, help="length of an answer; the task's own by default")
    evaluate.add_argument("--no-references", action="store_true", help="run nothing but what was asked for")
    evaluate.add_argument("--no-timing", action="store_true", help="measure no times")
    evaluate.add_argument(
        "--output",
        help="folder of the results; runs/MODEL-METHOD-KEEP by default, with a digest of what else is not the default",
    )
    force_argument(evaluate)
    evaluate.set_defaults(handler=_eval)


def _eval(args: argparse.Namespace) -> int:
    from tokenprune.evals.errors import as_user_error

    with as_user_error():
        config = _eval_config(args)
    return execute(config, force=args.force)


def _apart(args: argparse.Namespace, tasks: list[str], options: dict[str, Any]) -> str:
    """What keeps the default folder apart from that of another eval of the same model, method and budget: a digest of
    the settings that are not the default; "" where all are."""
    from tokenprune.evals.io.digest import digest
    from tokenprune.evals.tasks.load import default_task

    settings = {"options": options, "tasks": tasks, "limit": args.limit, "seed": args.seed, "dtype": args.dtype}
    settings |= {"max_new_tokens": args.max_new_tokens, "engine": args.engine, "engine_set": args.engine_set}
    usual = {"options": {}, "tasks": [default_task(args.model)], "limit": None, "seed": 0, "dtype": "float32"}
    usual |= {"engine": "transformers", "engine_set": []}
    other = {name: value for name, value in settings.items() if value != usual.get(name)}
    return f"-{digest(other)[:6]}" if other else ""


def _eval_config(args: argparse.Namespace) -> Any:
    from tokenprune.evals.config.measure import Measure
    from tokenprune.evals.config.points import NONE, check_method_name, named_by_file
    from tokenprune.evals.config.run_config import RunConfig
    from tokenprune.evals.tasks.load import default_task

    tasks = [task for task in (args.tasks or default_task(args.model)).split(",") if task]
    if args.include_path is not None:
        from tokenprune.evals.tasks.lmms_task import with_folder

        tasks = [with_folder(task, args.include_path) for task in tasks]
    options = parse_options(args.set)
    if args.method == NONE and args.keep is not None:
        raise ValueError("The unpruned model keeps every token; leave --keep out with --method none.")
    entry: Any = args.method
    if entry.endswith((".yaml", ".yml")):
        entry = {**named_by_file(entry), **options}
        if args.keep is not None:
            entry["keep"] = args.keep
        method, wanted = Path(args.method).stem, str(entry["method"])
    else:
        check_method_name(entry)
        method = wanted = entry
        entry = {"method": entry, **options} if options else entry
    if not (isinstance(entry, dict) and "keep" in entry):
        check_keep(wanted, args.keep)
    stem = args.model.rstrip("/").rpartition("/")[2]
    name = f"{stem}-{re.sub('[^A-Za-z0-9_.@-]+', '-', method).strip('-')}"
    name += f"-{args.keep}" if args.keep is not None else ""
    return RunConfig(
        name=name + _apart(args, tasks, options),
        model=args.model,
        tasks=tasks,
        methods=[entry],
        keep=[] if args.keep is None else [args.keep],
        limit=args.limit,
        seed=args.seed,
        batch_size=args.batch_size,
        dtype=args.dtype,
        device=args.device,
        max_new_tokens=args.max_new_tokens,
        references=not args.no_references,
        output=args.output,
        measure=Measure(times=not args.no_timing),
        engine=args.engine,
        engine_options=parse_options(args.engine_set, "--engine-set"),
    )
