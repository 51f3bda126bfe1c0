"""`tokenprune serve`: an OpenAI-compatible server for a model of transformers."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from tokenprune.commands._shared import check_keep, model_arguments

_PACKAGES = ("starlette", "uvicorn")


def add(commands: argparse._SubParsersAction) -> None:
    """Declare the subcommand."""
    serve = commands.add_parser(
        "serve",
        help="an OpenAI-compatible server; each request may name a method and a budget",
        description="One model, one request at a time. Models that vLLM serves are faster there: see "
        "docs/guides/serving_vllm.md.",
    )
    model_arguments(serve)
    serve.add_argument("--name", help="what requests call the model; as --model by default")
    serve.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the checkpoint")
    serve.add_argument(
        "--method", default="none", help='for requests that do not say: "holov@64", a YAML file, none (%(default)s)'
    )
    serve.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets other machines in (%(default)s)")
    serve.add_argument("--port", type=int, default=8000, help="0 takes a free one (%(default)s)")
    serve.add_argument(
        "--key-from",
        metavar="VARIABLE",
        help="clients must send the key in this environment variable as a bearer token",
    )
    serve.add_argument("--queue", type=int, default=64, help="requests that may wait; more get HTTP 503 (%(default)s)")
    serve.add_argument("--max-body", type=int, default=16, metavar="MIB", help="size of a request (%(default)s)")
    serve.add_argument("--max-pictures", type=int, default=16, help="pictures of a request (%(default)s)")
    serve.add_argument(
        "--max-pixels", type=int, default=40_000_000, help="of all pictures of a request together (%(default)s)"
    )
    serve.add_argument("--max-prompt-tokens", type=int, default=16_384, help="before pruning (%(default)s)")
    serve.add_argument("--max-new-tokens", type=int, default=1024, help="length of an answer (%(default)s)")
    serve.add_argument(
        "--patience", type=float, default=30.0, metavar="SECONDS",
        help="for a body to arrive, a picture to be fetched, a client to read on, answers to end at shutdown "
        "(%(default)s)",
    )  # fmt: skip
    serve.add_argument("--picture-folder", type=Path, help="let requests name file:// pictures below this folder")
    serve.add_argument(
        "--picture-host",
        action="append",
        default=[],
        metavar="HOST",
        help="let requests name http(s):// pictures there",
    )
    serve.set_defaults(handler=_serve)


def _serve(args: argparse.Namespace) -> int:
    from importlib.util import find_spec

    from tokenprune.evals.config.points import check_method_name
    from tokenprune.evals.errors import as_user_error
    from tokenprune.evals.models.load import load_model, model_source

    with as_user_error():
        missing = [name for name in _PACKAGES if find_spec(name) is None]
        if missing:
            raise ImportError(f"tokenprune serve needs {' and '.join(missing)}: pip install 'tokenprune-vlm[serve]'.")
        if not 0 <= args.port <= 65535:
            raise ValueError(f"--port is a number from 0 to 65535, got {args.port}.")
        if not args.method.endswith((".yaml", ".yml")):
            check_method_name(args.method)
            check_keep(args.method, None)
        key = _key(args.key_from)
        model_source(args.model)
        from tokenprune.server.limits import MIB, Limits

        limits = Limits(
            args.queue, args.max_body * MIB, args.max_pictures, args.max_pixels, args.max_prompt_tokens,
            args.max_new_tokens, args.patience, args.picture_folder, tuple(args.picture_host),
        )  # fmt: skip
        limits.check()
        from tokenprune.server.run import Place, listen, make_server, serve

        place = Place(args.host, args.port, args.name, key)
        opened = listen(place)
        loaded = load_model(args.model, args.dtype, args.device, args.trust_remote_code)
        server = make_server(loaded, args.method, limits, place)
    return serve(server, args.name or loaded.name, args.method, opened)


def _key(variable: str | None) -> str | None:
    """The key in an environment variable: on a command line, every user of the machine could read it."""
    if variable is None:
        return None
    key = os.environ.get(variable, "")
    if not key:
        raise ValueError(f"--key-from {variable}: there is no such environment variable, or it is empty.")
    return key
