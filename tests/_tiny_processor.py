"""A real processor for the tiny LLaVA of `_tiny`: one token a word."""

from __future__ import annotations

from typing import Any

from _tiny import IMAGE

WORDS = ["what", "is", "this", "where", "who", "red", "blue", "one", "two", "three", "yes", "no", "USER:", "ASSISTANT:"]


def word_tokenizer() -> Any:
    """One token a word, the ids of `_tiny`."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["<pad>", "</s>", "<s>", "<unk>", "<spare>", "<image>", *WORDS]
    assert names[IMAGE] == "<image>"
    names += [f"w{number}" for number in range(64 - len(names))]
    core = Tokenizer(models.WordLevel({name: index for index, name in enumerate(names)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
    )


def tiny_processor(tokenizer: Any) -> Any:
    """Pictures of 42 x 42 pixels, 36 tokens each."""
    from transformers import CLIPImageProcessor, LlavaProcessor

    image = CLIPImageProcessor(size={"shortest_edge": 42}, crop_size={"height": 42, "width": 42})
    return LlavaProcessor(
        image_processor=image, tokenizer=tokenizer, patch_size=7, vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )  # fmt: skip
