"""`tokenprune ui`: a page to try methods on."""

from __future__ import annotations

import argparse
from importlib.util import find_spec

from tokenprune.commands._shared import model_arguments

_PACKAGES = ("starlette", "uvicorn")


def add(commands: argparse._SubParsersAction) -> None:
    """Declare the subcommand."""
    ui = commands.add_parser(
        "ui",
        help="a page in the browser: drop a picture, slide the budget, see what three methods keep and answer",
        description="The page listens to this machine alone unless --host says otherwise, and asks nothing of any "
        "other. Whoever can open it can use the model: there is no password.",
    )
    model_arguments(ui)
    ui.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets other machines in (%(default)s)")
    ui.add_argument("--port", type=int, default=7860, help="0 takes a free one (%(default)s)")
    ui.add_argument("--max-new-tokens", type=int, default=32, help="length of an answer (%(default)s)")
    ui.set_defaults(handler=_ui)


def _ui(args: argparse.Namespace) -> int:
    from tokenprune.evals.errors import as_user_error
    from tokenprune.evals.models.load import check_device, check_dtype, load_model, model_source

    with as_user_error():
        missing = [name for name in _PACKAGES if find_spec(name) is None]
        if missing:
            raise ImportError(f"tokenprune ui needs {' and '.join(missing)}: pip install 'tokenprune-vlm[ui]'.")
        if not 0 <= args.port <= 65535:
            raise ValueError(f"--port is a number from 0 to 65535, got {args.port}.")
        if args.max_new_tokens < 1:
            raise ValueError(f"--max-new-tokens must be at least 1, got {args.max_new_tokens}.")
        model_source(args.model)
        check_dtype(args.dtype)
        check_device(args.device)
        from tokenprune.evals.ui.run import address, is_local, listen, make_server, serve

        opened = listen(args.host, args.port)
        print(f"Loading {args.model}.", flush=True)
        loaded = load_model(args.model, args.dtype, args.device)
        from tokenprune.evals.ui.desk import Desk

        server = make_server(Desk(loaded, args.max_new_tokens), args.host)
    print(f"Open {address(opened, args.host)} in a browser; Ctrl-C stops it.", flush=True)
    if not is_local(args.host):
        print("Other machines can open it too, and there is no password.", flush=True)
    return serve(server, opened)
