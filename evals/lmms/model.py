"""The model `tokenprune` of lmms-eval: a stock model with a method at work, loaded as everywhere here.

Only lmms-eval imports this file; see `plugin.py`.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, TokenCounts  # pyright: ignore[reportMissingImports]
from lmms_eval.api.model import lmms  # pyright: ignore[reportMissingImports]
from lmms_eval.models.model_utils.gen_metrics import log_metrics  # pyright: ignore[reportMissingImports]
from tqdm import tqdm

from tokenprune import cost
from tokenprune.api import Prepared, prepare
from tokenprune.evals.evaluation.applied_method import visual_tokens
from tokenprune.evals.lmms.arguments import read_arguments
from tokenprune.evals.models.chat_template import Message
from tokenprune.evals.models.load import load_model
from tokenprune.evals.tasks.lmms_generation import Generation, read_generation
from tokenprune.evals.tasks.lmms_media import Media, document, naming_document
from tokenprune.handle import Handle

_SETTLING = 8  # prompts at a time while an intervention learns from the first ones


class _Tokenprune(lmms):
    """What both interfaces share; they differ in what a request is made of.

    Args:
        given: see `arguments.Arguments`; anything else is an option of the method.

    Raises:
        UnknownName, ValueError, TypeError: before anything loads.
    """

    def __init__(self, **given: Any) -> None:
        super().__init__()
        self.arguments, self._spec = read_arguments(given)
        self._media = Media(self.arguments.fps, self.arguments.max_frames)
        device = self.arguments.device
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            # lmms-eval gathers through these; each process has a whole model and its share of the samples
            self.accelerator = Accelerator()
            self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
            if device in (None, "cuda"):
                device = str(self.accelerator.device)
        self._loaded: Any = load_model(self.arguments.pretrained, self.arguments.dtype, device)
        self.device = self._loaded.model.device
        self._tokens: list[tuple[int, float]] = []
        self._prepared: Prepared | None = None
        with self._pruned() as handle:  # what cannot work on this model fails now, not after the data was loaded
            if handle is not None and any("boxes" in stage.pruner.needed_hints for stage in handle.stages):
                raise ValueError(
                    f"{self.arguments.method} needs the boxes that suffice for an answer, and tasks of lmms-eval have "
                    "none; use it in `tokenprune eval` on the pocket suite."
                )

    @property
    def batch_size(self) -> int:
        """Prompts generated together."""
        return self.arguments.batch_size

    @contextlib.contextmanager
    def _pruned(self) -> Iterator[Handle | None]:
        if self._spec is None:
            yield None
            return
        if self._prepared is None:
            self._prepared = prepare(self._loaded.model, self._spec, adapter=self._loaded.adapter)
        with self._prepared.applied() as handle:
            yield handle

    def _request(self, arguments: tuple[Any, ...]) -> tuple[list[Message], Any]:
        """The conversation of a request, and the task's settings of generation."""
        raise NotImplementedError

    def _doc(self, task: str, split: str, doc_id: int) -> Any:
        return document(self.task_dict[task][split], doc_id, task)

    def generate_until(self, requests: list[Any]) -> list[Any]:
        """Answers in the order of `requests`, with how many tokens went in (before pruning) and out."""
        results: list[Any] = []
        begin, made = time.perf_counter(), 0
        self._tokens = []
        bar = tqdm(total=len(requests), disable=self.rank != 0, desc="tokenprune")
        asked = [request.args for request in requests]
        self._calibrate(asked)
        for _, same in groupby(asked, key=lambda arguments: repr(self._settings(arguments))):
            group = list(same)
            for start in range(0, len(group), self.batch_size):
                batch = [self._request(arguments) for arguments in group[start : start + self.batch_size]]
                how = read_generation(batch[0][1], self.arguments.max_new_tokens)
                answers = self._answer([conversation for conversation, _ in batch], how)
                made += sum(answer.token_counts.output_tokens for answer in answers)
                results += answers
                bar.update(len(batch))
        bar.close()
        self._log(made, time.perf_counter() - begin)
        return results

    def _settings(self, arguments: tuple[Any, ...]) -> Any:
        raise NotImplementedError

    def _answer(self, conversations: list[list[Message]], how: Generation) -> list[Any]:
        loaded = self._loaded
        inputs = loaded.pack([self._with_system(conversation) for conversation in conversations])
        length = inputs["input_ids"].shape[1]
        before = visual_tokens(loaded, inputs)
        with self._pruned() as handle, torch.inference_mode():
            output = loaded.model.generate(**inputs, **how.settings)
            kept: list[float] = [float(count) for count in before]
            if handle is not None and any(before):
                kept = [cost.equivalent_tokens(layers) for layers in handle.visual_by_layer]
        self._tokens += zip(before, kept, strict=True)
        answers = output[:, length:]
        pad, written = loaded.processor.tokenizer.pad_token_id, inputs["attention_mask"].sum(1).tolist()
        texts = [how.cut(text) for text in loaded.decode(answers)]
        return [
            GenerationResult(text, TokenCounts(input_tokens=int(count), output_tokens=int((tokens != pad).sum())))
            for text, tokens, count in zip(texts, answers, written, strict=True)
        ]

    def _with_system(self, conversation: list[Message]) -> list[Message]:
        prompt = self.arguments.system_prompt
        if prompt is None or conversation[0]["role"] == "system":
            return conversation
        return [{"role": "system", "content": [{"type": "text", "text": prompt}]}, *conversation]

    def _calibrate(self, asked: list[tuple[Any, ...]]) -> None:
        """Let interventions see the first prompts if they learn from prompts, as `tokenprune eval` does."""
        if self._spec is None or not self._spec.interventions:
            return
        seen = 0
        with self._pruned() as handle:
            while handle and any(each.wants_prompts for each in handle.interventions) and seen < len(asked):
                batch = [self._request(arguments)[0] for arguments in asked[seen : seen + _SETTLING]]
                seen += len(batch)
                with torch.inference_mode():
                    self._loaded.model(**self._loaded.pack([self._with_system(messages) for messages in batch]))
            if handle and seen:
                settled = tuple(each.settled() for each in handle.interventions)
                self._spec, self._prepared = replace(self._spec, interventions=settled), None

    def _log(self, made: int, seconds: float) -> None:
        """Into `throughput` of the results file, in addition to what every model of lmms-eval reports."""
        count = max(1, len(self._tokens))
        log_metrics(
            total_elapsed_time=seconds,
            total_gen_tokens=made,
            avg_speed=made / seconds if seconds else 0.0,
            additional_metrics={
                "visual_tokens": sum(before for before, _ in self._tokens) / count,
                "kept_tokens": sum(kept for _, kept in self._tokens) / count,
            },
        )

    def loglikelihood(self, requests: list[Any]) -> list[Any]:
        """Refused."""
        raise NotImplementedError(
            f"tokenprune answers by generation; {_task_of(requests)} scores likelihoods (output_type multiple_choice "
            "or loglikelihood). Choose a variant of the task that generates."
        )

    def generate_until_multi_round(self, requests: list[Any]) -> list[Any]:
        """Refused."""
        raise NotImplementedError(
            f"tokenprune answers one round; {_task_of(requests)} asks several (output_type generate_until_multi_round)."
        )

    def clean(self) -> None:
        """Let go of the model; lmms-eval calls this after the last answer."""
        self._loaded = None
        super().clean()


class Chat(_Tokenprune):
    """Requests are messages with pictures and videos in them."""

    is_simple = False

    def _request(self, arguments: tuple[Any, ...]) -> tuple[list[Message], Any]:
        _, to_messages, settings, doc_id, task, split = arguments
        doc = self._doc(task, split, doc_id)
        with naming_document(doc_id, task):
            return self._media.messages(to_messages(doc)), settings

    def _settings(self, arguments: tuple[Any, ...]) -> Any:
        return arguments[2]


class Simple(_Tokenprune):
    """Requests are a text and, separately, its pictures or videos."""

    is_simple = True

    def _request(self, arguments: tuple[Any, ...]) -> tuple[list[Message], Any]:
        text, settings, to_visual, doc_id, task, split = arguments
        doc = self._doc(task, split, doc_id) if to_visual is not None else None
        with naming_document(doc_id, task):
            visuals = to_visual(doc) if to_visual is not None else None
        return self._media.conversation(text, visuals), settings

    def _settings(self, arguments: tuple[Any, ...]) -> Any:
        return arguments[1]


def _task_of(requests: list[Any]) -> str:
    return str(getattr(requests[0], "task_name", None) or "this task") if requests else "this task"
