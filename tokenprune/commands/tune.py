"""`tokenprune tune`: search a method's options."""

from __future__ import annotations

import argparse

from tokenprune.commands._shared import model_arguments, parse_options


def add(commands: argparse._SubParsersAction) -> None:
    """Declare the subcommand."""
    tune = commands.add_parser(
        "tune",
        help="search a method's options offline, on unlabelled samples",
        description="Searches the options under which the last prompt token's final hidden state changes least, at a "
        "budget that every trial holds. Writes a YAML file that apply and `eval --method` take. A killed run goes on "
        "where it was. Needs the extra tokenprune-vlm[tune].",
    )
    tune.add_argument("method", help="name of a method that declares a search space, such as vflowopt")
    model_arguments(tune)
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


def _tune(args: argparse.Namespace) -> int:
    from tokenprune.evals.errors import as_user_error
    from tokenprune.evals.tuning.tune import TuneConfig, tune

    given = {name: value for name, value in vars(args).items() if name not in ("command", "handler", "set")}
    with as_user_error():
        config = TuneConfig(**given, options=parse_options(args.set))
    from rich.console import Console

    tuned = tune(config, Console())
    for name, check in (("shipped", tuned.shipped), ("tuned", tuned.best)):
        print(
            f"{name:<8} cosine {check.tuned_on:.5f} on its samples, {check.held_out:.5f} on held-out ones; "
            f"{check.retention:.2%} of the visual tokens on average"
        )
    if tuned.best.held_out <= tuned.shipped.held_out:
        print("On held-out samples the tuned settings are no better than the shipped ones.")
    print(f"{tuned.trials} trials. Written:")
    for file in tuned.files:
        print(f"  {file}")
    return 0
