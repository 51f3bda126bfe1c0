"""From a name to a loaded model: the pocket models that ship with the package, a local folder or a hub id."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenprune.evals.models.chat_template import Message, one_turn, pack
from tokenprune.registry import UnknownName, near

POCKET = Path(__file__).parents[1] / "pocket" / "models"
DTYPES = ("float32", "bfloat16", "float16")


@dataclass
class LoadedModel:
    """A model ready to be asked.

    Attributes:
        name: as it was asked for.
        model: the transformers model, in eval mode.
        processor: its processor, left padding.
        fingerprint: changes when the weights do; finished samples of other weights are not reused.
        prepared: by what a run asked for, its method made ready for this model (`tokenprune.api.Prepared`).
    """

    name: str
    model: Any
    processor: Any
    fingerprint: str
    prepared: dict[Any, Any] = field(default_factory=dict)

    @cached_property
    def adapter(self) -> Any:
        """The description of the model's family, `tokenprune.interfaces.adapter.Adapter`."""
        from tokenprune.api import adapter_for

        return adapter_for(self.model)

    def inputs(self, questions: list[str], images: Sequence[Any]) -> Any:
        """Processor output for a batch of questions, each on a picture, a video (its frames, a list) or several of
        them (a tuple); see `chat_template.one_turn`.

        Left padded, on the model's device and in its dtype.

        Raises:
            ValueError: a video for a model of pictures.
            ImportError: its videos need a package that is not installed.
        """
        return self.pack([one_turn(question, image) for question, image in zip(questions, images, strict=True)])

    def pack(self, conversations: list[list[Message]]) -> Any:
        """Processor output for a batch of conversations; as `inputs` gives it.

        Raises:
            BadPicture: a picture that cannot be read, or a video without frames.
            ValueError: what the processor does not take, in its words.
        """
        from tokenprune.evals.io.picture_reader import BadPicture

        clips = [
            part["video"] for turns in conversations for turn in turns for part in turn["content"] if "video" in part
        ]
        if clips and getattr(self.processor, "video_processor", None) is None:
            raise ValueError(
                f"{self.name} takes pictures, and one of its samples is a video of {len(clips[0])} frames."
            )
        try:
            packed = pack(self.processor, conversations)
        except BadPicture:
            raise
        except (ValueError, TypeError, IndexError) as error:  # more marks of pictures than pictures, and so on
            shown = any(part["type"] != "text" for turns in conversations for turn in turns for part in turn["content"])
            what = "this prompt" if shown else "this prompt, which has no picture"
            raise ValueError(f"The processor of {self.name} does not take {what}: {error}") from error
        return packed.to(self.model.device, dtype=self.model.dtype)

    def decode(self, tokens: Any) -> list[str]:
        """Generated ids `[B, T]`, prompt not included, as text."""
        texts = self.processor.batch_decode(tokens, skip_special_tokens=True)
        return [text.strip() for text in texts]


def pocket_names() -> list[str]:
    """Pocket models that are installed, sorted."""
    return sorted(path.parent.name for path in POCKET.glob("*/config.json"))


def model_source(name: str) -> str:
    """The folder or hub id behind `name`; imports nothing heavy, so that a typo fails before anything loads.

    Raises:
        UnknownName: neither a pocket model, nor a folder, nor a hub id (`owner/name`).
    """
    if name in pocket_names():
        return str(POCKET / name)
    folder = Path(os.path.expanduser(name))  # as Path's own, but for names that nobody has
    if os.path.isdir(folder):
        if not os.path.isfile(folder / "config.json"):
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


def load_model(
    name: str,
    dtype: str = "float32",
    device: str | None = None,
    trust_remote_code: bool = False,
    needs_processor: bool = True,
) -> LoadedModel:
    """Load model and processor.

    Args:
        name: pocket name, folder or hub id.
        dtype: one of `DTYPES`.
        device: where to put it; None takes a GPU where there is one.
        trust_remote_code: whether code that comes with the checkpoint may run.
        needs_processor: whether it is an error if none lies beside the weights; else `processor` is None then.

    Raises:
        UnknownName, ValueError, OSError: there is no such model, dtype or device.
    """
    source = model_source(name)
    check_dtype(dtype)
    check_device(device)
    import torch
    from transformers import AutoConfig

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    whole = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
    part = part_with_pictures(whole)
    given = {} if part is whole else {"config": part}
    model: Any = auto_class(part).from_pretrained(
        source, dtype=getattr(torch, dtype), trust_remote_code=trust_remote_code, **given
    )
    model = model.to(device).eval()
    try:
        processor = ready_processor(source, trust_remote_code)
    except (OSError, ValueError):
        if needs_processor:
            raise
        processor = None
    return LoadedModel(name, model, processor, fingerprint(source, model))


def auto_class(config: Any) -> Any:
    """The Auto class that makes models of a config: transformers keeps those which answer about pictures and audio,
    such as Phi-4 Multimodal, apart from those which answer about pictures.

    Raises:
        ValueError: the config is of neither, and no code comes with it.
    """
    from transformers import AutoModelForImageTextToText, AutoModelForMultimodalLM

    for auto in (AutoModelForImageTextToText, AutoModelForMultimodalLM):
        if type(config) in auto._model_mapping:
            return auto
    if hasattr(config, "auto_map"):
        return AutoModelForImageTextToText
    raise ValueError(
        f"transformers makes no model that answers in text about pictures of a {type(config).__name__} (it is in the "
        "list neither of AutoModelForImageTextToText nor of AutoModelForMultimodalLM), so it cannot be loaded by name. "
        "If it has pictures, load it by its own class and give it to tokenprune.apply."
    )


def part_with_pictures(config: Any) -> Any:
    """The config of the part that answers in text about pictures, of a model that has further ones, as Qwen2.5-Omni
    speaks; any other config as it is. transformers loads that part alone from the checkpoint of the whole."""
    from transformers import AutoModelForImageTextToText

    # `keys` imports nothing, and classes of remote code are not among them
    known = AutoModelForImageTextToText._model_mapping.keys()
    parts = [part for name in getattr(config, "sub_configs", {}) if type(part := getattr(config, name, None)) in known]
    whole = type(config) in known or hasattr(config, "auto_map") or len(parts) != 1
    return config if whole else parts[0]


def ready_processor(source: str, trust_remote_code: bool = False) -> Any:
    """The processor of a folder or hub id, padding on the left."""
    from tokenprune.evals.models.processor import family_of, load_processor

    processor = load_processor(source, trust_remote_code)
    family = family_of(source)
    if family is not None and not processor.chat_template:
        processor.chat_template = family.chat_template(processor) or None
    tokenizer = processor.tokenizer
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return processor


def check_dtype(dtype: str) -> None:
    """Raise ValueError if `dtype` is not one of `DTYPES`."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}.{near(dtype, list(DTYPES))}")


def check_device(device: str | None) -> None:
    """Raise ValueError if torch has no such device on this machine; None is any."""
    if device is None:
        return
    import torch

    try:
        wanted = torch.device(device)
        module = torch.get_device_module(wanted)
    except RuntimeError:
        raise ValueError(f"There is no torch device {device!r}; write cpu, cuda or cuda:1, for example.") from None
    # the modules of some kinds of device do not say how many there are
    count = module.device_count() if hasattr(module, "device_count") else 1
    if not module.is_available() or (wanted.index or 0) >= count:
        present = f"{count} of that kind" if module.is_available() else "none of that kind"
        raise ValueError(
            f"The device {device!r} is not there: torch {torch.__version__} finds {present} on this machine. Leave "
            "it out to take a GPU where there is one, or write cpu."
        )


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
