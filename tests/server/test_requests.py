"""What a request may say: every wrong one gets a sentence before anything waits for the model."""

from __future__ import annotations

import json
import struct
import zlib
from typing import Any

import pytest
from _served import ask, data_uri, png

from tokenprune.server.chat_request import read_request
from tokenprune.server.limits import Limits
from tokenprune.server.methods import check_text
from tokenprune.server.refusals import Refused
from tokenprune.server.text_stream import TextSoFar

LIMITS = Limits(pictures=2, pixels=10_000, prompt_tokens=100, new_tokens=50)


def read(body: Any, limits: Limits = LIMITS) -> Any:
    return read_request(json.dumps(body).encode(), limits)


def picture(url: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": url}]}]}


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes that says it is huge."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")


USER = {"role": "user", "content": "hello"}


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({}, "at least one message"),
        ({"messages": "hello"}, "at least one message"),
        ({"messages": [3]}, r"messages\[0\] must be an object"),
        ({"messages": [{"role": "tool", "content": ""}]}, "role must be one of"),
        ({"messages": [{"role": "user", "content": None}]}, "content must be a text or a list"),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "must be of the type"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": 3}]}]}, "text must be a text"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "surrogate"),
        ({"messages": [{"role": "system", "content": [*ask("", png(1))["messages"][0]["content"]]}]}, "the user's"),
        ({"messages": [USER, {"role": "assistant", "content": "yes"}]}, "last message must be the user's"),
        ({"messages": [{**USER, "tool_calls": [1]}]}, "'tool_calls', which is not supported"),
        ({"messages": [{"role": "user", "content": "x" * 1601}]}, "1601 letters"),
        (ask("", png(1), png(1), png(1)), "may have 2 pictures"),
        (ask("", tokenprun="holov@9"), "Did you mean 'tokenprune'"),
        (ask("", tokenprune={"method": "holov"}), "tokenprune must be a text"),
        (ask("", n=2), "n is not supported here; leave it out, or send 1"),
        (ask("", tools=[{"type": "function"}]), "tools is not supported"),
        (ask("", response_format={"type": "json_object"}), "response_format is not supported"),
        (ask("", max_tokens=0), "max_tokens must be a whole number from 1 to 50, got '0'"),
        (ask("", max_tokens=51), "from 1 to 50"),
        (ask("", max_tokens=True), "whole number"),
        (ask("", max_tokens=5, max_completion_tokens=6), "differ"),
        (ask("", temperature=float("nan")), "temperature must be a number from 0 to 2"),
        (ask("", temperature="hot"), "temperature must be a number"),
        (ask("", temperature=10**400), "temperature must be a number"),
        (ask("", temperature=1e-38), "temperature must be 0, .* or from 1e-20 to 2, got 1e-38"),
        (ask("", top_p=0), "top_p must be a number"),
        (ask("", top_p=-(10**400)), "top_p must be a number"),
        (ask("", stream=True, stream_options={"continuous_usage_stats": True}), "'continuous_usage_stats', which is"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "", "min_pixels": 3}]}]}, "'min_pixels'"),
        (picture({"url": data_uri(png(1)), "max_pixels": 9}), "image_url has a field 'max_pixels'"),
        (ask("", stop=[""]), "stop must be a text"),
        (ask("", stop=["a"] * 5), "up to 4"),
        (ask("", stream="yes"), "stream must be true or false"),
        (picture(None), "must be a data URI"),
        (picture({"url": "ftp://x/y.png"}), "must be a data URI"),
        (picture({"url": "data:image/png,abc"}), "not base64"),
        (picture({"url": "data:image/png;base64,@@@"}), "base64 of .* is broken"),
        (picture({"url": data_uri(b"GIF89a")}), "cannot be read as a picture"),
        (picture({"url": data_uri(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")}), "cannot be read"),
        (picture({"url": data_uri(bomb(30_000, 30_000))}), "too large a picture"),
        (picture({"url": data_uri(bomb(101, 100))}), r"10100 pixels \(101 x 100\), and this server takes 10000"),
        (picture({"url": data_uri(bomb(1, 201))}), "1 x 201 pixels is too narrow"),
        (picture({"url": data_uri(bomb(0, 9))}), "picture"),
        (picture({"url": "http://127.0.0.1:1/x.png"}), "fetches none"),
        (picture({"url": "file:///etc/passwd"}), "reads none of its own files"),
        (picture({"url": data_uri(png(1)), "detail": "low"}), "detail is not supported"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(body, says):
    with pytest.raises(Refused, match=says):
        read(body)


@pytest.mark.parametrize("body", [b"[" * 100_000, b'{"seed": ' + b"9" * 5000 + b"}", b"\x00", b'"' + b"\xed\xa0\x80"])
def test_bodies_that_are_no_json(body):
    with pytest.raises(Refused, match="body"):
        read_request(body, LIMITS)


def test_an_unknown_field_of_half_a_character_is_answered():
    with pytest.raises(Refused, match="no field") as error:
        read_request(b'{"messages": [], "\\ud800": 1}', LIMITS)
    json.dumps(error.value.body(), ensure_ascii=False).encode("utf-8")


@pytest.mark.parametrize(
    ("limits", "says"),
    [
        (Limits(seconds=float("inf")), "seconds must be a number"),
        (Limits(hosts=("localhost:8080",)), "without a scheme or a port; got 'localhost:8080'"),
        (Limits(hosts=("https://pictures.example",)), "by their names alone"),
        (Limits(hosts=("Pictures.example",)), "in small letters"),
    ],
)  # fmt: skip
def test_limits_that_let_nothing_through_are_refused(limits, says):
    with pytest.raises(ValueError, match=says):
        limits.check()
    Limits(hosts=("pictures.example", "127.0.0.1", "::1")).check()


def test_what_is_taken():
    cached = {"type": "text", "text": "", "cache_control": {"type": "ephemeral"}}
    assert read({"messages": [{"role": "user", "content": [cached]}]}).messages[0]["content"][0]["text"] == ""
    assert read(picture({"url": data_uri(png(1, 10)), "detail": None})).stream is False
    assert read(picture({"url": data_uri(bomb(200, 1))}))
    got = read(ask("hello", png(1), stream=True, temperature=0.5, seed=3, stop="\n", n=1, user="me", max_tokens=7))
    assert got.stream and (got.temperature, got.seed, got.stops, got.new_tokens) == (0.5, 3, ("\n",), 7)
    assert got.messages[0]["content"][0] == {"type": "image", "image": png(1)}


def test_files_are_read_below_their_folder_only(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    (folder / "a.png").write_bytes(png(1))
    (tmp_path / "b.png").write_bytes(png(2))
    (folder / "link.png").symlink_to(tmp_path / "b.png")
    limits = Limits(folder=folder)
    got = read(picture({"url": f"file://{folder}/a.png"}), limits)
    assert got.messages[0]["content"][0]["image"] == png(1)
    for name in ("/../b.png", "/link.png", "/none.png", "", "/%00", "/%2e%2e/b.png"):
        with pytest.raises(Refused, match="names no picture that this server has"):
            read(picture({"url": f"file://{folder}{name}"}), limits)


def test_the_web_is_fetched_from_named_hosts_only():
    limits = Limits(hosts=("pictures.example",), seconds=1)
    with pytest.raises(Refused, match=r"host '169.254.169.254', and this server fetches from pictures.example alone"):
        read(picture({"url": "http://pictures.example@169.254.169.254/x"}), limits)
    with pytest.raises(Refused, match="could not be fetched"):
        read(picture({"url": "http://localhost:1/x"}), Limits(hosts=("localhost",), seconds=1))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("hollov@64", "no method called 'hollov'. Did you mean 'holov'"),
        ("/etc/method.yaml", "one line"),
        ("holov(a=&x [*x])@4", "one line"),
        ("holov(a=[[[[[[[[[1]]]]]]]]])@4", "10 deep"),
        ("holov" * 100, "up to 300 letters"),
        ("holov(variant=official@4", "do not close"),
        ("sd_rpn(branch=..)@4", "'..' is not a word"),
        ("zerotuning(calibration=x.json)", "is not a word. What names a file"),
        ("", "no method called ''"),
    ],
)  # fmt: skip
def test_methods_of_requests(text, says):
    with pytest.raises(Refused, match=says):
        check_text(text)


def pieces(tokens: list[str], stops: tuple[str, ...] = ()) -> tuple[list[str], TextSoFar]:
    text = TextSoFar(lambda ids: "".join(tokens[i] for i in ids), stops)
    said = []
    for number in range(len(tokens)):
        said.append(text.add(number))
        if text.stopped:
            break
    return [*said, text.finish()], text


def test_text_comes_in_pieces_that_never_change():
    assert pieces([" ", "a ", " b", "\n", "\n"])[0] == ["", "a", "  b", "", "", ""]
    assert pieces(["a", "\ufffd"])[0] == ["a", "", "\ufffd"]
    said, text = pieces(["one E", "N", "D two"], ("END",))
    assert said == ["one", "", "", ""] and text.stopped and text.text == "one"
    said, text = pieces(["E", "NE", "X"], ("END",))
    assert "".join(said) == "ENEX" and not text.stopped
    assert pieces(["a\n", "b"], ("\n",))[0][:1] == ["a"]
