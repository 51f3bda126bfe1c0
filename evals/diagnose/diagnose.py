"""Runs the diagnostics of one model on one task, unpruned and, if asked for, under a method."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenprune import __version__
from tokenprune.api import Prepared, check_free, prepare
from tokenprune.evals.diagnose.attention_tap import AttentionTap
from tokenprune.evals.diagnose.batch_reader import BatchReader
from tokenprune.evals.diagnose.gather import Found, Gathered
from tokenprune.evals.diagnose.measures import writing_rows
from tokenprune.evals.diagnose.page import write_page
from tokenprune.evals.diagnose.prompt_tokens import PromptTokens, read_tokens
from tokenprune.evals.diagnose.samples import Shown, model_inputs, shown_sample
from tokenprune.evals.diagnose.sink_channels import Channels, decoder_info, sink_channels
from tokenprune.evals.errors import as_user_error
from tokenprune.evals.evaluation.batching import read_batch
from tokenprune.evals.evaluation.scored import scored
from tokenprune.evals.io.atomic_files import replace_file
from tokenprune.evals.io.outputs import check_folder
from tokenprune.evals.models.load import LoadedModel, check_device, check_dtype, load_model, model_source
from tokenprune.evals.profiling.hardware import hardware
from tokenprune.evals.tasks.load import check_task, load_task
from tokenprune.evals.tasks.task import Sample, Task, drawn_samples
from tokenprune.plan.parse import parse_method

UNPRUNED = "unpruned"
PICTURES = 4
"""Samples whose pictures are shown."""
Say = Callable[[str], None]


@dataclass
class DiagnoseConfig:
    """What to look into.

    Attributes:
        data: a task by name, or its YAML file.
        out: the folder to write to.
        prune: a method with its budget, "holov@64"; None: the unpruned model alone.
        limit: the first samples of the task; None: all.
        max_new_tokens: length of an answer; None: the task's own.
    """

    model: str
    data: str
    out: str
    prune: str | None = None
    limit: int | None = 200
    batch_size: int = 4
    max_new_tokens: int | None = None
    dtype: str = "float32"
    device: str | None = None

    def check(self) -> None:
        """Refuse what would fail later; loads no model and no data.

        Raises:
            UnknownName, ValueError, FileNotFoundError: with a sentence on what to write instead.
        """
        for name in ("limit", "batch_size", "max_new_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}.")
        check_folder(self.out, "--out")
        check_dtype(self.dtype)
        check_device(self.device)
        model_source(self.model)
        check_task(self.data)
        if self.prune is not None and parse_method(self.prune).interventions:
            raise ValueError(
                f"--prune {self.prune} changes attention, and diagnostics read the attention that the layers compute "
                "from query and key, which an intervention replaces afterwards. Name methods that prune only."
            )


def diagnose(config: DiagnoseConfig, say: Say = lambda line: None) -> dict[str, Any]:
    """Read the model, write `diagnosis.json`, `visual_heads.json` and `diagnosis.html`, return what the first holds.

    Raises:
        UserError: what was asked for cannot be done.
    """
    from transformers.utils import logging

    with as_user_error():
        config.check()
        task = load_task(config.data)
    logging.disable_progress_bar()
    with as_user_error():
        loaded = load_model(config.model, config.dtype, config.device)
        found, pictures = diagnose_model(loaded, task, config, say)
        folder = Path(config.out)
        folder.mkdir(parents=True, exist_ok=True)
    heads = {name: _head_rows(run["heads"]) for name, run in found["runs"].items()}
    replace_file(folder / "diagnosis.json", json.dumps(found, indent=1))
    replace_file(folder / "visual_heads.json", json.dumps(heads, indent=1))
    write_page(folder / "diagnosis.html", found, pictures)
    return found


def diagnose_model(
    loaded: LoadedModel, task: Task, config: DiagnoseConfig, say: Say = lambda line: None
) -> tuple[dict[str, Any], dict[str, list[Shown]]]:
    """The numbers of a loaded model, and by run the samples that are shown.

    Raises:
        ValueError: the attention of the model, or the method on it, cannot be read, or one is at work on it already: an
            intervention would change attention behind what is read.
    """
    check_free(loaded.adapter)
    method = None if config.prune is None else prepare(loaded.model, config.prune, adapter=loaded.adapter)
    channels = sink_channels(loaded, task, config.limit, config.batch_size)
    say(f"sink channels: {channels.found}")
    runs: dict[str, Found] = {}
    pictures: dict[str, list[Shown]] = {}
    for one in (None, method) if method else (None,):
        label = UNPRUNED if one is None else one.label
        gathered, pictures[label] = _run(
            loaded, task, config, one, channels, lambda line, at=label: say(f"{at}: {line}")
        )
        runs[label] = gathered.summary()
    info = decoder_info(loaded.adapter)
    found = {
        "model": loaded.name, "task": task.name, "of": task.size,
        "decoder": {"layers": info.layers, "heads": info.heads, "key_heads": info.key_heads},
        "sink_channels": asdict(channels), "runs": runs, "settings": asdict(config), "version": __version__,
        "command": " ".join(["tokenprune", *sys.argv[1:]]), "hardware": hardware(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }  # fmt: skip
    return found, pictures


def _run(
    loaded: LoadedModel, task: Task, config: DiagnoseConfig, method: Prepared | None, channels: Channels, say: Say
) -> tuple[Gathered, list[Shown]]:
    info = decoder_info(loaded.adapter)
    gathered, shown = Gathered(info.layers, info.key_heads), []
    count, ends = task.count(config.limit), ending_ids(loaded)
    drawn = set(drawn_samples(task, PICTURES, config.limit))
    for start in range(0, count, config.batch_size):
        batch = read_batch(task, start, min(start + config.batch_size, count))
        samples = [sample for sample in batch.samples if sample.visuals]
        for sample_id, failure in batch.unread.items():
            say(f"sample {sample_id} is left out: {failure.error}")
        if not samples:
            continue
        inputs = model_inputs(loaded, samples)
        tokens = read_tokens(loaded, samples, inputs)
        length = config.max_new_tokens or task.max_new_tokens
        reader, answers = read_answers(loaded, samples, inputs, tokens, method, channels, length)
        drawn_ids = {sample_id for place, sample_id in batch.ids.items() if place in drawn}
        for row, (sample, said) in enumerate(zip(samples, loaded.decode(answers), strict=True)):
            generated, writing = writing_rows(answers[row].tolist(), ends)
            score = scored(task, sample, said)["correct"]
            right = None if score is None else score > 0.5
            gathered.add(reader, row, {"writing": writing, "generated": generated}, right)
            picture = shown_sample(loaded, sample, said, right, reader, row) if sample.sample_id in drawn_ids else None
            shown += [picture] if picture else []
        if start // config.batch_size % 16 == 15:
            say(f"{start + len(samples)} of {count} samples read")
    if not gathered.samples:
        raise ValueError(f"None of the first {count} samples of {task.name} has a picture, so there is nothing to see.")
    return gathered, shown


def read_answers(
    loaded: LoadedModel,
    samples: list[Sample],
    inputs: dict[str, Any],
    tokens: PromptTokens,
    method: Prepared | None,
    channels: Channels,
    max_new_tokens: int,
) -> tuple[BatchReader, Tensor]:
    """What was read while a batch was answered greedily, and the answers `[B, T]`."""
    adapter = loaded.adapter
    reader, tap = BatchReader(tokens, len(adapter.layers), None, channels.numbers, channels.tau), AttentionTap(adapter)
    tap.reader = reader
    with contextlib.ExitStack() as stack:
        stack.enter_context(tap.installed())
        if method is not None:
            handle = stack.enter_context(method.applied())
            if any("boxes" in stage.pruner.needed_hints for stage in handle.stages):
                handle.set_hints(boxes=[sample.boxes for sample in samples])
            passes = stack.enter_context(handle.watch())
            reader.stays = lambda: list(passes[-1].stays_by_layer.values())[-1]

        def enter(module: Any, args: Any, kwargs: Any) -> None:
            reader.enter(args[0] if args else kwargs["hidden_states"])

        for layer in adapter.layers if channels.numbers else ():  # behind the method's hooks, which cut what enters
            stack.callback(layer.register_forward_pre_hook(enter, with_kwargs=True).remove)
        stack.enter_context(torch.inference_mode())
        length = inputs["input_ids"].shape[1]
        output = loaded.model.generate(**inputs, do_sample=False, num_beams=1, max_new_tokens=max_new_tokens)
    return reader, output[:, length:]


def ending_ids(loaded: LoadedModel) -> set[int]:
    """Ids that end an answer or stand behind its end."""
    settings = loaded.model.generation_config
    ends: set[int] = set()
    for value in (settings.eos_token_id, settings.pad_token_id):
        ends |= set(value if isinstance(value, list) else [] if value is None else [value])
    return ends


def _head_rows(heads: Found) -> dict[str, list[dict[str, Any]]]:
    """The card's table of heads, best first."""
    tables = {}
    for name, found in heads.items():
        rows = [
            {"layer": layer, "head": head, "W": found["image"][layer][head], "C": found["concentration"][layer][head],
             "R": None if found["region"] is None else found["region"][layer][head],
             "S": found["score"][layer][head], "rank": rank}
            for layer, ranks in enumerate(found["rank"]) for head, rank in enumerate(ranks)
        ]  # fmt: skip
        tables[name] = sorted(rows, key=lambda each: each["rank"])
    return tables
