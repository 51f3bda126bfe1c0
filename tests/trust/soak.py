"""What a long day does to a process: cycles of apply, generate and remove; many requests at once.

    python tests/trust/soak.py --cycles 2000 --requests 200

Resident memory, objects and hooks must be flat over the cycles, the model must answer as before, and concurrent answers
must equal sequential ones, with clients among them that leave, read slowly, and send what cannot be answered. Ends with
status 1 where one of these is not so; the last line is the record, as JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS / "evals"), str(TESTS.parent)]

GROWTH = 0.02
"""Of resident memory between the first mark and the last: a tensor of one picture left behind a cycle is more."""


def tiny() -> Any:
    """The tiny random LLaVA, with its processor."""
    from _tiny import tiny_llava
    from _tiny_processor import tiny_processor, word_tokenizer

    from tokenprune.evals.models.load import LoadedModel

    processor = tiny_processor(word_tokenizer())
    processor.tokenizer.padding_side = "left"
    return LoadedModel("tiny", tiny_llava(), processor, "")


def main() -> int:
    """Run both; 1 where something is not flat or not equal."""
    from _soak import METHODS, compare, cycles, requests
    from _tiny_processor import WORDS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--cycles", type=int, default=2000, help="apply, generate, remove (%(default)s); 0 leaves them out"
    )
    parser.add_argument("--every", type=int, default=200, help="cycles between two marks (%(default)s)")
    parser.add_argument("--requests", type=int, default=200, help="at once (%(default)s); 0 leaves them out")
    parser.add_argument("--rude", type=int, default=5, help="rounds of clients that misbehave (%(default)s)")
    parser.add_argument("--model", default="tiny", help="tiny, or as for tokenprune eval (%(default)s)")
    args = parser.parse_args()
    from transformers.utils import logging

    from tokenprune.evals.models.load import load_model

    logging.set_verbosity_error()
    loaded = tiny() if args.model == "tiny" else load_model(args.model)
    record: dict[str, Any] = {"model": args.model}
    wrong = []
    if args.cycles:
        started = time.monotonic()
        marks, changed = cycles(loaded, args.cycles, args.every)
        for mark in marks:
            print(f"{mark.cycles:6d} cycles  {mark.rss / 2**20:8.1f} MiB  {mark.objects} objects  {mark.hooks} hooks")
        first, last = marks[0], marks[-1]
        growth = (last.rss - first.rss) / first.rss
        record |= {
            "cycles": args.cycles, "methods": len(METHODS), "rss_growth": round(growth, 5),
            "objects": last.objects - first.objects, "hooks": last.hooks - first.hooks, "answers_changed": changed,
            "cycles_seconds": round(time.monotonic() - started),
        }  # fmt: skip
        wrong += ["memory"] * (growth > GROWTH) + ["objects"] * (last.objects - first.objects > 200)
        wrong += ["hooks"] * (last.hooks != first.hooks) + ["answers"] * bool(changed)
    if args.requests:
        side = 48 if args.model == "tiny" else 336
        names = ("uniform", "vtc_cls", "holov", "fastv", "random", "divprune", "visionzip", "pyramiddrop")
        found = compare(loaded, requests(args.requests, names, tuple(WORDS[:12]), side), args.rude)
        record |= dataclasses.asdict(found)
        wrong += ["concurrent answers"] * bool(found.different) + ["room"] * bool(found.left)
        expected = {"oversized": 400, "malformed": 400, "unknown": 400, "slow": 200}
        wrong += [name for name, status in expected.items() if set(found.rude[name]) != {status}]
    print(json.dumps({**record, "wrong": wrong}))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
