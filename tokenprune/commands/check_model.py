"""`tokenprune check-model`: what can be done with a checkpoint."""

from __future__ import annotations

import argparse


def add(commands: argparse._SubParsersAction) -> None:
    """Declare the subcommand."""
    check = commands.add_parser(
        "check-model",
        help="what can be done with a checkpoint: cuts and signals that verify, the error of removal against masking",
        description="Loads it, tries its decoder on random embeddings, and prunes a prompt with a random picture.",
    )
    check.add_argument("model", help="pocket name, local folder or hub id")
    check.add_argument("--dtype", default="float32", help="float32, bfloat16 or float16 (%(default)s)")
    check.add_argument("--device", help="torch device; a GPU where there is one by default")
    check.add_argument("--side", type=int, default=336, help="of the random picture, pixels (%(default)s)")
    check.add_argument(
        "--trust-remote-code", action="store_true", help="run code that comes with the checkpoint, which you have read"
    )
    check.set_defaults(handler=_check)


def _check(args: argparse.Namespace) -> int:
    from tokenprune.evals.errors import as_user_error
    from tokenprune.evals.models.load import load_model
    from tokenprune.model_check import capabilities_of, prompt_error

    with as_user_error():
        if args.side < 1:
            raise ValueError(f"--side is the side of a picture in pixels, at least 1, got {args.side}.")
        loaded = load_model(args.model, args.dtype, args.device, args.trust_remote_code, needs_processor=False)
        adapter = loaded.adapter
        without = loaded.processor is None
        inputs = None if without else loaded.inputs(["What is in the picture?"], [_noise(args.side)])
    print(f"{type(loaded.model).__name__}, read by the family file {adapter.name!r}")
    findings = capabilities_of(adapter, inputs)
    for finding in findings:
        print(f"{finding.name:<16} {'yes' if finding.has else 'no':<4} {finding.says}")
    if not findings[0].has:
        return 1
    if inputs is None:
        print(
            f"a random prompt  not tried: {args.model} has no processor that loads. Tower signals and what stands at "
            "the placeholders are tried where there is one (processor.save_pretrained into the same folder)."
        )
        return 0
    with as_user_error():
        found = prompt_error(loaded.model, adapter, inputs)
    print(
        f"a random prompt  {found.kept} of {found.visual} visual tokens kept: the last logits are {found.error:.1e} "
        f"from those of the masked model (unpruned: {found.unpruned:.1e})"
    )
    return 0


def _noise(side: int):
    """A picture of coloured squares, so that its patches differ."""
    import numpy as np
    from PIL import Image

    few = Image.new("RGB", (16, 16))
    few.putdata([tuple(colour) for colour in np.random.default_rng(0).integers(0, 256, (256, 3)).tolist()])
    return few.resize((side, side), Image.Resampling.NEAREST)
