"""Folders laid out as checkpoints of popular classes without a processor of their own in `_processors.py`: the tiny
models of the zoo, with tokenizer, chat template and the settings of the stock processor."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from _processors import CLIP, HALF, STEPS, WORDS
from _zoo import made, random_model
from _zoo_all import zoo_model

_PATCHES = {"patch_size": 4, "temporal_patch_size": 2, "merge_size": 2}
_LIMITS = {"size": {"shortest_edge": 16 * 64, "longest_edge": 48 * 64}}
_TILES = {"crop_to_patches": True, "min_patches": 1, "max_patches": 4}


def _side(pixels: int) -> dict[str, Any]:
    return {"size": {"height": pixels, "width": pixels}}


def _chat(picture: str, clip: str) -> str:
    """A chat template that writes `picture` for each picture and `clip` for each video, where it stands."""
    return (
        "{% for message in messages %}{{ message['role'] + ' ' }}{% for content in message['content'] %}"
        "{% if content['type'] == 'image' %}{{ '" + picture + "' }}{% elif content['type'] == 'video' %}"
        "{{ '" + clip + "' }}"
        "{% elif content['type'] == 'text' %}{{ content['text'] }}{% endif %}{% endfor %} {% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant ' }}{% endif %}"
    )


@dataclass(frozen=True)
class Stock:
    """What stands beside the weights of a class.

    Attributes:
        processor: name of the processor's class.
        picture: what the chat template writes for a picture; "" for a checkpoint without a template.
        image: settings of the image processor, its type among them.
        tokens: special tokens by id, those that the tiny model knows; 5 is the placeholder.
        settings: of the processor.
        named: special tokens that the processor asks the tokenizer for by name.
        video: of the video processor, where the class has one.
        clip: what the chat template writes for a video.
        torchvision: whether pictures need it.
        letters: whether a token is a letter: the tokenizer of the class knows pairs of bytes alone.
        model: makes the model where the zoo's own does not fit the processor.
    """

    processor: str
    picture: str
    image: dict[str, Any]
    tokens: dict[int, str]
    settings: dict[str, Any] = field(default_factory=dict)
    named: dict[str, str] = field(default_factory=dict)
    video: dict[str, Any] = field(default_factory=dict)
    clip: str = ""
    torchvision: bool = False
    letters: bool = False
    model: Callable[[], Any] | None = None


def _qwen(processor: str, pictures: str, videos: str, **more: Any) -> Stock:
    """Patches of pictures of any size, between a start and an end."""
    names = {3: "<|vision_start|>", 4: "<|vision_end|>", 5: "<|image_pad|>", 6: "<|video_pad|>"}
    return Stock(
        processor, "<|vision_start|><|image_pad|><|vision_end|>",
        {"image_processor_type": pictures, **STEPS, **HALF, **_PATCHES, **_LIMITS, **more}, names,
        video={"video_processor_type": videos, **STEPS, **HALF, **_PATCHES, **_LIMITS, **more},
        clip="<|vision_start|><|video_pad|><|vision_end|>",
    )  # fmt: skip


def _glm(processor: str, kind: str) -> Stock:
    names = {
        3: "<|begin_of_image|>", 4: "<|end_of_image|>", 5: "<|image|>", 6: "<|video|>", 7: "<|begin_of_video|>",
        2: "<|end_of_video|>",
    }  # fmt: skip
    settings = {**STEPS, **CLIP, **_PATCHES, **_LIMITS}
    return Stock(
        processor, "<|begin_of_image|><|image|><|end_of_image|>",
        {"image_processor_type": f"{kind}ImageProcessor", **settings}, names,
        video={"video_processor_type": f"{kind}VideoProcessor", **settings},
        clip="<|begin_of_video|><|video|><|end_of_video|>",
    )  # fmt: skip


def _aria() -> Any:
    """Pictures are 980 pixels wide, whatever the settings say."""
    cls, config = made("aria")
    config.vision_config.image_size, config.vision_config.patch_size = 980, 140
    config.projector_patch_to_query_dict = {49: 16}
    return random_model(cls, config)


def _got_ocr2() -> Any:
    """A picture is 256 tokens, whatever the settings say: 64 x 64 patches. Without layers that see all of them."""
    cls, config = made("got_ocr2")
    config.vision_config.image_size, config.vision_config.global_attn_indexes = 256, []
    config.image_seq_length, config.text_config.max_position_embeddings = 256, 2048
    return random_model(cls, config, "eager")


def _phi4_multimodal() -> Any:
    """A thumbnail is 256 tokens, whatever the settings say: 32 x 32 patches."""
    cls, config = made("phi4_multimodal")
    config.vision_config.image_size = config.vision_config.crop_size = 64
    config.vision_config.patch_size = 2
    config.max_position_embeddings = config.original_max_position_embeddings = 4096
    config.rope_parameters["original_max_position_embeddings"] = 4096
    return random_model(cls, config)


def _omni() -> Any:
    """The whole of it, as checkpoints are, but for the part that speaks."""
    from transformers import Qwen2_5OmniForConditionalGeneration
    from transformers.models.qwen2_5_omni.configuration_qwen2_5_omni import Qwen2_5OmniConfig

    thinker = zoo_model("qwen2_5_omni_thinker")
    config = Qwen2_5OmniConfig(thinker_config=thinker.config.to_dict(), enable_audio_output=False)
    whole = Qwen2_5OmniForConditionalGeneration(config)
    whole.thinker.load_state_dict(thinker.state_dict())
    return whole


_OMNI = {
    "image_token": "<|IMAGE|>", "video_token": "<|VIDEO|>", "audio_token": "<|AUDIO|>", "vision_bos_token":
    "<|vision_bos|>", "vision_eos_token": "<|vision_eos|>", "audio_bos_token": "<|audio_bos|>", "audio_eos_token":
    "<|audio_eos|>",
}  # fmt: skip
_AYA = {5: "<|IMG_PATCH|>", 3: "<|START_OF_IMG|>", 4: "<|END_OF_IMG|>", 7: "TILE_GLOBAL", 8: "<image>"}
STOCK = {
    "gemma3": Stock(
        "Gemma3Processor", "<start_of_image>",
        {"image_processor_type": "Gemma3ImageProcessor", **STEPS, **HALF, **_side(48)},
        {2: "<bos>", 3: "<start_of_image>", 4: "<end_of_image>", 5: "<image_soft_token>"}, {"image_seq_length": 36},
        {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"},
    ),
    "paligemma": Stock(
        "PaliGemmaProcessor", "",
        {"image_processor_type": "SiglipImageProcessor", **STEPS, **HALF, **_side(24), "image_seq_length": 36},
        {2: "<bos>", 5: "<image>"}, named={"image_token": "<image>"},
    ),
    "idefics3": Stock(
        "Idefics3Processor", "<image>",
        {
            "image_processor_type": "Idefics3ImageProcessor", **STEPS, **HALF, "do_pad": True, "resample": 1,
            "do_image_splitting": True, "size": {"longest_edge": 96}, "max_image_size": {"longest_edge": 48},
        },
        {
            2: "<|begin_of_text|>", 3: "<fake_token_around_image>", 4: "<end_of_utterance>", 5: "<image>",
            6: "<global-img>",
            **{8 + 3 * row + col: f"<row_{row + 1}_col_{col + 1}>" for row in range(3) for col in range(3)},
        },
        {"image_seq_len": 36},
    ),
    "aya_vision": Stock(
        "AyaVisionProcessor", "<image>",
        {"image_processor_type": "GotOcr2ImageProcessor", **STEPS, **CLIP, **_TILES, **_side(48)},
        {**_AYA, **{8 + tile: f"TILE_{tile}" for tile in range(1, 5)}},
        {"patch_size": 4, "img_size": 48, "downsample_factor": 2},
    ),
    "cohere2_vision": Stock(
        "Cohere2VisionProcessor", "<|IMG_PATCH|>",
        {
            "image_processor_type": "Cohere2VisionImageProcessor", **STEPS, **CLIP, **_TILES, **_side(48),
            "patch_size": 6,
        },
        {5: "<|IMG_PATCH|>", 3: "<|START_OF_IMG|>", 4: "<|END_OF_IMG|>", 7: "<|IMG_LINE_BREAK|>"},
        named={
            "image_token": "<|IMG_PATCH|>", "boi_token": "<|START_OF_IMG|>", "eoi_token": "<|END_OF_IMG|>",
            "img_line_break_token": "<|IMG_LINE_BREAK|>",
        },
        torchvision=True,
    ),
    "mistral3": Stock(
        "PixtralProcessor", "[IMG]",
        {
            "image_processor_type": "PixtralImageProcessor", **STEPS, **CLIP, "size": {"longest_edge": 48},
            "patch_size": {"height": 4, "width": 4},
        },
        {2: "<s>", 5: "[IMG]", 6: "[IMG_BREAK]", 7: "[IMG_END]"}, {"patch_size": 4, "spatial_merge_size": 2},
        torchvision=True,
    ),
    "lighton_ocr": Stock(
        "LightOnOcrProcessor", "<|image_pad|>",
        {
            "image_processor_type": "PixtralImageProcessor", **STEPS, **CLIP, "size": {"longest_edge": 48},
            "patch_size": {"height": 8, "width": 8},
        },
        {5: "<|image_pad|>", 6: "<|vision_pad|>", 7: "<|vision_end|>"}, {"patch_size": 4, "spatial_merge_size": 2},
        {"image_token": "<|image_pad|>", "image_break_token": "<|vision_pad|>", "image_end_token": "<|vision_end|>"},
        torchvision=True,
    ),
    "glm4v": _glm("Glm4vProcessor", "Glm4v"),
    "glm46v": _glm("Glm46VProcessor", "Glm46V"),
    "qwen3_vl_moe": _qwen("Qwen3VLProcessor", "Qwen2VLImageProcessor", "Qwen3VLVideoProcessor"),
    "video_llama_3": _qwen(
        "VideoLlama3Processor", "VideoLlama3ImageProcessor", "VideoLlama3VideoProcessor", temporal_patch_size=1
    ),
    "paddleocr_vl": Stock(
        "PaddleOCRVLProcessor", "<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>",
        {
            "image_processor_type": "PaddleOCRVLImageProcessor", **STEPS, **HALF, **_LIMITS, "patch_size": 4,
            "temporal_patch_size": 1, "merge_size": 2,
        },
        {3: "<|IMAGE_START|>", 4: "<|IMAGE_END|>", 5: "<|IMAGE_PLACEHOLDER|>"},
        named={"image_token": "<|IMAGE_PLACEHOLDER|>"},
    ),
    "ernie4_5_vl_moe": Stock(
        "Ernie4_5_VLMoeProcessor", "<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>",
        {
            "image_processor_type": "Ernie4_5_VLMoeImageProcessor", **STEPS, **CLIP, **_LIMITS, "patch_size": 4,
            "merge_size": 2,
        },
        {
            3: "<|IMAGE_START|>", 4: "<|IMAGE_END|>", 5: "<|IMAGE_PLACEHOLDER|>", 6: "<|VIDEO_PLACEHOLDER|>",
            7: "<|VIDEO_START|>", 2: "<|VIDEO_END|>",
        },
        named={
            "image_token": "<|IMAGE_PLACEHOLDER|>", "image_start_token": "<|IMAGE_START|>",
            "image_end_token": "<|IMAGE_END|>", "video_token": "<|VIDEO_PLACEHOLDER|>",
            "video_start_token": "<|VIDEO_START|>", "video_end_token": "<|VIDEO_END|>",
        },
        # numbers of frames would be drawn with a font of the checkpoint's
        video={
            "video_processor_type": "Ernie4_5_VLMoeVideoProcessor", "draw_on_frames": False, **STEPS, **CLIP,
            **_LIMITS, "patch_size": 4, "temporal_patch_size": 2, "merge_size": 2,
        },
        clip="<|VIDEO_START|><|VIDEO_PLACEHOLDER|><|VIDEO_END|>",
    ),
    "kimi_k25": Stock(
        "Kimi_K25Processor", "<|media_begin|>image<|media_content|><|media_pad|><|media_end|>",
        {
            "image_processor_type": "Kimi_K25ImageProcessor", **STEPS, **HALF, "patch_size": 4, "merge_size": 2,
            "max_patches": 192, "size": {"max_height": 64, "max_width": 64},
        },
        {
            3: "<|media_begin|>", 4: "<|media_end|>", 5: "<|media_pad|>", 6: "<|kimi_k25_video_placeholder|>",
            7: "<|media_content|>",
        },
        video={
            "video_processor_type": "Kimi_K25VideoProcessor", **STEPS, **HALF, "patch_size": 4, "merge_size": 2,
            "max_patches": 192, "size": {"max_height": 64, "max_width": 64}, "temporal_patch_size": 2,
        },
        clip="<|kimi_k25_video_placeholder|>",
        torchvision=True,
    ),
    "ovis2": Stock(
        "Ovis2Processor", "<image>",
        {"image_processor_type": "Ovis2ImageProcessor", **STEPS, **HALF, **_TILES, **_side(24)},
        {
            4: "<IMG_END>", 5: "<IMG_ATOM>", 6: "<image>", 60: "<IMG_START>", 61: "<IMG_GRID>", 62: "<IMG_COL>",
            63: "<IMG_ROW>",
        },
        {"image_seq_length": 36},
    ),
    "deepseek_vl": Stock(
        "DeepseekVLProcessor", "<image_placeholder>",
        {"image_processor_type": "DeepseekVLImageProcessor", **STEPS, **HALF, **_side(24)},
        {5: "<image_placeholder>"}, {"num_image_tokens": 36}, {"image_token": "<image_placeholder>"},
    ),
    "janus": Stock(
        "JanusProcessor", "<image_placeholder>",
        {"image_processor_type": "JanusImageProcessor", **STEPS, **HALF, **_side(24)},
        {3: "<begin_of_image>", 4: "<end_of_image>", 5: "<image_placeholder>"}, {"num_image_tokens": 36},
        {"image_token": "<image_placeholder>", "boi_token": "<begin_of_image>", "eoi_token": "<end_of_image>"},
    ),
    "lfm2_vl": Stock(
        "Lfm2VlProcessor", "<image>",
        {
            "image_processor_type": "Lfm2VlImageProcessor", **STEPS, **HALF, "encoder_patch_size": 4, "tile_size": 32,
            "min_image_tokens": 4, "max_image_tokens": 16, "min_tiles": 2, "max_tiles": 4, "downsample_factor": 2,
            "do_pad": True, **_side(32),
        },
        {
            3: "<|image_start|>", 4: "<|image_end|>", 5: "<image>", 6: "<|img_thumbnail|>",
            **{8 + 4 * row + col: f"<|img_row_{row + 1}_col_{col + 1}|>" for row in range(4) for col in range(4)},
        },
        torchvision=True,
    ),
    "molmo2": Stock(
        "Molmo2Processor", "<|image|>",
        {
            "image_processor_type": "Molmo2ImageProcessor", **STEPS, **HALF, **_side(24), "max_crops": 4,
            "overlap_margins": [1, 1], "patch_size": 4, "pooling_size": [2, 2],
        },
        {
            2: "<frame_end>", 3: "<im_col>", 4: "<|image|>", 5: "<im_patch>", 6: "<|video|>", 7: "<frame_start>",
            8: "<im_low>", 61: "<im_start>", 62: "<im_end>", 63: "<low_res_im_start>",
        },
        video={
            "video_processor_type": "Molmo2VideoProcessor", **STEPS, **HALF, **_side(24), "patch_size": 4,
            "pooling_size": [2, 2],
        }, clip="<|video|>", torchvision=True,
    ),
    "qwen3_5": dataclasses.replace(
        _qwen("Qwen3VLProcessor", "Qwen2VLImageProcessor", "Qwen3VLVideoProcessor"), letters=True
    ),
    "perception_lm": Stock(
        "PerceptionLMProcessor", "<|image|>",
        {
            "image_processor_type": "PerceptionLMImageProcessor", **STEPS, **HALF, "tile_size": 24, "max_num_tiles": 4,
            "vision_input_type": "thumb+tile",
        },
        {5: "<|image|>", 6: "<|video|>"}, {"patch_size": 4, "pooling_ratio": 2},
        {"image_token": "<|image|>", "video_token": "<|video|>"},
        {"video_processor_type": "PerceptionLMVideoProcessor", **STEPS, **HALF, **_side(24)}, "<|video|>",
        torchvision=True,
    ),
    "aria": Stock(
        "AriaProcessor", "<fim_prefix><|img|><fim_suffix>",
        {
            "image_processor_type": "AriaImageProcessor", **HALF, "max_image_size": 980, "split_image": False,
        },
        {3: "<fim_prefix>", 4: "<fim_suffix>", 5: "<|img|>"}, {"size_conversion": {"980": 16}},
        {"image_token": "<|img|>"}, model=_aria,
    ),
    "got_ocr2": Stock(
        "GotOcr2Processor", "",
        {
            "image_processor_type": "GotOcr2ImageProcessor", **STEPS, **CLIP, **_TILES, **_side(256),
            "crop_to_patches": False,
        },
        {2: "<|im_start|>", 3: "<img>", 4: "</img>", 5: "<imgpad>", 6: "<|im_end|>"}, model=_got_ocr2,
    ),
    "phi4_multimodal": Stock(
        "Phi4MultimodalProcessor", "<|image|>",
        {
            "image_processor_type": "Phi4MultimodalImageProcessor", **STEPS, **HALF, **_side(64), "patch_size": 2,
            "dynamic_hd": 4, "feature_extractor_type": "Phi4MultimodalFeatureExtractor",
        },
        {5: "<|image|>", 7: "<|audio|>"}, named={"image_token": "<|image|>", "audio_token": "<|audio|>"},
        torchvision=True, model=_phi4_multimodal,
    ),
    "qwen2_5_omni": Stock(
        "Qwen2_5OmniProcessor", "<|vision_bos|><|IMAGE|><|vision_eos|>",
        {
            "image_processor_type": "Qwen2VLImageProcessor", "feature_extractor_type": "WhisperFeatureExtractor",
            **STEPS, **CLIP, **_PATCHES, **_LIMITS, "feature_size": 16,
        },
        {
            3: "<|vision_bos|>", 4: "<|vision_eos|>", 5: "<|IMAGE|>", 6: "<|VIDEO|>", 7: "<|AUDIO|>",
            61: "<|audio_bos|>", 62: "<|audio_eos|>",
        },
        named=_OMNI, clip="<|vision_bos|><|VIDEO|><|vision_eos|>", model=_omni,
    ),
}  # fmt: skip


def save_stock(name: str, folder: Path) -> None:
    """The tiny model of a class, and every file that its processor is loaded from."""
    stock = STOCK[name]
    (stock.model or functools.partial(zoo_model, name))().save_pretrained(folder)
    _save_tokenizer(stock, folder)
    if stock.picture:
        (folder / "chat_template.jinja").write_text(_chat(stock.picture, stock.clip), encoding="utf-8")
    contents = {"preprocessor": stock.image, "video_preprocessor": stock.video, "processor": stock.settings}
    for stem, content in contents.items():
        if content:
            text = json.dumps({**content, "processor_class": stock.processor}, indent=2)
            (folder / f"{stem}_config.json").write_text(text, encoding="utf-8")


def _save_tokenizer(stock: Stock, folder: Path) -> None:
    """One token a word, special ones where the tiny model looks for them."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = {0: "<pad>", 1: "</s>", **stock.tokens}
    free = [place for place in range(64) if place not in names]
    words = iter([*(map(chr, range(97, 123)) if stock.letters else WORDS), *(f"w{number}" for number in range(64))])
    names |= {free.pop(): "<unknown>"}
    names |= {place: next(words) for place in free}
    places = {token: place for place, token in names.items()}
    core = Tokenizer(models.BPE(places, []) if stock.letters else models.WordLevel(places, unk_token="<unknown>"))
    core.pre_tokenizer = pre_tokenizers.ByteLevel() if stock.letters else pre_tokenizers.Whitespace()
    bos = "<bos>" if "<bos>" in stock.tokens.values() else None
    PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unknown>", bos_token=bos,
        additional_special_tokens=list(stock.tokens.values()),
    ).save_pretrained(folder)  # fmt: skip
    if stock.named:
        path = folder / "tokenizer_config.json"
        settings = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps({**settings, "extra_special_tokens": stock.named}, indent=2), encoding="utf-8")
