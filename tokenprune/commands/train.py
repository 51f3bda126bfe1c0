"""`tokenprune train`: make labels of a model's own answers and train what a method needs."""

from __future__ import annotations

import argparse

from tokenprune.commands._shared import model_arguments

METHODS = ("gtc",)


def add(commands: argparse._SubParsersAction) -> None:
    """Declare the subcommand."""
    train = commands.add_parser(
        "train",
        help="train the small network that a method needs (gtc)",
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
    train.add_argument("--samples", type=int, default=600, help="questions to make labels of (%(default)s)")
    train.add_argument("--held-out", type=int, default=60, help="questions to check the result on (%(default)s)")
    train.add_argument("--epochs", type=int, default=40, help="passes over the labels (%(default)s)")
    train.add_argument("--batch-size", type=int, default=32, help="labels a step (%(default)s)")
    train.add_argument("--rate", type=float, default=1e-3, help="learning rate, cosine to 0 (%(default)s)")
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
        config = TrainConfig(**given)
        config.check()
    from tokenprune.evals.learned.gtc import train_gtc

    with as_user_error():
        said = train_gtc(config, lambda line: print(line, flush=True))
    for name in ("student", "layer_0"):
        print(
            f"{name:<8} held-out rank correlation with the teacher {said['spearman'][name]:.3f}, "
            f"{said['overlap'][name]:.1%} of the teacher's mass in the best {said['keep']} tokens"
        )
    print(f"{said['labels']} labels. Written: {config.folder}")
    return 0
