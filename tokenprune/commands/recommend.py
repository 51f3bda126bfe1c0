"""`tokenprune recommend`: the cheapest setting whose accuracy drop is within a bound."""

from __future__ import annotations

import argparse

from tokenprune.commands._shared import budget_argument, model_arguments

NOT_FOUND = 1
"""Exit status where no setting keeps within the bound."""


def add(commands: argparse._SubParsersAction) -> None:
    """Declare the subcommand."""
    recommend = commands.add_parser(
        "recommend",
        help="the cheapest method and budget whose accuracy drop is within a bound",
        description="Searches methods and budgets on one half of the samples, by successive halving, and tests the few "
        "best on the other half. Prints the cheapest setting whose drop against the unpruned model is within "
        "--max-drop at 95 percent confidence, and writes it as a YAML file that apply and `eval --method` take. Where "
        "none holds, it names the closest and how many samples would be needed, writes no YAML and exits with "
        f"{NOT_FOUND}. A killed run goes on where it was. Needs the extra tokenprune-vlm[tune].",
    )
    model_arguments(recommend)
    recommend.add_argument("--data", default="pocket", help="a task or its YAML file, with answers (%(default)s)")
    recommend.add_argument("--max-drop", type=float, required=True, help="as a fraction: 0.01 is one point of accuracy")
    recommend.add_argument("--cost", default="flops", help="what shall be cheap: flops, kv or latency (%(default)s)")
    recommend.add_argument("--methods", help="names, comma separated; all that need no boxes by default")
    recommend.add_argument("--budgets", help="tokens per image or kept fractions, comma separated (1/2 to 1/18)")
    recommend.add_argument("--limit", type=int, help="the first samples of the task; all by default")
    recommend.add_argument("--seed", type=int, default=0, help="of the halves and of what draws (%(default)s)")
    recommend.add_argument("--trials", type=int, help="settings tried, drawn at random from all; all by default")
    recommend.add_argument("--minutes", type=float, help="begin no new round of the search after so long")
    recommend.add_argument("--finalists", type=int, default=3, help="most settings tested at the end (%(default)s)")
    recommend.add_argument("--batch-size", type=int, default=14, help="prompts generated together (%(default)s)")
    recommend.add_argument("--output", help="folder of the answers and results; runs/recommend-MODEL-DATA by default")
    recommend.set_defaults(handler=_recommend)


def _recommend(args: argparse.Namespace) -> int:
    from tokenprune.evals.errors import as_user_error
    from tokenprune.evals.tuning.recommend.settings import RecommendConfig

    given = {name: value for name, value in vars(args).items() if name not in ("command", "handler")}
    if args.methods is not None:
        given["methods"] = [name.strip() for name in args.methods.split(",")]
    with as_user_error():
        if args.budgets is not None:
            given["budgets"] = [_budget(text.strip()) for text in args.budgets.split(",")]
        config = RecommendConfig(**given)
        config.check()
    import sys

    from rich.console import Console

    from tokenprune.evals.io.progress import waiting

    console = Console() if sys.stdout.isatty() else Console(width=160)
    with waiting(console, "Getting ready"):
        from tokenprune.evals.tuning.recommend.output import sentences, table, write
        from tokenprune.evals.tuning.recommend.search import recommend

    recommendation = recommend(config, console)
    files = write(config, recommendation)
    console.print(table(config, recommendation))
    for line in sentences(config, recommendation):
        console.print(line, highlight=False, markup=False)
    for label, why in recommendation.left_out.items():
        console.print(f"Not searched: {label}: {why}", highlight=False, markup=False)
    console.print(f"{recommendation.seconds:.0f} s. Written:")
    for file in files:
        console.print(f"  {file}", soft_wrap=True, highlight=False, markup=False)
    return 0 if recommendation.chosen is not None else NOT_FOUND


def _budget(text: str) -> int | float:
    try:
        budget = budget_argument(text)
    except argparse.ArgumentTypeError as error:
        raise ValueError(str(error)) from None
    if isinstance(budget, str):
        raise ValueError(f"--budgets takes tokens per image or kept fractions, got {text!r}.")
    return budget
