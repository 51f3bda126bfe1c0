"""`tokenprune calibrate`: find what a method takes from a few samples, without labels and without a search."""

from __future__ import annotations

import argparse

from tokenprune.commands._shared import model_arguments

RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)


def add(commands: argparse._SubParsersAction) -> None:
    """Declare the subcommand."""
    calibrate = commands.add_parser(
        "calibrate",
        help="find what a method wants to know of a model (fitprune, shortv, zerotuning)",
        description="Runs a few samples and writes a file. fitprune: for each share of FLOPs that shall go, how many "
        "visual tokens may leave behind each decoder layer, by the attention they get: "
        'tokenprune.apply(model, "fitprune", keep=64, schedule="FILE.json"). shortv: how much each layer does with '
        'visual tokens: tokenprune.apply(model, "shortv", calibration="FILE.json"). zerotuning: gamma and heads: '
        'tokenprune.apply(model, "zerotuning", calibration="FILE.json").',
    )
    calibrate.add_argument("method", help="what to calibrate: fitprune, shortv or zerotuning")
    model_arguments(calibrate)
    calibrate.add_argument("--data", default="pocket", help="task, its YAML file or a folder of pictures (%(default)s)")
    ratio = "fitprune: shares of the visual FLOPs that shall go (0.1 to 0.8)"
    calibrate.add_argument("--ratio", type=float, nargs="+", default=list(RATIOS), help=ratio)
    calibrate.add_argument("--labels", action="store_true", help="zerotuning: use the samples' answers, not entropy")
    calibrate.add_argument("--output", required=True, help="the JSON file to write")
    calibrate.add_argument("--samples", type=int, default=64, help="samples to read (%(default)s)")
    calibrate.add_argument("--seed", type=int, default=0, help="of the samples (%(default)s)")
    calibrate.set_defaults(handler=_calibrate)


def _calibrate(args: argparse.Namespace) -> int:
    from tokenprune.evals.errors import as_user_error
    from tokenprune.evals.tuning.calibrate import CalibrateConfig, calibrate, lines

    given = {name: value for name, value in vars(args).items() if name not in ("command", "handler")}
    with as_user_error():
        config = CalibrateConfig(**given)
        config.check()
    said = calibrate(config, lambda line: print(line, flush=True))
    for line in lines(said):
        print(line)
    print(f"Written: {config.output}")
    return 0
