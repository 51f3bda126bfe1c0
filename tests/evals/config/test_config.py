"""A sweep file is checked whole before anything runs, and errors say what to write instead."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from tokenprune.evals.config.measure import Measure, Overlays
from tokenprune.evals.config.run_config import RunConfig
from tokenprune.evals.config.sweep_file import known_keys, packaged_configs, read_config
from tokenprune.evals.tasks.load import check_task
from tokenprune.registry import UnknownName

GOOD = "model: {model}\ntasks: [pocket]\nmethods: [none, uniform]\nkeep: [9]\n"


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "sweep.yaml"
    path.write_text(text)
    return path


def test_points_start_with_what_they_are_compared_with(tmp_path, tiny_folder):
    config = read_config(written(tmp_path, GOOD.format(model=tiny_folder) + "limit: 3\n"), output="elsewhere")
    assert [point.label for point in config.points()] == ["none", "random@9", "uniform@9"]
    assert [point.reference for point in config.points()] == [False, True, False]
    assert (config.limit, config.folder, config.name) == (3, Path("elsewhere"), "sweep")


def test_options_and_own_budgets(tiny_folder):
    entry = {"method": "holov", "variant": "official", "keep": 4}
    config = RunConfig("x", tiny_folder, ["pocket"], [entry, "uniform@0.5"], [9], references=False)
    config.check()
    assert [point.label for point in config.points()] == ["holov(variant=official)@4", "uniform@0.5"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("limt: 3", "unknown key 'limt'. Did you mean 'limit'"),
        ("measure: {repeat: 3}", "unknown key 'repeat'. Did you mean 'repeats'"),
        ("overlays: 3", "overlays in sweep.yaml must be a mapping"),
        ("limit: 0", "limit must be an integer of at least 1, got 0"),
        ("batch_size: 2.5", "batch_size must be an integer"),
        ("measure: {repeats: 0}", "measure.repeats must be an integer of at least 1"),
        ("dtype: bfloat", "Did you mean 'bfloat16'"),
        ("seed: yes", "seed must be an integer"),
        ("tasks: [poket]", "no task called 'poket'. Did you mean 'pocket'"),
        ("tasks: []", "tasks must name at least one entry"),
        ("methods: [unifrm]", "no method called 'unifrm'. Did you mean 'uniform'"),
        ("methods: [{method: holov, varient: paper}]", "no option 'varient'. Did you mean 'variant'"),
        ("methods: [{methd: holov}]", "mapping with the key 'method'"),
        ("methods: [uniform@many]", "or a mean over the decoder's layers like avg64, got 'many'"),
        ("keep: []", "Say how many visual tokens 'uniform' keeps"),
        ("keep: [1.5]", "must be in"),
        ("keep: [0]", "at least 1 token"),
        ("keep: [.nan]", "must be in"),
        ('share_tower: "no"', "share_tower must be true or false, got 'no'"),
        ("references: 0", "references must be true or false, got 0"),
        ("measure: {times: 1}", "measure.times must be true or false, got 1"),
        ('measure: {flops: "off"}', "measure.flops must be true or false, got 'off'"),
        ("overlays: {keep: 5}", "overlays.keep must be a budget of the run, got 5; it has 9"),
        ("model: pocket-lava", "no model called 'pocket-lava'"),
        ("model: 3", "model must be a text, or a list of texts, got 3"),
        ("model: [null]", "model must be a text, or a list of texts, got [None]"),
        ("tasks: [[pocket]]", "tasks must be a text, or a list of texts, got [['pocket']]"),
        ("tasks: {pocket: 3}", "tasks must be a text, or a list of texts, got [{'pocket': 3}]"),
        ("tasks: null", "tasks must be a text"),
        ("name: 2026", "name must be a text, got 2026"),
        ("device: 0", "device must be a text, got 0"),
        ("output: [runs]", "output must be a text, got ['runs']"),
    ],
)
def test_mistakes_are_found_before_the_work(tmp_path, tiny_folder, change, says):
    data = {**yaml.safe_load(GOOD.format(model=tiny_folder)), **yaml.safe_load(change)}
    with pytest.raises((ValueError, TypeError, UnknownName)) as caught:
        read_config(written(tmp_path, yaml.safe_dump(data)))
    assert says in str(caught.value)


def test_missing_key_and_file(tmp_path):
    with pytest.raises(ValueError, match="lacks the key 'model'"):
        read_config(written(tmp_path, "tasks: [pocket]\nmethods: [none]\n"))
    with pytest.raises(FileNotFoundError, match="Did you mean 'demo'"):
        read_config("dem")


@pytest.mark.parametrize("name", sorted(packaged_configs()))
def test_packaged_sweeps_comment_every_line(name):
    lines = packaged_configs()[name].read_text().splitlines()
    bare = [line for line in lines if line.strip() and "#" not in line and line != "methods:"]
    assert not bare


def test_task_file_is_checked(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("data: x.parquet\ncolums: {}\n")
    with pytest.raises(ValueError, match="unknown key 'colums'. Did you mean 'columns'"):
        check_task(str(path))
    path.write_text("data: x.parquet\nmatch: exactly\n")
    with pytest.raises(ValueError, match="match in .* must be one of exact, contains"):
        check_task(str(path))
    with pytest.raises(FileNotFoundError):
        check_task(str(tmp_path / "none.yaml"))


WRONG = (3, -1, 1.5, True, None, "x", [1], [None], ["x"], [], {"a": 1}, {})
KEYS = [(name,) for name in known_keys()] + [
    (section, field.name) for section, cls in (("measure", Measure), ("overlays", Overlays)) for field in fields(cls)
]


@pytest.mark.parametrize("path", KEYS, ids=".".join)
def test_no_value_of_a_wrong_kind_ends_in_a_stack_trace(path, tmp_path, tiny_folder):
    """Whatever stands behind a key: it is taken, or refused in a sentence."""
    for value in WRONG:
        data = {**yaml.safe_load(GOOD.format(model=tiny_folder)), path[0]: {path[1]: value} if path[1:] else value}
        try:
            config = read_config(written(tmp_path, yaml.safe_dump(data)))
            assert config.folder and config.points()
        except (ValueError, TypeError, UnknownName, FileNotFoundError) as error:
            said = str(error.args[0])
            assert said[-1] in ".?" and " " in said and "object" not in said and "unhashable" not in said, (
                f"{value}: {said}"
            )
