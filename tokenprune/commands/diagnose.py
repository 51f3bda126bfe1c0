"""`tokenprune diagnose`: what a model looks at, before and after pruning, as numbers and one page."""

from __future__ import annotations

import argparse

from tokenprune.commands._shared import model_arguments


def add(commands: argparse._SubParsersAction) -> None:
    """Declare the subcommand."""
    diagnose = commands.add_parser(
        "diagnose",
        help="what a model looks at: text dominance, visual heads, sinks, flow; a page",
        description="Reads the attention of the decoder while it answers questions and writes diagnosis.json, "
        "visual_heads.json and diagnosis.html: text dominance (MDI, AEI), visual heads, visual sinks, attention to the "
        "image, information flow and rollout by layer, and the share of each head that looks back at the picture. No "
        "attention matrix is formed.",
    )
    model_arguments(diagnose)
    diagnose.add_argument("--data", help="a task by name or its YAML file (the model's pocket suite)")
    diagnose.add_argument("--prune", metavar="METHOD@KEEP", help="a method to compare with, holov@64 for example")
    diagnose.add_argument("--out", required=True, help="the folder to write to")
    diagnose.add_argument("--limit", type=int, default=200, help="the first samples of the task (%(default)s)")
    diagnose.add_argument("--batch-size", type=int, default=4, help="prompts read together (%(default)s)")
    diagnose.add_argument("--max-new-tokens", type=int, help="length of an answer; the task's own by default")
    diagnose.set_defaults(handler=_diagnose)


def _diagnose(args: argparse.Namespace) -> int:
    from tokenprune.evals.diagnose.page import right_words
    from tokenprune.evals.errors import as_user_error
    from tokenprune.evals.tasks.load import default_task

    with as_user_error():
        from tokenprune.evals.diagnose.diagnose import DiagnoseConfig, diagnose

        given = {name: value for name, value in vars(args).items() if name not in ("command", "handler")}
        config = DiagnoseConfig(**{**given, "data": args.data or default_task(args.model)})
        config.check()
    found = diagnose(config, lambda line: print(line, flush=True))
    for name, run in found["runs"].items():
        dominance, heads = run["text_dominance"]["writing"], run["heads"]["writing"]
        print(
            f"{name}: {right_words(run)}; MDI in the middle layers "
            f"{dominance['mdi_stages']['middle']:.3g} (geometric mean "
            f"{dominance['mdi_geometric_stages']['middle']:.3g}); "
            f"visual heads (layer.head) {', '.join(f'{layer}.{head}' for layer, head in heads['visual'])}"
        )
    print(f"Written: {config.out}/diagnosis.html, diagnosis.json, visual_heads.json")
    return 0
