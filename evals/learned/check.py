"""What no method file says: how well GTC's teacher would choose, and what looking twice (SD-RPN) does to answers.

python -m tokenprune.evals.learned.check teacher --model pocket-llava --limit 350 --keep 16
python -m tokenprune.evals.learned.check zoom --model pocket-llava --branch runs/sd_rpn --limit 200
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from tokenprune.api import applied
from tokenprune.evals.learned.replay import greedy_answer, replay
from tokenprune.evals.learned.rollout import relevance
from tokenprune.evals.models.chat_template import one_turn, prompt_text
from tokenprune.evals.models.load import LoadedModel, load_model
from tokenprune.evals.tasks.load import default_task, load_task
from tokenprune.evals.tasks.task import Sample, Task
from tokenprune.interfaces.pruner import Pruner
from tokenprune.interfaces.view import View
from tokenprune.regions import zoomed


@dataclass
class Told(Pruner):
    """Keeps the visual tokens that score highest in a list that somebody wrote beforehand, visual by visual."""

    name: ClassVar[str] = "told"
    default_scope: ClassVar[str] = "visual"
    published_positions: ClassVar[str] = "keep"
    scores: Any = None

    def score(self, view: View) -> Tensor:
        return torch.stack([self.scores.pop(0) for _ in range(view.num_images)]).to(view.features.device)


def teacher(loaded: LoadedModel, task: Task, sample: Sample, keep: int | float) -> tuple[float, float]:
    """Scores of the unpruned answer and of the one with the tokens that supported it most: the teacher knows the answer
    that the whole model gave, right or wrong."""
    inputs = loaded.inputs([sample.question], [sample.image])
    plain = greedy_answer(loaded.model, inputs, task.max_new_tokens)
    scores = relevance(replay(loaded.adapter, inputs, plain, gradients=True))
    with applied(loaded.model, Told(scores=scores), keep=keep):
        pruned = greedy_answer(loaded.model, inputs, task.max_new_tokens)
    said = loaded.decode(plain[None])[0], loaded.decode(pruned[None])[0]
    return task.mark(sample, said[0]), task.mark(sample, said[1])


def zoom(
    loaded: LoadedModel, task: Task, sample: Sample, branch: str, tau: float, found: list[int]
) -> tuple[float, float]:
    """Scores of the plain answer and of the one to the prompt with crops; `found` takes how many crops there were."""
    text = prompt_text(loaded.processor, one_turn(sample.question, sample.image))
    image: Any = sample.image
    inputs, boxes = zoomed(loaded.model, loaded.processor, text, image, branch, tau)
    found.append(len(boxes))
    plain = loaded.inputs([sample.question], [sample.image])
    said = []
    for given in (plain, inputs) if boxes else (plain,):
        said.append(loaded.decode(greedy_answer(loaded.model, given, task.max_new_tokens)[None])[0])
    return task.mark(sample, said[0]), task.mark(sample, said[-1])


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["teacher", "zoom"])
    parser.add_argument("--model", default="pocket-llava")
    parser.add_argument("--limit", type=int, default=350, help="questions of the test split (%(default)s)")
    parser.add_argument("--keep", type=float, default=16, help="tokens, or a fraction below 1 (%(default)s)")
    parser.add_argument("--branch", help="folder that `tokenprune train sd_rpn` wrote")
    parser.add_argument("--tau", type=float, default=0.1)
    args = parser.parse_args()
    loaded = load_model(args.model)
    loaded.model.requires_grad_(False)
    task = load_task(default_task(args.model))
    keep = args.keep if args.keep < 1 else int(args.keep)
    crops: list[int] = []
    ask: Callable[[Sample], tuple[float, float]]
    if args.what == "teacher":
        ask = lambda sample: teacher(loaded, task, sample, keep)  # noqa: E731
    else:
        ask = lambda sample: zoom(loaded, task, sample, args.branch, args.tau, crops)  # noqa: E731
    scores = []
    for sample in task.load(0, args.limit):
        if args.what == "zoom" and isinstance(sample.image, (list, tuple)):
            continue
        scores.append((sample.family, *ask(sample)))
        if len(scores) % 25 == 0:
            print(_line("all", scores), flush=True)
    for family in dict.fromkeys(family for family, _, _ in scores):
        print(_line(family, [one for one in scores if one[0] == family]))
    print(_line("all", scores))
    if crops:
        print(f"{sum(count > 0 for count in crops)} of {len(crops)} prompts got crops")


def _line(name: str, scores: list[tuple[str, float, float]]) -> str:
    plain = sum(one[1] for one in scores) / len(scores)
    other = sum(one[2] for one in scores) / len(scores)
    changed = [sum(one[2] > one[1] for one in scores), sum(one[2] < one[1] for one in scores)]
    counts = f"(better {changed[0]}, worse {changed[1]})"
    return f"{name:<10} {len(scores):>4} questions  plain {plain:.1%}  then {other:.1%}  {counts}"


if __name__ == "__main__":
    main()
