"""From a command line's settings to a server that runs until it is told to stop."""

from __future__ import annotations

import socket
from dataclasses import dataclass

import uvicorn

from tokenprune.evals.models.load import LoadedModel
from tokenprune.server.answering import Answerer
from tokenprune.server.app import LOCAL, Served, build_app
from tokenprune.server.limits import Limits
from tokenprune.server.methods import NONE, Methods
from tokenprune.server.worker import Worker

LOOPBACK = ("127.0.0.1", "localhost", "::1")
SPARE = 256
"""Connections beyond those of waiting requests: clients that keep one open, and slow readers of finished answers."""


@dataclass(frozen=True)
class Place:
    """Where a server listens, and what it is called.

    Attributes:
        host, port: of the socket; port 0 takes a free one.
        name: of the model, as requests call it; None: as it was loaded.
        key: what clients must send; None: nothing.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    name: str | None = None
    key: str | None = None


def listen(place: Place) -> socket.socket:
    """A socket at that place, before a model is loaded for it.

    Raises:
        OSError: it is taken, or no address of this machine.
    """
    family = socket.AF_INET6 if ":" in place.host else socket.AF_INET
    opened = socket.socket(family)
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        opened.bind((place.host, place.port))
    except (OSError, OverflowError) as error:
        opened.close()
        raise OSError(
            f"Nothing can listen at {place.host}, port {place.port} ({error}). Another server may be there; try "
            "--port 0."
        ) from None
    return opened


def make_server(loaded: LoadedModel, method: str, limits: Limits, place: Place) -> uvicorn.Server:
    """The server of a loaded model; `run(sockets=[listen(place)])` starts it.

    Args:
        method: what requests get that do not say, see `Methods`.

    Raises:
        TypeError, ValueError, UnknownName: a limit lets nothing through, or the method cannot work on the model.
    """
    limits.check()
    methods = Methods(loaded.model, loaded.adapter, method)
    worker = Worker(Answerer(loaded, methods, limits), limits.queue)
    hosts = LOCAL if place.host in LOOPBACK else ()
    served = Served(place.name or loaded.name, method, hosts, place.key)
    config = uvicorn.Config(
        build_app(worker, served, limits), http="h11", ws="none", lifespan="on", server_header=False,
        proxy_headers=False, limit_concurrency=limits.queue + SPARE, timeout_graceful_shutdown=int(limits.seconds) or 1,
    )  # fmt: skip
    return uvicorn.Server(config)


def serve(server: uvicorn.Server, name: str, method: str, opened: socket.socket) -> int:
    """Serve until SIGINT or SIGTERM; the exit status. Answers that are being made are finished first.

    Args:
        name, method: for the line that says what runs where.
    """
    host, port = opened.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    own = "unpruned" if method == NONE else method
    print(
        f"Serving {name} at http://{shown}:{port}/v1 ({own}, where a request does not say). Ctrl-C stops.", flush=True
    )
    server.run(sockets=[opened])
    return 0 if server.started else 1
