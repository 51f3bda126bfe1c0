"""The HTTP side: routes, who may ask, bodies that arrive in time, clients that leave or read slowly."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import anyio
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tokenprune.registry import near
from tokenprune.server.answering import Began, Ended, Piece
from tokenprune.server.chat_request import ChatRequest, read_request
from tokenprune.server.limits import Limits
from tokenprune.server.refusals import Refused
from tokenprune.server.wire import Answer, event
from tokenprune.server.worker import Job, Slot, Worker

ROUTES = "GET /v1/models, GET /health and POST /v1/chat/completions"
LOCAL = ("127.0.0.1", "localhost", "[::1]")
"""Hosts by which a browser may call a server that listens to this machine alone: a page of another name that was made
to point here is turned away."""


@dataclass(frozen=True)
class Served:
    """What a server says of itself.

    Attributes:
        name: of the model, as requests call it.
        method: what requests get that do not say.
        hosts: by which it may be called; (): by any.
        key: what clients send as `Authorization: Bearer KEY`; None: nothing.
    """

    name: str
    method: str
    hosts: tuple[str, ...] = LOCAL
    key: str | None = None


def build_app(worker: Worker, served: Served, limits: Limits) -> ASGIApp:
    """The application, whose worker starts and stops with it."""

    @contextlib.asynccontextmanager
    async def lifespan(_: Any) -> AsyncIterator[None]:
        worker.start()
        yield
        await asyncio.to_thread(worker.close, limits.seconds)

    started = int(time.time())

    async def models(_: Request) -> JSONResponse:
        one = {"id": served.name, "object": "model", "created": started, "owned_by": "tokenprune"}
        return JSONResponse({"object": "list", "data": [{**one, "tokenprune": served.method}]})

    async def health(_: Request) -> JSONResponse:
        state = worker.state()
        return JSONResponse(state, 200 if state["status"] == "ok" else 503)

    async def wrong(request: Request, error: Exception) -> JSONResponse:
        status = error.status_code if isinstance(error, HTTPException) else 500
        headers = dict(getattr(error, "headers", None) or {})
        said = f"There is no {request.method} {request.url.path} here; there are {ROUTES}."
        return JSONResponse(Refused(said, status).body(), status, headers)

    routes = [
        Route("/v1/chat/completions", Chat(worker, served, limits), methods=["POST"]),
        Route("/v1/models", models),
        Route("/health", health),
    ]
    app = Starlette(routes=routes, lifespan=lifespan, exception_handlers={HTTPException: wrong})
    return Gate(app, served)


class Gate:
    """Turns away who may not ask: other names for this machine, requests without the key."""

    def __init__(self, app: ASGIApp, served: Served) -> None:
        self._app, self._served = app, served

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refused = self._refused(Request(scope)) if scope["type"] == "http" else None
        if refused is None:
            await self._app(scope, receive, send)
        else:
            await JSONResponse(refused.body(), refused.status)(scope, receive, send)

    def _refused(self, request: Request) -> Refused | None:
        name = request.headers.get("host", "")
        host = name if name.endswith("]") else name.rpartition(":")[0] or name
        if self._served.hosts and host not in self._served.hosts:
            return Refused(f"This server is not called {host[:60]!r}; call it {self._served.hosts[0]}.", 403)
        key = self._served.key
        if key is not None and request.url.path != "/health":
            said = request.headers.get("authorization", "").encode()
            if not hmac.compare_digest(said, f"Bearer {key}".encode()):
                return Refused("This server wants its key, as Authorization: Bearer KEY.", 401)
        return None


class Chat:
    """`/v1/chat/completions`."""

    def __init__(self, worker: Worker, served: Served, limits: Limits) -> None:
        self._worker, self._served, self._limits = worker, served, limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = _Body(receive, self._limits)
        try:
            slot = self._worker.reserve()
            try:
                request = await self._read(Request(scope), body)
            except BaseException:
                slot.release()
                raise
            await self._answer(request, slot, receive, send)
        except Refused as refused:
            await body.drain()
            await JSONResponse(refused.body(), refused.status, refused.headers)(scope, receive, send)
        except _Gone:
            pass  # nobody is there to be told

    async def _read(self, head: Request, body: _Body) -> ChatRequest:
        kind = head.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            # and so no web page can send one without asking first
            raise Refused(f"Send the body as application/json, not as {kind[:60]!r}.", 415, code="content_type")
        data = await body.read(head.headers.get("content-length"))
        request = await asyncio.to_thread(read_request, data, self._limits)
        name = self._served.name
        if request.model is not None and request.model != name:
            raise Refused(
                f"There is no model {request.model[:60]!r} here.{near(request.model[:60], [name])} This server has "
                f"{name}.",
                404, param="model", code="model_not_found",
            )  # fmt: skip
        return request

    async def _answer(self, request: ChatRequest, slot: Slot, receive: Receive, send: Send) -> None:
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[Any] = asyncio.Queue()

        def emit(said: Any) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended, and nobody listens
                loop.call_soon_threadsafe(events.put_nowait, said)

        job = Job(request, emit, slot)
        self._worker.submit(job)
        watcher = asyncio.create_task(self._until_gone(receive, job, events))
        try:
            first = await _next(events)  # what is refused has a status of its own: nothing was sent yet
            method = first.method if isinstance(first, Began) else ""
            if request.stream:
                await self._stream(request, method, events, send)
            else:
                await self._whole(method, events, send)
        finally:
            watcher.cancel()
            self._worker.cancel(job)

    async def _until_gone(self, receive: Receive, job: Job, events: asyncio.Queue[Any]) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._worker.cancel(job)
        events.put_nowait(_Gone())

    async def _whole(self, method: str, events: asyncio.Queue[Any], send: Send) -> None:
        text = ""
        while not isinstance(said := await _next(events), Ended):
            text += said.text if isinstance(said, Piece) else ""
        response = JSONResponse(Answer(self._served.name).whole(text, method, said))
        await self._send(send, {"type": "http.response.start", "status": 200, "headers": response.raw_headers})
        await self._send(send, {"type": "http.response.body", "body": response.body})

    async def _stream(self, request: ChatRequest, method: str, events: asyncio.Queue[Any], send: Send) -> None:
        answer = Answer(self._served.name)
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache"),
            (b"x-accel-buffering", b"no"),
        ]  # fmt: skip
        await self._send(send, {"type": "http.response.start", "status": 200, "headers": headers})
        said: Any = answer.piece(method, {"role": "assistant", "content": ""})
        await self._send(send, _part(event(said)))
        try:
            while not isinstance(said := await _next(events), Ended):
                await self._send(send, _part(event(answer.piece(method, {"content": said.text}))))
            await self._send(send, _part(event(answer.piece(method, {}, said.reason))))
            if request.count_at_end:
                await self._send(send, _part(event(answer.counts(method, said))))
        except Refused as refused:  # too late for a status
            await self._send(send, _part(event(refused.body())))
        await self._send(send, _part(event("[DONE]")))
        await self._send(send, {"type": "http.response.body", "body": b""})

    async def _send(self, send: Send, message: Message) -> None:
        """Send, but wait no longer than a client may take: the answer is made already, and others are not held up."""
        try:
            with anyio.fail_after(self._limits.seconds):
                await send(message)
        except (TimeoutError, OSError):
            raise _Gone from None


class _Gone(Exception):
    """The client has left, or does not read."""


class _Body:
    """The body of a request, of a limited size, in a limited time."""

    def __init__(self, receive: Receive, limits: Limits) -> None:
        self._receive, self._limits, self._more = receive, limits, True

    async def read(self, declared: str | None) -> bytes:
        """All of it.

        Args:
            declared: the header Content-Length.

        Raises:
            Refused: it is too long, or comes too slowly.
        """
        most = self._limits.body
        if declared is not None and declared.isdigit() and int(declared) > most:
            raise self._too_long(declared)
        parts, length = [], 0
        try:
            with anyio.fail_after(self._limits.seconds):
                while self._more:
                    part = await self._next()
                    length += len(part)
                    if length > most:
                        raise self._too_long(f"more than {most}")
                    parts.append(part)
        except TimeoutError:
            raise Refused(
                f"The body did not arrive within {self._limits.seconds:g} s.", 408, code="slow_body"
            ) from None
        return b"".join(parts)

    async def drain(self) -> None:
        """Take what is still on its way, so that the client gets to read why it was refused; not for ever."""
        left = 8 * self._limits.body
        with contextlib.suppress(TimeoutError, _Gone):
            with anyio.fail_after(min(5.0, self._limits.seconds)):
                while self._more and left > 0:
                    left -= len(await self._next())

    async def _next(self) -> bytes:
        message = await self._receive()
        if message["type"] == "http.disconnect":
            self._more = False
            raise _Gone
        self._more = message.get("more_body", False)
        return message.get("body", b"")

    def _too_long(self, length: str) -> Refused:
        return Refused(
            f"The body has {length[:20]} bytes, and this server takes {self._limits.body}. Send smaller pictures.", 413,
            code="body_too_large",
        )  # fmt: skip


async def _next(events: asyncio.Queue[Any]) -> Any:
    said = await events.get()
    if isinstance(said, (Refused, _Gone)):
        raise said
    return said


def _part(data: bytes) -> Message:
    return {"type": "http.response.body", "body": data, "more_body": True}
