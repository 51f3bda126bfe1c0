"""A real server on 127.0.0.1: 200 requests of 8 clients with methods, budgets and pictures of their own, errors among
them and clients that go away, equal to the same requests one after the other."""

from __future__ import annotations

import base64
import io
import json
import os
import random
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
from _vllm import SMALL, folder, needs_vllm, reference, request, rows

needs_vllm()

pytestmark = pytest.mark.slow
REQUESTS, CLIENTS = 200, 8
SETTINGS = (None, "divprune@32", "uniform", "vtc_cls@0.2", "@1.0", "pool@100")
BAD = ("@0", "holov", 5, "@x", "fastv@64")


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def start(*options):
    port = free_port()
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", folder("llava"),
        "--served-model-name", "pocket", "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32",
        "--enforce-eager", "--max-model-len", "2048", "--block-size", "32", "--max-num-seqs", "16",
        "--distributed-executor-backend", "uni",
        "--mm-processor-kwargs", '{"tokenprune": "divprune@64 | uniform | vtc_cls | pool"}', *options,
    ]  # fmt: skip
    environment = {**os.environ, **SMALL, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    return subprocess.Popen(command, env=environment, stderr=subprocess.STDOUT, stdout=subprocess.PIPE, text=True), port


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    process, port = start("--trust-request-mm-kwargs")
    log = []
    with ThreadPoolExecutor(1) as reading:
        reading.submit(lambda: log.extend(process.stdout))
        try:
            until = time.time() + 600
            while True:
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                    break
                except OSError:
                    if process.poll() is not None or time.time() > until:
                        pytest.fail("the server did not start:\n" + "".join(log[-40:]))
                    time.sleep(1)
            yield port
        finally:
            process.terminate()
            process.wait(60)


@pytest.fixture(scope="module")
def client(server):
    openai = pytest.importorskip("openai")
    return openai.OpenAI(base_url=f"http://127.0.0.1:{server}/v1", api_key="none", max_retries=0, timeout=600)


@pytest.fixture(scope="module")
def data():
    return rows("llava", 20)


def picture_url(picture):
    file = io.BytesIO()
    picture.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def body(data, index, setting, url=None):
    content = [
        {"type": "image_url", "image_url": {"url": url or picture_url(data[index]["picture"])}},
        {"type": "text", "text": data[index]["question"]},
    ]
    extra = {"add_special_tokens": True}
    if setting is not None:
        extra["mm_processor_kwargs"] = {"tokenprune": setting}
    return {
        "model": "pocket", "temperature": 0, "max_tokens": 8,
        "messages": [{"role": "user", "content": content}], "extra_body": extra,
    }  # fmt: skip


def answer(client, data, index, setting):
    """The answer, or the status of the refusal and its sentence."""
    from openai import APIStatusError

    try:
        found = client.chat.completions.create(**body(data, index, setting))
    except APIStatusError as error:
        return error.status_code, str(error)
    return found.choices[0].message.content, found.usage.prompt_tokens


def leave(port, data):
    """A client that sends its request and closes the line before it is answered."""
    sent = body(data, 0, "divprune@63")
    sent.update(sent.pop("extra_body"), stream=True, max_tokens=64)
    text = json.dumps(sent).encode()
    with socket.create_connection(("127.0.0.1", port)) as line:
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: "
        line.sendall(f"{head}{len(text)}\r\n\r\n".encode() + text)


def test_requests_of_several_clients_are_answered_as_one_after_the_other(server, client, data):
    from openai import APIStatusError

    draw = random.Random(0)
    asked = [(draw.randrange(len(data)), draw.choice(SETTINGS)) for _ in range(REQUESTS)]
    for place in draw.sample(range(REQUESTS), 20):
        asked[place] = (asked[place][0], draw.choice(BAD))
    with ThreadPoolExecutor(CLIENTS) as pool:
        waiting = []
        for number, (index, setting) in enumerate(asked):
            if number % 50 == 10:
                pool.submit(leave, server, data)
            waiting.append(pool.submit(answer, client, data, index, setting))
            if number == 100:
                torn = body(data, 0, None, url="data:image/png;base64,bm8gcGljdHVyZQ==")
                with pytest.raises(APIStatusError) as refused:
                    client.chat.completions.create(**torn)
                assert 400 <= refused.value.status_code < 500
        together = [one.result() for one in waiting]
    alone = {one: answer(client, data, *one) for one in set(asked)}
    for one, said in zip(asked, together):
        assert said == alone[one], one
    for index, setting in asked:
        if setting in BAD:
            status, sentence = alone[index, setting]
            assert status == 400 and len(sentence) > 40, (setting, sentence)
    lengths = {setting: alone[index, setting][1] for index, setting in asked if setting in ("divprune@32", "@1.0")}
    assert lengths["divprune@32"] < lengths["@1.0"]


def test_answers_are_those_of_transformers(client, data):
    from transformers import AutoTokenizer

    names = AutoTokenizer.from_pretrained(folder("llava"))
    asked = [request("llava", data, index) for index in range(4)]
    expected = reference(folder("llava"), asked, "divprune@64", "compact")
    for index, ids in enumerate(expected):
        text = names.decode(ids, skip_special_tokens=True)
        assert answer(client, data, index, None)[0].strip() == text.strip()


DRAFTS = {"method": "ngram", "num_speculative_tokens": 2}


@pytest.mark.parametrize("setting", ["divprun@64", "fastv@64", "divprune", "prumerge(count=outliers)@64"])
def test_an_engine_with_a_bad_setting_does_not_start(setting):
    from _vllm import engine

    with pytest.raises(Exception, match="(?s)divprune'|inside the decoder|Say how many|decides by picture"):
        engine(folder("llava"), setting)


@pytest.mark.parametrize(
    "setting, says",
    [
        ("divprun@64", "Did you mean 'divprune'"),
        ("fastv@64", "inside the decoder"),
        ("divprune", "Say how many"),
        (64, "is a text like"),
    ],
)
def test_a_bad_setting_is_refused_before_any_process_is_started(setting, says):
    from _vllm import register_classes
    from vllm.engine.arg_utils import EngineArgs

    register_classes()
    with pytest.raises(RuntimeError, match=f"The setting tokenprune of this engine: .*{says}"):
        EngineArgs(model=folder("llava"), mm_processor_kwargs={"tokenprune": setting}).create_model_config()


@pytest.mark.parametrize(
    ("model", "setting", "asked", "says"),
    [
        ("llava", "divprune@64", {"pipeline_parallel_size": 2}, "pipeline_parallel_size above 1"),
        ("llava", "divprune@64", {"enable_lora": True, "enable_tower_connector_lora": True}, "enable_tower_connector"),
        ("llava", "uniform@64 | vtc_cls", {"compilation_config": {"compile_mm_encoder": True}}, "beside vtc_cls,"),
        ("qwen", "uniform@0.25 | vtc_cls", {"mm_encoder_tp_mode": "data"}, "'data' beside vtc_cls, which reads"),
        ("qwen", "divprune@0.25", {"video_pruning_rate": 0.5}, "use evs@0.5 as a method"),
        ("qwen", "divprune@0.25", {"speculative_config": DRAFTS}, "speculative decoding on a model with 3-D positions"),
    ],
)
def test_what_cannot_stand_beside_a_setting_is_refused_before_any_process_is_started(model, setting, asked, says):
    from _vllm import register_classes
    from vllm.engine.arg_utils import EngineArgs

    register_classes()
    with pytest.raises(RuntimeError, match=f"An engine with tokenprune cannot have .*{says}"):
        EngineArgs(model=folder(model), mm_processor_kwargs={"tokenprune": setting}, **asked).create_engine_config()
    EngineArgs(model=folder(model), **asked).create_engine_config()  # which vLLM allows without a setting


def test_the_log_says_that_an_engine_prunes_and_by_what(monkeypatch):
    from _vllm import register_classes
    from vllm.engine.arg_utils import EngineArgs

    from tokenprune.vllm import processing

    register_classes()
    said = []
    monkeypatch.setattr(processing.LOGGER, "info_once", lambda *parts: said.append(parts[0] % parts[1:]))
    for setting in (None, {"tokenprune": "divprune@64 | uniform | pool@0.1"}):
        EngineArgs(model=folder("llava"), mm_processor_kwargs=setting).create_model_config()
    assert set(said) == {
        "tokenprune prunes the pictures of this engine: divprune@64 by default, uniform@64, pool@0.1 on request."
    }
