"""Prompts: from a conversation with pictures and videos in it to the text and the media that a processor takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image

FPS = 2.0  # frames a second of a video that does not say
MARKER = "<image>"  # where a picture belongs in a text that says so itself

Part = dict[str, Any]
"""`{"type": "text", "text": ...}`, `{"type": "image", "image": ...}` or `{"type": "video", "video": frames}`."""
Message = dict[str, Any]
"""`{"role": "user" | "assistant" | "system", "content": [Part, ...]}`, as chat templates take them."""


class Clip(list):
    """The frames of a video, and how many of them there are a second."""

    def __init__(self, frames: Sequence[Image], fps: float = FPS) -> None:
        super().__init__(frames)
        self.fps = fps


def one_turn(question: str, image: Image | list[Image] | tuple[Image | list[Image], ...]) -> list[Message]:
    """A conversation of one question.

    Args:
        question: with several pictures it may say where each belongs, with as many `<image>` as there are pictures;
            else they come before the text.
        image: a picture, the frames of a video (a list), or several of those (a tuple, empty for a text alone).
    """
    visuals = list(image) if isinstance(image, tuple) else [image]
    return [{"role": "user", "content": interleave(question, [visual_part(visual) for visual in visuals])}]


def visual_part(visual: Any) -> Part:
    """A picture, or the frames of a video, as a part of a message."""
    return {"type": "video", "video": visual} if isinstance(visual, list) else {"type": "image", "image": visual}


def interleave(text: str, visuals: list[Part]) -> list[Part]:
    """Visuals at the `<image>` marks of `text` if it has one for each, else before it."""
    pieces = text.split(MARKER)
    if not visuals or len(pieces) != len(visuals) + 1:
        return [*visuals, {"type": "text", "text": text}]
    parts: list[Part] = []
    for piece, visual in zip(pieces, [*visuals, None], strict=True):
        if piece.strip():
            parts.append({"type": "text", "text": piece})
        if visual is not None:
            parts.append(visual)
    return parts


def prompt_text(processor: Any, messages: list[Message]) -> str:
    """The text of a conversation: the processor's chat template, or LLaVA-1.5's form where there is none."""
    if not getattr(processor, "chat_template", None):
        return _plain(messages, getattr(processor, "image_token", None) or MARKER)
    # a template needs to know where media are, and not what
    bare = [{**message, "content": [_bare(part) for part in message["content"]]} for message in messages]
    text = processor.apply_chat_template(bare, add_generation_prompt=True, tokenize=False)
    # some templates write the token that the tokenizer adds by itself
    tokenizer = processor.tokenizer
    bos = tokenizer.bos_token
    doubled = bos and tokenizer(text).input_ids[:2] == [tokenizer.bos_token_id] * 2
    return text.removeprefix(bos) if doubled else text


def pack(processor: Any, conversations: list[list[Message]]) -> Any:
    """Processor output for a batch of conversations, left padded if the tokenizer is."""
    from tokenprune.evals.io.picture_reader import read_frames, read_picture

    by_prompt = [[part for message in messages for part in message["content"]] for messages in conversations]
    # one list a prompt: some processors take a flat list for the pictures of a single prompt
    nested = [[read_picture(part["image"]) for part in parts if part["type"] == "image"] for parts in by_prompt]
    flat = [picture for of_prompt in nested for picture in of_prompt]
    pictures = nested if all(nested) else flat
    by_prompt = [[part["video"] for part in parts if part["type"] == "video"] for parts in by_prompt]
    clips = [clip for of_prompt in by_prompt for clip in of_prompt]
    videos = [[read_frames(clip) for clip in of_prompt] for of_prompt in by_prompt]
    # as with pictures; older transformers' SmolVLM processor takes nothing but a list a prompt
    videos = videos if all(videos) else [clip for of_prompt in videos for clip in of_prompt]
    metadata = [frames_metadata(len(clip), getattr(clip, "fps", FPS)) for clip in clips]
    given = {
        "text": [prompt_text(processor, messages) for messages in conversations],
        "padding": True,
        "return_tensors": "pt",
        **({"videos": videos, "video_metadata": metadata, "do_sample_frames": False} if clips else {}),
    }
    if not pictures:
        return processor(**given)
    try:
        packed = processor(**given, images=pictures)
    except ValueError:
        if pictures is flat:
            packed = processor(**given, images=nested)  # Gemma 3 and LFM2-VL take a flat list for one prompt's
        elif _marks(processor, given["text"]) == [len(of_prompt) for of_prompt in nested]:
            packed = processor(**given, images=flat)  # GOT-OCR 2 takes a nested list for the pages of a document
        else:
            raise
    packed.pop("labels", None)  # PaliGemma's processor makes some, none of which counts, for whoever trains
    return packed


def _marks(processor: Any, texts: list[str]) -> list[int]:
    """How many pictures each text says that it has."""
    mark = getattr(processor, "image_token", None)
    return [text.count(mark) if mark else -1 for text in texts]


def frames_metadata(frames: int, fps: float) -> dict[str, Any]:
    """What processors are told of a video whose frames are all used."""
    return {"fps": fps, "total_num_frames": frames, "duration": frames / fps, "frames_indices": list(range(frames))}


def _bare(part: Part) -> Part:
    return part if part["type"] == "text" else {"type": part["type"]}


def _plain(messages: list[Message], picture: str) -> str:
    """LLaVA-1.5's form, with what the processor looks for in place of each picture."""
    marks = {"image": picture, "video": "<video>"}
    turns = {"user": "USER: ", "assistant": "ASSISTANT: ", "system": ""}
    texts = []
    for message in messages:
        pieces = [part["text"] if part["type"] == "text" else f"{marks[part['type']]}\n" for part in message["content"]]
        texts.append(turns[message["role"]] + "".join(pieces))
    return " ".join([*texts, "ASSISTANT:"])
