"""A model behind real HTTP: concurrent requests answer as sequential ones and as the library does; errors are
sentences; who leaves stops the answer."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
import torch
from _paths import ROOT
from _served import ask, events, get, listening, png, post, rest_of, send, text_of, until
from _tiny import tiny_llava
from _tiny_processor import tiny_processor, word_tokenizer

import tokenprune
from tokenprune.cli import main
from tokenprune.evals.models.load import LoadedModel
from tokenprune.server import run
from tokenprune.server.answering import Answerer
from tokenprune.server.chat_request import read_request
from tokenprune.server.limits import Limits
from tokenprune.server.methods import Methods

NEW = 12


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    processor = tiny_processor(word_tokenizer())
    processor.tokenizer.padding_side = "left"
    return LoadedModel("tiny", tiny_llava(), processor, "")


@contextlib.contextmanager
def serving(loaded: LoadedModel, method: str = "vtc_cls@9", limits: Limits | None = None) -> Iterator[int]:
    server = run.make_server(loaded, method, limits or Limits(new_tokens=440), run.Place())
    server.config.log_level = "error"
    server.config.configure_logging()
    with listening(server) as port:
        yield port


@pytest.fixture(scope="module")
def port(loaded: LoadedModel) -> Iterator[int]:
    with serving(loaded) as port:
        yield port


REQUESTS = [
    ask("what is this", png(1), tokenprune="none"),
    ask("who is red", png(1), tokenprune="vtc_cls@4"),
    ask("who is red", png(1), tokenprune="vtc_cls@20"),
    ask("where is this", png(2), png(3), tokenprune="holov@9"),
    ask("where", png(2, 90), tokenprune="fastv@0.25"),
    ask("who", png(4), tokenprune="divprune(positions=compact)@5"),
    ask("one two", png(5), tokenprune="random(seed=3)@7"),
    ask("three", png(5), tokenprune="random@7+naavit"),
    ask("yes", png(6), temperature=1.0, seed=5, tokenprune="@11"),
    ask("no", png(6)),
    ask("who is blue", tokenprune="holov@9"),
]  # fmt: skip


def answer_to(port: int, request: dict[str, Any]) -> tuple[str, Any, Any]:
    status, said, _ = post(port, {"max_tokens": NEW, **request})
    assert status == 200, said
    return said["choices"][0]["message"]["content"], said["usage"], said["tokenprune"]


def test_concurrent_requests_answer_as_sequential_ones(port):
    alone = [answer_to(port, request) for request in REQUESTS]
    assert len({text for text, _, _ in alone}) > 8, "answers must tell methods and budgets apart"
    assert [usage["visual_tokens"]["kept"] for _, usage, _ in alone] == [36, 4, 20, 18, 9, 5, 7, 7, 11, 9, 0]
    assert alone[4][1]["visual_tokens"] == {"of": 36, "kept": 9, "average": 22.5}
    order = [*range(len(REQUESTS)), *reversed(range(len(REQUESTS)))]
    with ThreadPoolExecutor(len(order)) as pool:
        together = list(pool.map(lambda number: answer_to(port, REQUESTS[number]), order))
    assert together == [alone[number] for number in order]


def test_answers_are_those_of_the_library(port, loaded):
    for request, method in ((REQUESTS[1], "vtc_cls@4"), (REQUESTS[4], "fastv@0.25"), (REQUESTS[0], None)):
        message = read_request(json.dumps(request).encode(), Limits()).messages[0]
        inputs = loaded.pack([[message]])
        with contextlib.nullcontext() if method is None else tokenprune.applied(loaded.model, method), torch.no_grad():
            ids = loaded.model.generate(**inputs, do_sample=False, max_new_tokens=NEW)
        text, usage, _ = answer_to(port, request)
        assert text == loaded.decode(ids[:, inputs["input_ids"].shape[1] :])[0]
        assert usage["prompt_tokens"] == inputs["input_ids"].shape[1] and usage["completion_tokens"] == NEW


def test_streams_stops_and_lengths(port):
    whole, usage, _ = answer_to(port, REQUESTS[1])
    said = events(rest_of(send(port, {**REQUESTS[1], "max_tokens": NEW, "stream": True})))
    assert text_of(said) == whole and len(said) > NEW, "a piece a word"
    assert said[-1]["choices"][0]["finish_reason"] == "length"
    words = whole.split()
    stop = next(word for place, word in enumerate(words) if place >= 3 and words.index(word) == place)
    status, cut, _ = post(port, {**REQUESTS[1], "max_tokens": NEW, "stop": ["never", stop]})
    assert cut["choices"][0]["message"]["content"] == whole[: whole.index(stop)].strip()
    assert (
        cut["choices"][0]["finish_reason"] == "stop" and cut["usage"]["completion_tokens"] < usage["completion_tokens"]
    )


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"tokenprune": "hollov@9"}, "Did you mean 'holov'"),
        ({"tokenprune": "holov@0"}, "at least 1 token per image, got 0"),
        ({"tokenprune": "holov@1.5"}, "must be in (0, 1]"),
        ({"tokenprune": "holov@many"}, "A budget is a number of tokens"),
        ({"tokenprune": "@-3"}, "at least 1 token"),
        ({"tokenprune": "holov(varant=paper)@9"}, "Did you mean 'variant'"),
        ({"tokenprune": "oracle@9"}, "needs hints (boxes)"),
        ({"tokenprune": "var"}, "prompts with pictures before it acts"),
        ({"tokenprune": "fastv(layer=77)@9"}, "is not a place to cut"),
        ({"tokenprune": "gtc(student=elsewhere)@9"}, "elsewhere"),
        ({"max_tokens": 441}, "from 1 to 440"),
        ({"messages": [{"role": "user", "content": "what is <image> this"}]}, "holds '<image>'"),
        ({"messages": [{"role": "user", "content": "what " * 600}]}, "the model holds 512 in all"),
    ],
)  # fmt: skip
def test_bad_requests_get_a_sentence(port, fields, says):
    status, said, _ = post(port, {**ask("what", png(1)), **fields})
    assert status == 400 and says in said["error"]["message"], said
    assert get(port, "/health")[1]["taken"] == 0


def test_what_a_processor_does_not_take_is_refused_in_a_sentence(loaded, monkeypatch):
    def refuse(*_: Any) -> None:
        raise ValueError("Found 2 <image> tokens.")

    monkeypatch.setattr("tokenprune.evals.models.load.pack", refuse)  # which marks it counts differs by release
    with pytest.raises(
        ValueError, match="The processor of tiny does not take this prompt, which has no picture: Found 2"
    ):
        loaded.inputs(["what is <image> this <image>"], [()])


def test_a_token_of_the_models_own_is_met_across_parts(port):
    for first, second in (("what is <ima", "ge> this"), ("yes </", "s> no")):
        parts = [{"type": "text", "text": text} for text in (first, second)]
        status, said, _ = post(port, {"messages": [{"role": "user", "content": parts}]})
        assert status == 400 and said["error"]["code"] == "special_token", said


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_logits_that_are_no_numbers_are_refused_before_a_token_is_taken(port, loaded, monkeypatch, temperature):
    request = ask("what", png(1), temperature=temperature)
    head = loaded.model.lm_head
    monkeypatch.setattr(head, "forward", lambda hidden: torch.full((*hidden.shape[:-1], head.out_features), torch.nan))
    status, said, _ = post(port, request)
    assert status == 500 and said["error"]["code"] == "no_numbers" and "--dtype" in said["error"]["message"]
    monkeypatch.undo()
    assert post(port, {**request, "max_tokens": 2})[0] == 200


def test_half_a_picture_gets_a_sentence(port):
    status, said, _ = post(port, ask("what", png(1)[:200]))
    assert status == 400 and "picture" in said["error"]["message"]


def test_a_budget_alone_needs_a_default(loaded):
    methods = Methods(loaded.model, loaded.adapter, "none")
    for text, says in (("@9", "is a budget alone"), ("holov", "does not say how many")):
        with pytest.raises(Exception, match=says):
            methods.prepared(text)
    assert methods.prepared(None) is None and methods.prepared("none") is None
    assert methods.prepared("holov@9") is methods.prepared(" holov@9 ")
    for default in ("vtc_cls@9+naavit", "naavit+vtc_cls@9"):
        assert _label(Methods(loaded.model, loaded.adapter, default), "holov") == "holov@9"
    with pytest.raises(Exception, match="does not say how many"):
        Methods(loaded.model, loaded.adapter, "vtc_cls@20+fastv@9").prepared("holov")


def _label(methods: Methods, said: str) -> str:
    prepared = methods.prepared(said)
    assert prepared is not None
    return prepared.label


def test_who_leaves_stops_the_answer(loaded):
    made: list[int] = []
    before = Answerer.__call__

    def counted(self: Answerer, job: Any) -> Any:
        emit = job.emit
        job.emit = lambda said: (made.append(1), emit(said))
        return before(self, job)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Answerer, "__call__", counted)
        with serving(loaded) as port:
            client = send(port, ask("what", png(1), stream=True, max_tokens=440))
            client.recv(100)
            client.close()
            until(lambda: get(port, "/health")[1]["taken"] == 0)
            assert 0 < len(made) < 440, "it went on for a client that had left"
            assert answer_to(port, REQUESTS[9])[2] == "vtc_cls@9"
    assert "removed" not in repr(loaded.model) and not loaded.model._forward_hooks


def test_openai_clients_work(port):
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
    assert [model.id for model in client.models.list()] == ["tiny"]
    messages: Any = REQUESTS[1]["messages"]
    extra = {"tokenprune": "vtc_cls@4"}
    whole = client.chat.completions.create(model="tiny", messages=messages, max_tokens=NEW, extra_body=extra)
    assert whole.usage is not None and whole.usage.model_extra
    assert whole.usage.model_extra["visual_tokens"]["kept"] == 4
    pieces = client.chat.completions.create(
        model="tiny", messages=messages, max_completion_tokens=NEW, extra_body=extra, stream=True
    )
    assert "".join(one.choices[0].delta.content or "" for one in pieces) == whole.choices[0].message.content
    with pytest.raises(openai.BadRequestError, match="no method called 'x'"):
        client.chat.completions.create(model="tiny", messages=messages, extra_body={"tokenprune": "x@3"})
    with pytest.raises(openai.NotFoundError, match="no model 'tinny'"):
        client.chat.completions.create(model="tinny", messages=messages)


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--method", "hollov@9"], "Did you mean 'holov'"),
        (["--method", "holov"], "Say how many visual tokens holov keeps"),
        (["--model", "nothing"], "no model called 'nothing'"),
        (["--queue", "-1"], "queue must be at least 0"),
        (["--port", "99999"], "--port is a number from 0 to 65535, got 99999"),
        (["--picture-folder", "/nowhere/at/all"], "no folder /nowhere/at/all"),
        (["--key-from", "NO_SUCH_VARIABLE"], "no such environment variable"),
    ],
)  # fmt: skip
def test_the_command_refuses_before_a_model_loads(argv, says, capsys):
    assert main(["serve", *argv]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.pocket
def test_the_command_serves_and_stops():
    command = [sys.executable, "-m", "tokenprune", "serve", "--port", "0", "--method", "vtc_cls@64"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            found = re.search(r"Serving pocket-llava at http://127.0.0.1:(\d+)/v1 \(vtc_cls@64", line)
            assert found, line
            until(lambda: _answers(int(found[1])))
            said = post(int(found[1]), ask("is there a red car?", png(1, 336)))[1]
            assert said["usage"]["visual_tokens"] == {"of": 576, "kept": 64, "average": 64.0}
            process.send_signal(signal.SIGTERM)
            said = process.communicate(timeout=120)[1]
            assert "Application shutdown complete" in said and "Traceback" not in said
            assert process.returncode in (0, -signal.SIGTERM), "uvicorn raises the signal again, once all is closed"
        finally:
            process.kill()


def _answers(port: int) -> bool:
    try:
        return get(port, "/health")[0] == 200
    except OSError:
        return False
