"""What a diagnosis says of answers that cannot be marked, and of samples that cannot be read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from tokenprune.cli import main


@pytest.mark.parametrize(
    ("answers", "says", "marked"),
    [(["x", None], "0.0% of 1 right", 1), ([None, None], "2 samples, no answer of which could be marked", 0)],
)
def test_what_is_left_out_is_said(answers, says, marked, tiny_folder, tmp_path: Path, capsys):
    for name in ("a.png", "b.png"):
        Image.new("RGB", (42, 42), "red").save(tmp_path / name)
    (tmp_path / "bad.png").write_bytes(b"no picture")
    rows = [{"image": name, "question": "what", "answer": "x"} for name in ("a.png", "b.png", "bad.png")]
    rows = [{**row, "answer": answer} for row, answer in zip(rows, [*answers, "x"])]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "own.yaml").write_text("data: rows.jsonl\nmax_new_tokens: 2\n")
    out = tmp_path / "out"
    asked = ["--model", tiny_folder, "--data", str(tmp_path / "own.yaml"), "--out", str(out)]
    assert main(["diagnose", *asked]) == 0
    said = capsys.readouterr().out
    assert f"unpruned: {says}" in said and "sample #2 is left out: BadPicture" in said
    run = json.loads((out / "diagnosis.json").read_text())["runs"]["unpruned"]
    assert (run["samples"], run["marked"], run["accuracy"]) == (2, marked, 0.0 if marked else None)
    page = (out / "diagnosis.html").read_text()
    share, _, rest = says.partition(" ")
    assert f"{share}<small> {rest}</small>" in page
