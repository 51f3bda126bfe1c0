"""What a user is told when something cannot be run: a sentence, no traceback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """What was asked for cannot be run; the message is a sentence for whoever asked."""


@contextmanager
def as_user_error() -> Iterator[None]:
    """Turn errors of the checks before the work into `UserError`; an error during the work keeps its traceback."""
    try:
        yield
    except (ValueError, TypeError, KeyError, OSError, ImportError) as error:
        raise UserError(str(error)) from error
