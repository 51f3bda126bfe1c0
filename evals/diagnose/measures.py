"""The formulas, on tensors whose last dimensions say what they hold; nothing here knows a model.

MDI and AEI follow arXiv 2508.10552, heads arXiv 2412.18108, of which the score is our reconstruction; what the sources
leave open is marked "our choice".
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

EPS = 1e-10
OUTLIER = 10.0  # times the mean that a visual sink is attended, in more than half of the heads
TOP = 0.05  # of all heads that count as visual


def text_dominance(text: Tensor, image: Tensor, n_text: Tensor, n_image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """MDI, AEI of text and AEI of the image, each of the shape of the arguments.

    Args:
        text, image: attention that all text tokens and all image tokens get, any common scale.
        n_text, n_image: how many tokens these are.
    """
    mdi = (text / n_text.clamp(min=EPS)) / (image / n_image.clamp(min=EPS)).clamp(min=EPS)
    both, tokens = (text + image).clamp(min=EPS), (n_text + n_image).clamp(min=EPS)
    aei_text = (text / both) / (n_text / tokens).clamp(min=EPS)
    aei_image = (image / both) / (n_image / tokens).clamp(min=EPS)
    return mdi, aei_text, aei_image


def stage_layers(layers: int) -> dict[str, list[int]]:
    """Layers of the stages: the first two, the two in the middle, the last two; fewer where there are fewer."""
    middle = sorted({max(layers // 2 - 1, 0), layers // 2} & set(range(layers)))
    return {"early": list(range(min(2, layers))), "middle": middle, "late": list(range(max(layers - 2, 0), layers))}


def concentration(weights: Tensor, among: Tensor) -> Tensor:
    """1 - H / log N of attention over N tokens, `[...]`: 0 where it is even, 1 where one token gets all; 0 where there
    is no attention, or one token.

    Args:
        weights: `[..., K]`.
        among: `[..., K]` bool, which tokens.
    """
    kept = weights * among
    total = kept.sum(-1, keepdim=True)
    shares = kept / total.clamp(min=torch.finfo(weights.dtype).tiny)
    entropy = -torch.special.xlogy(shares, shares).sum(-1)
    count = among.sum(-1).expand_as(entropy)
    most = count.clamp(min=2).to(weights.dtype).log()
    return torch.where((count > 1) & (total[..., 0] > 0), 1 - entropy / most, torch.zeros_like(entropy))


def outliers(received: Tensor, visual: Tensor) -> Tensor:
    """`[..., K]` bool: image tokens that get more than 10 times the mean of the image tokens in more than half of the
    heads (the guard against sinks in the card of visual heads, an addition of ours).

    Args:
        received: `[..., H, K]`, attention that each key gets.
        visual: `[..., K]` bool.
    """
    among = visual[..., None, :]
    mean = (received * among).sum(-1, keepdim=True) / among.sum(-1, keepdim=True).clamp(min=1)
    high = (received > OUTLIER * mean) & among
    return high.to(received.dtype).mean(-2) > 0.5


def head_scores(image: Tensor, focus: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Score `[L, H]`, rank `[L, H]` int64 from 1 and whether a head is visual: S = W C, or W R with boxes, and the top
    5 percent (at least one head). Ties go to the lower layer and head. Our reconstruction.

    Args:
        image: W `[L, H]`, mean share of attention on the image.
        focus: C or R `[L, H]`.
    """
    score = image * focus
    order = score.flatten().argsort(descending=True, stable=True)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(1, order.numel() + 1)
    top = max(1, round(TOP * order.numel()))
    return score, rank.view_as(score), (rank <= top).view_as(score)


def rank_correlation(first: Tensor, second: Tensor) -> float | None:
    """Spearman's, of two vectors without regard to ties; None for fewer than three numbers."""
    if first.numel() < 3:
        return None
    ranks = [values.flatten().argsort(stable=True).argsort(stable=True).double() for values in (first, second)]
    one, other = (rank - rank.mean() for rank in ranks)
    return float((one * other).sum() / (one.norm() * other.norm()))


def writing_rows(generated: Sequence[int], ends: set[int]) -> tuple[list[int], list[int]]:
    """Steps whose rows are those of the answer: of its tokens ("generated", the card's G; the last prompt row where
    there are none, our choice), and those that predict its tokens ("writing", our choice).

    Step 0 is the last row of the prompt and predicts the first token; step t is the row of the t-th token.

    Args:
        generated: ids of the row, padding behind an end among them.
        ends: ids that end an answer, or stand behind its end.
    """
    content = next((i for i, token in enumerate(generated) if token in ends), None)
    if content is None:  # cut off: its last token was never read
        content = len(generated)
        return list(range(1, content)) or [0], list(range(content))
    return list(range(1, content + 1)) or [0], list(range(content)) or [0]
