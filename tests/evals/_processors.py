"""Folders laid out as the hub's checkpoints are: a tiny model of each family with its tokenizer, chat template and the
files of its processor, written by hand where the stock class that would write them needs torchvision."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from _families import family

CLIP_MEAN, CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
HALF = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
CLIP = {"image_mean": CLIP_MEAN, "image_std": CLIP_STD}
STEPS = {"do_convert_rgb": True, "do_normalize": True, "do_rescale": True, "do_resize": True, "resample": 3}
TILES = [f"<row_{row}_col_{col}>" for row in (1, 2, 3, 4) for col in (1, 2, 3, 4)]
WORDS = ["what", "is", "this", "where", "who", "red", "blue", "one", "two", "three", "yes", "no", "user", "assistant"]

USER = (  # LLaVA-1.5 and LLaVA-NeXT-Video: pictures first, then videos, then text
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'video') %}{{ '<video>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' ' }}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
INST = (  # LLaVA-1.6-Mistral: the template writes the token that the tokenizer adds by itself
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST] ' }}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] }}{% endfor %}"
    "{{ ' [/INST]' }}{% endif %}{% endfor %}"
)
ONEVISION = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + ' ' }}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'video') %}{{ '<video>' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ '\n' + content['text'] }}"
    "{% endfor %}{{ '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN = (  # a system turn of its own where there is none, which Qwen3-VL has not
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' and SYSTEM %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
INTERNVL = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% for content in message['content'] %}{% if content['type'] == 'image' %}{{ '<IMG_CONTEXT>\n' }}"
    "{% elif content['type'] == 'video' %}{{ '<video>\n' }}"
    "{% elif content['type'] == 'text' %}{{ content['text'] }}{% endif %}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SMOL = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}"
    "{% if message['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{ line['text'] }}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


@dataclass(frozen=True)
class Files:
    """What stands beside the weights of a checkpoint.

    Attributes:
        processor: name of the processor's class.
        template: the chat template.
        special: special tokens whose ids are 0, 1, ... as the tiny models have them: padding and end first.
        image: `preprocessor_config.json`.
        video: `video_preprocessor_config.json`, where the checkpoints have one.
        settings: `processor_config.json`, where the checkpoints have one.
        named: special tokens that the processor asks the tokenizer for by name.
        bos: the tokenizer's token for the beginning of a text.
        adds_bos: whether the tokenizer puts it there by itself.
    """

    processor: str
    template: str
    special: tuple[str, ...]
    image: dict[str, Any]
    video: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    named: dict[str, str] = field(default_factory=dict)
    bos: str | None = None
    adds_bos: bool = True


_LLAMA = ("<pad>", "</s>", "<s>", "<unk>", "<spare>", "<image>", "<video>")
_CHATML = ("<|endoftext|>", "<|im_end|>", "<|im_start|>")
_CROP = {"do_center_crop": True, "size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
_ANYRES = {"patch_size": 7, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
_PATCHES = {"patch_size": 4, "temporal_patch_size": 2, "merge_size": 2}


def _qwen(number: str, pictures: dict[str, Any], video: dict[str, Any], system: bool = True) -> Files:
    special = (*_CHATML, "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    image = {"image_processor_type": "Qwen2VLImageProcessor", **STEPS, **_PATCHES, **pictures}
    template = QWEN.replace("SYSTEM", str(system).lower())
    return Files(f"Qwen{number}VLProcessor", template, special, image, video)


_LIMITS = {"size": {"shortest_edge": 16 * 64, "longest_edge": 48 * 64}, **HALF}
_PIXELS = {"min_pixels": 16 * 64, "max_pixels": 48 * 64, **CLIP}
FILES = {
    "llava": Files(
        "LlavaProcessor", USER, _LLAMA[:6],
        {
            "image_processor_type": "CLIPImageProcessor", **STEPS, **CLIP, "do_center_crop": True,
            "size": {"shortest_edge": 42}, "crop_size": {"height": 42, "width": 42},
        },
        settings={"image_token": "<image>", **_ANYRES}, bos="<s>",
    ),
    "llava_next": Files(
        "LlavaNextProcessor", INST, _LLAMA[:6],
        {
            "image_processor_type": "LlavaNextImageProcessor", **STEPS, **CLIP, **_CROP, "do_pad": True,
            "aspect_ratio_setting": "anyres", "image_grid_pinpoints": [[28, 56], [56, 28], [56, 56]],
        },
        settings={"image_token": "<image>", **_ANYRES}, bos="<s>",
    ),
    "llava_next_video": Files(
        "LlavaNextVideoProcessor", USER, _LLAMA,
        {
            "image_processor_type": "LlavaNextImageProcessor", **STEPS, **CLIP, **_CROP, "do_pad": True,
            "aspect_ratio_setting": "anyres", "image_grid_pinpoints": [[28, 56], [56, 28], [56, 56]],
        },
        {"video_processor_type": "LlavaNextVideoVideoProcessor", **STEPS, **CLIP, **_CROP},
        {"image_token": "<image>", "video_token": "<video>", **_ANYRES}, bos="<s>",
    ),
    "llava_onevision": Files(
        "LlavaOnevisionProcessor", ONEVISION, (*_CHATML, "<spare>", "<pad>", "<image>", "<video>"),
        {
            "image_processor_type": "LlavaOnevisionImageProcessor", **STEPS, **HALF, "do_pad": True,
            "size": {"height": 28, "width": 28}, "image_grid_pinpoints": [[28, 56], [56, 28], [56, 56], [84, 84]],
        },
        {"video_processor_type": "LlavaOnevisionVideoProcessor", **STEPS, **HALF, "size": {"height": 28, "width": 28}},
        {
            "image_token": "<image>", "video_token": "<video>", "num_image_tokens": 16,
            "vision_feature_select_strategy": "full", "vision_aspect_ratio": "anyres_max_4",
        },
    ),
    "qwen2_vl": _qwen("2", _PIXELS, {}),
    "qwen2_5_vl": _qwen("2_5_", _PIXELS, {}),
    "qwen3_vl": _qwen(
        "3", {**_LIMITS, "image_processor_type": "Qwen2VLImageProcessorFast"},
        {"video_processor_type": "Qwen3VLVideoProcessor", **STEPS, **_PATCHES, **_LIMITS}, system=False,
    ),
    "internvl": Files(
        "InternVLProcessor", INTERNVL, (*_CHATML, "<img>", "</img>", "<IMG_CONTEXT>", "<video>"),
        {
            "image_processor_type": "GotOcr2ImageProcessorFast", **STEPS, **IMAGENET, "crop_to_patches": False,
            "min_patches": 1, "max_patches": 4, "size": {"height": 48, "width": 48},
        },
        {"video_processor_type": "InternVLVideoProcessor", **STEPS, **IMAGENET, "size": {"height": 48, "width": 48}},
        {"image_seq_length": 36},
        named={
            "start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
    ),
    "smolvlm": Files(
        "SmolVLMProcessor", SMOL,
        (
            "<|im_end|>", "<end_of_utterance>", "<|im_start|>", "<fake_token_around_image>", "<global-img>", "<image>",
            *TILES,
        ),
        {
            "image_processor_type": "SmolVLMImageProcessor", **STEPS, **HALF, "do_pad": True, "resample": 1,
            "do_image_splitting": True, "size": {"longest_edge": 96}, "max_image_size": {"longest_edge": 48},
            "video_sampling": {"fps": 1, "max_frames": 64, "video_size": {"longest_edge": 48}},
        },
        {
            "video_processor_type": "SmolVLMVideoProcessor", **STEPS, **HALF, "do_pad": True, "fps": 1,
            "num_frames": 64, "size": {"longest_edge": 48}, "max_image_size": {"longest_edge": 48},
        },
        {"image_seq_len": 36},
        named={
            "end_of_utterance_token": "<end_of_utterance>", "fake_image_token": "<fake_token_around_image>",
            "global_image_token": "<global-img>", "image_token": "<image>",
        },
        bos="<|im_start|>", adds_bos=False,
    ),
}  # fmt: skip


def prepares_pictures(name: str) -> bool:
    """Whether this transformers has the family's image processor without torchvision: 5.17 has not SmolVLM's."""
    import transformers

    stem = FILES[name].image["image_processor_type"].removesuffix("Fast")
    return any(not getattr(getattr(transformers, stem + end), "is_dummy", False) for end in ("", "Pil"))


def save_checkpoint(name: str, folder: Path) -> None:
    """The tiny model of a family, and every file that its processor is loaded from."""
    files = FILES[name]
    family(name).save_pretrained(folder)
    _save_tokenizer(files, folder)
    (folder / "chat_template.jinja").write_text(files.template, encoding="utf-8")
    contents = {"preprocessor": files.image, "video_preprocessor": files.video, "processor": files.settings}
    for stem, content in contents.items():
        if content:
            text = json.dumps({**content, "processor_class": files.processor}, indent=2)
            (folder / f"{stem}_config.json").write_text(text, encoding="utf-8")


def _save_tokenizer(files: Files, folder: Path) -> None:
    """One token a word; special tokens where the tiny models look for them."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    names = [*files.special, *WORDS]
    names += [f"w{number}" for number in range(63 - len(names))] + ["<unknown>"]
    core = Tokenizer(models.WordLevel({name: index for index, name in enumerate(names)}, unk_token="<unknown>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    if files.bos and files.adds_bos:
        core.post_processor = processors.TemplateProcessing(
            f"{files.bos} $A", special_tokens=[(files.bos, names.index(files.bos))]
        )
    PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=files.special[0], eos_token=files.special[1], unk_token="<unknown>",
        bos_token=files.bos, additional_special_tokens=[*files.special[2:]],
    ).save_pretrained(folder)  # fmt: skip
    if files.named:
        path = folder / "tokenizer_config.json"
        settings = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps({**settings, "extra_special_tokens": files.named}, indent=2), encoding="utf-8")
