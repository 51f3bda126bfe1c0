"""Tiles belong to their picture: which make one is read off a prompt, or not at all."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any, ClassVar

import _zoo_pictures  # noqa: F401
import pytest
import torch
from _families import END, START, Writer, _tile_batch, family, smolvlm_picture
from _masked_whole import compare_whole
from _tiny import IMAGE
from _zoo import SPECIAL, zoo_model
from masked_reference import run_pruned

import tokenprune
from tokenprune.adapters._grids import Grids
from tokenprune.adapters._tiles import (
    UNTOLD,
    pictures_by_chain,
    pictures_by_label,
    pictures_by_marks,
    pictures_by_rows,
    pictures_by_run,
)
from tokenprune.interfaces.pruner import Pruner
from tokenprune.interfaces.selection import Selection
from tokenprune.interfaces.view import View
from tokenprune.interfaces.visual import Pictures, Raster, Visual, joined, one_raster, unplaced
from tokenprune.seams import cache_argument, cache_in

TILE, FAKE, WHOLE, LINE = 99, 90, 91, 92
SIZE = 4  # tokens of a tile


def labelled(rows: int, cols: int, words: int = 1, line: int = 1) -> list[int]:
    """A picture as Idefics 3 and its relatives write it; `words` ids a label, `line` ids between rows of tiles."""

    def tile(label: int) -> list[int]:
        return [FAKE, *[50] * (words - 1), label, *[TILE] * SIZE]

    parts = [
        tile(10 + 10 * row + col) + [LINE] * line * (col == cols - 1) for row in range(rows) for col in range(cols)
    ]
    return [*sum(parts, []), *([LINE] if parts and line else []), *tile(WHOLE), FAKE]


def row_of(*parts: list[int]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    ids = torch.tensor(sum(parts, []))
    return ids, list((ids == TILE).nonzero()[:, 0].split(SIZE))


def counts(*parts: list[int]) -> tuple[int, ...]:
    found = pictures_by_label(*row_of(*parts))
    assert found.note in ("", UNTOLD) and (not found.note or len(found.counts) == 1)
    return () if found.note else found.counts


@pytest.mark.parametrize("words", [1, 3, 10])
@pytest.mark.parametrize("line", [0, 1])
def test_pictures_are_found_by_the_label_of_their_last_tile(words, line):
    """Thousands of prompts: pictures in tiles and whole ones, equal ones, side by side or with text between."""
    draw = random.Random(words)
    for _ in range(1000):
        grids = [draw.choice([(0, 0), (1, 2), (2, 2), (3, 2), (2, 3)]) for _ in range(draw.randint(2, 5))]
        parts = [[0] * draw.randint(0, 3)]  # padding
        for grid in grids:
            parts += [[1, 2, 3][: draw.randint(0, 3)], labelled(*grid, words, line)]
        assert counts(*parts, [5, 6]) == tuple(rows * cols + 1 for rows, cols in grids)


def test_what_stands_otherwise_is_one_picture_with_a_note():
    split, whole, text = labelled(2, 2), labelled(0, 0), [1, 2, 3]
    ended = [text, split, text]
    assert counts(*ended) == (5,)
    tile = [TILE] * SIZE
    for parts in (
        [text, tile, text, tile, text],  # no labels at all
        [text, [FAKE, *tile], [FAKE, *tile], [FAKE], text],  # separators without labels
        [text, split[:-1]],  # nothing behind the last tile
        [*ended, split[: len(split) // 2]],  # the second picture is cut off
        [*ended, [FAKE, 10, *tile, FAKE, 10, *tile, FAKE, WHOLE, *tile, FAKE], text],  # a label twice in a picture
        [*ended, [FAKE, 11, *tile, FAKE, 10, *tile, FAKE, WHOLE, *tile, FAKE], text],  # tiles in another order
        [*ended, [FAKE, 10, *tile], text, text, [FAKE, WHOLE, *tile, FAKE]],  # text inside a picture
        [text, whole[:-1], text, whole, text],  # the first is not closed
        [text, [*split[:-1], FAKE, 10, *tile], [FAKE, WHOLE, *tile, FAKE]],  # one separator between two pictures
        [text, whole[1:], text, whole, text],  # the first has no separator
        [text, [FAKE, *range(100, 130), *tile, FAKE], whole, text],  # a label that is none
        [text, [FAKE, WHOLE, TILE, 1, *tile[1:], FAKE], whole, text],  # text inside a tile
    ):
        assert counts(*parts) == (), parts


def test_a_prompt_that_came_as_embeddings_is_one_picture_unless_it_is_one_tile():
    _, places = row_of(labelled(0, 0), labelled(0, 0))
    assert pictures_by_label(None, places) == Pictures((2,), UNTOLD)
    assert pictures_by_label(None, places[:1]) == Pictures((1,))


def test_runs_are_pictures():
    _, places = row_of([1], [TILE] * 3 * SIZE, [1], [TILE] * SIZE, [1, 1], [TILE] * 2 * SIZE)
    assert pictures_by_run(places).counts == (3, 1, 2)


def chain(*pictures: int) -> list[int]:
    """Idefics 2: `pictures` side by side, each in so many crops."""
    return [*sum(([FAKE, *[TILE] * SIZE] for _ in range(sum(pictures))), []), FAKE]


def test_pictures_of_a_chain_are_told_apart_where_its_length_shows_that_none_is_split():
    def counts_of(*parts: list[int]) -> tuple[int, ...]:
        found = pictures_by_chain(*row_of(*parts), 5)
        return () if found.note else found.counts

    text = [1, 2]
    assert counts_of(text, chain(1), text, chain(1, 1), [3]) == (1, 1, 1)
    assert counts_of(text, chain(1), text) == (1,)
    assert counts_of(text, chain(*[1] * 6), text, chain(*[1] * 5), text) == (1,) * 11
    assert counts_of(text, chain(5), text, chain(5), text) == ()  # two in crops, or ten
    for parts in (
        [text, chain(1)[1:], text, chain(1), text],
        [text, chain(1, 1)[:-1]],
        [text, chain(1)[:-1], text, chain(1), text],
        [text, [TILE] * 2 * SIZE, [FAKE]],
    ):
        assert counts_of(*parts) == (), parts


def test_pictures_between_marks_that_are_known():
    """Llama 4: tiles with separators in rows of them, the whole picture behind, all between two ids."""
    tile, text = [TILE] * SIZE, [1, 2]

    def marked(*tiles: list[int]) -> list[int]:
        return [START, *sum(([*own, 7] for own in tiles), []), END]

    def counts_of(*parts: list[int]) -> tuple[int, ...]:
        found = pictures_by_marks(*row_of(*parts), START, END)
        return () if found.note else found.counts

    split, whole = marked(tile, [*tile, 8], tile), marked(tile)
    assert counts_of(text, split, text, whole, split, text) == (3, 1, 3)
    assert counts_of(split, whole) == (3, 1) and counts_of(tile) == (1,)
    for parts in (
        [text, split[1:], text, whole],  # nothing in front
        [text, split, text, whole[:-1], text],  # nothing behind
        [text, split[:-1], text, whole],  # one picture begins in another
    ):
        assert counts_of(*parts) == (), parts
    assert pictures_by_marks(None, [torch.arange(4), torch.arange(4, 8)], START, END) == Pictures((2,), UNTOLD)


def test_pictures_of_single_tokens_in_rows():
    """Fuyu: a row of a picture ends in an id, and something else stands behind the last one."""

    def grids_of(*parts: list[int]) -> Any:
        ids = torch.tensor(sum(parts, []))
        found = pictures_by_rows(ids, list((ids == TILE).nonzero()[:, 0].split(1)))
        assert bool(found.note) == (found.grids is None)
        return found.grids

    def rows(count: int, width: int) -> list[int]:
        return ([TILE] * width + [LINE]) * count

    assert grids_of(rows(2, 3), [1], rows(1, 4), [1, 5], rows(3, 3), [1]) == ((2, 3), (1, 4), (3, 3))
    assert grids_of([0, 0], rows(2, 3)) == ((2, 3),) and grids_of(rows(1, 1)) == ((1, 1),)
    for parts in (
        [rows(2, 3)[:-1]],  # cut off
        [rows(2, 3), rows(1, 2)],  # a row of another length
        [rows(1, 3), [TILE] * 3, [7]],  # another id behind a row
    ):
        assert grids_of(*parts) is None, parts
    assert pictures_by_rows(None, list(torch.arange(3).split(1))) == Pictures((3,), UNTOLD)
    assert joined([unplaced(1)] * 6, (2, 3)).rasters == (Raster((2, 3)),)
    with pytest.raises(ValueError, match="no grid of"):
        joined([unplaced(1)] * 5, (2, 3))


def test_joined_tiles_keep_their_order_and_refuse_separators():
    whole = joined([one_raster((2, 3)), one_raster((1, 2))])
    assert whole.rasters == (Raster((2, 3), 0, "crop"), Raster((1, 2), 6, "crop")) and whole.length == 8
    alone = one_raster((2, 3))
    assert joined([alone]) is alone
    with pytest.raises(ValueError, match="one token a placeholder"):
        joined([alone, Visual((Raster((2, 2)),), placeholders=5, offsets=torch.arange(4))])


# --- on models --------------------------------------------------------------------------------------------------------

PICTURES = [[3, 1, 4], [2], [], [5, 2]]  # tiles of each picture of each row


def batch(name: str, samples: list[list[int]], side: str = "left", seed: int = 1) -> dict[str, torch.Tensor]:
    return _tile_batch(name, samples, side, seed)


def run(name: str, inputs: dict, method, **more):
    with tokenprune.applied(family(name), method, **more) as handle, torch.no_grad():
        logits = family(name)(**inputs).logits
        return handle.last, logits


@dataclass
class Rated(Pruner):
    """Keeps the tokens that the caller rates highest."""

    name: ClassVar[str] = "rated"
    hints: ClassVar[tuple[str, ...]] = ("ratings",)
    token_hints: ClassVar[tuple[str, ...]] = ("ratings",)
    default_scope: ClassVar[str] = "visual"

    def select(self, view: View) -> Selection:
        ratings = torch.stack(view.hints["ratings"])
        return Selection(ratings.topk(view.budget, dim=1).indices.sort(dim=1).values)


both = pytest.mark.parametrize("name", ["internvl", "smolvlm"])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("scope", ["raster", "visual"])
@pytest.mark.parametrize("keep", [1, 7, 40, 0.25])
@both
def test_the_budget_is_that_of_a_picture(name, keep, scope, side):
    prompt, _ = run(name, batch(name, PICTURES, side), {"prune": "random", "scope": scope, "keep": keep})
    tiles = [[len(span.visual.rasters) for span in prompt.layout.spans if span.sample == row] for row in range(4)]
    assert tiles == PICTURES
    for row, kept in zip(PICTURES, prompt.kept):
        for count, own in zip(row, kept, strict=True):
            wanted = keep if isinstance(keep, int) else round(keep * 36 * count)
            assert len(own) == min(wanted, 36 * count)
            by_tile = torch.bincount(own // 36, minlength=count)
            if scope == "raster":
                assert by_tile.max() - by_tile.min() <= 1
    assert prompt.report().images == 6 and not prompt.report().notes


@both
def test_a_picture_is_pruned_alike_alone_and_in_a_batch(name):
    inputs = batch(name, PICTURES)
    together, _ = run(name, inputs, "divprune@9")
    start = 0
    for row, tiles in enumerate(PICTURES):
        if not tiles:
            continue
        ids = inputs["input_ids"][row][inputs["attention_mask"][row].bool()][None]
        pixels = inputs["pixel_values"]
        pixels = pixels[start : start + sum(tiles)] if name == "internvl" else pixels[row : row + 1, : sum(tiles)]
        start += sum(tiles)
        alone, _ = run(name, {"input_ids": ids, "pixel_values": pixels}, "divprune@9")
        assert [own.tolist() for own in alone.kept[0]] == [own.tolist() for own in together.kept[row]]


@both
def test_beams_of_equal_pictures_keep_what_each_is_told(name):
    """`generate` repeats features; two rows with the same picture and other hints must not be taken for one."""
    inputs = batch(name, [[3], [3], [1, 1]])
    pixels = inputs["pixel_values"]
    tiles = pixels if name == "internvl" else pixels.flatten(0, 1)
    tiles[3:6] = tiles[:3]
    if name == "internvl":
        tiles[7] = tiles[6]
    else:
        pixels[2, 1] = pixels[2, 0]
    lengths = (108, 108, 36, 36)
    hints = [torch.randperm(n, generator=torch.Generator().manual_seed(n + i)).float() for i, n in enumerate(lengths)]
    with tokenprune.applied(family(name), [{"method": Rated(), "keep": 5}]) as handle, torch.no_grad():
        handle.set_hints(ratings=hints)
        family(name).generate(**inputs, max_new_tokens=3, do_sample=False, num_beams=3)
        kept = handle.kept
    best = [values.topk(5).indices.sort().values.tolist() for values in hints]
    wanted = [[best[0]]] * 3 + [[best[1]]] * 3 + [best[2:]] * 3
    assert [[own.tolist() for own in row] for row in kept] == wanted


def plain(name: str) -> dict[str, torch.Tensor]:
    """A prompt of two pictures whose tiles carry no labels."""
    inputs, writer = batch(name, [[2, 3]]), Writer(5)
    writer.row(*([*writer.words(1)] + [IMAGE] * 36 for _ in range(5)))
    return {**inputs, **writer.batch("left")}


def test_tiles_that_are_not_labelled_share_a_budget_and_the_report_says_so():
    prompt, _ = run("smolvlm", plain("smolvlm"), "random@9")
    assert [len(own) for own in prompt.kept[0]] == [9]
    assert prompt.report().notes == (UNTOLD,) and UNTOLD in str(prompt.report())


def test_embeddings_without_ids_share_a_budget_and_runs_are_seen_in_them_too():
    for name, wanted in (("smolvlm", [9]), ("internvl", [9, 9, 9])):
        inputs = batch(name, [[3, 1, 2]])
        embeds = family(name).get_input_embeddings()(inputs["input_ids"])
        prompt, _ = run(name, {**inputs, "input_ids": None, "inputs_embeds": embeds}, "random@9")
        assert [len(own) for own in prompt.kept[0]] == wanted
        assert prompt.report().notes == ((UNTOLD,) if name == "smolvlm" else ())


@both
def test_a_later_turn_brings_pictures_of_its_own(name):
    first, second = batch(name, [[3, 2]]), batch(name, [[2, 4]], seed=2)
    with tokenprune.applied(family(name), "random@9") as handle, torch.no_grad():
        cache = cache_in(family(name)(**first, use_cache=True))
        length = first["input_ids"].shape[1] + second["input_ids"].shape[1]
        mask = torch.ones(1, length, dtype=torch.int64)
        family(name)(**{**second, "attention_mask": mask}, **cache_argument(cache))
        assert [len(span.visual.rasters) for span in handle.last.layout.spans] == [2, 4]
        assert [len(own) for own in handle.kept[0]] == [9, 9]


@both
def test_signals_and_seeds_are_those_of_a_pictures_own_tiles(name):
    """What a method is told of a picture does not change with what stands before it."""
    inputs = batch(name, [[2, 3]])
    for method in ("vtc_cls@9", "holov@12"):
        both_pictures, _ = run(name, inputs, method)
        ids = inputs["input_ids"][0]
        second = (ids == (START if name == "internvl" else END)).nonzero()[:, 0]
        begin = int(second[1]) if name == "internvl" else int(second[0]) + 38
        pixels = inputs["pixel_values"]
        pixels = pixels[2:] if name == "internvl" else pixels[:, 2:]
        alone, _ = run(name, {"input_ids": ids[None, begin:], "pixel_values": pixels}, method)
        assert torch.equal(both_pictures.kept[0][1], alone.kept[0][0])


def test_frames_of_a_video_count_as_pictures():
    prompt, _ = run("smolvlm", batch("smolvlm", [[1, 1, 1]]), "random@9")
    assert [len(own) for own in prompt.kept[0]] == [9, 9, 9]


# --- classes without a tower that is read -----------------------------------------------------------------------------

COUNT = {"qianfan_ocr": 36, "got_ocr2": 16, "idefics2": 16, "granite_docling": 36}


def zoo_prompts(name: str, samples: list[list[int]], seed: int = 3) -> dict[str, torch.Tensor]:
    """Pictures of so many tiles, as the family's processor writes them."""
    writer, tile = Writer(seed), [IMAGE] * COUNT[name]
    for sample in samples:
        if name == "granite_docling":
            parts = [smolvlm_picture(tiles) for tiles in sample]
        elif name == "idefics2":
            parts = [[START, *tile, START] for _ in range(sum(sample))]
        else:
            parts = [[START, *tile * tiles, END] for tiles in sample]
        writer.row(*parts)
    made, totals = writer.batch("left"), [sum(sample) for sample in samples]
    side = 64 if name == "got_ocr2" else 48
    if name in ("qianfan_ocr", "got_ocr2"):
        return {**made, "pixel_values": writer.pixels(sum(totals), 3, side, side)}
    pixels = torch.zeros(len(samples), max(totals), 3, side, side)
    for row, tiles in enumerate(totals):
        pixels[row, :tiles] = writer.pixels(tiles, 3, side, side)
    made["pixel_values"] = pixels
    if name == "granite_docling":
        made["pixel_attention_mask"] = (pixels != 0).flatten(2).any(-1)
    return made


@pytest.mark.parametrize("method", ["random", "divprune"])
@pytest.mark.parametrize("name", list(COUNT))
def test_tiles_of_classes_that_are_read_off_their_model(name, method):
    samples = [[1, 1, 1], [1]] if name == "idefics2" else [[3, 2], [2], [4]]
    inputs = zoo_prompts(name, samples)
    silent = [token for token in SPECIAL if token < zoo_model(name).get_output_embeddings().weight.shape[0]]
    found = run_pruned(zoo_model(name), method, 5, inputs, tokens=4, silent=silent)
    compare_whole(found, inputs, 1e-5, silent)
    with tokenprune.applied(zoo_model(name), method, keep=5) as handle, torch.no_grad():
        zoo_model(name).generate(**inputs, max_new_tokens=2, do_sample=False, num_beams=2)
        spans = handle.last.layout.spans
        tiles = [[len(one.visual.rasters) for one in spans if one.sample == row] for row in range(2 * len(samples))]
        assert tiles == [sample for sample in samples for _ in range(2)]
        assert [[len(own) for own in row] for row in handle.kept] == [[5] * len(row) for row in tiles]


def test_a_grid_that_lengths_leave_open_is_not_guessed() -> None:
    """36 tokens of tiles with 12 x 12 patches are four tiles in 3 x 3 or one in 6 x 6."""
    pixels = torch.zeros(1, 4, 3, 48, 48)

    def grid(length: int, merge: int | None = None) -> Any:
        return Grids("image", {}, pixels, 1, 4, merge).frames_rows_cols(0, length)

    assert grid(36) is None
    assert grid(36, merge=2) == (1, 6, 6)
    assert grid(36, merge=4) == (4, 3, 3)
    assert grid(108) == (3, 6, 6)
    boxes = {"video_grid_thw": torch.tensor([[4, 6, 6]])}
    video = Grids("video", boxes, torch.zeros(144, 8), 1, 4)
    assert video.frames_rows_cols(0, 36) is None  # of four frames in 3 x 3, or of one in 6 x 6
    assert Grids("video", boxes, torch.zeros(144, 8), 1, 4, 2).frames_rows_cols(0, 36) == (4, 3, 3)
