"""What must stay flat however long one goes on, and equal however many ask at once."""

from __future__ import annotations

import gc
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from _served import ask, data_uri, events, get, listening, png, post, rest_of, send, text_of, until

import tokenprune
from tokenprune.evals.models.load import LoadedModel
from tokenprune.server.limits import Limits
from tokenprune.server.run import Place, make_server

METHODS = (
    "uniform@9", "vtc_cls@9", "holov@0.25", "fastv@9", "random@20", "pyramiddrop@0.3", "visionzip@9", "tome@0.5",
    "flowcut@9",
    "divprune@5", "todre@9", "sparsevlm@9", "prumerge@9", "downsample@9", "vtc_cls@9+naavit", "fastv@avg20",
)  # fmt: skip


@dataclass(frozen=True)
class Mark:
    """The state of the process after some cycles.

    Attributes:
        cycles: how many.
        rss: resident memory, bytes.
        objects: that the garbage collector knows.
        hooks: on all modules of the model.
    """

    cycles: int
    rss: int
    objects: int
    hooks: int


def hooks_on(model: Any) -> int:
    """Hooks of all modules, of whoever set them."""
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def _mark(cycles: int, model: Any) -> Mark:
    gc.collect()
    return Mark(cycles, psutil.Process().memory_info().rss, len(gc.get_objects()), hooks_on(model))


def cycles(loaded: LoadedModel, count: int, every: int) -> tuple[list[Mark], int]:
    """Apply, generate and remove, over and over, a method after the other.

    Returns:
        Marks, the first after one round of all methods (what is made once is there by then); and how often the model
        gave another answer after a method was removed than before it was ever applied.
    """
    inputs = dict(
        loaded.inputs(["what is this"], [torch.rand(48, 48, 3, generator=torch.Generator().manual_seed(1)).numpy()])
    )
    arguments: Any = {**inputs, "max_new_tokens": 3, "do_sample": False}
    with torch.no_grad():
        before = loaded.model.generate(**arguments)
        marks, changed = [], 0
        for number in range(-len(METHODS), count + 1):
            if number >= 0 and number % every == 0:
                marks.append(_mark(number, loaded.model))
                changed += not torch.equal(loaded.model.generate(**arguments), before)
            handle = tokenprune.apply(loaded.model, METHODS[number % len(METHODS)])
            loaded.model.generate(**arguments)
            handle.report()
            handle.remove()
    return marks, changed


def requests(count: int, methods: tuple[str, ...], words: tuple[str, ...], side: int) -> list[dict[str, Any]]:
    """Requests that differ in picture, question, method and budget."""
    draw, made = random.Random(0), []
    for number in range(count):
        method, budget = draw.choice(methods), draw.choice(("1", "4", "9", "0.25", "0.5", "1.0"))
        pictures = [png(draw.randrange(count), side) for _ in range(draw.choice((1, 1, 1, 2, 0)))]
        text = " ".join(draw.sample(words, 4))
        made.append(ask(text, *pictures, tokenprune=f"{method}@{budget}" if number % 9 else "none", max_tokens=8))
        if number % 10 == 3:
            made[-1] |= {"temperature": 1.0, "seed": number}
    return made


def _answer(port: int, request: dict[str, Any], stream: bool) -> tuple[str, Any, str]:
    if not stream:
        status, said, _ = post(port, request)
        if status != 200:
            raise RuntimeError(f"HTTP {status}: {said}")
        return said["choices"][0]["message"]["content"], said["usage"], said["tokenprune"]
    body = {**request, "stream": True, "stream_options": {"include_usage": True}}
    said = events(rest_of(send(port, body)))
    return text_of(said), said[-1]["usage"], said[-1]["tokenprune"]


@dataclass(frozen=True)
class Compared:
    """Concurrent answers beside sequential ones.

    Attributes:
        requests, different: how many, and how many of the concurrent ones differ in text, counts or method.
        distinct: different texts among the sequential answers: what tells requests apart.
        rude: what clients that misbehave were told in between: name to HTTP statuses.
        sequential_s, concurrent_s: seconds.
        left: room that was not given back.
    """

    requests: int
    different: int
    distinct: int
    rude: dict[str, list[int]]
    sequential_s: float
    concurrent_s: float
    left: int


def compare(loaded: LoadedModel, asked: list[dict[str, Any]], rude: int) -> Compared:
    """Ask one after the other, then all at once, half of them as streams, with `rude` rounds of clients that leave,
    read
    slowly, send too large a picture or no JSON among them."""
    limits = Limits(queue=len(asked) + 8 * rude + 8, pixels=1_000_000)
    server = make_server(loaded, "none", limits, Place(name="soak"))
    server.config.log_level = "error"
    server.config.configure_logging()
    with listening(server, send_buffer=4096) as port:
        started = time.monotonic()
        alone = [_answer(port, request, False) for request in asked]
        between = time.monotonic()
        told: dict[str, list[int]] = {"left": [], "slow": [], "oversized": [], "malformed": [], "unknown": []}
        with ThreadPoolExecutor(len(asked) + 8 * rude) as pool:
            waiting = [pool.submit(_answer, port, request, bool(number % 2)) for number, request in enumerate(asked)]
            misbehaving = [pool.submit(_misbehave, port, asked[number], told) for number in range(rude)]
            together = [one.result() for one in waiting]
            ended = time.monotonic()
            for one in misbehaving:
                one.result()
        until(lambda: get(port, "/health")[1]["taken"] == 0)
        left = get(port, "/health")[1]["taken"]
    return Compared(
        len(asked), sum(a != b for a, b in zip(alone, together, strict=True)), len({text for text, _, _ in alone}),
        told, round(between - started, 1), round(ended - between, 1), left,
    )  # fmt: skip


def _misbehave(port: int, request: dict[str, Any], told: dict[str, list[int]]) -> None:
    leaving = send(port, {**request, "stream": True, "max_tokens": 200})
    slow = send(port, {**request, "stream": True}, receive_buffer=4096)
    huge = {
        "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": data_uri(png(1, 1100))}}]}]
    }
    told["oversized"].append(post(port, huge)[0])
    told["malformed"].append(post(port, b'{"messages": [')[0])
    told["unknown"].append(post(port, {**request, "tokenprune": "hollov@9"})[0])
    threading.Event().wait(0.2)
    leaving.close()
    told["left"].append(0)
    until(lambda: get(port, "/health")[1]["waiting"] == 0, seconds=900)
    told["slow"].append(int(rest_of(slow).split(b" ", 2)[1]))
