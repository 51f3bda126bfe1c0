"""What goes over the wire: the objects of OpenAI's chat completions."""

from __future__ import annotations

import json
import secrets
import time
from typing import Any

from tokenprune.server.answering import Ended


class Answer:
    """The head of one answer, whole or in pieces: its id, its time and its model."""

    def __init__(self, model: str) -> None:
        self._id, self._created, self._model = f"chatcmpl-{secrets.token_hex(12)}", int(time.time()), model

    def whole(self, text: str, method: str, ended: Ended) -> dict[str, Any]:
        """A `chat.completion`."""
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "finish_reason": ended.reason, "logprobs": None}
        return {**self._head("chat.completion", method), "choices": [choice], "usage": usage(ended)}

    def piece(self, method: str, delta: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
        """A `chat.completion.chunk` of more text, or of the end."""
        choice = {"index": 0, "delta": delta, "finish_reason": reason, "logprobs": None}
        return {**self._head("chat.completion.chunk", method), "choices": [choice]}

    def counts(self, method: str, ended: Ended) -> dict[str, Any]:
        """The last `chat.completion.chunk` of a stream whose counts were asked for."""
        return {**self._head("chat.completion.chunk", method), "choices": [], "usage": usage(ended)}

    def _head(self, kind: str, method: str) -> dict[str, Any]:
        return {
            "id": self._id, "object": kind, "created": self._created, "model": self._model, "tokenprune": method,
        }  # fmt: skip


def usage(ended: Ended) -> dict[str, Any]:
    """Counts of tokens. `prompt_tokens` are those of the whole prompt, as the processor laid it out."""
    return {
        "prompt_tokens": ended.prompt_tokens,
        "completion_tokens": ended.new_tokens,
        "total_tokens": ended.prompt_tokens + ended.new_tokens,
        "kept_prompt_tokens": ended.kept_prompt_tokens,
        "visual_tokens": {"of": ended.visual, "kept": ended.kept, "average": round(ended.average, 2)},
    }


def event(said: dict[str, Any] | str) -> bytes:
    """One event of a stream."""
    text = said if isinstance(said, str) else json.dumps(said, ensure_ascii=False, separators=(",", ":"))
    return f"data: {text}\n\n".encode()
