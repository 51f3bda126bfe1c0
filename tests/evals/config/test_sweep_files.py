"""Sweep files: grids, lists of points, seeds and includes, and the order in which they become points."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from tokenprune.evals.config.grid import expand, matching_reference
from tokenprune.evals.config.measure import Measure, Overlays
from tokenprune.evals.config.points import NONE, MethodEntry, Point, read_entry
from tokenprune.evals.config.run_config import RunConfig
from tokenprune.evals.config.sweep_file import packaged_configs, read_config, read_settings
from tokenprune.evals.sweep.sweep import run


def written(folder: Path, file: str = "sweep.yaml", **settings) -> Path:
    path = folder / file
    path.write_text(yaml.safe_dump(settings, sort_keys=False))
    return path


def labels(config: RunConfig) -> list[str]:
    return [point.label for point in config.points()]


@pytest.fixture
def base(tiny_folder) -> dict:
    return {"model": tiny_folder, "tasks": ["pocket"], "methods": ["uniform"], "keep": [9], "references": False}


# Grids

names = st.sampled_from(["alpha", "beta", "gamma", "delta"])
values = st.lists(st.integers(-9, 9), min_size=1, max_size=4, unique=True)
grids = st.dictionaries(names, values, max_size=3)


@settings(max_examples=60)
@given(
    st.lists(st.sampled_from(["m1", "m2", "m3"]), min_size=1, max_size=3, unique=True),
    st.lists(st.sampled_from(["t1", "t2"]), min_size=1, max_size=2, unique=True),
    st.lists(st.integers(1, 576), min_size=1, max_size=4, unique=True),
    grids,
)
def test_a_grid_is_its_product(models, tasks, keeps, grid):
    entries = read_entry({"method": "uniform", "grid": grid}, keeps)
    points = expand(models, tasks, entries, [], [], references=False)
    wanted = len(models) * len(tasks) * len(keeps) * math.prod(map(len, grid.values()))
    assert len(points) == wanted
    assert len({point.key for point in points}) == wanted
    assert points == expand(models, tasks, entries, [], [], references=False)
    # the order is that of the file: model, task, options (the last one fastest), budget
    place = [
        (
            models.index(point.model),
            tasks.index(point.task),
            *(values.index(dict(point.options)[name]) for name, values in grid.items()),
            keeps.index(point.keep),
        )
        for point in points
    ]
    assert place == sorted(place)


@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=4, unique=True),
    st.lists(st.integers(1, 9), min_size=1, unique=True),
)
@settings(max_examples=60)
def test_seeds_multiply_what_draws_and_nothing_else(seeds, keeps):
    entries = [one for method in ("none", "uniform", "random") for one in read_entry(method, keeps)]
    points = expand(["m"], ["t"], entries, [], seeds, references=True)
    by_method = {name: [point for point in points if point.method == name] for name in ("none", "uniform", "random")}
    assert [len(found) for found in by_method.values()] == [1, len(keeps), len(keeps) * len(seeds)]
    assert {point.seed for point in by_method["random"]} == set(seeds)
    assert all(point.seed is None for name in ("none", "uniform") for point in by_method[name])
    assert len({point.key for point in points}) == len(points)


def test_what_draws_depends_on_the_options(tiny_folder):
    methods = ["todre", {"method": "todre", "pivot": "random"}, {"method": "random", "seed": 5}, "random+var"]
    config = RunConfig("x", tiny_folder, ["pocket"], methods, [4], references=False, seeds=[0, 7])
    assert labels(config) == [
        "todre@4", "todre(pivot=random)@4 seed 0", "todre(pivot=random)@4 seed 7", "random(seed=5)@4",
        "random+var@4 seed 0", "random+var@4 seed 7",
    ]  # fmt: skip


def test_options_in_a_grid(base, tmp_path):
    entry = {"method": "todre", "grid": {"objective": ["k_center", "max_sum"], "fade": [True, False]}, "tau": 0.2}
    config = read_config(written(tmp_path, **{**base, "methods": [entry], "keep": [9, 4]}))
    assert labels(config)[:3] == [
        "todre(fade=True,objective=k_center,tau=0.2)@9",
        "todre(fade=True,objective=k_center,tau=0.2)@4",
        "todre(fade=False,objective=k_center,tau=0.2)@9",
    ]
    assert len(config.points()) == 8


def test_two_settings_never_share_a_label():
    entries = [MethodEntry("uniform", (("width", value),), (9,)) for value in (1, "1")]
    with pytest.raises(ValueError, match=r"both written 'uniform\(width=1\)@9'"):
        expand(["m"], ["t"], entries, [], [], references=False)


def test_comparisons_are_within_a_seed():
    def random(seed, **changes):
        return Point(**{"model": "m", "task": "t", "method": "random", "keep": 4, "seed": seed, **changes})

    points = [random(3), random(0), random(1), random(0, keep=9), Point("m", "t", "random", 4, (("seed", 8),))]
    points += [Point("m", "t", "uniform", 4), Point("m", "t", "todre", 4, seed=1), Point("m", "t", "uniform", 2)]
    others = [matching_reference(point, points) for point in points]
    assert others == [None] * 4 + [points[0], points[0], points[2], None]


# Lists of points


def test_points_in_place_of_a_grid(tmp_path, tiny_folder):
    points = [
        {
            "model": tiny_folder,
            "task": "pocket:count",
            "method": "holov",
            "keep": 4,
            "options": {"variant": "official"},
        },
        {"model": "pocket-llava", "task": "pocket:read", "method": "uniform", "keep": 0.5},
        {
            "model": tiny_folder,
            "task": "pocket:count",
            "method": "holov",
            "keep": 4,
            "options": {"variant": "official"},
        },
    ]
    config = read_config(written(tmp_path, points=points))
    assert [(point.model, point.task, point.label) for point in config.points()] == [
        (tiny_folder, "pocket:count", "none"),
        (tiny_folder, "pocket:count", "random@4"),
        (tiny_folder, "pocket:count", "holov(variant=official)@4"),
        ("pocket-llava", "pocket:read", "none"),
        ("pocket-llava", "pocket:read", "random@0.5"),
        ("pocket-llava", "pocket:read", "uniform@0.5"),
    ]
    assert (config.models, config.all_tasks) == ([tiny_folder, "pocket-llava"], ["pocket:count", "pocket:read"])


def test_points_beside_a_grid(base, tmp_path):
    points = [{"method": "vtc_cls", "keep": 4}, {"method": "uniform@2", "task": "pocket:count"}]
    config = read_config(written(tmp_path, **base, points=points))
    assert [(point.task, point.label) for point in config.points()] == [
        ("pocket", "uniform@9"), ("pocket", "vtc_cls@4"), ("pocket:count", "uniform@2"),
    ]  # fmt: skip


def test_what_a_run_writes_down_is_the_run(base, tmp_path):
    points = [{"method": "vtc_cls", "keep": 4}]
    config = read_config(written(tmp_path, **base, points=points, seeds=[1, 2], measure={"repeats": 3}))
    assert config.as_dict()["points"] == points
    again = read_config(written(tmp_path, **config.as_dict()))
    assert again == config


# Includes


def test_later_keys_win_and_lists_are_replaced(base, tmp_path):
    (tmp_path / "parts").mkdir()
    written(tmp_path / "parts", "times.yaml", measure={"samples": 7, "repeats": 9}, limit=5, keep=[1, 2, 3])
    written(tmp_path / "parts", "both.yaml", include="times.yaml", limit=6, seeds=[1])
    own = {"include": ["parts/both.yaml"], **base, "measure": {"repeats": 2}}
    config = read_config(written(tmp_path, **own))
    assert (config.limit, config.seeds, config.keep) == (6, [1], [9])
    assert (config.measure.samples, config.measure.repeats) == (7, 2)
    # of two included files the later one wins
    first, second = written(tmp_path, "a.yaml", limit=1, seed=1), written(tmp_path, "b.yaml", limit=2)
    read = read_settings(written(tmp_path, "c.yaml", include=[first.name, second.name]))
    assert read == {"limit": 2, "seed": 1}
    read = read_settings(written(tmp_path, "c.yaml", include=[second.name, first.name]))
    assert read == {"limit": 1, "seed": 1}


def test_an_included_file_may_be_shared(tmp_path):
    written(tmp_path, "base.yaml", limit=3)
    for name in "ab":
        written(tmp_path, f"{name}.yaml", include="base.yaml", seed=1)
    assert read_settings(written(tmp_path, "c.yaml", include=["a.yaml", "b.yaml"])) == {"limit": 3, "seed": 1}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"include": "tims.yaml"}, "sweep.yaml includes tims.yaml, and there is no file"),
        ({"include": "tims.yaml"}, "Did you mean 'times.yaml'"),
        ({"include": "circle.yaml"}, "in a circle: sweep.yaml -> circle.yaml -> sweep.yaml"),
        ({"include": 3}, "a path or a list of paths, got 3"),
        ({"include": "wrong.yaml"}, "wrong.yaml has an unknown key 'limt'. Did you mean 'limit'"),
        ({"include": "deep.yaml"}, "measure in deep.yaml has an unknown key 'repeat'. Did you mean 'repeats'"),
        ({"inclued": "times.yaml"}, "unknown key 'inclued'. Did you mean 'include'"),
        ({"point": []}, "unknown key 'point'. Did you mean 'points'"),
        ({"points": {"method": "uniform"}}, "points must be a list"),
        ({"points": ["uniform@4"]}, r"points[0] must be a mapping"),
        ({"points": [{"method": "uniform", "kep": 4}]}, "points[0] has an unknown key 'kep'. Did you mean 'keep'"),
        ({"points": [{"method": "holov", "keep": 4, "variant": "paper"}]}, "stand under 'options'"),
        ({"points": [{"method": "uniform"}]}, "Say how many visual tokens 'uniform' keeps"),
        ({"points": [{"method": "holov", "keep": 4, "options": {"varient": "paper"}}]}, "Did you mean 'variant'"),
        ({"points": [{"method": "uniform", "keep": 4, "task": "poket"}]}, "Did you mean 'pocket'"),
        ({"points": [{"method": "uniform", "keep": 4, "model": "pocket-lava"}]}, "no model called 'pocket-lava'"),
        ({"points": [{"keep": 4}]}, "points[0] needs a method"),
        ({"methods": [{"method": "todre", "grd": {"fade": [True]}}]}, "unknown key 'grd'. Did you mean 'grid'"),
        ({"methods": [{"method": "todre", "grid": {"fad": [True]}}]}, "no option 'fad'. Did you mean 'fade'"),
        ({"methods": [{"method": "todre", "grid": {"fade": True}}]}, "gives 'fade' of 'todre' a list of values"),
        ({"methods": [{"method": "todre", "grid": {"fade": []}}]}, "gives 'fade' of 'todre' a list of values"),
        ({"methods": [{"method": "todre", "grid": ["fade"]}]}, "maps options to lists"),
        ({"methods": [{"method": "todre", "fade": True, "grid": {"fade": [True]}}]}, "in its grid and beside it"),
        ({"methods": [{"metod": "todre"}]}, "Did you write 'metod' for 'method'"),
        ({"seeds": ["one"]}, "seeds must be a list of integers"),
        ({"seeds": [1, 1]}, "each once, got [1, 1]"),
        ({"tasks": ["lmm:pope"]}, "no task called 'lmm:pope'"),
    ],
)  # fmt: skip
def test_mistakes_at_every_level(base, tmp_path, change, says):
    written(tmp_path, "times.yaml", limit=3)
    written(tmp_path, "circle.yaml", include=["times.yaml", "sweep.yaml"])
    written(tmp_path, "wrong.yaml", limt=3)
    written(tmp_path, "deep.yaml", measure={"repeat": 3})
    with pytest.raises((ValueError, TypeError, KeyError, OSError)) as caught:
        read_config(written(tmp_path, **{**base, **change}))
    assert says in str(caught.value)


@pytest.mark.parametrize("name", [name for name in packaged_configs() if "/" not in name])
def test_older_files_mean_what_they_meant(name):
    """Every model x task x budget of a file, references first, in the file's order; written out here once more."""
    data = yaml.safe_load(packaged_configs()[name].read_text())
    if "include" in data:
        data = yaml.safe_load(packaged_configs()[data["include"].removesuffix(".yaml")].read_text()) | data
    if "keep" not in data:  # each entry says its own budget, or has none, and references are off
        entries = [entry if isinstance(entry, dict) else {"method": entry} for entry in data["methods"]]
        wanted = [f"{one['method']}@{one['keep']}" if "keep" in one else one["method"] for one in entries]
        assert labels(read_config(name)) == wanted * len(data["tasks"]) and data["references"] is False
        return
    keeps = data["keep"]
    wanted = ["none", *(f"random@{keep}" for keep in keeps)]
    for entry in data["methods"]:
        given = dict(entry) if isinstance(entry, dict) else {"method": entry}
        method = given.pop("method")
        label = method + (f"({','.join(f'{k}={v}' for k, v in sorted(given.items()))})" if given else "")
        wanted += [] if method in ("none", "random") else [f"{label}@{keep}" for keep in keeps]
    assert labels(read_config(name)) == wanted * len(data["tasks"])


# A run with several seeds, from end to end


@pytest.fixture(scope="module")
def seeded(tmp_path_factory, tiny_folder, tiny_task):
    folder = tmp_path_factory.mktemp("seeds")
    config = RunConfig(
        "seeds", tiny_folder, [tiny_task], ["uniform"], [9], limit=12, batch_size=6, seeds=[0, 4], output=str(folder),
        measure=Measure(samples=1, times=False, flops=False, decode_tokens=0), overlays=Overlays(samples=0),
    )  # fmt: skip
    return run(config, Console(quiet=True)), folder


def test_seeds_are_run_and_shown(seeded):
    done, folder = seeded
    assert [record["label"] for record in done.records] == ["none", "random@9 seed 0", "random@9 seed 4", "uniform@9"]
    assert [record["seed"] for record in done.records] == [None, 0, 4, None]
    rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    kept = {seed: [row["kept"] for row in rows if row["point"].endswith(f"random@9 seed {seed}")] for seed in (0, 4)}
    assert len(kept[0]) == 12
    predictions = {
        seed: [row["prediction"] for row in rows if row["point"].endswith(f"seed {seed}")] for seed in (0, 4)
    }
    assert predictions[0] != predictions[4], "another seed must make another choice"
    uniform = done.records[-1]["overall"]
    difference = uniform["accuracy"] - done.records[1]["overall"]["accuracy"]
    assert uniform["vs_random"] == pytest.approx(difference), "compared with the first seed"
    assert "random seed 4" in (folder / "report.html").read_text()


def test_seeds_are_summed_up(seeded):
    import csv

    done, folder = seeded
    with (folder / "seeds.csv").open() as stream:
        (row,) = csv.DictReader(stream)
    accuracies = [record["overall"]["accuracy"] for record in done.records if record["method"] == "random"]
    assert (row["method"], row["keep"], row["seeds"]) == ("random", "9", "0 4")
    assert float(row["mean"]) == pytest.approx(sum(accuracies) / 2)
    with (folder / "summary.csv").open() as stream:
        table = [row for row in csv.DictReader(stream) if row["family"] == "overall"]
    assert [row["seed"] for row in table] == ["", "0", "4", ""]


def test_none_is_a_name_of_its_own():
    (entry,) = read_entry(NONE, [1, 2])
    assert [point.keep for point in expand(["m"], ["t"], [entry], [], [3], True)] == [None]
