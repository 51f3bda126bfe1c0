"""The HTTP side with answers made by hand: a full queue, clients that leave, read slowly or send what is no request."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import uvicorn
from _served import ask, events, get, listening, png, post, rest_of, send, text_of, until

from tokenprune.server.answering import Began, Ended, Piece
from tokenprune.server.app import Served, build_app
from tokenprune.server.limits import Limits
from tokenprune.server.refusals import Refused
from tokenprune.server.worker import Job, Worker

ENDED = Ended("stop", 10, 5, 3, 8, 3, 3.0)


class ByHand:
    """Answers when a test says so.

    Attributes:
        go: cleared, answers wait for it at their second piece.
        seen: jobs that were begun.
        pieces: of every answer.
    """

    def __init__(self) -> None:
        self.go, self.seen, self.pieces = threading.Event(), [], ["one ", "two ", "three"]
        self.go.set()

    def __call__(self, job: Job) -> Ended | None:
        self.seen.append(job)
        text = job.request.messages[0]["content"][-1]["text"]
        if text == "refuse":
            raise Refused("Not this one.", 400, code="so")
        if text == "break":
            raise RuntimeError("secret")
        job.emit(Began("holov@9"))
        job.emit(Piece(self.pieces[0]))
        while not self.go.wait(0.02):
            if job.cancelled.is_set():
                return None
        for piece in self.pieces[1:]:
            job.emit(Piece(piece))
        return ENDED


@contextlib.contextmanager
def served(
    limits: Limits | None = None, send_buffer: int | None = None, **about: Any
) -> Iterator[tuple[int, ByHand, Worker]]:
    limits = limits or Limits()
    answer = ByHand()
    worker = Worker(answer, limits.queue)
    app = build_app(worker, Served("tiny", "holov@9", **about), limits)
    config = uvicorn.Config(app, http="h11", ws="none", lifespan="on", log_level="error", timeout_graceful_shutdown=20)
    with listening(uvicorn.Server(config), send_buffer) as port:
        yield port, answer, worker


def test_an_answer_whole_and_in_pieces():
    with served() as (port, _, _):
        status, whole, _ = post(port, ask("hello"))
        assert status == 200 and whole["choices"][0]["message"]["content"] == "one two three"
        assert whole["usage"] == {
            "prompt_tokens": 10, "completion_tokens": 3, "total_tokens": 13, "kept_prompt_tokens": 5,
            "visual_tokens": {"of": 8, "kept": 3, "average": 3.0},
        }  # fmt: skip
        said = events(rest_of(send(port, ask("hello", stream=True, stream_options={"include_usage": True}))))
        assert text_of(said) == "one two three"
        assert [one["choices"][0]["finish_reason"] for one in said if one["choices"]][-1] == "stop"
        assert said[-1]["usage"] == whole["usage"] and {one["tokenprune"] for one in said} == {"holov@9"}
        assert get(port, "/v1/models")[1]["data"][0]["id"] == "tiny"


def test_a_full_queue_says_when_to_come_again():
    with served(Limits(queue=1)) as (port, answer, worker):
        answer.go.clear()
        first = send(port, ask("a"))
        until(lambda: answer.seen)
        second = send(port, ask("b"))
        until(lambda: worker.state()["waiting"] == 1)
        status, said, headers = post(port, ask("c"))
        assert status == 503 and int({k.lower(): v for k, v in headers.items()}["retry-after"]) >= 1
        assert said["error"]["code"] == "queue_full" and "2 requests" in said["error"]["message"]
        answer.go.set()
        assert b"one two three" in rest_of(first) and b"one two three" in rest_of(second)
        assert post(port, ask("c"))[0] == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_room(stream):
    with served(Limits(queue=1)) as (port, answer, worker):
        answer.go.clear()
        running, waiting = send(port, ask("a", stream=stream)), None
        until(lambda: answer.seen)
        waiting = send(port, ask("b", stream=stream))
        until(lambda: worker.state()["waiting"] == 1)
        waiting.close()
        until(lambda: worker.state()["taken"] == 1)  # at once, and not when its turn comes
        running.close()
        until(lambda: worker.state()["taken"] == 0)
        assert answer.seen[0].cancelled.is_set() and not answer.go.is_set()
        answer.go.set()
        assert post(port, ask("c"))[0] == 200
        assert [job.request.messages[0]["content"][0]["text"] for job in answer.seen] == ["a", "c"]


def test_a_slow_reader_holds_up_nobody():
    limits = Limits(seconds=60)
    with served(limits, send_buffer=4096) as (port, answer, worker):
        answer.pieces = [f"{number:05d} " * 40 for number in range(2000)]  # 900 kB: more than any buffer on the way
        slow = send(port, ask("a", stream=True), receive_buffer=4096)
        until(lambda: answer.seen and worker.state()["taken"] == 0)  # its answer is made, and it has not read a byte
        assert post(port, ask("b"))[0] == 200
        assert text_of(events(rest_of(slow))) == "".join(answer.pieces)


def test_who_never_reads_is_left():
    with served(Limits(seconds=0.5), send_buffer=4096) as (port, answer, worker):
        answer.pieces = ["x" * 1000] * 2000
        slow = send(port, ask("a", stream=True), receive_buffer=4096)
        until(lambda: answer.seen and worker.state()["taken"] == 0)
        threading.Event().wait(1.5)
        assert b"[DONE]" not in rest_of(slow), "it was waited for beyond the limit"


def test_errors_are_sentences_and_the_next_request_is_answered():
    with served() as (port, answer, _):
        status, said, _ = post(port, ask("refuse", stream=True))
        assert (status, said["error"]["message"], said["error"]["code"]) == (400, "Not this one.", "so")
        status, said, _ = post(port, ask("break"))
        assert status == 500 and "RuntimeError" in said["error"]["message"] and "secret" not in json.dumps(said)
        assert post(port, ask("hello"))[0] == 200
        for body in (b'{"messages": [', b"\xff{}", b"[]", b""):
            status, said, _ = post(port, body)
            assert status == 400 and "JSON" in said["error"]["message"]
        status, said, _ = post(port, ask("hello", model="tinny"))
        assert status == 404 and "Did you mean 'tiny'?" in said["error"]["message"]
        status, said, _ = post(port, json.dumps(ask("hello")).encode(), {"Content-Type": "text/plain"})
        assert status == 415 and "application/json" in said["error"]["message"]
        assert get(port, "/v1/model") == (404, get(port, "/v1/model")[1])
        assert "GET /v1/models" in get(port, "/nothing")[1]["error"]["message"]
        assert get(port, "/v1/chat/completions")[0] == 405
        assert len(answer.seen) == 3


def test_bodies_too_long_or_too_slow():
    with served(Limits(body=50_000, seconds=1)) as (port, answer, worker):
        status, said, _ = post(port, ask("x" * 60_000))
        assert status == 413 and "50000" in said["error"]["message"]
        client = send(port, ask("hello"))
        rest_of(client)
        chunked = socket.create_connection(("127.0.0.1", port), 60)
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        chunked.sendall(f"{head}Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n".encode())
        chunked.sendall(b"f000\r\n" + b"x" * 0xF000 + b"\r\n0\r\n\r\n")
        assert rest_of(chunked).startswith(b"HTTP/1.1 413")
        slow = socket.create_connection(("127.0.0.1", port), 60)
        slow.sendall(f"{head}Content-Length: 1000\r\nConnection: close\r\n\r\n{{".encode())
        assert rest_of(slow).startswith(b"HTTP/1.1 408")
        assert worker.state()["taken"] == 0 and len(answer.seen) == 1


def test_who_may_ask():
    with served(key="secret") as (port, answer, _):
        assert post(port, ask("hello"))[0] == 401
        assert post(port, ask("hello"), {"Authorization": "Bearer secret"})[0] == 200
        status, said, _ = post(port, ask("hello"), {"Authorization": "Bearer secret", "Host": f"evil.example:{port}"})
        assert status == 403 and "evil.example" in said["error"]["message"]
        assert get(port, "/health") == (200, {"status": "ok", "answering": 0, "waiting": 0, "taken": 0, "room": 65})
        assert len(answer.seen) == 1


def test_what_is_being_answered_at_the_end_is_finished():
    with served() as (port, answer, worker):
        answer.go.clear()
        client = send(port, ask("a", png(1)))
        until(lambda: answer.seen)
        threading.Timer(0.3, answer.go.set).start()
    assert b"one two three" in rest_of(client)
    assert worker.state()["status"] == "stopping"
    with pytest.raises(Refused, match="stopping"):
        worker.reserve()
