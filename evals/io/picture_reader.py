"""The one reader of pictures: whatever a command is asked about comes out of here, upright and in 8-bit RGB.

Pillow's own conversion to RGB cuts grey levels of more than eight bits off at 255, which leaves a 16-bit picture white,
and floats from 0 to 1 black. Here levels are scaled:

| levels | to 0..255 |
|---|---|
| 9 to 16 bits, as the file says (or an array of uint16) | the upper eight, as Pillow takes them of RGB |
| booleans | 0 and 255 |
| floats within 0..1 | times 255, rounded |
| whole numbers within 0..255, as 32-bit integers or floats | as they are |
| whole numbers within 0..65535, likewise | the upper eight bits |
| all others | from the smallest to the largest level of the picture, rounded; all 0 where they are one |

The frames of a video are scaled together, or its light would flicker. Levels that are no finite numbers are refused.
A picture is turned as its camera says (EXIF); transparency is left out, and what is written beneath it shows; palettes,
grey, 1-bit and CMYK are converted by Pillow. Of an animation that is asked for as a picture the first frame counts.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, ImageSequence

NARROWEST = 200
"""Times that the long side of a stranger's picture may be its short side. Processors that make the short side as long
as the model wants it make the other as many times longer, and a file of some hundred bytes would fill the memory."""
_ORIENTATION = 274  # EXIF
_BITS_PER_SAMPLE, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339  # TIFF
_WHITE_IS_ZERO, _UNSIGNED = 0, 1


class BadPicture(ValueError):
    """A picture that cannot be read; the sentence names it."""


@dataclass(frozen=True)
class _Levels:
    """Levels `[H, W]` or `[H, W, 3]` that have still to be scaled.

    Attributes:
        bits: how many the file says that a level has; None where it does not say.
        negative: whether 0 is white.
    """

    values: np.ndarray
    bits: int | None = None
    negative: bool = False


def read_picture(source: Any, name: str | None = None) -> Image.Image:
    """A picture as every command sees it, in mode RGB; see the table above. One that was read before stays as it is.

    Args:
        source: a path, the bytes of a file, a mapping with `bytes` or `path` as datasets store pictures, a Pillow
            picture, or an array `[H, W]` or `[H, W, C]` with one to four channels.
        name: what an error calls it; by default its path.

    Raises:
        FileNotFoundError: no such file.
        BadPicture: it is no picture, or half of one.
    """
    called = name or _name(source)
    with _naming(called):
        return _scaled([_raw(source)])[0]


def read_frames(source: Any, name: str | None = None) -> list[Image.Image]:
    """The frames of a video or an animation, each as `read_picture` gives it.

    Args:
        source: the path or the bytes of an animation (one frame where it is a still picture), an array
            `[T, H, W, C]`, or any sequence of what `read_picture` takes.

    Raises:
        FileNotFoundError, BadPicture: as `read_picture`.
    """
    called = name or _name(source)
    with _naming(called):
        if isinstance(source, (str, Path, bytes)):
            with _stream(source) as stream, Image.open(stream) as opened:
                return _scaled([_of_pillow(frame) for frame in ImageSequence.Iterator(opened)])
    frames = []
    for frame in source:
        with _naming(name or _name(frame)):
            frames.append(_raw(frame))
    if not frames:
        raise BadPicture(f"{name or 'A video'} has no frames, so there is nothing to ask about.")
    with _naming(called):
        return _scaled(frames)


@dataclass(frozen=True)
class Extent:
    """How much there is in a picture's file, read without its pixels.

    Attributes:
        size: width and height of the first picture.
        count: of pictures; `read_picture` gives the first.
        pages: whether they are pages of a document and no frames.
        kind: the file's format, as Pillow calls it.
    """

    size: tuple[int, int]
    count: int
    pages: bool
    kind: str


def read_extent(source: Path | bytes) -> Extent | None:
    """What a file says of its size; None where it is no picture, which `read_picture` puts in words."""
    try:
        with _stream(source) as stream, Image.open(stream) as opened:
            # a camera's MPO has a preview or a depth map behind its picture, no frames
            count = 1 if opened.format == "MPO" else getattr(opened, "n_frames", 1)
            return Extent(opened.size, count, opened.format == "TIFF", opened.format or "")
    except Exception:  # decoders raise what they like
        return None


def read_size(data: bytes, formats: Sequence[str]) -> tuple[int, int]:
    """Width and height that a file of one of Pillow's `formats` says of itself; nothing is decoded.

    Raises:
        PIL.Image.DecompressionBombError: it says more pixels than Pillow ever reads.
        Exception: it is no picture of these formats; decoders raise what they like.
    """
    with warnings.catch_warnings(), Image.open(io.BytesIO(data), formats=list(formats)) as opened:
        warnings.simplefilter("ignore")  # Pillow warns before it refuses; a caller asks for its own limit next
        return opened.size


def _stream(source: str | Path | bytes) -> Any:
    # by its name Pillow maps a file into memory, and then a grey TIFF that is to be turned comes out in shreds
    return io.BytesIO(source) if isinstance(source, bytes) else Path(source).open("rb")


def _raw(source: Any) -> Image.Image | _Levels:
    if isinstance(source, Mapping):
        source = source["path"] if source.get("bytes") is None else source["bytes"]
    if isinstance(source, Image.Image):
        return _of_pillow(source)
    if isinstance(source, str) and "://" in source:
        from datasets import Image as Feature

        # a file of the hub, of the web or of an archive: datasets knows how to open it
        return _of_pillow(Feature().decode_example({"path": source, "bytes": None}))
    if isinstance(source, (str, Path, bytes)):
        with _stream(source) as stream, Image.open(stream) as opened:
            return _of_pillow(opened)
    return _of_array(np.asarray(source))


def _of_pillow(picture: Image.Image) -> Image.Image | _Levels:
    # asked before it is turned, as the copy knows nothing of its file
    tags, kind, mode = getattr(picture, "tag_v2", {}), picture.format, picture.mode
    picture.load()  # Pillow turns TIFFs by itself here
    upright = picture if picture.getexif().get(_ORIENTATION) in (None, 1) else ImageOps.exif_transpose(picture)
    if mode != "F" and mode.partition(";")[0] != "I":
        return upright if mode == "RGB" and type(upright) is Image.Image else upright.convert("RGB")
    values, bits = np.asarray(upright), None
    if mode.startswith("I;16"):
        bits = min(16, *np.atleast_1d(tags.get(_BITS_PER_SAMPLE, 16)).tolist())
    elif mode == "I" and kind in ("PNG", "PPM"):
        bits = 16  # in 32, as Pillow has it
    elif mode == "I" and kind == "TIFF" and np.atleast_1d(tags.get(_SAMPLE_FORMAT, _UNSIGNED))[0] == _UNSIGNED:
        values = np.ascontiguousarray(values).view(np.uint32)  # Pillow takes the highest bit for a sign
    return _Levels(values, bits, negative=kind == "TIFF" and tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO)


def _of_array(values: np.ndarray) -> _Levels:
    channels = values.shape[2] if values.ndim == 3 else 1
    if values.ndim not in (2, 3) or not 1 <= channels <= 4 or values.dtype.kind not in "buif":
        given = f"an array {list(values.shape)} of {values.dtype}" if values.ndim else type(values.item()).__name__
        raise ValueError(f"{given} is none; [H, W], or [H, W, C] with C from 1 to 4, is")
    if values.ndim == 3:
        values = values[..., :3] if channels > 2 else values[..., 0]
    if values.dtype == bool:
        return _Levels(values.astype(np.uint8) * 255)
    return _Levels(values, 16 if values.dtype == np.uint16 else None)


def _scaled(frames: Sequence[Image.Image | _Levels]) -> list[Image.Image]:
    """Pictures of the frames, whose levels are scaled together."""
    rule = _rule([f.values for f in frames if isinstance(f, _Levels) and f.bits is None and f.values.dtype != np.uint8])
    pictures = []
    for frame in frames:
        if isinstance(frame, Image.Image):
            pictures.append(frame)
            continue
        levels = frame.values
        if frame.bits is not None:
            levels = levels >> max(0, frame.bits - 8)
        elif levels.dtype != np.uint8:
            levels = rule(levels)
        levels = levels.astype(np.uint8)
        levels = 255 - levels if frame.negative else np.ascontiguousarray(levels)
        pictures.append(Image.fromarray(levels).convert("RGB"))
    return pictures


def _rule(values: Sequence[np.ndarray]) -> Callable[[np.ndarray], np.ndarray]:
    """How levels of which no file says the bits become 0..255: one rule for all of `values`."""
    if not values:
        return lambda levels: levels
    if not all(np.isfinite(levels).all() for levels in values):
        raise ValueError("it has levels that are no finite numbers")
    low, high = min(float(levels.min()) for levels in values), max(float(levels.max()) for levels in values)
    if low >= 0 and high <= 1 and any(levels.dtype.kind == "f" for levels in values):
        return lambda levels: np.rint(levels.astype(np.float64) * 255)
    if low >= 0 and high <= 65535 and all((levels == np.floor(levels)).all() for levels in values):
        return lambda levels: levels.astype(np.int64) >> (8 if high > 255 else 0)
    return lambda levels: np.rint((levels.astype(np.float64) - low) * (255 / ((high - low) or 1)))


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Errors as sentences that name the picture."""
    try:
        yield
    except MemoryError:
        raise  # says nothing against the picture
    except FileNotFoundError as error:
        raise FileNotFoundError(f"There is no picture {name}.") from error
    except Exception as error:  # decoders raise what they like
        raise BadPicture(f"{name} cannot be read as a picture ({error}). Give a PNG, a JPEG or the like.") from error


def _name(source: Any) -> str:
    if isinstance(source, Mapping):
        source = source.get("path")
    named = source if isinstance(source, (str, Path)) else getattr(source, "filename", "")
    return str(named or "A picture without a file")
