"""Pictures of a request: where they may come from, and how large they may be, before one is decoded."""

from __future__ import annotations

import base64
import binascii
import http.client
import re
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from PIL import Image

from tokenprune.evals.io.picture_reader import NARROWEST, read_size
from tokenprune.server.limits import Limits
from tokenprune.server.refusals import Refused

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
"""What is read. Pillow knows more; one of them starts a PostScript interpreter."""
_DATA = re.compile(r"data:([\w.+-]+/[\w.+-]+)?(?:;[\w.+-]+=[\w.+-]*)*(;base64)?,", re.ASCII)


def picture_bytes(url: Any, limits: Limits, where: str) -> bytes:
    """The file of a picture.

    Args:
        url: a data URI; a `file://` path or an `http(s)://` address where the server was started with them.
        where: the field of the request, for messages.

    Raises:
        Refused: it is none of these, or not to be had.
    """
    if not isinstance(url, str) or not url:
        raise Refused(f"{where} must be a data URI (data:image/png;base64,...), got {_short(url)}.", param=where)
    scheme = url.partition(":")[0].lower()
    if scheme == "data":
        return _of_data(url, where)
    if scheme == "file":
        return _of_file(url, limits, where)
    if scheme in ("http", "https"):
        return _of_web(url, limits, where)
    raise Refused(
        f"{where} must be a data URI (data:image/png;base64,...), got {_short(url)}.", param=where, code="bad_picture"
    )


def picture_size(data: bytes, where: str) -> tuple[int, int]:
    """Width and height that a file says of itself; nothing is decoded.

    Raises:
        Refused: it is no picture.
    """
    try:
        return read_size(data, FORMATS)
    except Image.DecompressionBombError as error:
        raise Refused(f"{where} is too large a picture: {error}", param=where, code="picture_too_large") from None
    except Exception as error:  # decoders raise what they like
        raise Refused(
            f"{where} cannot be read as a picture; {', '.join(FORMATS[:-1])} and {FORMATS[-1]} can. "
            f"({len(data)} bytes came, {type(error).__name__}.)",
            param=where,
            code="bad_picture",
        ) from None


def check_sizes(sizes: list[tuple[int, int]], limits: Limits) -> None:
    """Raise Refused where the pictures of a request have too many pixels together, or one is too narrow."""
    width, height = next((size for size in sizes if max(size) > NARROWEST * min(size)), (1, 1))
    if max(width, height) > NARROWEST:
        raise Refused(
            f"A picture of {width} x {height} pixels is too narrow: one side may be {NARROWEST} times as long as the "
            "other. Cut it, or fill it up.",
            param="messages",
            code="picture_too_narrow",
        )
    pixels = sum(width * height for width, height in sizes)
    if pixels > limits.pixels:
        said = " + ".join(f"{width} x {height}" for width, height in sizes[:4]) + " + ..." * (len(sizes) > 4)
        raise Refused(
            f"The pictures of this request have {pixels} pixels ({said}), and this server takes {limits.pixels} in "
            "all. Send smaller ones.",
            param="messages",
            code="picture_too_large",
        )


def _of_data(url: str, where: str) -> bytes:
    match = _DATA.match(url)
    if match is None or match[2] is None:
        raise Refused(
            f"{where} is a data URI that is not base64; write data:image/png;base64,... .",
            param=where, code="bad_picture",
        )  # fmt: skip
    try:
        return base64.b64decode("".join(url[match.end() :].split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise Refused(f"The base64 of {where} is broken: {error}.", param=where, code="bad_picture") from None


def _of_file(url: str, limits: Limits, where: str) -> bytes:
    if limits.folder is None:
        raise Refused(
            f"{where} names a file, and this server reads none of its own files. Send the picture as a data URI, or "
            "start the server with --picture-folder.",
            param=where,
            code="files_refused",
        )
    parts, missing = urlsplit(url), Refused(f"{where} names no picture that this server has.", param=where)
    try:
        path = Path(unquote(parts.path)).resolve(strict=True)
        inside = parts.netloc in ("", "localhost") and path.is_relative_to(limits.folder.resolve())
        # one sentence for what is not there and what is not to be read: a client learns nothing of other folders
        if not inside or not path.is_file():
            raise missing
        if path.stat().st_size > limits.body:
            raise Refused(f"{where} is a file of more than {limits.body} bytes.", param=where, code="picture_too_large")
        return path.read_bytes()
    except (OSError, ValueError):
        raise missing from None


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        return None


def _of_web(url: str, limits: Limits, where: str) -> bytes:
    try:
        host = urlsplit(url).hostname
    except ValueError:
        host = None
    if not limits.hosts:
        raise Refused(
            f"{where} is a web address, and this server fetches none. Send the picture as a data URI, or start the "
            "server with --picture-host.",
            param=where,
            code="web_refused",
        )
    if host not in limits.hosts:
        raise Refused(
            f"{where} is of the host {_short(host)}, and this server fetches from {', '.join(limits.hosts)} alone.",
            param=where, code="web_refused",
        )  # fmt: skip
    opener = urllib.request.build_opener(_NoRedirect)
    try:
        with opener.open(url, timeout=limits.seconds) as answer:
            data = answer.read(limits.body + 1)
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise Refused(f"{where} could not be fetched: {error}.", param=where, code="bad_picture") from None
    if len(data) > limits.body:
        raise Refused(f"{where} is a file of more than {limits.body} bytes.", param=where, code="picture_too_large")
    return data


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else type(value).__name__
    return repr(text if len(text) <= 60 else f"{text[:57]}...")
