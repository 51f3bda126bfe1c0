"""What users load from the hub loads from a folder through the Auto classes, processor and command line included."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from _families import BUILDERS, IMAGE, batch_of, family
from _processors import FILES
from PIL import Image

import tokenprune
from tokenprune.cli import main
from tokenprune.evals.config.points import Point
from tokenprune.evals.models.chat_template import one_turn, prompt_text
from tokenprune.evals.models.load import load_model
from tokenprune.evals.report.overlay import draw_kept, seen_views
from tokenprune.evals.results.run_folder import read_pictures
from tokenprune.evals.tasks.load import load_task

VIEWS = {  # of a picture of 56 x 28 pixels: (rows, cols) of the rasters of tokens that lie over it
    "llava": [(6, 6)],
    "llava_next": [(4, 4), (4, 8)],
    "llava_next_video": [(4, 4), (4, 8)],
    "llava_onevision": [(4, 4), (4, 8)],
    "qwen2_vl": [(4, 7)],
    "qwen2_5_vl": [(4, 7)],
    "qwen3_vl": [(4, 7)],
    "internvl": [(6, 6)] * 3,
    "smolvlm": [(6, 6)] * 3,
}


@pytest.mark.parametrize("name", list(BUILDERS))
def test_a_saved_model_of_each_family_loads_through_the_auto_class_and_is_pruned_alike(name, tmp_path):
    from transformers import AutoModelForImageTextToText

    model, batch = family(name), batch_of(name, "one_left")
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype="float32").eval()
    assert type(loaded) is type(model)
    plan = [{"at": "input", "prune": "random", "keep": 20}, {"at": "layer:2", "prune": "fastv", "keep": 6}]
    found = []
    for each in (model, loaded):
        with tokenprune.applied(each, plan), torch.no_grad():
            found.append(each(**batch).logits)
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


def test_every_family_is_here():
    assert set(FILES) == set(BUILDERS) == set(VIEWS)


def test_a_budget_may_be_a_mean_over_the_layers(tmp_path, tiny_folder, tiny_task):
    command = ["eval", "--model", tiny_folder, "--tasks", tiny_task, "--method", "fastv", "--limit", "2"]
    main([*command, "--keep", "avg21", "--no-timing", "--output", str(tmp_path)])
    with (tmp_path / "summary.csv").open() as stream:
        rows = {row["method"]: row for row in csv.DictReader(stream) if row["family"] == "overall"}
    assert rows["fastv"]["keep"] == "avg21"
    # layers 0 and 1 of 4 hold all 36: (2 * 36 + 2 * 6) / 4
    assert float(rows["fastv"]["kept_tokens"]) == 21 == float(rows["random"]["kept_tokens"])


def evaluate(folder: Path, task: str, method: str, output: Path, *more: str) -> int:
    command = ["eval", "--model", str(folder), "--tasks", task, "--method", method, "--keep", "0.25", "--no-timing"]
    return main([*command, *more, "--output", str(output)])


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# the run of divprune has the unpruned model beside it
@pytest.mark.parametrize("method", ["divprune", "fastv", "flowcut"])
@pytest.mark.parametrize("name", list(FILES))
def test_the_command_line_evaluates_a_checkpoint(name, method, tmp_path, checkpoint, sized_task, capsys):
    folder = checkpoint(name)
    # one batch of four pictures, none of the size of another
    more = [] if method == "divprune" else ["--no-references"]
    done = evaluate(folder, sized_task, method, tmp_path, "--limit", "4", "--batch-size", "4", *more)
    said = capsys.readouterr()
    assert done == 0
    assert "Analytic FLOPs" not in said.out
    with (tmp_path / "summary.csv").open() as stream:
        overall = {row["method"]: row for row in csv.DictReader(stream) if row["family"] == "overall"}
    assert set(overall) == ({method, "none", "random"} if method == "divprune" else {method})
    for row in overall.values():
        assert row["n"] == "4" and 0 <= float(row["accuracy"]) <= 1
    for record in lines(tmp_path / "results.jsonl"):
        assert record["flops"]["measured"]["vision"] > 0 and record["flops"]["measured"]["prefill"] > 0
        assert record["flops"]["agree"], record["flops"]["difference"]
        assert record["kv"]["measured"] == record["kv"]["analytic"]
    if method == "divprune":
        rows = [row for row in lines(tmp_path / "samples.jsonl") if "|divprune@" in row["point"] and row["kept"]]
        assert len(rows) == 3
        check_overlays(name, folder, sized_task, tmp_path, rows)


def check_overlays(name: str, folder: Path, task: str, run: Path, rows: list[dict]) -> None:
    """The views are those of the family, and as many of their cells are left bright as tokens were kept."""
    loaded = load_model(str(folder), device="cpu")
    saved = {entry["sample_id"]: entry["views"] for entry in read_pictures(run)}
    point = Point("m", "t", "divprune", 0.25)
    for row, sample in zip(rows, load_task(task).load(0, 3)):
        assert row["sample_id"] == sample.sample_id
        views = seen_views(loaded, dict(loaded.inputs([sample.question], [sample.image])), sample.image)
        if sample.sample_id == "s0":
            assert [view.raster.grid for view in views] == VIEWS[name]
        found = [(view["rows"], view["cols"], view["start"], view["visual"]) for view in saved[sample.sample_id]]
        assert found == [(*view.raster.grid, view.raster.start, view.visual) for view in views]
        assert all((run / "pictures" / view["file"]).is_file() for view in saved[sample.sample_id])
        drawn = np.asarray(draw_kept(views, point, row["kept"])).astype(int)
        assert drawn.shape[1] == sum(view.picture.width + 8 for view in views) - 8
        bright, left = 0, 0
        for view in views:
            own = drawn[: view.picture.height, left : left + view.picture.width]
            same = (own == np.asarray(view.picture)).all(axis=2)
            cells = view.raster.grid
            bright += int(same.reshape(cells[0], -1, cells[1], same.shape[1] // cells[1]).all(axis=(1, 3)).sum())
            left += view.picture.width + 8
        assert bright == sum(map(len, row["kept"])) == row["kept_tokens"]


@pytest.mark.parametrize("name", list(FILES))
def test_a_prompt_begins_once_and_holds_its_picture_once(name, checkpoint):
    loaded = load_model(str(checkpoint(name)), device="cpu")
    sizes = [(56, 28), (42, 42)]
    inputs = loaded.inputs(["what is this", "who"], [Image.new("RGB", size, (200, 90, 30)) for size in sizes])
    files, tokenizer = FILES[name], loaded.processor.tokenizer
    for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"]):
        ids = ids[mask.bool()].tolist()
        if files.bos:
            assert ids[0] == tokenizer.bos_token_id != ids[1] and ids.count(tokenizer.bos_token_id) == 1
        assert (
            prompt_text(loaded.processor, one_turn("who", Image.new("RGB", (9, 9)))).count(
                tokenizer.convert_ids_to_tokens(IMAGE)
            )
            == 1
        )
    counts = (inputs["input_ids"] == IMAGE).sum(1).tolist()
    whole = sum(rows * cols for rows, cols in VIEWS[name])
    newlines = 4 if len(VIEWS[name]) == 2 else 0
    assert counts[0] == whole + newlines
