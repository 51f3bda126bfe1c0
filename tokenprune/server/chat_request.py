"""The body of `/v1/chat/completions`, read and checked before anything waits for the model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tokenprune.registry import near
from tokenprune.server.limits import Limits
from tokenprune.server.pictures import check_sizes, picture_bytes, picture_size
from tokenprune.server.refusals import Refused

ROLES = ("system", "developer", "user", "assistant")
# what OpenAI's clients may send and a server of one local model need not act upon
_IGNORED = ("user", "metadata", "store", "safety_identifier", "prompt_cache_key", "service_tier", "parallel_tool_calls")
# what would change an answer here, and is not built: taken where it says "leave it as it is"
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,), "logprobs": (False,), "top_logprobs": (0,), "presence_penalty": (0,), "frequency_penalty": (0,),
    "logit_bias": ({},), "tools": ([],), "tool_choice": ("none", "auto"), "functions": ([],),
    "response_format": ({"type": "text"},), "modalities": (["text"],), "reasoning_effort": ("none",),
}  # fmt: skip
_OWN = (
    "model", "messages", "stream", "stream_options", "max_tokens", "max_completion_tokens", "temperature", "top_p",
    "seed", "stop", "tokenprune",
)  # fmt: skip
CHARACTERS = 16
"""Letters of text for each token that a prompt may have: longer ones are not even counted."""
STOPS, STOP_LENGTH = 4, 200
COLDEST = 1e-20
"""The smallest temperature above 0: logits divided by much less are no finite numbers, which no token is drawn from."""
# of a part of a message: what is written for caches and readers, and changes no answer
_BESIDE = ("cache_control", "annotations")


@dataclass(frozen=True)
class ChatRequest:
    """One request, checked as far as the model is not needed.

    Attributes:
        model: as the client calls it; None where it does not say.
        messages: as chat templates take them; a picture is the bytes of its file.
        method: what stands in the field `tokenprune`; None where nothing does.
        stream: whether the answer is sent piece by piece.
        count_at_end: whether a stream ends with the counts of tokens.
        new_tokens: at most so many tokens of an answer; None where the client does not say.
        temperature, top_p: of sampling; temperature 0 takes the likeliest token each time.
        seed: of sampling; None draws one.
        stops: the answer ends before the first of these.
    """

    model: str | None
    messages: tuple[dict[str, Any], ...]
    method: str | None
    stream: bool
    count_at_end: bool
    new_tokens: int | None
    temperature: float
    top_p: float
    seed: int | None
    stops: tuple[str, ...]


def read_request(body: bytes, limits: Limits) -> ChatRequest:
    """Read a body.

    Raises:
        Refused: what is wrong with it, as a sentence.
    """
    said = _read_json(body)
    _check_fields(said)
    method = said.get("tokenprune")
    if method is not None and not isinstance(method, str):
        raise Refused(f'tokenprune must be a text like "holov@64", got {_kind(method)}.', param="tokenprune")
    model = said.get("model")
    if model is not None and not isinstance(model, str):
        raise Refused(f"model must be a text, got {_kind(model)}.", param="model")
    options = said.get("stream_options") or {}
    if not isinstance(options, Mapping):
        raise Refused(f"stream_options must be an object, got {_kind(options)}.", param="stream_options")
    for name, value in options.items():
        if name != "include_usage" and value:
            raise Refused(
                f"stream_options has a field {_short(name)}, which is not supported here.", param="stream_options"
            )
    return ChatRequest(
        model=model,
        messages=_messages(said.get("messages"), limits),
        method=method,
        stream=_flag(said, "stream"),
        count_at_end=_flag(options, "include_usage"),
        new_tokens=_new_tokens(said, limits),
        temperature=_temperature(said),
        top_p=_number(said, "top_p", 1.0, 0.0, 1.0),
        seed=_whole(said, "seed", -(2**63), 2**63 - 1),
        stops=_stops(said.get("stop")),
    )


def _read_json(body: bytes) -> dict[str, Any]:
    try:
        said = json.loads(body.decode("utf-8"))
    except RecursionError:
        raise Refused("The body is nested too deeply to be read.", code="bad_json") from None
    except ValueError as error:  # no UTF-8, no JSON, or a number of thousands of digits
        raise Refused(f"The body is no JSON: {error}.", code="bad_json") from None
    if not isinstance(said, dict):
        raise Refused(f'The body must be a JSON object with "messages", got {_kind(said)}.', code="bad_json")
    return said


def _check_fields(said: Mapping[str, Any]) -> None:
    known = [*_OWN, *_NEUTRAL, *_IGNORED]
    for name, value in said.items():
        if name not in known:
            raise Refused(
                f"There is no field {_short(name)}.{near(name[:60], known)} Known: {', '.join(_OWN)}.",
                param=_sendable(name[:60]), code="unknown_field",
            )  # fmt: skip
        if name in _NEUTRAL and value is not None and value not in _NEUTRAL[name]:
            taken = " or ".join(json.dumps(one) for one in _NEUTRAL[name])
            raise Refused(
                f"{name} is not supported here; leave it out, or send {taken}.", param=name, code="not_supported"
            )


def _messages(said: Any, limits: Limits) -> tuple[dict[str, Any], ...]:
    if not isinstance(said, list) or not said:
        raise Refused("messages must be a list of at least one message.", param="messages")
    sizes: list[tuple[int, int]] = []
    messages = tuple(_message(one, f"messages[{place}]", limits, sizes) for place, one in enumerate(said))
    if messages[-1]["role"] == "assistant":
        raise Refused("The last message must be the user's: an answer is not gone on with.", param="messages")
    letters = sum(len(part.get("text", "")) for message in messages for part in message["content"])
    if letters > CHARACTERS * limits.prompt_tokens:
        raise Refused(
            f"The messages have {letters} letters, and this server takes prompts of {limits.prompt_tokens} tokens.",
            param="messages", code="prompt_too_long",
        )  # fmt: skip
    return messages


def _message(said: Any, where: str, limits: Limits, sizes: list[tuple[int, int]]) -> dict[str, Any]:
    if not isinstance(said, Mapping):
        raise Refused(f"{where} must be an object with role and content, got {_kind(said)}.", param=where)
    role, content = said.get("role"), said.get("content")
    if role not in ROLES:
        raise Refused(f"{where}.role must be one of {', '.join(ROLES)}, got {_short(role)}.", param=where)
    for name in said:
        empty = said[name] in (None, [], "")
        if name not in ("role", "content", "name", "refusal", "annotations") and not empty:
            raise Refused(f"{where} has a field {_short(name)}, which is not supported here.", param=where)
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise Refused(f"{where}.content must be a text or a list of parts, got {_kind(content)}.", param=where)
    parts = [_part(one, f"{where}.content[{place}]", limits, sizes) for place, one in enumerate(content)]
    if role != "user" and any(part["type"] != "text" for part in parts):
        raise Refused(f"{where} is of the role {role!r} and has a picture; pictures are the user's.", param=where)
    return {"role": "system" if role == "developer" else role, "content": parts}


def _part(said: Any, where: str, limits: Limits, sizes: list[tuple[int, int]]) -> dict[str, Any]:
    kind = said.get("type") if isinstance(said, Mapping) else None
    if kind in ("text", "image_url"):
        _check_part(said, ("type", kind), where)
    if kind == "text":
        return {"type": "text", "text": _text(said.get("text"), f"{where}.text")}
    if kind != "image_url":
        raise Refused(f'{where} must be of the type "text" or "image_url", got {_short(kind)}.', param=where)
    url = said.get("image_url")
    if isinstance(url, Mapping):
        _check_part(url, ("url", "detail"), f"{where}.image_url")
        if url.get("detail") not in (None, "auto"):
            raise Refused(
                f'{where}.image_url.detail is not supported here, send "auto"; what a picture costs is said with '
                'tokenprune: "holov@64".',
                param=where, code="not_supported",
            )  # fmt: skip
        url = url.get("url")
    if len(sizes) == limits.pictures:
        raise Refused(f"A request may have {limits.pictures} pictures, and this one has more.", param="messages")
    where = f"{where}.image_url.url"
    data = picture_bytes(url, limits, where)
    sizes.append(picture_size(data, where))
    check_sizes(sizes, limits)
    return {"type": "image", "image": data}


def _check_part(said: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
    """Raise Refused where a part says more than is read of it: a budget or a size for one picture would be passed
    over in silence."""
    for name, value in said.items():
        if name not in known and name not in _BESIDE and value not in (None, [], {}, ""):
            raise Refused(
                f"{where} has a field {_short(name)}, which is not supported here.", param=where, code="unknown_field"
            )


def _text(said: Any, where: str) -> str:
    if not isinstance(said, str):
        raise Refused(f"{where} must be a text, got {_kind(said)}.", param=where)
    try:
        said.encode("utf-8")
    except UnicodeEncodeError:
        raise Refused(f"{where} holds half of a surrogate pair, which is no character.", param=where) from None
    return said


def _new_tokens(said: Mapping[str, Any], limits: Limits) -> int | None:
    names = [name for name in ("max_completion_tokens", "max_tokens") if said.get(name) is not None]
    values = [_whole(said, name, 1, limits.new_tokens) for name in names]
    if len(set(values)) > 1:
        raise Refused("max_tokens and max_completion_tokens differ; send one of them.", param="max_tokens")
    return values[0] if values else None


def _stops(said: Any) -> tuple[str, ...]:
    texts = [said] if isinstance(said, str) else [] if said is None else said
    right = isinstance(texts, list) and all(isinstance(text, str) and 0 < len(text) <= STOP_LENGTH for text in texts)
    if not right or len(texts) > STOPS:
        raise Refused(f"stop must be a text, or up to {STOPS}, of 1 to {STOP_LENGTH} letters each.", param="stop")
    return tuple(texts)


def _flag(said: Mapping[str, Any], name: str) -> bool:
    value = said.get(name)
    if value is not None and not isinstance(value, bool):
        raise Refused(f"{name} must be true or false, got {_kind(value)}.", param=name)
    return bool(value)


def _temperature(said: Mapping[str, Any]) -> float:
    value = _number(said, "temperature", 0.0, 0.0, 2.0)
    if 0 < value < COLDEST:
        raise Refused(
            f"temperature must be 0, which takes the likeliest token each time, or from {COLDEST:g} to 2, got "
            f"{value:g}.",
            param="temperature",
        )
    return value


def _number(said: Mapping[str, Any], name: str, default: float, least: float, most: float) -> float:
    value = said.get(name)
    if value is None:
        return default
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    # no number that is none, and no whole number too long to be a float, is between them
    if not number or not least <= value <= most or (name == "top_p" and value == 0):
        raise Refused(
            f"{name} must be a number from {least:g} to {most:g}, got {_short(json.dumps(value))}.", param=name
        )
    return float(value)


def _whole(said: Mapping[str, Any], name: str, least: int, most: int) -> int | None:
    value = said.get(name)
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most):
        raise Refused(
            f"{name} must be a whole number from {least} to {most}, got {_short(json.dumps(value))}.", param=name
        )
    return value


def _sendable(text: str) -> str:
    """A client's text, as an answer in UTF-8 can hold it."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "nothing"}
    return names.get(type(value), "a number")


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else _kind(value)
    return repr(text if len(text) <= 60 else f"{text[:57]}...")
