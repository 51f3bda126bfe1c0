"""Many question-answer turns over one image in one sequence, each seeing the image and itself only.

Every turn has the positions it would have alone after the image, so a packed prefill is exactly as many single-turn
prompts: the model is never trained on anything that differs from how it is asked.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from tokenprune.evals.pocket.easy_vqa import easy_split
from tokenprune.evals.pocket.questions import Question, ask
from tokenprune.evals.pocket.scenes import PATCH, SHAPES, SIGN_LENGTH, SIGN_MARGIN, SIGN_PITCH, Scene
from tokenprune.evals.pocket_training.model import build_tokenizer

NO_PLACE = 24  # the class of "nowhere" in the grounding targets


@lru_cache(maxsize=1)
def tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer, built once."""
    return build_tokenizer()


@lru_cache(maxsize=50_000)
def _ids(text: str) -> tuple[int, ...]:
    return tuple(tokenizer()(text, add_special_tokens=False).input_ids)


@lru_cache(maxsize=1)
def prefix_ids() -> tuple[list[int], list[int]]:
    """Token ids before and after the image tokens."""
    image = tokenizer().convert_tokens_to_ids("<image>")
    ids = tokenizer()("USER: <image>\n").input_ids
    return ids[: ids.index(image)], ids[ids.index(image) + 1 :]


@dataclass
class Turn:
    """Token ids of one turn and where its answer begins; ``places``: (token index, column, row) of grounded words.

    ``pair``: column and row of the first and of the second thing that a relation question names, else None.
    """

    ids: list[int]
    answer: int
    places: list[tuple[int, int, int]]
    family: str
    pair: tuple[int, int, int, int] | None = None


def make_turn(question: Question, corner: tuple[int, int]) -> Turn:
    """``corner``: the (x, y) patch of the full grid where the image's top left patch lies."""
    prompt, answer = _ids(question.question + " ASSISTANT:"), _ids(" " + question.answer)
    words = _shape_words()
    mentions = [i for i, token in enumerate(prompt) if token in words]
    boxes = list(question.boxes)
    if question.family == "relation":
        boxes.reverse()  # the question names the second box's object first
    elif question.family == "exist" and question.answer == "no":
        boxes = [None]
    elif question.family not in ("exist", "attribute"):
        mentions = []
    places = [(i, *_place(box, corner)) for i, box in zip(mentions, boxes, strict=False)]
    eos = int(tokenizer().eos_token_id)  # type: ignore[arg-type]
    if question.family == "read":
        # the word "sign", and each token that predicts a symbol, shall know where the sign or the symbol is
        x0, y0, _, y1 = question.boxes[0]
        places = [(prompt.index(_ids(" sign")[0]), *_place(question.boxes[0], corner))]
        for j in range(SIGN_LENGTH):
            x = x0 + SIGN_MARGIN + j * SIGN_PITCH
            token = len(prompt) + len(answer) - SIGN_LENGTH + j - 1
            places.append((token, *_place((x, y0, x + 10, y1), corner)))
    pair = (*places[0][1:], *places[1][1:]) if question.family == "relation" else None
    return Turn([*prompt, *answer, eos], len(prompt), places, question.family, pair)


@lru_cache(maxsize=1)
def _shape_words() -> frozenset[int]:
    return frozenset(_ids(" " + word)[0] for word in (*SHAPES, "thing"))


def _place(box, corner: tuple[int, int]) -> tuple[int, int]:
    if box is None:
        return NO_PLACE, NO_PLACE
    return (
        int((box[0] + box[2]) / 2) // PATCH + corner[0],
        int((box[1] + box[3]) / 2) // PATCH + corner[1],
    )


def scene_turns(scene: Scene, mix: dict[str, int], corner: tuple[int, int], rng: random.Random) -> list[Turn]:
    """Different questions about one scene, up to ``mix[family]`` of each family."""
    turns = []
    for family, number in mix.items():
        asked: set[str] = set()
        for _ in range(number):
            question = ask(scene, family, rng)
            if question is not None and question.question not in asked:
                asked.add(question.question)
                turns.append(make_turn(question, corner))
    return turns


def easy_turns(i: int, n: int, size: int, rng: random.Random) -> list[Turn]:
    """``n`` questions of the easy-VQA training image ``i``."""
    return [make_turn(question, (0, 0)) for question in easy_split("train").ask(i, n, size, rng)]


def kept_patches(scenes: list[Scene | None], share: float, rng: np.random.Generator) -> Tensor:
    """Patches [B, K] (sorted) that stay when background is dropped: all that things and signs touch, and some others.

    K is the largest foreground plus ``share`` of the rest. A scene of None has no known foreground: any patches stay.
    """
    wanted, total = [], 0
    for scene in scenes:
        if scene is None:
            continue
        fore = np.zeros((scene.height // PATCH, scene.width // PATCH), bool)
        total = fore.size
        for box in [t.box for t in scene.things] + ([scene.sign_box] if scene.sign_box else []):
            x0, y0, x1, y1 = box
            fore[y0 // PATCH : (y1 - 1) // PATCH + 1, x0 // PATCH : (x1 - 1) // PATCH + 1] = True
        wanted.append(fore.ravel())
    most = max(int(w.sum()) for w in wanted)
    keep = most + int(share * (total - most))
    rows = []
    for scene in scenes:
        fore = wanted.pop(0) if scene is not None else np.zeros(total, bool)
        order = np.argsort(rng.random(total) - 2.0 * fore)  # foreground first, then background at random
        rows.append(np.sort(order[:keep]))
    return torch.from_numpy(np.stack(rows))


@dataclass
class Packed:
    """A batch of packed turns, T tokens after the image prefix of each of B samples.

    ``ids`` [B, T]; ``mask`` [B, 1, P + T, P + T] bool, True where attention is allowed; ``positions`` [B, P + T];
    ``labels`` [B, T], -100 where no loss is; ``places`` [M, 4]: sample, token, column, row; ``pairs`` [R, 6]: sample,
    token that predicts the answer, columns and rows of two things; ``family`` [B, T] index or -1.
    """

    ids: Tensor
    mask: Tensor
    positions: Tensor
    labels: Tensor
    places: Tensor
    pairs: Tensor
    family: Tensor


def pack(turns: list[list[Turn]], image_positions: Tensor, image_end: int, families: tuple[str, ...]) -> Packed:
    """Pack ``turns[b]`` behind the prefix of sample b.

    ``image_positions`` [B, K]: the positions of its image tokens. ``image_end``: the position of the first token behind
    the image, larger than the last image position + 1 where dropped tokens leave their positions behind.
    """
    before, after = prefix_ids()
    head = len(before) + image_positions.shape[1] + len(after)
    batch, length = len(turns), max(sum(len(t.ids) for t in group) for group in turns)
    ids = torch.zeros(batch, length, dtype=torch.long)
    labels = torch.full((batch, length), -100)
    family = torch.full((batch, length), -1)
    segment = torch.zeros(batch, head + length, dtype=torch.long)
    segment[:, head:] = 1_000  # padding sees itself, and the prefix
    positions = torch.zeros(batch, head + length, dtype=torch.long)
    positions[:, : len(before)] = torch.arange(len(before))
    positions[:, len(before) : len(before) + image_positions.shape[1]] = image_positions
    positions[:, head - len(after) : head] = torch.arange(len(after)) + image_end
    first = image_end + len(after)
    places, pairs = [], []
    for b, group in enumerate(turns):
        at = 0
        for k, turn in enumerate(group):
            n = len(turn.ids)
            ids[b, at : at + n] = torch.tensor(turn.ids)
            # the label sits at the token that predicts it
            labels[b, at + turn.answer - 1 : at + n - 1] = ids[b, at + turn.answer : at + n]
            family[b, at + turn.answer - 1 : at + n - 1] = families.index(turn.family)
            segment[b, head + at : head + at + n] = k + 1
            positions[b, head + at : head + at + n] = torch.arange(n) + first
            places += [(b, at + i, col, row) for i, col, row in turn.places]
            if turn.pair is not None:
                pairs.append((b, at + turn.answer - 1, *turn.pair))
            at += n
    same = (segment[:, :, None] == segment[:, None, :]) | (segment[:, None, :] == 0)
    mask = (same & torch.ones(head + length, head + length, dtype=torch.bool).tril())[:, None]
    return Packed(
        ids, mask, positions, labels, torch.tensor(places).reshape(-1, 4), torch.tensor(pairs).reshape(-1, 6), family
    )


def answer_accuracy(
    right: Tensor, labels: Tensor, family: Tensor, families: tuple[str, ...], eos: int | None
) -> dict[str, float]:
    """Share of wholly right answers by family; labelled tokens up to and with an end token are one answer.

    Args:
        right: `[L]` bool, whether each labelled token is predicted.
        labels, family: `[L]` int64, the tokens and indices into `families`.
    """
    hits: dict[str, list[bool]] = {}
    whole = True
    for ok, label, index in zip(right.tolist(), labels.tolist(), family.tolist(), strict=True):
        whole = whole and ok
        if label == eos:
            hits.setdefault(families[index], []).append(whole)
            whole = True
    return {name: sum(found) / len(found) for name, found in hits.items()}
