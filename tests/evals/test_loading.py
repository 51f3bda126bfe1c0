"""What users load from the hub loads from a folder through the Auto classes, processor and command line included."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from _families import BUILDERS, batch_of, family

import tokenprune

# the others' processors bring a video processor, which needs torchvision; that does not load beside a CPU-only torch
IMAGE_ONLY = ("llava", "llava_next")


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


def save_processor(name: str, folder: Path, tokenizer: Any) -> None:
    """A real processor for a tiny model of the family."""
    from transformers import LlavaNextImageProcessor, LlavaNextProcessor

    image = LlavaNextImageProcessor(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28},
        image_grid_pinpoints=family(name).config.image_grid_pinpoints,
    )  # fmt: skip
    LlavaNextProcessor(
        image_processor=image, tokenizer=tokenizer, patch_size=7, vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    ).save_pretrained(folder)  # fmt: skip


def test_a_budget_may_be_a_mean_over_the_layers(tmp_path, tiny_folder, tiny_task):
    from tokenprune.cli import main

    command = ["eval", "--model", tiny_folder, "--tasks", tiny_task, "--method", "fastv", "--limit", "2"]
    main([*command, "--keep", "avg21", "--no-timing", "--output", str(tmp_path)])
    with (tmp_path / "summary.csv").open() as stream:
        rows = {row["method"]: row for row in csv.DictReader(stream) if row["family"] == "overall"}
    assert rows["fastv"]["keep"] == "avg21"
    # layers 0 and 1 of 4 hold all 36: (2 * 36 + 2 * 6) / 4
    assert float(rows["fastv"]["kept_tokens"]) == 21 == float(rows["random"]["kept_tokens"])


@pytest.mark.parametrize("method", ["none", "divprune", "fastv", "flowcut"])
@pytest.mark.parametrize("name", IMAGE_ONLY)
def test_the_command_line_evaluates_a_folder(name, method, tmp_path, tiny_folder, tiny_tokenizer, tiny_task, capsys):
    from tokenprune.cli import main

    folder = Path(tiny_folder)
    if name != "llava":
        folder = tmp_path / name
        family(name).save_pretrained(folder)
        save_processor(name, folder, tiny_tokenizer)
    command = ["eval", "--model", str(folder), "--tasks", tiny_task, "--method", method, "--limit", "4"]
    if method != "none":
        command += ["--keep", "0.25"]
    assert main([*command, "--output", str(tmp_path / "out")]) in (0, None)
    with (tmp_path / "out" / "summary.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert rows[-1]["family"] == "overall" and rows[-1]["n"] == "4"
    assert "differ by more than" not in capsys.readouterr().out
    drawn = sorted((tmp_path / "out" / "overlays").glob("*.png"))
    assert bool(drawn) == (method != "none")
    if drawn and name == "llava_next":
        from PIL import Image

        assert Image.open(drawn[0]).width > Image.open(drawn[0]).height, "thumbnail and mosaic side by side"
