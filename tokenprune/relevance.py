"""How relevant each token of a picture is to a question, by a CLIP model beside the one that is pruned.

The published relevance of CDPruner (arXiv 2506.10967; Theia-4869/CDPruner at 9541616, Apache-2.0, no code was copied),
for models whose visual tokens stand in the grid of CLIP's own patches, as LLaVA-1.5's do:

    name = "openai/clip-vit-large-patch14-336"
    clip, tokenizer = CLIPModel.from_pretrained(name), AutoTokenizer.from_pretrained(name)
    handle = tokenprune.apply(model, "cdpruner(relevance=hint)", keep=64)
    handle.set_hints(relevance=tokenprune.clip_relevance(clip, tokenizer, [question], inputs["pixel_values"]))
    model.generate(**inputs)

Pixels must be as CLIP's own processor makes them; that of LLaVA-1.5 is CLIP's. Checkpoints of LLaVA hold no text tower,
so this is a second model of CLIP's size, whose run is in no report.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize, pad


@torch.no_grad()
def clip_relevance(
    clip: Any, tokenizer: Any, questions: Sequence[str], pixel_values: Tensor, layer: int = -2
) -> list[Tensor]:
    """Minus the cosine of CLIP's patch features with its text features, mean over the question's segments.

    Patch features are the hidden states of `layer` behind the tower's last norm and its projection, though they were
    trained to be so behind the last layer and for [CLS] alone; there patches that show what the text says have the
    lower cosine (hence the minus, as in the official code). Questions longer than the text tower's places (77) are cut
    into segments of that length, the last one filled with zeros that are not attended to, as there: only the last one
    holds the end token, at which CLIP reads a text, so the others give the feature of their first place or of their
    highest id, which says little of the question. Ask short questions.

    Args:
        clip: a `transformers.CLIPModel`.
        tokenizer: its tokenizer; of `tokenizer(question)` the `input_ids` are taken.
        questions: one for each picture, without the template of the chat.
        pixel_values: `[M, 3, H, W]`, the size that the tower was made for.
        layer: of the tower's hidden states, as its output numbers them; that from which the pruned model takes its
            tokens.

    Returns:
        For each picture `[N]` fp32, N patches in raster order, on the device of `clip`.

    Raises:
        ValueError: `clip` has no text tower, or pictures and questions do not go together.
    """
    parts = ("text_model", "text_projection", "vision_model", "visual_projection")
    missing = [part for part in parts if not hasattr(clip, part)]
    if missing:
        raise ValueError(
            f"clip_relevance needs a CLIPModel with both towers, and {type(clip).__name__} has no {missing[0]}: load "
            'one with CLIPModel.from_pretrained("openai/clip-vit-large-patch14-336").'
        )
    if isinstance(questions, str) or pixel_values.dim() != 4 or len(questions) != len(pixel_values):
        got = "one string" if isinstance(questions, str) else f"{len(questions)}"
        raise ValueError(
            f"clip_relevance needs a list with one question for each picture of [M, 3, H, W], got {got} for "
            f"{list(pixel_values.shape)}."
        )
    weight = clip.visual_projection.weight
    seen = clip.vision_model(pixel_values.to(weight.device, weight.dtype), output_hidden_states=True)
    patches = clip.vision_model.post_layernorm(seen.hidden_states[layer][:, 1:])
    patches = normalize(clip.visual_projection(patches).float(), dim=2)  # [M, N, P]
    texts: dict[str, Tensor] = {}
    relevance = []
    for question, picture in zip(questions, patches, strict=True):
        if question not in texts:
            texts[question] = _text_features(clip, tokenizer(question)["input_ids"])
        relevance.append(-(picture @ texts[question].T).mean(dim=1))
    return relevance


def _text_features(clip: Any, ids: Sequence[int]) -> Tensor:
    """`[segments, P]` fp32, of length 1."""
    device, places = clip.text_projection.weight.device, clip.config.text_config.max_position_embeddings
    row = torch.as_tensor(ids, dtype=torch.int64, device=device)
    filling = -len(row) % places if len(row) else places
    input_ids = pad(row, (0, filling)).view(-1, places)
    mask = pad(torch.ones_like(row), (0, filling)).view(-1, places)
    pooled = clip.text_model(input_ids=input_ids, attention_mask=mask).pooler_output
    return normalize(clip.text_projection(pooled).float(), dim=1)
