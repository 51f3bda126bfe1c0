"""`tokenprune calibrate`: find what a method takes from a few samples, without labels and without a search."""

from __future__ import annotations

import argparse

from tokenprune.commands._shared import model_arguments

RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)


def add(commands: argparse._SubParsersAction) -> None:
    """Declare the subcommand."""
    calibrate = commands.add_parser(
        "calibrate",
        help="find how many tokens may leave behind each layer (fitprune)",
        description="Reads attention of the unpruned model on a few samples and writes, for each share of FLOPs that "
        "shall go, how many visual tokens may leave behind each decoder layer. apply takes the file: "
        'tokenprune.apply(model, "fitprune", keep=64, schedule="FILE.json").',
    )
    calibrate.add_argument("method", help="method to calibrate: fitprune")
    model_arguments(calibrate)
    calibrate.add_argument("--data", default="pocket", help="task, its YAML file or a folder of pictures (%(default)s)")
    calibrate.add_argument(
        "--ratio", type=float, nargs="+", default=list(RATIOS), help="shares of the visual FLOPs that shall go (0.6)"
    )
    calibrate.add_argument("--output", required=True, help="the JSON file to write")
    calibrate.add_argument("--samples", type=int, default=64, help="samples to read (%(default)s)")
    calibrate.add_argument("--seed", type=int, default=0, help="of the samples (%(default)s)")
    calibrate.set_defaults(handler=_calibrate)


def _calibrate(args: argparse.Namespace) -> int:
    from tokenprune.evals.errors import as_user_error
    from tokenprune.evals.tuning.calibrate import CalibrateConfig, calibrate

    given = {name: value for name, value in vars(args).items() if name not in ("command", "handler")}
    with as_user_error():
        config = CalibrateConfig(**given)
        config.check()
    said = calibrate(config, lambda line: print(line, flush=True))
    for one in said["schedules"]:
        print(
            f"ratio {one['ratio']:g}: {one['flops']:.1%} of the visual FLOPs less, {one['average']:g} of "
            f"{said['tokens']} tokens on average, {one['keep']} at the last layer (alpha {one['alpha']:g})"
        )
    print(f"Written: {config.output}")
    return 0
