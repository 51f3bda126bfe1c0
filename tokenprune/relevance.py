"""How relevant each patch of a picture is to a question, by a CLIP model with a text tower: a hint for `cdpruner`.

A LLaVA checkpoint holds CLIP's vision tower and not its text tower, so the CLIP model that the tower was taken from is
loaded beside it (`openai/clip-vit-large-patch14-336` for LLaVA-1.5):

    handle = tokenprune.apply(model, "cdpruner", keep=64, relevance="hint")
    clip, tokenizer = CLIPModel.from_pretrained(NAME), AutoTokenizer.from_pretrained(NAME)
    inputs = processor(images=picture, text=prompt, return_tensors="pt")
    handle.set_hints(relevance=tokenprune.clip_relevance(clip, tokenizer, question, inputs["pixel_values"]))
    model.generate(**inputs)

Published (CDPruner, arXiv 2506.10967, its official code): patch features are CLIP's last hidden state but one behind
the last norm and the projection of pictures; relevance is minus their cosine with the text, because on objects CLIP's
patches are the other way round; a question that is too long for CLIP is cut into segments, whose relevance is averaged.
Our choice: each segment begins and ends with the tokenizer's own tokens, so that CLIP reads it as a text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize


@torch.no_grad()
def clip_relevance(
    clip: Any, tokenizer: Any, questions: str | Sequence[str], pixel_values: Tensor, sign: float = -1.0
) -> list[Tensor]:
    """Relevance of the N patches of M pictures to their questions, for `handle.set_hints(relevance=...)`.

    Works for families whose token n is patch n of one square crop (LLaVA-1.5); where crops, pooling or a merger make
    other tokens of patches, N does not fit and `cdpruner` says so.

    Args:
        clip: a `CLIPModel` of transformers: towers of text and vision and both projections.
        tokenizer: that of `clip`.
        questions: one for each picture, or one for all; the words alone, without the chat template.
        pixel_values: `[M, 3, H, W]`, as the tower of `clip` takes them.
        sign: -1 as published for CDPruner, 1 for the cosine itself.

    Returns:
        M tensors `[N]`, fp32.

    Raises:
        ValueError: the arguments do not fit each other.
    """
    if pixel_values.dim() != 4:
        raise ValueError(
            f"pixel_values must be [M, 3, H, W], one crop a picture, got {tuple(pixel_values.shape)}. Pictures in "
            "several crops have tokens that no patch of CLIP's stands for."
        )
    asked = [questions] * len(pixel_values) if isinstance(questions, str) else list(questions)
    if len(asked) != len(pixel_values):
        raise ValueError(
            f"questions must be one for each of {len(pixel_values)} pictures, or one text for all, got {len(asked)}."
        )
    if sign not in (-1, 1):
        raise ValueError(f"sign must be -1 (minus the cosine) or 1, got {sign!r}.")
    patches = _patches(clip, pixel_values)
    texts = {question: _texts(clip, tokenizer, question).to(patches.device) for question in set(asked)}
    return [sign * (own @ texts[question].T).mean(dim=1) for own, question in zip(patches, asked)]


def _patches(clip: Any, pixel_values: Tensor) -> Tensor:
    """`[M, N, P]` fp32 of length 1: patches in the space that CLIP shares with text, without [CLS]."""
    tower = clip.vision_model
    weight = clip.visual_projection.weight
    states = tower(pixel_values.to(weight.device, weight.dtype), output_hidden_states=True).hidden_states[-2]
    return normalize(clip.visual_projection(tower.post_layernorm(states[:, 1:])).float(), dim=-1)


def _texts(clip: Any, tokenizer: Any, question: str) -> Tensor:
    """`[S, P]` fp32 of length 1, one row for each segment of a question."""
    words = tokenizer(question, add_special_tokens=False)["input_ids"]
    room = clip.config.text_config.max_position_embeddings - 2
    rows = []
    for start in range(0, max(len(words), 1), room):
        ids = [tokenizer.bos_token_id, *words[start : start + room], tokenizer.eos_token_id]
        states = clip.text_model(input_ids=torch.tensor([ids], device=clip.text_projection.weight.device))
        rows.append(clip.text_projection(states.pooler_output)[0])
    return normalize(torch.stack(rows).float(), dim=-1)
