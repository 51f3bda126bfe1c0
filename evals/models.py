"""From a name to a loaded model: the pocket models that ship with the package, a local folder or a hub id."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenprune.registry import UnknownName, near

if TYPE_CHECKING:
    from PIL.Image import Image

POCKET = Path(__file__).parent / "pocket" / "models"
PLAIN_PROMPT = "USER: <image>\n{question} ASSISTANT:"
FPS = 2.0  # frames a second of videos, which tasks give as frames
DTYPES = ("float32", "bfloat16", "float16")


@dataclass
class LoadedModel:
    """A model ready to be asked.

    Attributes:
        name: as it was asked for.
        model: the transformers model, in eval mode.
        processor: its processor, left padding.
        fingerprint: changes when the weights do; finished samples of other weights are not reused.
        settled: by point, its method after interventions have seen the prompts that they learn from.
    """

    name: str
    model: Any
    processor: Any
    fingerprint: str
    settled: dict[str, Any] = field(default_factory=dict)

    def prompt(self, question: str, kind: str = "image") -> str:
        """The text of one turn with one image, or one video: the processor's chat template, or LLaVA-1.5's form."""
        if getattr(self.processor, "chat_template", None):
            content = [{"type": kind}, {"type": "text", "text": question}]
            text = self.processor.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
            )
            # some templates write the token that the tokenizer adds by itself
            bos = self.processor.tokenizer.bos_token
            doubled = (
                bos and self.processor.tokenizer(text).input_ids[:2] == [self.processor.tokenizer.bos_token_id] * 2
            )
            return text.removeprefix(bos) if doubled else text
        return PLAIN_PROMPT.format(question=question)

    def inputs(self, questions: list[str], images: list[Image | list[Image]]) -> Any:
        """Processor output for a batch with one image, or one video (its frames, `FPS` a second), each.

        Left padded, on the model's device and in its dtype.

        Raises:
            ValueError: a video for a model of pictures.
            ImportError: its videos need a package that is not installed.
        """
        kinds = ["video" if isinstance(image, list) else "image" for image in images]
        # one list a prompt: some processors take a flat list for the pictures of a single prompt
        pictures = [[image.convert("RGB")] for image in images if not isinstance(image, list)]
        videos = [[frame.convert("RGB") for frame in image] for image in images if isinstance(image, list)]
        if videos and getattr(self.processor, "video_processor", None) is None:
            raise ValueError(
                f"{self.name} takes pictures, and one of its samples is a video of {len(videos[0])} frames."
            )
        metadata = [
            {"fps": FPS, "total_num_frames": len(v), "duration": len(v) / FPS, "frames_indices": list(range(len(v)))}
            for v in videos
        ]
        batch = self.processor(
            text=[self.prompt(question, kind) for question, kind in zip(questions, kinds)],
            padding=True,
            return_tensors="pt",
            **({"images": pictures} if pictures else {}),
            **({"videos": videos, "video_metadata": metadata, "do_sample_frames": False} if videos else {}),
        )
        return batch.to(self.model.device, dtype=self.model.dtype)

    def decode(self, tokens: Any) -> list[str]:
        """Generated ids `[B, T]`, prompt not included, as text."""
        texts = self.processor.batch_decode(tokens, skip_special_tokens=True)
        return [text.strip() for text in texts]


def pocket_names() -> list[str]:
    """Pocket models that are there, sorted."""
    return sorted(path.parent.name for path in POCKET.glob("*/config.json"))


def model_source(name: str) -> str:
    """The folder or hub id behind `name`; imports nothing heavy, so that a typo fails before anything loads.

    Raises:
        UnknownName: neither a pocket model, nor a folder, nor a hub id (`owner/name`).
    """
    if name in pocket_names():
        return str(POCKET / name)
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ValueError(f"The folder {name!r} holds no config.json, so it is no model that transformers can load.")
        return str(folder)
    parts = name.split("/")
    if len(parts) == 2 and all(parts) and not name.startswith((".", "~")):
        return name
    known = pocket_names()
    raise UnknownName(
        f"There is no model called {name!r}.{near(name, known)} Known: {', '.join(known) or 'no pocket model'}; "
        "or pass a local folder, or a hub id such as llava-hf/llava-1.5-7b-hf."
    )


def load_model(name: str, dtype: str = "float32", device: str | None = None) -> LoadedModel:
    """Load model and processor.

    Args:
        name: pocket name, folder or hub id.
        dtype: one of `DTYPES`.
        device: where to put it; None takes a GPU where there is one.
    """
    source = model_source(name)
    check_dtype(dtype)
    import torch
    from transformers import AutoModelForImageTextToText

    from tokenprune.evals.processing import load_processor

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    model: Any = AutoModelForImageTextToText.from_pretrained(source, dtype=getattr(torch, dtype))
    model = model.to(device).eval()
    processor = load_processor(source)
    tokenizer = processor.tokenizer
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return LoadedModel(name, model, processor, fingerprint(source, model))


def check_dtype(dtype: str) -> None:
    """Raise ValueError if `dtype` is not one of `DTYPES`."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}.{near(dtype, list(DTYPES))}")


def fingerprint(source: str, model: Any = None) -> str:
    """A short digest of a model: file names, sizes and sampled bytes of a folder, or the commit of a hub model."""
    folder = Path(source)
    if not folder.is_dir():
        commit = getattr(getattr(model, "config", None), "_commit_hash", None)
        return str(commit or source)
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if not file.is_file() or file.suffix not in (".json", ".safetensors", ".txt", ".model", ".jinja", ".bin"):
            continue
        size = file.stat().st_size
        digest.update(f"{file.name}:{size};".encode())
        with file.open("rb") as stream:
            # a large shard is sampled: 64 spots tell two checkpoints apart without reading 14 GB
            step = max(1, size // 64)
            for start in range(0, size, step) if size > 64_000_000 else (0,):
                stream.seek(start)
                digest.update(stream.read(4096 if size > 64_000_000 else -1))
    return digest.hexdigest()[:16]
