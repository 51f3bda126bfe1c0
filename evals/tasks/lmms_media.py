"""From what tasks of lmms-eval hand over (pictures, paths, videos, messages) to our conversations.

Imports nothing of lmms-eval.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from tokenprune.evals.io.picture_reader import BadPicture, read_frames, read_picture
from tokenprune.evals.models.chat_template import FPS, Clip, Message, Part, interleave, visual_part

_PICTURES = (
    ".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpeg", ".jpg", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp",
)  # fmt: skip
_SOUNDS = (".wav", ".mp3", ".m4a", ".aac", ".flac", ".ogg", ".opus")


@dataclass(frozen=True)
class Media:
    """How media are read.

    Attributes:
        fps: frames a second that are taken of a video.
        max_frames: most frames of a video; a longer one is spread over them.
    """

    fps: float = FPS
    max_frames: int = 32

    def conversation(self, text: str, visuals: Any) -> list[Message]:
        """One question: the visuals at the `<image>` marks of `text`, if it has one for each, else before it."""
        return [{"role": "user", "content": interleave(text, [self.part(visual) for visual in flat(visuals)])}]

    def messages(self, messages: Iterable[Any]) -> list[Message]:
        """Messages as `doc_to_messages` of a task gives them.

        Raises:
            ValueError: a part that is no text, picture or video.
        """
        chat: list[Message] = []
        for message in messages:
            content = message["content"]
            content = [{"type": "text", "text": content}] if isinstance(content, str) else content
            parts = [self._message_part(part) for part in content]
            if len(parts) > 1 and parts[-1]["type"] == "text" and all(part["type"] != "text" for part in parts[:-1]):
                parts = interleave(parts[-1]["text"], parts[:-1])
            chat.append({"role": message["role"], "content": parts})
        return chat

    def _message_part(self, part: Mapping[str, Any]) -> Part:
        if part["type"] == "text":
            return {"type": "text", "text": part["text"]}
        if part["type"] == "video" and not isinstance(part["url"], Mapping):
            return visual_part(self._video(part["url"], part.get("start_time"), part.get("end_time")))
        if part["type"] in ("image", "video"):
            return self.part(part["url"])
        raise ValueError(f"tokenprune prunes visual tokens; it takes no {part['type']}, which this task hands over.")

    def part(self, visual: Any) -> Part:
        """A picture, a path of one, a video (path, array of frames, list of pictures) or lmms-eval's mapping of one.

        Raises:
            ValueError: it is something else, such as sound.
        """
        from PIL import Image

        if isinstance(visual, Image.Image):
            return visual_part(read_picture(visual))
        if isinstance(visual, (str, Path)) and Path(visual).suffix.lower() in _PICTURES:
            return visual_part(read_picture(visual))
        if isinstance(visual, Mapping) and visual.get("type", "video") == "video":
            source = visual.get("url") or visual.get("path") or visual.get("video")
            if source is not None:
                return visual_part(self._video(source, visual.get("video_start"), visual.get("video_end")))
        elif not isinstance(visual, Mapping):
            return visual_part(self._video(visual))
        shown = f"a mapping with {sorted(map(str, visual))}" if isinstance(visual, Mapping) else repr(visual)
        raise ValueError(f"A task handed over {shown}; tokenprune takes pictures and videos.")

    def _video(self, source: Any, start: float | None = None, end: float | None = None) -> Clip:
        if isinstance(source, (str, Path)):
            if Path(source).suffix.lower() in _SOUNDS:
                raise ValueError(f"tokenprune takes pictures and videos, and {source} is sound.")
            return read_clip(str(source), self.fps, self.max_frames, start, end)
        if isinstance(source, (list, tuple)) or getattr(source, "ndim", 0) == 4:
            step = max(1.0, len(source) / self.max_frames)
            taken = [source[int(i * step)] for i in range(min(len(source), self.max_frames))]
            return Clip(read_frames(taken), self.fps)
        raise ValueError(f"A task handed over a {type(source).__name__}; tokenprune takes pictures and videos.")


def document(docs: Any, number: int, task: str) -> Any:
    """A document of a task of lmms-eval.

    Tasks convert pictures themselves, in Pillow's way, which cuts levels of more than eight bits off: those pictures
    are read before the task sees them, all others are left to it.

    Raises:
        BadPicture: it has a picture that cannot be read.
    """
    with naming_document(number, task):
        return _readable(docs[number])


@contextmanager
def naming_document(number: int, task: str) -> Iterator[None]:
    """Errors of what reads pictures for a task do not say whose; this says it."""
    try:
        yield
    except FileNotFoundError:
        raise  # names its file
    except (OSError, SyntaxError) as error:
        raise BadPicture(f"Document {number} of {task} holds a picture that cannot be read ({error}).") from error


def _readable(value: Any) -> Any:
    from PIL import Image

    if isinstance(value, Image.Image):
        return read_picture(value) if value.mode.startswith(("I", "F")) else value
    if isinstance(value, dict):
        return {name: _readable(member) for name, member in value.items()}
    return [_readable(member) for member in value] if isinstance(value, list) else value


def flat(visuals: Any) -> list[Any]:
    """What `doc_to_visual` gives, as a list: None is nothing, lists of lists are one list."""
    if visuals is None:
        return []
    if not isinstance(visuals, (list, tuple)):
        return [visuals]
    return [visual for item in visuals for visual in (flat(item) if isinstance(item, (list, tuple)) else [item])]


def frame_places(total: int, rate: float, fps: float, most: int, start: float | None, end: float | None) -> list[int]:
    """Which frames are taken of `total` frames at `rate` a second: `fps` a second, at most `most`, evenly spread.

    Args:
        start: where it begins, seconds; None for its beginning.
        end: where it ends, seconds; None for its end.
    """
    first = min(total - 1, max(0, int((start or 0.0) * rate)))
    last = total - 1 if end is None else min(total - 1, max(first, int(end * rate)))
    span = last - first + 1
    count = max(1, min(most, span, round(span / rate * fps)))
    return [first + (2 * i + 1) * span // (2 * count) for i in range(count)]


def read_clip(path: str, fps: float, most: int, start: float | None = None, end: float | None = None) -> Clip:
    """Frames of a video file, see `frame_places`, through PyAV.

    Raises:
        FileNotFoundError: no such file.
        ImportError: PyAV is not installed; it comes with the extra.
        ValueError: the file does not say how many frames it has.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no video {path}.")
    from transformers.utils.import_utils import is_av_available
    from transformers.video_utils import load_video

    if not is_av_available():
        raise ImportError("Videos need the package av: pip install 'tokenprune-vlm[lmms]'.")
    seen: dict[str, Any] = {}

    def places(metadata: Any, **_: Any) -> list[int]:
        if not metadata.total_num_frames or not metadata.fps:
            raise ValueError(f"{path} does not say how many frames it has; convert it, for example to mp4.")
        seen["rate"] = metadata.fps
        seen["places"] = frame_places(metadata.total_num_frames, metadata.fps, fps, most, start, end)
        return seen["places"]

    frames, _ = load_video(cast(Any, path), backend="pyav", sample_indices_fn=places)
    step = (seen["places"][-1] - seen["places"][0]) / max(1, len(seen["places"]) - 1)
    return Clip(read_frames(frames, path), seen["rate"] / step if step else fps)
