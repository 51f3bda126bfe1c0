"""vLLM with and without pruning: prompts a second, and the time to the first token of a prompt alone.

One offline engine has all methods; unpruned and pruned take turns within a round, so that a noisy machine hits all
alike, and ratios are of turns within a round. Caches of prefixes and of processed pictures are off, and every turn has
pictures of its own (one pixel differs), so that nothing is computed for one turn by another. The time to the first
token begins with the picture, as a client sends it: processor, tower and selection are in it.

On a machine that others use too, `--processor-time` has the engine in this process and counts the seconds that the
process was given: what the same work takes on a core of its own, with OMP_NUM_THREADS=1.
"""

# vLLM is not there where types are checked
# pyright: reportMissingImports=false

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from tokenprune.interfaces.budget import read_budget
from tokenprune.plan.expression import yaml_value

COLUMNS = (
    "model", "method", "keep", "prompts", "visual_tokens", "kept_tokens", "answer_tokens", "seconds",
    "prompts_per_second", "to_unpruned", "to_unpruned_low", "to_unpruned_high", "first_token_ms", "first_to_unpruned",
    "rounds", "clock", "dtype", "vllm",
)  # fmt: skip
CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}
ALONE = 20
"""Prompts whose first token is timed, one after the other."""


def own_picture(sample: Any, number: int, column: int = 0) -> Any:
    """A sample whose pictures no other turn has: a pixel of the first row says the turn."""

    def marked(picture: Any) -> Any:
        copy = picture.copy()
        copy.putpixel((column, 0), (number % 256, number // 256 % 256, 7))
        return copy

    image = sample.image
    return replace(sample, image=tuple(map(marked, image)) if isinstance(image, tuple) else marked(image))


def turn(served: Any, samples: Sequence[Any], text: str, tokens: int, clock: Any) -> tuple[float, float, float]:
    """Seconds for all prompts together, the median of the first token's for some alone, and visual tokens a prompt."""
    from vllm import SamplingParams

    from tokenprune.evals.evaluation.vllm_engine import vllm_request

    asked = [vllm_request(served.processor, sample, text) for sample in samples]
    begin = clock()
    answer = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    outputs = served.llm.generate(asked, answer, use_tqdm=False)
    seconds = clock() - begin
    kept = np.mean([sum(one in served.media for one in output.prompt_token_ids) for output in outputs])
    first, short = [], SamplingParams(temperature=0, max_tokens=1)
    for place, sample in enumerate(samples[:ALONE]):
        alone = vllm_request(served.processor, own_picture(sample, 1 + place, column=1), text)
        begin = clock()
        served.llm.generate([alone], short, use_tqdm=False)
        first.append(clock() - begin)
    return seconds, float(np.median(first)), float(kept)


def measure(
    config: Any, model: str, points: Sequence[Any], prompts: int, rounds: int, tokens: int, clock: str
) -> Iterator[Any]:
    """A row per point, the unpruned model first; `clock`: see `CLOCKS`."""
    from tokenprune.evals.config.engines import vllm_release
    from tokenprune.evals.evaluation.vllm_engine import start
    from tokenprune.evals.tasks.load import load_task

    served = start(config, model, list(points))
    pictured = [
        sample for sample in load_task(config.tasks[0]).load(0, 2 * prompts) if not isinstance(sample.image, list)
    ]
    samples = pictured[:prompts]
    for point in points:  # not counted: the first prompts of an engine are slow
        turn(served, [own_picture(sample, 65_000) for sample in samples[:4]], served.texts[point.key], 2, CLOCKS[clock])
    taken: dict[str, list[tuple[float, float, float]]] = {point.key: [] for point in points}
    for number in range(rounds):
        for place, point in enumerate(points):
            mine = [own_picture(sample, 1 + number * len(points) + place) for sample in samples]
            taken[point.key].append(turn(served, mine, served.texts[point.key], tokens, CLOCKS[clock]))
    served.shut_down()
    plain = taken[points[0].key]
    for point in points:
        own = taken[point.key]
        ratios = [before[0] / after[0] for before, after in zip(plain, own)]
        seconds = float(np.median([one[0] for one in own]))
        yield {
            "model": model, "method": point.method, "keep": "" if point.keep is None else point.keep,
            "prompts": len(samples), "visual_tokens": plain[0][2], "kept_tokens": own[0][2], "answer_tokens": tokens,
            "seconds": seconds, "prompts_per_second": len(samples) / seconds,
            "to_unpruned": float(np.median(ratios)), "to_unpruned_low": min(ratios), "to_unpruned_high": max(ratios),
            "first_token_ms": 1e3 * float(np.median([one[1] for one in own])),
            "first_to_unpruned": float(np.median([before[1] / after[1] for before, after in zip(plain, own)])),
            "rounds": rounds, "clock": clock, "dtype": config.dtype, "vllm": vllm_release(),
        }  # fmt: skip


def engine_option(pair: str) -> tuple[str, Any]:
    """Name and value of an argument like `max_model_len=4096`.

    Raises:
        ValueError: it is no pair, or the value is no YAML.
    """
    name, equals, value = pair.partition("=")
    if not equals or not name:
        raise ValueError(f"--engine-set takes NAME=VALUE, got {pair!r}.")
    return name, yaml_value(value, f"The value in --engine-set {pair}")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write."""
    from tokenprune.evals.bench.table import Table
    from tokenprune.evals.config.engines import VLLM
    from tokenprune.evals.config.points import NONE, Point
    from tokenprune.evals.config.run_config import RunConfig
    from tokenprune.evals.tasks.load import default_task

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pocket-llava", help="pocket name, folder or hub id (%(default)s)")
    parser.add_argument("--task", help="where pictures and questions come from; the model's pocket suite")
    parser.add_argument("--methods", nargs="+", default=["divprune", "vtc_cls"], help="%(default)s")
    parser.add_argument("--keep", nargs="+", type=read_budget, default=[128, 64, 32], help="budgets (%(default)s)")
    parser.add_argument("--prompts", type=int, default=200, help="in a turn (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="%(default)s")
    parser.add_argument("--answer-tokens", type=int, default=8, help="%(default)s")
    parser.add_argument("--dtype", default="float32", help="%(default)s")
    parser.add_argument(
        "--engine-set", action="append", default=[], metavar="NAME=VALUE",
        help="an argument of vllm.LLM; load_format=dummy needs no weights",
    )  # fmt: skip
    parser.add_argument(
        "--processor-time", action="store_true",
        help="count this process's processor time, the engine in it: where the machine has company",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("runs/bench/serving.csv"), help="%(default)s")
    args = parser.parse_args(argv)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    fresh: dict[str, Any] = {"enable_prefix_caching": False, "mm_processor_cache_gb": 0}
    if args.processor_time:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        fresh["distributed_executor_backend"] = "uni"
    options = {**fresh, **dict(map(engine_option, args.engine_set))}
    task = args.task or default_task(args.model)
    config = RunConfig("serving", args.model, [task], args.methods, args.keep, dtype=args.dtype, engine=VLLM,
                       engine_options=options)  # fmt: skip
    config.check()
    points = [Point(args.model, task, NONE, None)]
    points += [Point(args.model, task, method, keep) for method in args.methods for keep in args.keep]
    table = Table(args.out, COLUMNS)
    clock = "processor" if args.processor_time else "wall"
    for row in measure(config, args.model, points, args.prompts, args.rounds, args.answer_tokens, clock):
        table.add(row)
        print(
            f"{row['method']}@{row['keep']}: {row['prompts_per_second']:.2f} prompts/s, {row['to_unpruned']:.2f} times"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
