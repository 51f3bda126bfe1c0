"""`tokenprune train`: make labels of a model's own answers and train what a method needs."""

from __future__ import annotations

import argparse
from typing import Any

from tokenprune.commands._shared import model_arguments

METHODS = {"gtc": (25, 16, 3e-3), "sd_rpn": (3, 8, 1e-4)}
"""What can be trained: epochs, batch and learning rate where nothing else is said."""


def add(commands: argparse._SubParsersAction) -> None:
    """Declare the subcommand."""
    train = commands.add_parser(
        "train",
        help="train the small network that a method needs (gtc, sd_rpn)",
        description="Makes labels of the model's own right answers to training questions, trains on them, checks the "
        "result on held-out ones and writes weights and config.json into a folder that apply takes. A killed run goes "
        "on where it was.",
    )
    train.add_argument("method", help=f"method to train for: {', '.join(METHODS)}")
    model_arguments(train)
    train.add_argument(
        "--data", default="pocket", help="pocket suite (its training split) or YAML file of a task (%(default)s)"
    )
    train.add_argument("--output", required=True, help="folder of the weights, labels and checkpoints")
    train.add_argument("--samples", type=int, default=360, help="questions to make labels of (%(default)s)")
    train.add_argument("--held-out", type=int, default=40, help="questions to check the result on (%(default)s)")
    train.add_argument("--epochs", type=int, help="passes over the labels (gtc 25, sd_rpn 3)")
    train.add_argument("--batch-size", type=int, help="labels a step (gtc 16, sd_rpn 8)")
    train.add_argument("--rate", type=float, help="learning rate, cosine to 0 (gtc 3e-3, sd_rpn 1e-4)")
    train.add_argument("--seed", type=int, default=0, help="of questions, weights and batches (%(default)s)")
    train.set_defaults(handler=_train)


def _train(args: argparse.Namespace) -> int:
    from tokenprune.evals.errors import as_user_error
    from tokenprune.evals.learned.settings import TrainConfig
    from tokenprune.registry import near

    given = {name: value for name, value in vars(args).items() if name not in ("command", "handler")}
    with as_user_error():
        if args.method not in METHODS:
            raise ValueError(
                f"There is nothing to train for {args.method!r}.{near(args.method, list(METHODS))} Known: "
                f"{', '.join(METHODS)}."
            )
        usual = dict(zip(("epochs", "batch_size", "rate"), METHODS[args.method]))
        config = TrainConfig(**{**given, **{name: given[name] or value for name, value in usual.items()}})
        config.check()
    _HOW[args.method](config)
    print(f"Written: {config.folder}")
    return 0


def _gtc(config: Any) -> None:
    from tokenprune.evals.errors import as_user_error
    from tokenprune.evals.learned.gtc import train_gtc

    with as_user_error():
        said = train_gtc(config, _say)
    for name in ("student", "layer_0"):
        print(
            f"{name:<8} held-out rank correlation with the teacher {said['spearman'][name]:.3f}, "
            f"{said['overlap'][name]:.1%} of the teacher's mass in the best {said['keep']} tokens"
        )


def _sd_rpn(config: Any) -> None:
    from tokenprune.evals.errors import as_user_error
    from tokenprune.evals.learned.sd_rpn import train_sd_rpn

    with as_user_error():
        said = train_sd_rpn(config, _say)
    heads = ", ".join(f"layer {layer} head {head}" for layer, head in said["heads"])
    print(f"labels by {heads}: {said['labels']} of {said['questions']} questions have one")
    for name, value in said["separation"].items():
        print(f"{name:<10} held-out foreground above background in {value:.1%} of pairs")


def _say(line: str) -> None:
    print(line, flush=True)


_HOW = {"gtc": _gtc, "sd_rpn": _sd_rpn}
