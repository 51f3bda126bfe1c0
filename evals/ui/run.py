"""Opening the port, and answering until the user stops it."""

from __future__ import annotations

import ipaddress
import socket

import uvicorn

from tokenprune.evals.ui.app import LOCAL, build_app
from tokenprune.evals.ui.desk import Desk


def listen(host: str, port: int) -> socket.socket:
    """A socket that waits for browsers, opened before a model is loaded for them.

    Raises:
        ValueError: the port is taken, or the host is no address of this machine.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        opened = socket.socket(family, kind, protocol)
    except (OSError, OverflowError) as error:
        raise ValueError(f"--host {host} --port {port} is no address of this machine ({error}).") from None
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        opened.bind(address)
    except OSError as error:
        opened.close()
        raise ValueError(
            f"Nothing can listen at {host}:{port} ({error.strerror or error}). Give another --port, or --port 0 for "
            "one that is free."
        ) from None
    opened.listen(64)
    return opened


def is_local(host: str) -> bool:
    """Whether only this machine can reach a page at `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def address(opened: socket.socket, host: str) -> str:
    """What to open in a browser."""
    shown = f"[{host}]" if ":" in host else host
    return f"http://{'127.0.0.1' if host in ('0.0.0.0', '::') else shown}:{opened.getsockname()[1]}"


def make_server(desk: Desk, host: str) -> uvicorn.Server:
    """The server, which `serve` runs."""
    app = build_app(desk, LOCAL if is_local(host) else ())
    return uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=2, server_header=False))


def serve(server: uvicorn.Server, opened: socket.socket) -> int:
    """Answer until the user stops it; the exit status."""
    server.run(sockets=[opened])
    return 0
