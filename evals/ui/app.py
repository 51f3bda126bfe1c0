"""The HTTP side of the page: a few fixed routes, nothing of another machine, and sentences where something is wrong."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tokenprune.evals.ui.desk import Desk

HERE = Path(__file__).parent
REPORT = HERE.parent / "report"  # whose style the page shares
MOST_BYTES = 20_000_000  # of a picture
WAITING = 32  # requests that may wait for the model
LOCAL = ("127.0.0.1", "localhost", "[::1]")
"""Names by which a page that listens to this machine alone may be called: another site's name that was made to point
here is turned away."""

HEADERS = {
    # nothing is fetched but from here, so no font, script or counter of another machine can be
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "Cache-Control": "no-store",
}  # fmt: skip

log = logging.getLogger("tokenprune.ui")


class _Sentence(Exception):
    """What a request is told instead of an answer."""

    def __init__(self, text: str, status: int) -> None:
        super().__init__(text)
        self.status = status


def build_app(desk: Desk, hosts: tuple[str, ...] = LOCAL) -> Starlette:
    """The application.

    Args:
        hosts: names by which it may be called; (): by any.
    """
    turn, waiting = asyncio.Lock(), [0]
    style = (REPORT / "page.css").read_text("utf-8") + (HERE / "page.css").read_text("utf-8")
    texts = {
        "/": ((HERE / "page.html").read_text("utf-8"), "text/html"),
        "/page.css": (style, "text/css"),
        "/page.js": ((HERE / "page.js").read_text("utf-8"), "text/javascript"),
    }

    async def text(request: Request) -> Response:
        content, kind = texts[request.url.path]
        return Response(content, media_type=kind)

    async def facts(_: Request) -> Response:
        return JSONResponse(await asyncio.to_thread(desk.facts))

    async def thumbnail(request: Request) -> Response:
        content = await asyncio.to_thread(desk.thumbnail, request.path_params["place"])
        if content is None:
            raise _Sentence("The page offers no such picture.", 404)
        return Response(content, media_type="image/png")

    async def picture(request: Request) -> Response:
        return JSONResponse(await _told(desk.take, await _body(request, MOST_BYTES)))

    def about_the_model(work: Callable[[Any], dict[str, Any]]) -> Callable[[Request], Any]:
        async def handler(request: Request) -> Response:
            given = await _json(request)
            if waiting[0] >= WAITING:
                raise _Sentence(f"{WAITING} requests wait for the model already; try again in a moment.", 503)
            waiting[0] += 1
            try:
                async with turn:
                    if await request.is_disconnected():
                        return Response(status_code=499)  # the slider has moved on: nobody reads this answer
                    return JSONResponse(await _told(work, given))
            finally:
                waiting[0] -= 1

        return handler

    async def guarded(request: Request, handler: Callable[[Request], Any]) -> Response:
        try:
            _check_caller(request, hosts)
            response = await handler(request)
        except _Sentence as said:
            response = JSONResponse({"error": str(said)}, said.status)
        except ClientDisconnect:
            response = Response(status_code=499)
        response.headers.update(HEADERS)
        return response

    def route(path: str, handler: Callable[[Request], Any], method: str = "GET") -> Route:
        async def endpoint(request: Request) -> Response:
            return await guarded(request, handler)

        return Route(path, endpoint, methods=[method])

    return Starlette(
        routes=[
            *(route(path, text) for path in texts),
            route("/facts", facts),
            route("/samples/{place:int}.png", thumbnail),
            route("/picture", picture, "POST"),
            route("/look", about_the_model(desk.look), "POST"),
            route("/answer", about_the_model(desk.answer), "POST"),
        ]
    )


def _check_caller(request: Request, hosts: tuple[str, ...]) -> None:
    """Raise for a request that another site made a browser send."""
    host = request.headers.get("host", "").lower()
    name = host if host.endswith("]") else host.rpartition(":")[0] or host
    if hosts and name not in hosts:
        raise _Sentence(f"This page answers to {', '.join(hosts)}, not to {name or 'no name'}; see --host.", 403)
    # a form of another site cannot send a header of its own, and a script may only if this server said so
    if request.method == "POST" and request.headers.get("x-tokenprune") != "page":
        raise _Sentence("Requests come from the page itself, with the header X-Tokenprune: page.", 403)


async def _body(request: Request, most: int) -> bytes:
    content = bytearray()
    async for piece in request.stream():
        content += piece
        if len(content) > most:
            raise _Sentence(f"The picture's file has more than {most // 1_000_000} MB; give a smaller one.", 413)
    return bytes(content)


async def _json(request: Request) -> Any:
    import json

    try:
        return json.loads(await _body(request, 20_000))
    except ValueError:
        raise _Sentence("The request is no JSON.", 400) from None


async def _told(work: Callable[[Any], dict[str, Any]], given: Any) -> dict[str, Any]:
    """What `work` makes of what was given, in a thread of its own; its errors as sentences."""
    try:
        return await asyncio.to_thread(work, given)
    except (ValueError, TypeError, KeyError, OSError, ImportError) as error:
        text = error.args[0] if isinstance(error, KeyError) and error.args else error
        raise _Sentence(str(text), 400) from error
    except Exception as error:
        log.exception("A request failed")
        kind = type(error).__name__
        if "OutOfMemory" in kind:
            raise _Sentence("The device has no memory left for this; give a smaller picture.", 503) from error
        raise _Sentence(f"The model failed on this ({kind}: {error}). The terminal says where.", 500) from error
