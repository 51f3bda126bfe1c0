"""One request, answered by the model: prompt, method, tokens as they come, counts."""

from __future__ import annotations

import contextlib
import itertools
import math
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from tokenprune import cost
from tokenprune.evals.evaluation.applied_method import visual_tokens
from tokenprune.evals.io.picture_reader import BadPicture
from tokenprune.evals.models.load import LoadedModel
from tokenprune.handle import Handle
from tokenprune.server.chat_request import ChatRequest
from tokenprune.server.limits import Limits
from tokenprune.server.methods import NONE, Methods
from tokenprune.server.refusals import Refused
from tokenprune.server.text_stream import TextSoFar
from tokenprune.server.worker import Job


@dataclass(frozen=True)
class Began:
    """The prompt has been read and the first token is there.

    Attributes:
        method: what is at work, with its budget.
    """

    method: str


@dataclass(frozen=True)
class Piece:
    """More text of an answer."""

    text: str


@dataclass(frozen=True)
class Ended:
    """An answer is whole.

    Attributes:
        reason: "stop" where the model or a stop text ended it, "length" where the limit did.
        prompt_tokens: text and visual tokens, before pruning.
        kept_prompt_tokens: of these, in the decoder's last layer.
        new_tokens: of the answer.
        visual, kept: visual tokens before pruning, and in the decoder's last layer.
        average: visual tokens averaged over the decoder's layers.
    """

    reason: str
    prompt_tokens: int
    kept_prompt_tokens: int
    new_tokens: int
    visual: int
    kept: int
    average: float


class _Watch(StoppingCriteria):
    """Sees every token as it comes: tells it to the job, and says whether to stop."""

    def __init__(self, job: Job, text: TextSoFar, label: str) -> None:
        self._job, self._text, self._label = job, text, label

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        if not self._text.tokens:
            self._job.emit(Began(self._label))
        piece = self._text.add(int(input_ids[0, -1]))
        if piece:
            self._job.emit(Piece(piece))
        done = self._text.stopped or self._job.cancelled.is_set()
        return torch.full((input_ids.shape[0],), done, device=input_ids.device, dtype=torch.bool)


class _Numbers(LogitsProcessor):
    """Refuses logits that are no numbers before a token is taken from them: the likeliest of them would be any token,
    and drawing one ends all work on a CUDA device, that for later requests too."""

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        largest = float(scores.max())  # NaN where one of them is
        if not math.isfinite(largest):
            raise Refused(
                f"The model's logits for this prompt are no finite numbers (the largest is {largest}), so no token can "
                "be taken from them. In float16 some models reach beyond its range: start the server with --dtype "
                "bfloat16 or float32.",
                500, code="no_numbers",
            )  # fmt: skip
        return scores


class Answerer:
    """Answers jobs with one model; called by one thread at a time.

    Args:
        loaded: the model.
        methods: of that model.
        limits: what a request may ask for.
    """

    def __init__(self, loaded: LoadedModel, methods: Methods, limits: Limits) -> None:
        self._loaded, self._methods, self._limits = loaded, methods, limits
        tokenizer = loaded.processor.tokenizer
        added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        named = [getattr(loaded.processor, name, None) for name in ("image_token", "video_token")]
        self._own = sorted({*tokenizer.all_special_tokens, *added, *(name for name in named if name)})
        config = loaded.model.config.get_text_config()
        self._context = getattr(config, "max_position_embeddings", None)

    def __call__(self, job: Job) -> Ended | None:
        """Emit `Began` and pieces; what is returned ends the answer, None where nobody waits for it.

        Raises:
            Refused: what was asked for cannot be answered.
        """
        request: ChatRequest = job.request
        self._check_text(request)
        with _sentences(), torch.inference_mode():
            prepared = self._methods.prepared(request.method)
            inputs = self._inputs(request)
            length = self._answer_length(request, inputs["input_ids"].shape[1])
            text = TextSoFar(self._decode, request.stops)
            label = NONE if prepared is None else prepared.label
            if job.cancelled.is_set():
                return None
            with contextlib.nullcontext() if prepared is None else prepared.applied() as handle, _random(request):
                watch = StoppingCriteriaList([_Watch(job, text, label)])
                self._loaded.model.generate(
                    **inputs, **_sampling(request), num_beams=1, max_new_tokens=length, stopping_criteria=watch,
                    logits_processor=LogitsProcessorList([_Numbers()]),
                )  # fmt: skip
                counts = self._counts(handle, inputs)
        if job.cancelled.is_set():
            raise Refused("This answer was stopped before it was whole.", 503, code="stopped")
        rest = text.finish()
        if rest:
            job.emit(Piece(rest))
        return Ended(self._reason(text, length), new_tokens=len(text.tokens), **counts)

    def _check_text(self, request: ChatRequest) -> None:
        """Raise Refused where a text holds a token of the model's own: it would be one, a picture's place or a turn's
        end, and not the letters that were written."""
        for place, message in enumerate(request.messages):
            # parts that follow each other are one text to a template, and a token may lie across their border
            for _, run in itertools.groupby(message["content"], lambda part: part["type"]):
                text = "".join(part.get("text", "") for part in run)
                found = next((own for own in self._own if own in text), None)
                if found is not None:
                    raise Refused(
                        f"The text of messages[{place}] holds {found!r}, which is no text to this model but a token of "
                        "its own. Leave it out, or write it with a space inside.",
                        param=f"messages[{place}]", code="special_token",
                    )  # fmt: skip

    def _inputs(self, request: ChatRequest) -> dict[str, Any]:
        try:
            return dict(self._loaded.pack([list(request.messages)]))
        except BadPicture as error:
            raise Refused(
                f"A picture of this request cannot be read: {error}", param="messages", code="bad_picture"
            ) from None
        except (ValueError, torch.OutOfMemoryError):
            raise  # sentences already, see `_sentences`
        except Exception as error:  # chat templates and processors raise what they like of what they do not take
            raise Refused(
                f"The processor of {self._loaded.name} does not take this prompt: {error}",
                param="messages", code="bad_prompt",
            ) from error  # fmt: skip

    def _answer_length(self, request: ChatRequest, prompt: int) -> int:
        most = self._limits.prompt_tokens
        if prompt > most:
            raise Refused(
                f"This prompt has {prompt} tokens, and this server takes {most}. Send less text, or fewer or smaller "
                "pictures.",
                param="messages", code="prompt_too_long",
            )  # fmt: skip
        room = self._limits.new_tokens if self._context is None else self._context - prompt
        if room < (request.new_tokens or 1):
            raise Refused(
                f"This prompt has {prompt} tokens and the answer may have {request.new_tokens or 1}, and the model "
                f"holds {self._context} in all.",
                param="max_tokens", code="prompt_too_long",
            )  # fmt: skip
        return request.new_tokens or min(room, self._limits.new_tokens)

    def _decode(self, tokens: list[int]) -> str:
        tokenizer = self._loaded.processor.tokenizer
        return tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _reason(self, text: TextSoFar, length: int) -> str:
        ends = self._loaded.model.generation_config.eos_token_id
        ends = [ends] if isinstance(ends, int) else ends or []
        ended = text.stopped or len(text.tokens) < length or text.tokens[-1] in ends
        return "stop" if ended else "length"

    def _counts(self, handle: Handle | None, inputs: dict[str, Any]) -> dict[str, Any]:
        if handle is not None and handle.last is not None:
            view = handle.last
            report = view.report()
            return {
                "prompt_tokens": report.prompt_tokens, "kept_prompt_tokens": report.kept_prompt_tokens,
                "visual": report.visual_tokens, "kept": report.kept_tokens,
                "average": cost.equivalent_tokens(view.visual_by_layer[0]),
            }  # fmt: skip
        prompt, visual = inputs["input_ids"].shape[1], visual_tokens(self._loaded, inputs)[0]
        return {
            "prompt_tokens": prompt, "kept_prompt_tokens": prompt, "visual": visual, "kept": visual,
            "average": float(visual),
        }  # fmt: skip


def _sampling(request: ChatRequest) -> dict[str, Any]:
    """Arguments of `generate`; nothing of the checkpoint's own settings for sampling is left to chance."""
    if request.temperature == 0:
        return {"do_sample": False}
    return {"do_sample": True, "temperature": request.temperature, "top_p": request.top_p, "top_k": 0}


@contextlib.contextmanager
def _random(request: ChatRequest) -> Iterator[None]:
    """Random numbers of this request's own."""
    if request.temperature == 0:
        yield
        return
    with torch.random.fork_rng():
        torch.manual_seed(secrets.randbits(63) if request.seed is None else request.seed)
        yield


@contextlib.contextmanager
def _sentences() -> Iterator[None]:
    """What the library refuses is the client's to mend; a device that is full is nobody's."""
    try:
        yield
    except torch.OutOfMemoryError:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        raise Refused(
            "The device has no memory left for this request. Send fewer or smaller pictures.", 503, code="out_of_memory"
        ) from None
    except ValueError as error:
        raise Refused(str(error), code="refused") from error
