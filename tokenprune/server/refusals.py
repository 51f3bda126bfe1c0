"""What a client is told when a request is not answered: an HTTP status and a sentence."""

from __future__ import annotations

from typing import Any

_KINDS = {400: "invalid_request_error", 401: "authentication_error", 503: "server_busy"}


class Refused(Exception):
    """A request that is not answered; the message is a sentence for whoever sent it.

    Attributes:
        status: of HTTP.
        param: the field of the request that is to blame, where one is.
        code: a word for programs, such as "unknown_method".
        retry_after: seconds after which it may be sent again, where that helps.
    """

    def __init__(
        self, sentence: str, status: int = 400, param: str | None = None, code: str | None = None,
        retry_after: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__(sentence)
        self.status, self.param, self.code, self.retry_after = status, param, code, retry_after

    def body(self) -> dict[str, Any]:
        """The error as OpenAI's clients read it."""
        kind = _KINDS.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """Of the HTTP answer."""
        return {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
