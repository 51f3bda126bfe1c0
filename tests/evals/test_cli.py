"""The command line: quick to start, clear when it refuses, and its files where it says."""

from __future__ import annotations

import subprocess
import sys
import warnings

import pytest
import yaml
from _paths import ROOT

from tokenprune.cli import _parser, main
from tokenprune.commands._shared import parse_options
from tokenprune.commands.eval import _eval_config
from tokenprune.evals.models.load import load_model
from tokenprune.plan.expression import yaml_value

QUICK = """
import contextlib, io, sys
from tokenprune.cli import _parser, main
out = io.StringIO()
with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
    for line in ("--help", "eval --help", "ls methods", "ls models", "ls tasks", "ls sweeps",
                 "eval --method holv --keep 64 --model a/b", "eval --method holov --keep 64 --tasks x --model a/b"):
        try:
            main(line.split())
        except SystemExit:
            pass
heavy = [name for name in ("torch", "transformers", "datasets", "numpy", "scipy", "matplotlib") if name in sys.modules]
print(out.getvalue())
print("imported:", heavy)
"""


def test_starts_without_torch():
    done = subprocess.run([sys.executable, "-c", QUICK], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.rstrip().endswith("imported: []"), done.stdout[-400:]
    for line in ("tokenprune demo", "holov ", "pocket:count", "Did you mean 'holov'", "no task called 'x'"):
        assert line in done.stdout


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["eval", "--method", "uniform"], "Say how many visual tokens uniform keeps"),
        (["eval", "--method", "none", "--keep", "4"], "leave --keep out"),
        (["eval", "--method", "uniform@9", "--keep", "4"], "says its own budget, uniform@9; leave --keep 4 out"),
        (["run", "--method", "uniform@9", "--keep", "4"], "says its own budget, uniform@9; leave --keep 4 out"),
        (["eval", "--method", "uniform@9", "--seed", "-1"], "seed must be an integer from 0 to"),
        (["eval", "--method", "uniform@9", "--seed", str(2**32)], "seed must be an integer from 0 to"),
        (["eval", "--method", "holov@9", "--set", "power=a"], "power of holov must be a number, got 'a'"),
        (["eval", "--method", "uniform", "--keep", "1.5"], "must be in"),
        (["eval", "--method", "uniform", "--keep", "4", "--set", "positions"], "OPTION=VALUE"),
        (["eval", "--method", "uniform", "--keep", "4", "--set", "position=keep"], "Did you mean 'positions'"),
        (["eval", "--method", "uniform", "--keep", "4", "--limit", "0"], "limit must be an integer of at least 1"),
        (["sweep", "nothing.yaml"], "There is no sweep file nothing.yaml"),
        (["run", "--method", "uniform", "--keep", "4", "--image", "x.png"], "both --image and --question"),
        (
            ["run", "--method", "uniform", "--keep", "4", "--max-new-tokens", "0"],
            "max_new_tokens must be an integer of at",
        ),
        (["run", "--method", "uniform", "--keep", "4", "--output", "overlay"], "--output names a picture, such as"),
        (["eval", "--method", "uniform", "--keep", "4", "--set", "x=[1"], "--set x=[1 is no YAML at line 1"),
        (["eval", "--method", "uniform(x={1)", "--keep", "4"], "x of 'uniform' is no YAML"),
    ],
)
def test_refuses_with_a_sentence(argv, says, capsys, tiny_folder):
    if argv[0] != "sweep":
        argv = [*argv, "--model", tiny_folder]
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("tokenprune: ") and says in captured.err
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize(
    ("device", "says"),
    [
        ("gpu", "There is no torch device 'gpu'"),
        ("meta", "There is no torch device 'meta'"),
        ("cuda:x", "There is no torch device 'cuda:x'"),
        ("cuda:99", "The device 'cuda:99' is not there"),
        ("cpu:7", "The device 'cpu:7' is not there"),
    ],
)
def test_a_device_that_is_not_there_is_refused_before_loading(device, says, tiny_folder, monkeypatch):
    from transformers import AutoModelForImageTextToText

    monkeypatch.setattr(AutoModelForImageTextToText, "from_pretrained", None)
    with pytest.raises(ValueError, match=says):
        load_model(tiny_folder, device=device)


@pytest.mark.parametrize("kind", ["sweep", "task", "method", "apply"])
@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"a: [1\n", "is no YAML at line 2"),
        (b"a: \xff", "is no text in UTF-8"),
        (b"method: uniform\nkeep: 9\n'keep': 4\n", "is no YAML at line 3, column 1: the key 'keep' stands there again"),
        (
            b"a: [{b: 1, b: 1}]",
            "is no YAML at line 1, column 12: the key 'b' stands there again, after line 1; keep one",
        ),
    ],
)
def test_a_file_that_is_no_yaml_is_named(kind, text, says, tmp_path):
    from tokenprune.evals.config.points import method_of_file
    from tokenprune.evals.config.sweep_file import read_config
    from tokenprune.evals.tasks.load import check_task
    from tokenprune.plan.parse import parse_method

    file = tmp_path / "broken.yaml"
    file.write_bytes(text)
    read = {"sweep": read_config, "task": check_task, "method": method_of_file, "apply": parse_method}[kind]
    with pytest.raises(ValueError, match=f"broken.yaml {says}"):
        read(str(file))


def test_a_merged_key_is_no_second_one():
    assert yaml_value("- &base {a: 1, b: 2}\n- {<<: *base, b: 3}\n", "it") == [{"a": 1, "b": 2}, {"a": 1, "b": 3}]
    assert yaml_value("{1: x, '1': y}", "it") == {1: "x", "1": "y"}


def test_values_mean_what_pyyaml_writes_them_for():
    values = {"a": "1e-3", "b": "0o10", "c": "on", "d": "1:30", "e": 1e-3, "f": True, "g": 8}
    assert yaml_value(yaml.safe_dump(values), "it") == values
    assert yaml_value("[010, yes, 1e-3]", "it") == [8, True, "1e-3"]


def test_options_are_read_as_yaml():
    assert parse_options(["a=1", "b=official", "c=[1, 2]", "d=true"]) == {
        "a": 1,
        "b": "official",
        "c": [1, 2],
        "d": True,
    }
    with pytest.raises(ValueError, match="given twice"):
        parse_options(["a=1", "a=2"])


def test_eval_prints_table_and_paths(tmp_path, tiny_folder, tiny_task, capsys):
    argv = ["eval", "--model", tiny_folder, "--tasks", tiny_task, "--method", "none", "--limit", "4", "--no-timing"]
    assert main([*argv, "--output", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "unpruned" in printed and str(tmp_path / "out" / "summary.csv") in printed
    assert "these are not the numbers of the whole task" in printed
    lines = (tmp_path / "out" / "summary.csv").read_text().splitlines()
    assert "accuracy" in lines[0].split(",") and ",overall," in lines[-1]


def test_run_answers_twice_and_draws(tmp_path, tiny_folder, capsys):
    from PIL import Image

    picture = tmp_path / "picture.png"
    Image.new("RGB", (60, 42), (200, 90, 30)).save(picture)
    overlay = tmp_path / "deep" / "overlay.png"
    argv = ["run", "--model", tiny_folder, "--method", "uniform", "--keep", "9", "--image", str(picture)]
    argv += ["--question", "what is this", "--output", str(overlay), "--max-new-tokens", "1"]
    assert main(argv) == 0
    printed = capsys.readouterr().out
    assert "unpruned" in printed and "uniform@9" in printed and "9 (25%)" in printed
    for said in ("FLOPs to the first token", "KV cache of the prompt", "first token after", "whole answer after"):
        assert f"\n{said}" in printed
    drawn = Image.open(overlay)
    # two panels of 42 pixels, eight times as large, and under them one line
    assert drawn.width == 20 + 336 + 20 + 336 + 20
    top = drawn.height - 20 - 21 - 8 - 336

    def bright(left: int) -> int:
        return sum(drawn.getpixel((left + 56 * x + 28, top + 56 * y + 28))[0] > 150 for x in range(6) for y in range(6))

    assert (bright(20), bright(20 + 336 + 20)) == (36, 9)


def test_run_takes_files_none_and_animations(tmp_path, tiny_folder, capsys):
    from PIL import Image

    method, clip, overlay = tmp_path / "tuned.yaml", tmp_path / "clip.gif", tmp_path / "o.png"
    method.write_text("- {at: input, prune: uniform, keep: 18}\n- {at: 'layer:1', prune: random, keep: 9}\n")
    frames = [Image.new("RGB", (42, 42), colour) for colour in ("red", "green", "blue")]
    frames[0].save(clip, save_all=True, append_images=frames[1:])
    argv = ["run", "--model", tiny_folder, "--image", str(clip), "--question", "what is this", "--output", str(overlay)]
    argv += ["--max-new-tokens", "1"]
    assert main([*argv, "--method", str(method)]) == 0
    printed = capsys.readouterr().out
    assert "clip.gif has 3 frames; only the first is asked about." in printed
    assert "tuned.yaml" in printed and "visual tokens, mean of layers" in printed and "9 (25%)" in printed
    assert main([*argv, "--method", "none"]) == 0
    assert "unpruned" in capsys.readouterr().out and Image.open(overlay).width == 20 + 336 + 20
    for wrong, says in ((["none", "--keep", "4"], "takes no --keep"), ([str(tmp_path / "x.yaml")], "There is no file")):
        assert main([*argv, "--method", *wrong]) == 2
        assert says in capsys.readouterr().err


@pytest.mark.pocket
@pytest.mark.parametrize(
    ("model", "keep", "right"), [("pocket-llava", "64", "vtc_cls"), ("pocket-qwen", "0.25", "divprune")]
)
def test_the_default_sample_is_a_sign_that_pruning_can_get_wrong(model, keep, right, tmp_path, capsys):
    said = {}
    for method in ("holov", right):
        argv = ["run", "--model", model, "--method", method, "--keep", keep, "--output", str(tmp_path / "o.png")]
        assert main(argv) == 0
        lines = [line.split() for line in capsys.readouterr().out.splitlines()]
        (expected,) = (words[1] for words in lines if words[:1] == ["expected"])
        ((_, whole, said[method]),) = (words for words in lines if words[:1] == ["answer"])
        assert whole == expected
    assert said[right] == expected != said["holov"]


@pytest.mark.parametrize("method", ["var(calibrate=2)", "uniform@9+var(channels=[1], tau=1.5, layers=[1])"])
def test_run_says_whether_an_intervention_acts(method, tmp_path, tiny_folder, capsys):
    from PIL import Image

    from tokenprune.evals import single_image as single

    picture = tmp_path / "picture.png"
    Image.new("RGB", (60, 42), (200, 90, 30)).save(picture)
    given = {"keep": None, "options": {}, "image": str(picture), "question": "what is this", "sample": 0}
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        assert single.run_single(tiny_folder, method, output=str(tmp_path / "o.png"), max_new_tokens=2, **given) == 0
    printed = capsys.readouterr().out
    # a random model has no sink channels, and after two prompts that is known; given ones are taken
    expected = "off: no channel stands out" if "calibrate" in method else "channels 1 (given by the caller)"
    assert expected in printed and "not acting yet" not in printed


def test_two_evals_that_differ_have_two_default_folders(tiny_folder, tiny_task):
    def folder(*more: str) -> str:
        given = ["eval", "--model", tiny_folder, "--method", "holov", "--keep", "9", *more]
        return _eval_config(_parser().parse_args(given)).folder.name

    plain = folder()
    assert plain == "tiny-holov-9" == folder("--tasks", "pocket", "--seed", "0", "--no-timing")
    changes = (
        ("--set", "variant=official"), ("--set", "variant=paper"), ("--tasks", tiny_task), ("--limit", "3"),
        ("--limit", "4"), ("--seed", "1"), ("--dtype", "bfloat16"), ("--max-new-tokens", "3"),
    )  # fmt: skip
    others = [folder(*change) for change in changes]
    assert len({plain, *others}) == 1 + len(changes) and all(name.startswith(f"{plain}-") for name in others)
    assert folder("--limit", "3") == others[3]


def test_run_takes_text_as_it_is_and_pictures_as_cameras_mean_them(tiny_folder, tmp_path, capsys, monkeypatch):
    from PIL import Image

    from tokenprune.evals import single_image as single
    from tokenprune.evals.io.picture_reader import read_picture
    from tokenprune.evals.one_prompt.ask import Outcome

    turned = Image.new("RGB", (60, 30), "red")
    exif = turned.getexif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    turned.save(tmp_path / "turned.jpg", exif=exif)
    assert read_picture(tmp_path / "turned.jpg").size == (30, 60)
    argv = ["run", "--model", tiny_folder, "--method", "uniform@9", "--max-new-tokens", "2"]
    question = "is [red]this[/red] a box [/foo]"
    outcome = Outcome("uniform@9", "[b]so[/c]", 36, 9, 9.0, 10, 10, 0.1, 0.2, [list(range(9))])
    monkeypatch.setattr(single, "ask", lambda *args: outcome)
    monkeypatch.setattr(single, "draw_places", lambda *args: turned)
    output = str(tmp_path / "[b]" / "o.png")
    assert main([*argv, "--image", str(tmp_path / "turned.jpg"), "--question", question, "--output", output]) == 0
    said = capsys.readouterr().out
    assert question in said and said.count("[b]so[/c]") == 2 and output in said.replace("\n", "")


@pytest.mark.parametrize("content", [b"", b"no picture", b"\x89PNG\r\n\x1a\n truncated"])
def test_run_refuses_what_is_no_picture(content, tiny_folder, tmp_path, capsys):
    (tmp_path / "x.png").write_bytes(content)
    argv = ["run", "--model", tiny_folder, "--method", "uniform@9", "--image", str(tmp_path / "x.png")]
    assert main([*argv, "--question", "what"]) == 2
    assert "cannot be read as a picture" in capsys.readouterr().err


def test_run_refuses_an_output_before_it_answers(tiny_folder, tmp_path, capsys):
    (tmp_path / "file.png").write_bytes(b"")
    argv = ["run", "--model", tiny_folder, "--method", "uniform@9", "--output", str(tmp_path / "file.png" / "o.png")]
    assert main(argv) == 2 and "file.png" in capsys.readouterr().err


def test_who_reads_may_stop_before_the_end():
    """`tokenprune ls methods | head -1`: no traceback, and nothing is said about the pipe."""
    command = "import sys; from tokenprune.cli import main; sys.exit(main(['ls', 'methods']))"
    with subprocess.Popen(
        [sys.executable, "-c", command], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as listing:
        listing.stdout.close()
        assert listing.stderr.read() == b""
    assert listing.returncode == 0
