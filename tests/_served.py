"""A server on 127.0.0.1 in this process, and clients that are as slow, as rude or as plain as a test wants them."""

from __future__ import annotations

import base64
import contextlib
import http.client
import io
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import uvicorn
from PIL import Image

from tokenprune.server.run import Place, listen


@contextlib.contextmanager
def listening(server: uvicorn.Server, send_buffer: int | None = None) -> Iterator[int]:
    """The port of a server that runs in a thread; it is stopped at the end.

    Args:
        send_buffer: bytes that the kernel holds for a client that does not read.
    """
    opened = listen(Place(port=0))
    if send_buffer is not None:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [opened]}, daemon=True)
    thread.start()
    try:
        until(lambda: server.started)
        yield opened.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(60)
        opened.close()
    assert not thread.is_alive()


def until(met: Callable[[], Any], seconds: float = 120.0) -> None:
    """Wait for a condition; a machine may be slow, so for long."""
    end = time.monotonic() + seconds
    while not met():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def png(seed: int, side: int = 48) -> bytes:
    """A picture of coloured noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST).save(stream, "PNG")
    return stream.getvalue()


def data_uri(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def ask(text: str, *pictures: bytes, **fields: Any) -> dict[str, Any]:
    """The body of a request."""
    parts: list[Any] = [{"type": "image_url", "image_url": {"url": data_uri(one)}} for one in pictures]
    return {"messages": [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}], **fields}


def post(port: int, body: Any, headers: dict[str, str] | None = None) -> tuple[int, Any, dict[str, str]]:
    """Status, JSON and headers of a chat request; bytes are sent as they are."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    try:
        connection.request(
            "POST", "/v1/chat/completions", data, {"Content-Type": "application/json", **(headers or {})}
        )
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read()), dict(answer.getheaders())
    finally:
        connection.close()


def get(port: int, path: str) -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
    finally:
        connection.close()


def send(port: int, body: Any, receive_buffer: int | None = None) -> socket.socket:
    """A socket on which a request was sent, and nothing read yet."""
    client = socket.socket()
    if receive_buffer is not None:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    client.settimeout(300)
    client.connect(("127.0.0.1", port))
    data = json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(data)}\r\n"
    client.sendall(f"{head}Content-Type: application/json\r\nConnection: close\r\n\r\n".encode() + data)
    return client


def rest_of(client: socket.socket) -> bytes:
    """What comes until the server closes."""
    parts = []
    while part := client.recv(65536):
        parts.append(part)
    return b"".join(parts)


def events(stream: bytes) -> list[Any]:
    """The events of a streamed answer, its last line checked."""
    lines = [line[6:] for line in stream.decode().splitlines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def text_of(said: list[Any]) -> str:
    """The text of a streamed answer."""
    return "".join(choice["delta"].get("content", "") for one in said for choice in one.get("choices", ()))
