"""How pocket-llava is put together: tokenizer, processor, the stock LLaVA classes at pocket size, and the export."""

from __future__ import annotations

# layers of transformers models are untyped modules to pyright, and the recipe handles nothing else
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportIndexIssue=false, reportArgumentType=false
# pyright: reportOptionalMemberAccess=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
import math
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import (
    CLIPImageProcessor,
    CLIPVisionModel,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)  # fmt: skip

from tokenprune.evals.pocket.easy_vqa import EASY_COLOURS, EASY_SHAPES
from tokenprune.evals.pocket.questions import PLURALS, SIDES
from tokenprune.evals.pocket.scenes import COLOURS, PATCH, PATTERNS, SHAPES, SIZE
from tokenprune.evals.pocket_training.vision import IMAGE_MEAN, IMAGE_STD

MODEL_DIR = Path(__file__).parents[1] / "pocket" / "models" / "pocket-llava"
PROMPT = "USER: <image>\n{question} ASSISTANT:"
_CHAT = (
    "{% for message in messages %}{% if message['role'] == 'user' %}USER: {% else %}ASSISTANT: {% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<image>\n' }}{% endif %}{% endfor %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% endif %}{% if message['role'] == 'user' %}{{ ' ' }}{% else %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def build_tokenizer(more_words: tuple[str, ...] = (), markers: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """Byte-level BPE in which every word of the templates is one token, and a sign is spelled symbol by symbol.

    ``more_words``: whole words beside those of the still pictures' questions; ``markers``: special tokens of another
    family, the last of which but one stands for an image.
    """
    words = [*SHAPES, *COLOURS, *PATTERNS, *SIDES, *PLURALS.values(), *EASY_SHAPES, *EASY_COLOURS, "yes", "no"]
    words += [
        "is",
        "there",
        "a",
        "an",
        "how",
        "many",
        "are",
        "things",
        "thing",
        "what",
        "colour",
        "which",
        "side",
        "of",
        "the",
        "on",
        "does",
        "sign",
        "say",
        "background",
    ]
    words += ["pattern", "shape", "color", "image", "contain", "not", "in", "present", *more_words]
    texts = [text for word in dict.fromkeys(words) for text in (word, " " + word)] + [f" {n}" for n in range(10)]
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2000, min_frequency=1, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<pad>", "<s>", "</s>", "<image>"],
    )  # fmt: skip
    core.train_from_iterator(texts, trainer)
    core.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in markers])
    # whole tokens, so that no merge of capital letters is ever learnt: those belong to the signs
    core.add_tokens([AddedToken(name, normalized=False, special=False) for name in ("USER:", "ASSISTANT:")])
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", core.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>", padding_side="left",
        extra_special_tokens={"image_token": markers[-2] if markers else "<image>"}, model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def build_processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    """The stock LLaVA processor: 336 pixels, 576 image tokens, LLaVA-1.5's conversation format."""
    size = {"height": SIZE, "width": SIZE}
    image = CLIPImageProcessor(
        do_resize=True, size={"shortest_edge": SIZE}, do_center_crop=True, crop_size=size, do_convert_rgb=True,
        image_mean=[IMAGE_MEAN] * 3, image_std=[IMAGE_STD] * 3,
    )  # fmt: skip
    return LlavaProcessor(
        image_processor=image, tokenizer=tokenizer, patch_size=PATCH, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=_CHAT, image_token="<image>",
    )  # fmt: skip


def build_llava(tower: CLIPVisionModel, tokenizer: PreTrainedTokenizerFast) -> LlavaForConditionalGeneration:
    """A fresh decoder and projector around ``tower``, whose weights are copied.

    The rotary base is a million: most rotary dimensions then barely turn over 600 positions, which makes looking up a
    patch by its content easy to learn.
    """
    pad, bos, eos, image = tokenizer.convert_tokens_to_ids(["<pad>", "<s>", "</s>", "<image>"])
    text = LlamaConfig(
        vocab_size=(len(tokenizer) + 15) // 16 * 16, hidden_size=256, intermediate_size=576, num_hidden_layers=6,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048, tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6}, pad_token_id=pad, bos_token_id=bos,
        eos_token_id=eos,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=tower.config, text_config=text, image_token_id=image, image_seq_length=(SIZE // PATCH) ** 2,
        vision_feature_layer=-2, vision_feature_select_strategy="default", projector_hidden_act="gelu",
        pad_token_id=pad, bos_token_id=bos, eos_token_id=eos,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(tower.state_dict())
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and "vision_tower" not in name:
                std = module.in_features**-0.5
                if name.endswith(("o_proj", "down_proj")):
                    std /= math.sqrt(2 * text.num_hidden_layers)
                module.weight.normal_(std=0.02 if name == "lm_head" else std)
                if module.bias is not None:
                    module.bias.zero_()
        model.get_input_embeddings().weight.normal_(std=0.5)
    model.generation_config = GenerationConfig(
        max_new_tokens=8, do_sample=False, pad_token_id=pad, bos_token_id=bos, eos_token_id=eos
    )
    return model


def export(model: LlavaForConditionalGeneration, folder: Path, dtype: torch.dtype = torch.float16) -> None:
    """Write an ordinary ``from_pretrained`` folder, weights in ``dtype``; the model handed in is left as it is."""
    copy = LlavaForConditionalGeneration(model.config)
    copy.load_state_dict(model.state_dict())
    copy.generation_config = model.generation_config
    copy.to(dtype).save_pretrained(folder)
    build_processor(build_tokenizer()).save_pretrained(folder)
