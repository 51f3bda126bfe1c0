"""Positions of prompts with cut pictures against those of the whole prompt, written out here."""

from __future__ import annotations

import pytest
import torch

from tokenprune.vllm.positions import (
    CHANNELS,
    check_strays,
    grid_positions,
    pack,
    place_visuals,
    prompt_positions,
    unpack,
)

PAD = 7


def whole(parts):
    """`[3, S]`: text as ints, pictures as (frames, rows, cols), and for each token the picture that it is of."""
    columns, owner, position = [], [], 0
    for number, part in enumerate(parts):
        if isinstance(part, int):
            columns += [(position + i,) * 3 for i in range(part)]
            owner += [-1] * part
            position += part
            continue
        frames, rows, cols = part
        cells = [(t, r, c) for t in range(frames) for r in range(rows) for c in range(cols)]
        columns += [tuple(position + axis for axis in cell) for cell in cells]
        owner += [number] * len(cells)
        position += max(frames, rows, cols)
    return torch.tensor(columns).T, torch.tensor(owner), position


PARTS = (3, (1, 4, 6), 2, (3, 2, 5), 1, (1, 1, 1), 4)
KEEP = {1: [0, 7, 23], 3: [2, 11, 12, 29], 5: [0]}


def cut():
    ids, owner, after = whole(PARTS)
    stays = torch.ones(len(owner), dtype=torch.bool)
    for number, kept in KEEP.items():
        places = (owner == number).nonzero()[:, 0]
        stays[places] = False
        stays[places[kept]] = True
    return ids[:, stays], owner[stays], after


@pytest.mark.parametrize("chunk", [None, 1, 2, 3, 5])
def test_kept_tokens_keep_their_ids_and_text_stands_where_it_would(chunk):
    expected, owner, after = cut()
    length = len(owner)
    visuals, sent = [], {}
    for number, kept in KEEP.items():
        grid = grid_positions(*PARTS[number])
        offset = int((owner == number).nonzero()[0])
        visuals.append((offset, len(kept), grid))
        sent[offset] = pack(torch.randn(len(kept), 5), grid[:, kept])
    positions, delta = prompt_positions(length, visuals)
    assert length + delta == after
    text = owner < 0
    assert torch.equal(positions[:, text], expected[:, text])
    ids = torch.where(text, 1, PAD)
    # as vLLM gives them: of each step the slices of those visuals that it touches
    for start in range(0, length, chunk or length):
        end = min(length, start + (chunk or length))
        slices = [
            rows[max(0, start - at) : end - at] for at, rows in sent.items() if at < end and at + len(rows) > start
        ]
        own = [unpack(part)[1] for part in slices]
        positions = place_visuals(ids, [PAD], positions, own, start)
        assert torch.equal(positions[:, start:end], expected[:, start:end])
    assert torch.equal(positions, expected)


def test_a_cached_prefix_needs_no_ids_of_its_pictures():
    expected, owner, _ = cut()
    second = int((owner == 3).nonzero()[0])
    visuals = [
        (int((owner == number).nonzero()[0]), len(kept), grid_positions(*PARTS[number]))
        for number, kept in KEEP.items()
    ]
    positions, _ = prompt_positions(len(owner), visuals)
    own = [grid_positions(*PARTS[number])[:, KEEP[number]] for number in (3, 5)]
    own[0] = own[0][:, 1:]  # the first of its tokens is cached
    ids = torch.where(owner < 0, 1, PAD)
    placed = place_visuals(ids, [PAD], positions, own, second + 1)
    assert torch.equal(placed[:, second + 1 :], expected[:, second + 1 :])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_ids_are_exact_in_any_dtype(dtype):
    ids = torch.tensor([[0, 1, 255, 256, 257, 65535, 40000], [3] * 7, [12345] * 7])
    embeddings = torch.randn(7, 4).to(dtype)
    packed = pack(embeddings, ids)
    assert packed.dtype == dtype and packed.shape == (7, 4 + CHANNELS)
    back, again = unpack(packed)
    assert torch.equal(back, embeddings) and torch.equal(again, ids)
    with pytest.raises(ValueError, match="65536"):
        pack(embeddings, ids + 1)


def test_frames_of_a_video_stand_apart():
    ids = grid_positions(3, 1, 2, 2.5)
    assert ids[0].tolist() == [0, 0, 2, 2, 5, 5] and ids[2].tolist() == [0, 1] * 3


def test_a_placeholder_that_a_text_spells_is_refused():
    video = PAD + 1
    ids = [1, 2, PAD, PAD, 3]
    check_strays(ids, [PAD, video], [(2, 4)])
    check_strays([video, 1], [PAD, video], [])  # no visual, whose ids could be taken
    for place in (0, 1, 4):
        spelt = [*ids[:place], video, *ids[place:]]
        begin = 2 + (place < 2)
        with pytest.raises(ValueError, match=f"id {video}, at {place}"):
            check_strays(spelt, [PAD, video], [(begin, begin + 2)])
