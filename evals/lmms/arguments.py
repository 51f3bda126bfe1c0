"""What `lmms-eval --model tokenprune --model_args ...` may say; read and checked before anything loads.

Imports nothing of lmms-eval.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tokenprune.evals.config.points import NONE, Point, check_method_name, needs_budget
from tokenprune.evals.models.load import check_dtype, model_source
from tokenprune.interfaces.budget import read_budget
from tokenprune.plan.expression import pruner_parts, split_name, split_outside, yaml_value
from tokenprune.plan.parse import Spec
from tokenprune.registry import METHODS, UnknownName, beside_methods, near


@dataclass(frozen=True)
class Arguments:
    """The arguments of the model; every other one is an option of its method.

    Attributes:
        pretrained: pocket name, folder or hub id.
        method: as `tokenprune eval --method` takes it: a name, several joined by plus signs, a YAML file, or `none`
            for the unpruned model.
        keep: visual tokens kept of each image (int), the kept fraction (float), or their mean over the decoder's
            layers ("avg128").
        seed: of methods that draw.
        dtype: float32, bfloat16 or float16.
        device: torch device; None takes a GPU where there is one.
        batch_size: prompts generated together.
        max_batch_size: lmms-eval may hand it over; there is no automatic batch size, so it has no effect.
        max_new_tokens: length of an answer where the task does not say.
        max_frames: most frames that are taken of a video.
        fps: frames a second that are taken of a video of up to `max_frames`.
        system_prompt: put before every conversation that has none.
    """

    pretrained: str
    method: str = NONE
    keep: Any = None
    seed: int = 0
    dtype: str = "float32"
    device: str | None = None
    batch_size: int = 1
    max_batch_size: int | None = None
    max_new_tokens: int = 1024
    max_frames: int = 32
    fps: float = 2.0
    system_prompt: str | None = None


def read_arguments(given: Mapping[str, Any]) -> tuple[Arguments, Spec | None]:
    """The arguments, and the method that they ask for; None for the unpruned model. Loads no model.

    Args:
        given: as lmms-eval reads them off its command line: numbers and booleans are numbers and booleans already.

    Raises:
        UnknownName: an argument, model or method that is not known, with near matches.
        ValueError, TypeError: a value that cannot work.
    """
    names = [field.name for field in dataclasses.fields(Arguments)]
    known = {name: _plain(given[name]) for name in names if name in given}
    options = {name: _plain(value) for name, value in given.items() if name not in names}
    if "pretrained" not in known:
        written = next((name for name in options if near(name, ["pretrained"])), None)
        hint = f" Did you write {written!r} for it?" if written else ""
        raise ValueError(f"Say which model: --model_args pretrained=llava-hf/llava-1.5-7b-hf,...{hint}")
    if str(known.get("batch_size")).isdigit():  # a text, because it may be "auto"
        known["batch_size"] = int(known["batch_size"])
    read = Arguments(**known)
    _check(read)
    method, keep = read.method, read.keep
    known = _options(method)
    for option in options:
        if option not in known:
            takes = f"options of {method}: {', '.join(known)}" if known else f"{method} takes no options beside it"
            close = near(option, [*names, *known])
            raise UnknownName(f"There is no argument {option!r}.{close} Arguments: {', '.join(names)}; {takes}.")
    if method == NONE:
        if keep is not None:
            raise ValueError(f"The unpruned model keeps every token; leave keep={keep} out, or name a method.")
        return read, None
    if not _is_file(method) and needs_budget(method) and keep is None:
        raise ValueError(f"Say how many visual tokens {method} keeps: keep=128 or keep=0.25.")
    from tokenprune.evals.evaluation.applied_method import method_of

    budget = None if keep is None else read_budget(str(keep))
    return read, method_of(Point(read.pretrained, "", method, budget, tuple(sorted(options.items()))), read.seed)


def _check(read: Arguments) -> None:
    model_source(str(read.pretrained))
    check_dtype(str(read.dtype))
    for name in ("batch_size", "max_new_tokens", "max_frames"):
        value = getattr(read, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be an integer of at least 1, got {value!r}.")
    if isinstance(read.seed, bool) or not isinstance(read.seed, int):
        raise ValueError(f"seed must be an integer, got {read.seed!r}.")
    if isinstance(read.fps, bool) or not isinstance(read.fps, (int, float)) or read.fps <= 0:
        raise ValueError(f"fps must be a number above 0, got {read.fps!r}.")
    if not isinstance(read.method, str):
        raise TypeError(f"method must be a name or a YAML file, got {read.method!r}.")
    if not _is_file(read.method):
        check_method_name(read.method)


def _options(method: str) -> list[str]:
    """Names of the options that may be given together with `method`."""
    parts = split_outside(method, "+")
    if method == NONE or _is_file(method) or len(parts) > 1:
        return []
    name = split_name(parts[0])[0]
    cls: Any = (METHODS if pruner_parts(method) else beside_methods()[name]).get(name)
    return [field.name for field in dataclasses.fields(cls)]


def _is_file(method: str) -> bool:
    return method.endswith((".yaml", ".yml"))


def _plain(value: Any) -> Any:
    """A text as YAML, as `--set` reads it; lmms-eval leaves quotes on, which keep a value with commas together."""
    if not isinstance(value, str):
        return value
    if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"":
        value = value[1:-1]
    return yaml_value(value, repr(value)) if value[:1] in ("[", "{") else value
