"""Prompts, engines and references for the tests of tokenprune inside vLLM. vLLM is imported when an engine is made."""

from __future__ import annotations

import functools
import importlib
import io
import os
from collections.abc import Sequence
from importlib import metadata
from typing import Any

import pyarrow.parquet as pq
import pytest
from _paths import ROOT
from PIL import Image

MODELS = {"llava": ("pocket-llava", "pocket"), "qwen": ("pocket-qwen", "pocket-mixed")}
TOKENS = 8
SMALL = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in this process: what it does can be watched
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "HF_HUB_OFFLINE": "1",
    "TORCHDYNAMO_DISABLE": "1",  # vLLM compiles parts of its sampler for CPUs, which takes a minute
}


def needs_vllm() -> None:
    """Skip a module of tests where vLLM is not installed."""
    if not any(True for name in ("vllm", "vllm-cpu") for _ in metadata.distributions(name=name)):
        pytest.skip("vLLM is not installed: make test-vllm", allow_module_level=True)
    small_engines()


def small_engines() -> None:
    """Set what vLLM reads from the environment, before it is imported."""
    for name, value in SMALL.items():
        os.environ.setdefault(name, value)


def folder(model: str) -> str:
    """Where a pocket model is."""
    return str(ROOT / "evals" / "pocket" / "models" / MODELS[model][0])


@functools.cache
def rows(model: str, count: int) -> tuple[dict[str, Any], ...]:
    """So many questions of the model's suite, each about another picture."""
    from tokenprune.evals.pocket.catalog import suite_file

    table = pq.read_table(suite_file(MODELS[model][1]), columns=["family", "image", "question", "answer"])
    found = [row for row in table.to_pylist() if row["family"] != "video"]
    chosen = found[::8][:count]  # seven families go round: another family and another picture each time
    assert len(chosen) == count
    for row in chosen:
        data = row["image"]["bytes"] if isinstance(row["image"], dict) else row["image"]
        row["picture"] = Image.open(io.BytesIO(data)).convert("RGB")
    return tuple(chosen)


def prompt(model: str, question: str, pictures: int = 1) -> str:
    """A prompt as the pocket models were trained on."""
    if model == "llava":
        return "USER: " + "<image>\n" * pictures + question + " ASSISTANT:"
    return "USER: " + "<|vision_start|><|image_pad|><|vision_end|>" * pictures + question + " ASSISTANT:"


def request(
    model: str, data: Sequence[Any], index: int, setting: str | None = None, pictures: int = 1, **more: Any
) -> Any:
    """What an engine is asked: one question, about its picture and those that follow."""
    shown = [data[(index + place) % len(data)]["picture"] for place in range(pictures)]
    text = prompt(model, more.get("question") or data[index]["question"], pictures)
    made = {"prompt": text, "multi_modal_data": {"image": shown}}
    if setting is not None:
        made["mm_processor_kwargs"] = {"tokenprune": setting}
    return made


@functools.cache
def register_classes() -> None:
    """Register our classes themselves, behind the plug-in, which registers them by name: vLLM looks at a class that it
    knows by name in a process of its own, half a minute each."""
    from vllm import ModelRegistry
    from vllm.plugins import load_general_plugins

    from tokenprune.vllm.plugin import MODELS

    load_general_plugins()
    for name, where in MODELS.items():
        module, _, ours = where.partition(":")
        ModelRegistry.register_model(name, getattr(importlib.import_module(module), ours))


def engine(source: str, setting: str | None, **options: Any) -> Any:
    """A small engine in this process."""
    small_engines()
    from vllm import LLM

    register_classes()
    given = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 2048,
        "seed": 0,
        "block_size": 32,
        "max_num_seqs": 16,
        "distributed_executor_backend": "uni",
        "limit_mm_per_prompt": {"image": 4, "video": 1} if "qwen" in source else {"image": 4},
        **options,
    }
    if setting is not None:
        given["mm_processor_kwargs"] = {"tokenprune": setting, **given.get("mm_processor_kwargs", {})}
    return LLM(model=source, **given)


class Answers(list):
    """Token ids of answers; beside them log-probabilities, lengths of prompts and how much was cached."""

    logprobs: list[list[float]]
    lengths: list[int]
    cached: list[int]

    def part(self, places: Sequence[int]) -> Answers:
        """Some of them, with their log-probabilities."""
        found = Answers(self[place] for place in places)
        found.logprobs = [self.logprobs[place] for place in places]
        return found


def runnable(source: str, family: Any, keep: str) -> list[str]:
    """Methods that vLLM can run on a model, as an engine's setting names them."""
    from transformers import AutoConfig

    from tokenprune.registry import list_methods
    from tokenprune.vllm.settings import read_setting

    facts, found = family.facts(AutoConfig.from_pretrained(source)), []
    for name in list_methods():
        for text in (name, f"{name}(positions=compact)", f"{name}(key_bias=false)"):
            try:
                read_setting(f"{text}@{keep}", facts)
            except ValueError:
                continue
            found.append(text)
            break
    return found


def ask(
    llm: Any, requests: Sequence[Any], one_by_one: bool = False, tokens: int = TOKENS, ignore_eos: bool = False
) -> Answers:
    """Greedy answers; `ignore_eos`: of models that transformers is not told to stop."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=tokens, logprobs=0, ignore_eos=ignore_eos)
    given = [[one] for one in requests] if one_by_one else [list(requests)]
    outputs = [output for part in given for output in llm.generate(part, sampling, use_tqdm=False)]
    found = Answers(list(output.outputs[0].token_ids) for output in outputs)
    found.logprobs = [[next(iter(step.values())).logprob for step in o.outputs[0].logprobs] for o in outputs]
    found.lengths = [len(output.prompt_token_ids) for output in outputs]
    found.cached = [output.num_cached_tokens or 0 for output in outputs]
    return found


@functools.cache
def hugging_face(source: str) -> tuple[Any, Any]:
    """The same model in transformers, and its processor."""
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(source, dtype=torch.float32).eval()
    return model, AutoProcessor.from_pretrained(source)


def _videos(videos: Sequence[Any]) -> dict[str, Any]:
    """Videos as vLLM is given them, `(frames, facts)`, for a processor of transformers."""
    from transformers.video_utils import VideoMetadata

    known = [{name: value for name, value in facts.items() if name != "do_sample_frames"} for _, facts in videos]
    return {
        "videos": [frames for frames, _ in videos],
        "video_metadata": [VideoMetadata(**facts) for facts in known],
        "do_sample_frames": False,
    }


def reference(
    source: str, requests: Sequence[Any], method: str | None, positions: str | None = None, tokens: int = TOKENS
) -> Answers:
    """Greedy answers of transformers, one prompt at a time, with tokenprune's own engine."""
    import torch

    import tokenprune

    model, processor = hugging_face(source)
    handle = None
    if method is not None:
        handle = tokenprune.apply(model, method, **({} if positions is None else {"positions": positions}))
    found = Answers()
    found.logprobs = []
    try:
        for one in requests:
            media = one["multi_modal_data"]
            given = {"images": media["image"]} if "image" in media else {}
            given |= _videos(media["video"]) if "video" in media else {}
            inputs = processor(text=one["prompt"], return_tensors="pt", **given)
            inputs = inputs.to(dtype=torch.float32)
            with torch.no_grad():
                out = model.generate(
                    **inputs, max_new_tokens=tokens, do_sample=False, output_logits=True, return_dict_in_generate=True
                )
            ids = out.sequences[0, inputs["input_ids"].shape[1] :].tolist()
            found.append(ids)
            found.logprobs.append([float(step[0].log_softmax(-1)[i]) for step, i in zip(out.logits, ids)])
    finally:
        if handle is not None:
            handle.remove()
    return found


def furthest(one: Answers, other: Answers) -> float:
    """The largest difference of log-probabilities of answers with the same ids."""
    pairs = [(a, b) for x, y, a, b in zip(one, other, one.logprobs, other.logprobs) if x == y]
    return max((abs(p - q) for a, b in pairs for p, q in zip(a, b)), default=float("inf"))
