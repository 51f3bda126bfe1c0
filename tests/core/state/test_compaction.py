"""Compaction and bookkeeping against plain loops, over ragged batches with any padding."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenprune.state.compaction import plan_compaction
from tokenprune.state.kv_cache import PrunedPrompt, Segment


@st.composite
def batches(draw):
    """(keep, attended, pad_left): rows of one length, padded on one side, with kept and dropped tokens in between."""
    rows, length, left = draw(st.integers(1, 4)), draw(st.integers(1, 12)), draw(st.booleans())
    keep, attended = [], []
    for _ in range(rows):
        pad = draw(st.integers(0, length - 1))
        real = draw(st.lists(st.booleans(), min_size=length - pad, max_size=length - pad))
        # the last token of a prompt is text and always stays
        real[-1] = True
        keep.append([True] * pad + real if left else real + [True] * pad)
        attended.append([False] * pad + [True] * len(real) if left else [True] * len(real) + [False] * pad)
    return torch.tensor(keep), torch.tensor(attended), left


@settings(max_examples=150)
@given(batches(), st.sampled_from(["compact", "keep"]))
def test_rows_positions_labels_and_padding_follow_one_index(batch, policy):
    keep, attended, left = batch
    stays = keep & attended
    lengths = stays.sum(1).tolist()
    plan = plan_compaction(keep, attended, lengths, left)
    values, ids = torch.randn(*keep.shape, 3), torch.arange(keep.shape[1]) + 7
    moved, places = plan.rows(values), plan.positions(ids[None], policy)
    restored, counted = plan.restore(moved), plan.counted()
    assert plan.index.shape == (len(lengths), max(lengths)) and plan.padded == (len(set(lengths)) > 1)
    for row, count in enumerate(lengths):
        kept = [i for i in range(keep.shape[1]) if stays[row, i]]
        real = plan.real[row].nonzero()[:, 0].tolist()
        assert real == list(range(max(lengths) - count, max(lengths)) if left else range(count))
        assert plan.index[row, real].tolist() == kept
        assert torch.equal(moved[row, real], values[row, kept])
        gone = [sum(not bool(k) for k in keep[row, :i]) for i in kept]
        assert places[row, real].tolist() == [7 + i - (g if policy == "compact" else 0) for i, g in zip(kept, gone)]
        assert torch.equal(restored[row, kept], values[row, kept])
        for place in range(kept[0]):  # padding on the left, or what left before any that stayed
            assert torch.equal(restored[row, place], moved[row, 0])
        for place in range(kept[0], keep.shape[1]):  # what left is stood for by the last before it that stayed
            before = max(i for i in kept if i <= place)
            padding = left is False and place > kept[-1] and not bool(plan.real[row, -1])
            assert torch.equal(restored[row, place], moved[row, -1] if padding else values[row, before])
        assert counted[row].nonzero()[:, 0].tolist() == kept[1:]  # nothing is there to predict the first from
        assert int(plan.removed[row]) == sum(not bool(k) for k in keep[row])


@settings(max_examples=100)
@given(batches(), st.integers(0, 5), st.data())
def test_the_mask_of_a_pruned_cache_shows_what_the_logical_mask_shows(batch, later, data):
    keep, attended, left = batch
    stays = keep & attended
    plan = plan_compaction(keep, attended, stays.sum(1).tolist(), left)
    length = keep.shape[1]
    segment = Segment(0, plan.index.masked_fill(~plan.real, -1), plan.removed, plan.padded)
    prompt = PrunedPrompt((segment,), length)
    past = length + later
    mask = torch.cat([attended.long(), torch.randint(0, 2, (keep.shape[0], later + 2))], 1)
    physical = segment.mask(mask, length, past)
    assert physical.shape[1] == past - prompt.hidden()
    for row in range(keep.shape[0]):
        expected = [int(mask[row, i]) for i in range(length) if stays[row, i]] + mask[row, length:past].tolist()
        found = [int(m) for m, real in zip(physical[row], plan.real[row].tolist() + [True] * later) if real]
        assert found == expected
        assert not physical[row, : plan.real.shape[1]][~plan.real[row]].any()
    order = torch.tensor(data.draw(st.permutations(range(keep.shape[0]))))
    assert torch.equal(prompt.rows(order).segments[0].slots, segment.slots[order])


def test_no_mask_stays_no_mask_unless_a_row_is_padded():
    slots = torch.tensor([[0, 2, 3]])
    assert Segment(0, slots, torch.tensor([1]), False).mask(None, 4, 6) is None
    padded = Segment(0, torch.tensor([[0, 2, 3], [-1, 1, 3]]), torch.tensor([1, 2]), True)
    assert padded.mask(None, 4, 5).tolist() == [[1, 1, 1, 1], [0, 1, 1, 1]]
