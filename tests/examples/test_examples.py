"""Each file of examples/ runs as it stands and says what it promises."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
from _notebook import run_notebook
from _paths import ROOT

EXAMPLES = ROOT / "examples"
pytestmark = pytest.mark.pocket


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's own folder: what an example writes must not land in the checkout."""
    monkeypatch.chdir(tmp_path)


def printed(name: str, capsys: pytest.CaptureFixture[str]) -> str:
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return capsys.readouterr().out


def test_wrap_and_batch(capsys: pytest.CaptureFixture[str]) -> None:
    said = printed("wrap_and_batch.py", capsys)
    assert len(re.findall(r"unpruned: \S+ +64 tokens: \S+", said)) == 4
    assert "256 of 2304 visual tokens kept" in said and said.endswith("the model is as it was: True\n")


def test_stream(capsys: pytest.CaptureFixture[str]) -> None:
    said = printed("stream.py", capsys)
    assert "what does the sign say? PA4\n" in said and said.endswith("64 visual tokens were kept\n")


def test_pictures_and_video(capsys: pytest.CaptureFixture[str]) -> None:
    said = printed("pictures_and_video.py", capsys)
    first, second = re.search(r"a quarter of each, (\d+) and (\d+) tokens", said).groups()
    assert int(first) != int(second)  # the two pictures differ in size, and each keeps a quarter of its own
    kept, whole = map(int, re.search(r"(\d+) of (\d+) tokens\. what colour", said).groups())
    assert kept == round(whole / 4)


@pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing:FutureWarning")  # TRL's settings use the older name
def test_lora(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("peft")
    pytest.importorskip("trl")
    said = printed("lora.py", capsys)
    losses = [float(loss) for loss in re.search(r"loss by step: (.*)", said)[1].split(", ")]
    assert len(losses) == 4 and losses[3] < 0.9 * losses[0]  # the same three rows in every step
    assert "192 of 1728 visual tokens kept" in said


def test_the_notebook_says_what_it_holds() -> None:
    import json

    path = EXAMPLES / "first_steps.ipynb"
    cells = zip(json.loads(path.read_text(encoding="utf-8"))["cells"], run_notebook(path)["cells"], strict=True)
    for held, ran in cells:
        if held["cell_type"] == "code":
            assert texts(held) == texts(ran), "python tests/_notebook.py examples/first_steps.ipynb writes them anew"


def texts(cell: dict) -> list:
    return [output.get("text") or output["data"]["text/plain"] for output in cell["outputs"]]


def test_every_example_is_in_the_table_and_says_what_to_change() -> None:
    table = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    files = sorted(path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".ipynb"))
    assert files == sorted(re.findall(r"^\| \[`(\S+)`\]\(\1\)", table, re.MULTILINE))
    for name in files:
        assert re.search(r"For a (7B|larger) checkpoint", (EXAMPLES / name).read_text(encoding="utf-8")), name
