"""The command `tokenprune`: ls, run, eval, sweep, demo, tune.

Only argparse is imported at the top: `--help` and `ls` answer at once, and no subcommand imports torch before every
name on its command line has been checked.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

from tokenprune import __version__
from tokenprune.budget import read_budget

_EXAMPLES = """examples:
  tokenprune demo
  tokenprune ls methods
  tokenprune run --method vtc_cls --keep 64
  tokenprune eval --model pocket-llava --tasks pocket --method holov --keep 64 --limit 150 --output runs/holov
  tokenprune sweep configs/pocket_llava.yaml
  tokenprune tune vflowopt --model pocket-llava --data pocket --budget 0.25
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

    ls = commands.add_parser("ls", help="list methods, interventions, models, tasks or sweeps")
    ls.add_argument("what", choices=("methods", "interventions", "models", "tasks", "sweeps"))

    run = commands.add_parser(
        "run",
        help="one picture, one question: the answer with and without pruning, and a picture of what was kept",
        description="Without --image and --question a picture of the pocket suite is asked about.",
    )
    _model_arguments(run)
    run.add_argument("--method", required=True, help='as for eval: holov, var, "vtc_cls+var(p=0.4)"')
    run.add_argument("--keep", type=_budget, help="tokens per image (64) or kept fraction (0.25)")
    run.add_argument("--set", action="append", default=[], metavar="OPTION=VALUE", help="an option of the method")
    run.add_argument("--image", help="path of a picture")
    run.add_argument("--question", help="what to ask about it")
    run.add_argument("--sample", type=int, default=0, help="without --image: number of a suite sample (%(default)s)")
    run.add_argument("--max-new-tokens", type=int, default=32, help="length of the answer (%(default)s)")
    run.add_argument("--output", default="runs/overlay.png", help="where the overlay goes (%(default)s)")
    run.set_defaults(handler=_run)

    evaluate = commands.add_parser(
        "eval",
        help="accuracy and cost of one model x method x budget on tasks",
        description="Also runs what the result is compared with, the unpruned model and random at the same budget; "
        "--no-references leaves them out. A killed run goes on where it was.",
    )
    _model_arguments(evaluate)
    evaluate.add_argument("--tasks", help="task names or YAML files, comma separated (the model's pocket suite)")
    evaluate.add_argument(
        "--method", required=True, help="a method or intervention, several joined by plus signs, a YAML file, or none"
    )
    evaluate.add_argument("--keep", type=_budget, help="tokens per image (64) or kept fraction (0.25)")
    evaluate.add_argument("--set", action="append", default=[], metavar="OPTION=VALUE", help="an option of the method")
    evaluate.add_argument("--limit", type=int, help="samples per task; all by default")
    evaluate.add_argument("--seed", type=int, default=0, help="of methods that draw, and of intervals (%(default)s)")
    evaluate.add_argument("--batch-size", type=int, default=8, help="prompts generated together (%(default)s)")
    evaluate.add_argument("--max-new-tokens", type=int, help="length of an answer; the task's own by default")
    evaluate.add_argument("--no-references", action="store_true", help="run nothing but what was asked for")
    evaluate.add_argument("--no-timing", action="store_true", help="measure no times")
    evaluate.add_argument("--output", help="folder of the results; runs/NAME by default")
    evaluate.set_defaults(handler=_eval)

    sweep = commands.add_parser("sweep", help="run the grid of a YAML file", description="Command line wins over file.")
    sweep.add_argument("config", help="a YAML file, or the name of a packaged one, see `tokenprune ls sweeps`")
    _sweep_arguments(sweep)
    demo = commands.add_parser("demo", help="the sweep configs/demo.yaml: minutes on a laptop, no GPU, no download")
    demo.set_defaults(config="demo")
    _sweep_arguments(demo)

    tune = commands.add_parser(
        "tune",
        help="search a method's options offline, on unlabelled samples",
        description="Searches the options under which the last prompt token's final hidden state changes least, at a "
        "budget that every trial holds. Writes a YAML file that apply and `eval --method` take. A killed run goes on "
        "where it was. Needs the extra tokenprune-vlm[tune].",
    )
    tune.add_argument("method", help="name of a method that declares a search space, such as vflowopt")
    _model_arguments(tune)
    tune.add_argument("--data", default="pocket", help="task, its YAML file or a folder of pictures (%(default)s)")
    tune.add_argument("--budget", type=float, required=True, help="mean over the layers, as a kept fraction (0.25)")
    tune.add_argument("--set", action="append", default=[], metavar="OPTION=VALUE", help="an option that stays fixed")
    tune.add_argument("--samples", type=int, default=30, help="samples of the objective (%(default)s)")
    tune.add_argument("--held-out", type=int, default=30, help="samples to check the result on (%(default)s)")
    tune.add_argument("--trials", type=int, default=50, help="settings tried in all (%(default)s)")
    tune.add_argument("--seed", type=int, default=42, help="of the samples and the search (%(default)s)")
    tune.add_argument("--batch-size", type=int, default=6, help="prompts a forward pass (%(default)s)")
    tune.add_argument("--output", help="folder of the study; runs/tune-METHOD-MODEL-BUDGET by default")
    tune.set_defaults(handler=_tune)
    return parser


def _model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="pocket-llava", help="pocket name, local folder or hub id (%(default)s)")
    parser.add_argument("--dtype", default="float32", help="float32, bfloat16 or float16 (%(default)s)")
    parser.add_argument("--device", help="torch device; a GPU where there is one by default")


def _sweep_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--limit", type=int, help="samples per task")
    parser.add_argument("--output", help="folder of the results")
    parser.add_argument("--device", help="torch device")
    parser.set_defaults(handler=_sweep)


def _budget(text: str) -> int | float | str:
    try:
        return read_budget(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def parse_options(pairs: list[str]) -> dict[str, Any]:
    """`["variant=official", "layers=[1, 2]"]` to a mapping; values are read as YAML.

    Raises:
        ValueError: an entry without `=`, or an option given twice.
    """
    import yaml

    options: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise ValueError(f"--set takes OPTION=VALUE, got {pair!r}.")
        if name in options:
            raise ValueError(f"--set {name} was given twice.")
        options[name] = yaml.safe_load(value)
    return options


def _ls(what: str) -> None:
    from tokenprune.registry import INTERVENTIONS, METHODS, MODELS

    if what in ("methods", "interventions"):
        registry = METHODS if what == "methods" else INTERVENTIONS
        for name in registry.names():
            print(f"{name:<17} {registry.describe(name)}")
    elif what == "models":
        from tokenprune.evals.models import pocket_names

        for name in pocket_names():
            print(f"{name:<17} ships with tokenprune")
        for name in MODELS.names():
            print(f"{name:<17} family: {MODELS.describe(name)}")
        print(f"{'OWNER/NAME':<17} a hub id or a local folder of one of the families")
    elif what == "tasks":
        from tokenprune.evals.tasks import task_names

        for name in task_names():
            print(name)
        print("PATH.yaml       a task of your own")
    else:
        from tokenprune.evals.config import packaged_configs

        for name, file in packaged_configs().items():
            first = file.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")
            print(f"{name:<17} {first}")


def _eval(args: argparse.Namespace) -> int:
    from tokenprune.evals.config import refusing

    with refusing():
        config = _eval_config(args)
    return _execute(config)


def _eval_config(args: argparse.Namespace) -> Any:
    from tokenprune.evals.config import NONE, Measure, RunConfig, check_method_name, method_of_file
    from tokenprune.evals.tasks import default_task

    tasks = [task for task in (args.tasks or default_task(args.model)).split(",") if task]
    options = parse_options(args.set)
    if args.method == NONE and args.keep is not None:
        raise ValueError("The unpruned model keeps every token; leave --keep out with --method none.")
    entry: Any = args.method
    if entry.endswith((".yaml", ".yml")):
        entry = {**method_of_file(entry), **options}
        if args.keep is not None:
            entry["keep"] = args.keep
        method, wanted = Path(args.method).stem, str(entry["method"])
    else:
        check_method_name(entry)
        method = wanted = entry
        entry = {"method": entry, **options} if options else entry
    if not (isinstance(entry, dict) and "keep" in entry):
        _check_keep(wanted, args.keep)
    stem = args.model.rstrip("/").rpartition("/")[2]
    name = f"{stem}-{re.sub('[^A-Za-z0-9_.@-]+', '-', method).strip('-')}"
    name += f"-{args.keep}" if args.keep is not None else ""
    return RunConfig(
        name=name,
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
    )


def _tune(args: argparse.Namespace) -> int:
    from tokenprune.evals.config import refusing
    from tokenprune.evals.tune import TuneConfig, tune

    given = {name: value for name, value in vars(args).items() if name not in ("command", "handler", "set")}
    with refusing():
        config = TuneConfig(**given, options=parse_options(args.set))
    from rich.console import Console

    found = tune(config, Console())
    for name, check in (("shipped", found.shipped), ("tuned", found.best)):
        print(
            f"{name:<8} cosine {check.tuned_on:.5f} on its samples, {check.held_out:.5f} on held-out ones; "
            f"{check.retention:.2%} of the visual tokens on average"
        )
    if found.best.held_out <= found.shipped.held_out:
        print("On held-out samples the tuned settings are no better than the shipped ones.")
    print(f"{found.trials} trials. Written:")
    for file in found.files:
        print(f"  {file}")
    return 0


def _check_keep(method: str, keep: Any) -> None:
    from tokenprune.evals.config import NONE, needs_budget
    from tokenprune.notation import pruner_parts

    if needs_budget(method) and keep is None:
        raise ValueError(f"Say how many visual tokens {method} keeps: --keep 64 or --keep 0.25.")
    if keep is not None and method != NONE and not pruner_parts(method):
        raise ValueError(f"{method} changes attention and keeps every token; leave --keep out.")


def _sweep(args: argparse.Namespace) -> int:
    from tokenprune.evals.config import read_config, refusing

    with refusing():
        config = read_config(args.config, limit=args.limit, output=args.output, device=args.device)
    return _execute(config)


def _execute(config: Any) -> int:
    from tokenprune.evals.config import refusing

    with refusing():
        config.check()
    from rich.console import Console

    from tokenprune.evals.sweep import run
    from tokenprune.evals.tables import result_tables
    from tokenprune.evals.tasks import cut_short

    console = Console() if sys.stdout.isatty() else Console(width=160)
    done = run(config, console)
    for table in result_tables(done.records, console.width):
        console.print()
        console.print(table)
    console.print()
    if cut_short(config.tasks, config.limit):
        console.print(f"A limit of {config.limit} samples was set: these are not the numbers of the whole task.")
    for note in done.warnings:
        console.print(f"[yellow]{note}[/yellow]")
    console.print(f"{done.seconds:.0f} s. Written:")
    for file in done.files:
        console.print(f"  {file}", soft_wrap=True, highlight=False)
    return 0


def _run(args: argparse.Namespace) -> int:
    from tokenprune.evals.config import RunConfig, check_method_name, refusing

    with refusing():
        if (args.image is None) != (args.question is None):
            raise ValueError("Give both --image and --question, or neither to ask about a picture of the pocket suite.")
        options = parse_options(args.set)
        check_method_name(args.method)
        _check_keep(args.method, args.keep)
        entry: Any = {"method": args.method, **options}
        budgets = [] if args.keep is None else [args.keep]
        RunConfig("run", args.model, ["pocket"], [entry], budgets, dtype=args.dtype, references=False).check()
    from tokenprune.evals.single import run_single

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


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status. What the user got wrong is one sentence on stderr and status 2."""
    args = _parser().parse_args(argv)
    if args.command == "ls":
        _ls(args.what)
        return 0
    from tokenprune.evals.config import Refused

    try:
        return args.handler(args)
    except Refused as error:
        print(f"tokenprune: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nStopped. The same command goes on where it was.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
