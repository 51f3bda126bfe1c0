"""How pocket-qwen is put together: tokenizer, the stock Qwen2.5-VL classes at pocket size, and the export."""

from __future__ import annotations

# layers of transformers models are untyped modules to pyright, and the recipe handles nothing else
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportIndexIssue=false, reportArgumentType=false
# pyright: reportOptionalMemberAccess=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
import json
import math
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

from tokenprune.evals.pocket_training import model as llava
from tokenprune.evals.pocket_training.vision import IMAGE_STD

MODEL_DIR = Path(__file__).parents[2] / "pocket" / "models" / "pocket-qwen"
TEACHER_DIR = llava.MODEL_DIR
TOKEN = 28  # pixels a side of a merged token: patch 14, merged 2 x 2
# The patch embedding has no bias and RMSNorm forgets lengths: with one mean for all colours a flat patch would look the
# same at any brightness. With three means its direction tells.
MEANS = (0.4, 0.5, 0.6)
MROPE = [2, 4, 26]  # rotary pairs of time, height and width; see `transfer.place_layer`
START, END, IMAGE, VIDEO = "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"
NEW_WORDS = ("way", "that", "move", "moves", "up", "down")
_CHAT = (
    "{% for message in messages %}{% if message['role'] == 'user' %}USER:{% else %}ASSISTANT: {% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '" + START + IMAGE + END + "' }}"
    "{% elif part['type'] == 'video' %}{{ '" + START + VIDEO + END + "' }}"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% endif %}{% if message['role'] == 'user' %}{{ ' ' }}{% else %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


@lru_cache(maxsize=1)
def build_tokenizer() -> PreTrainedTokenizerFast:
    """pocket-llava's tokenizer with the words of the video questions and Qwen's markers."""
    return llava.build_tokenizer(NEW_WORDS, (START, END, IMAGE, VIDEO))


def build_config() -> Qwen2_5_VLConfig:
    """A windowed tower of 5 x 128 with full attention in blocks 1 and 3, and a decoder of 7 x 256."""
    ids = build_tokenizer().convert_tokens_to_ids
    pad, bos, eos = ids(["<pad>", "<s>", "</s>"])
    vision = {
        "depth": 5, "hidden_size": 128, "intermediate_size": 256, "num_heads": 4, "out_hidden_size": 256,
        "window_size": 112, "fullatt_block_indexes": [1, 3], "tokens_per_second": 2,
    }  # fmt: skip
    text = {
        "vocab_size": (len(build_tokenizer()) + 15) // 16 * 16, "hidden_size": 256, "intermediate_size": 576,
        "num_hidden_layers": 7, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": MROPE},
        "pad_token_id": pad, "bos_token_id": bos, "eos_token_id": eos, "rms_norm_eps": 1e-6,
    }  # fmt: skip
    start, end, image, video = ids([START, END, IMAGE, VIDEO])
    return Qwen2_5_VLConfig(
        vision_config=vision, text_config=text, vision_start_token_id=start, vision_end_token_id=end,
        image_token_id=image, video_token_id=video, tie_word_embeddings=False,
        pad_token_id=pad, bos_token_id=bos, eos_token_id=eos,
    )  # fmt: skip


def build_qwen() -> Qwen2_5_VLForConditionalGeneration:
    """A fresh model; its tower starts with heads that look at one neighbouring patch each."""
    config = build_config()
    model = Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        max_new_tokens=8, do_sample=False, pad_token_id=config.text_config.pad_token_id,
        bos_token_id=config.text_config.bos_token_id, eos_token_id=config.text_config.eos_token_id,
    )  # fmt: skip
    _start_tower(model.model.visual)
    return model


def _start_tower(tower: nn.Module) -> None:
    """Scaled weights, heads that look at one neighbouring patch each, kernels that see edges and change."""
    width = tower.config.hidden_size
    with torch.no_grad():
        kernel = tower.patch_embed.proj.weight.normal_(std=0.03)
        # most kernels do not answer to flat patches: RMSNorm would let those drown edges, and what moves with them
        kernel[width // 4 :] -= kernel[width // 4 :].mean((2, 3, 4), keepdim=True)
        kernel[width // 4 :] *= 2
        size = kernel[width // 4 :].std()
        kernel[width // 4 : width // 2] = size * _moving_waves(width // 4)
        kernel[-width // 4 :] = size * _waves(width // 4)
        for block in tower.blocks:
            block.attn.qkv.weight.normal_(std=0.7 * width**-0.5)
            block.attn.qkv.weight[2 * width :].normal_(std=width**-0.5)
            block.attn.qkv.bias.zero_()
            block.attn.proj.weight.normal_(std=width**-0.5 / math.sqrt(2))
            for name in ("gate_proj", "up_proj"):
                getattr(block.mlp, name).weight.normal_(std=width**-0.5)
            block.mlp.down_proj.weight.normal_(std=tower.config.intermediate_size**-0.5)
        first, _, last = tower.merger.mlp
        first.weight.normal_(std=first.in_features**-0.5)
        last.weight.normal_(std=0.5 * last.in_features**-0.5)
    _look_at(tower, {0: 1, 1: 2})
    _see_change(tower)


def _wave(angle: float, phase: float, cycles: float, shift: float = 0.0) -> Tensor:
    """[14, 14] of mean 0 and variance 1: a wave with so many ``cycles`` a patch, moved on by ``shift`` pixels."""
    y, x = torch.meshgrid(torch.arange(14) - 6.5, torch.arange(14) - 6.5, indexing="ij")
    along = x * math.cos(angle) + y * math.sin(angle) - shift
    wave = torch.sin(2 * math.pi * cycles / 14 * along + phase)
    return (wave - wave.mean()) / wave.std()


def _waves(number: int) -> Tensor:
    """[number, 3, 2, 14, 14]: waves in eight directions, two phases and two lengths.

    With random kernels the background's pattern, whose bands differ by a tenth of the grey scale, was not found within
    500 steps of training; with these in 60.
    """
    made = [_wave(math.pi * (j % 8) / 8, math.pi / 2 * (j // 8 % 2), (0.5, 1.0)[j // 16 % 2]) for j in range(number)]
    return torch.stack(made)[:, None, None].expand(-1, 3, 2, -1, -1)


def _moving_waves(number: int) -> Tensor:
    """[number, 3, 2, 14, 14]: waves that go left, right, up or down from the first frame to the second, by what things
    that move do; four phases, two lengths."""
    made = []
    for j in range(number):
        angle, phase, cycles = math.pi / 2 * (j % 4), math.pi / 2 * (j // 4 % 4), (0.5, 0.75)[j // 16 % 2]
        made.append(torch.stack([_wave(angle, phase, cycles), _wave(angle, phase, cycles, shift=7.0)]))
    return torch.stack(made)[:, None].expand(-1, 3, -1, -1, -1)


@torch.no_grad()
def _look_at(tower: nn.Module, distances: dict[int, int]) -> None:
    """Let the four heads of some blocks start with biases whose products peak so many patches away."""
    width, heads = tower.config.hidden_size, tower.config.num_heads
    head, pairs = width // heads, width // heads // 4
    turns = 10000.0 ** (-torch.arange(pairs) / pairs)  # radians a patch, for rows and for columns alike
    weight = torch.tensor([1.0, 0.7, 0.4] + [0.0] * (pairs - 3))  # the pairs that tell near patches apart
    for depth, far in distances.items():
        qkv = tower.blocks[depth].attn.qkv
        query, key = qkv.bias[: 2 * width].view(2, heads, head)
        qkv.weight[: 2 * width] *= 0.2
        for h, (dy, dx) in enumerate([(-far, 0), (far, 0), (0, -far), (0, far)]):
            key[h, : 2 * pairs], key[h, 2 * pairs :] = 4.5 * torch.cat([weight, weight]), 0.0
            query[h, : 2 * pairs] = 4.5 * torch.cat([(dy * turns).cos(), (dx * turns).cos()])
            query[h, 2 * pairs :] = 4.5 * torch.cat([(dy * turns).sin(), (dx * turns).sin()])


@torch.no_grad()
def _see_change(tower: nn.Module) -> None:
    """Add what differs between two frames to a quarter of the patch embedding; still pictures stay as they are."""
    kernel = tower.patch_embed.proj.weight  # [width, 3, 2, 14, 14]
    change = 0.03 * torch.randn_like(kernel[: len(kernel) // 4, :, 0])
    kernel[: len(kernel) // 4, :, 0] += change
    kernel[: len(kernel) // 4, :, 1] -= change


def export(model: Qwen2_5_VLForConditionalGeneration, folder: Path, dtype: torch.dtype = torch.float16) -> None:
    """Write an ordinary ``from_pretrained`` folder, weights in ``dtype``; the model handed in is left as it is."""
    copy = Qwen2_5_VLForConditionalGeneration(model.config)
    copy.load_state_dict(model.state_dict())
    copy.generation_config = model.generation_config
    copy.to(dtype).save_pretrained(folder)
    tokenizer = build_tokenizer()
    tokenizer.chat_template = _CHAT
    tokenizer.save_pretrained(folder)
    size = {"shortest_edge": 56 * 56, "longest_edge": 1024 * TOKEN * TOKEN}
    shared = {
        "image_mean": list(MEANS), "image_std": [IMAGE_STD] * 3, "patch_size": 14, "temporal_patch_size": 2,
        "merge_size": 2, "size": size, "processor_class": "Qwen2_5_VLProcessor",
    }  # fmt: skip
    # written by hand: the classes that would write the video processor's file need torchvision
    image = shared | {"image_processor_type": "Qwen2VLImageProcessor"}
    video = shared | {"video_processor_type": "Qwen2VLVideoProcessor", "do_sample_frames": False}
    for name, content in (("preprocessor_config", image), ("video_preprocessor_config", video)):
        (folder / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")
