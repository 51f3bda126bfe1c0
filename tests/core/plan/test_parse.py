"""How a method may be written, and what `apply` says of what cannot be read."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from _tiny import prompts, tiny_llava

import tokenprune
from tokenprune.plan.parse import parse_method
from tokenprune.registry import METHODS, UnknownName


@functools.cache
def model():
    return tiny_llava()


@pytest.mark.parametrize("keep", [0, -3, 0.0, -0.5, 1.5, math.nan, math.inf])
def test_keep_out_of_range(keep):
    with pytest.raises(ValueError, match="keep"):
        tokenprune.apply(model(), "uniform", keep=keep)


@pytest.mark.parametrize("keep", ["64", True, [64]])
def test_keep_of_another_type(keep):
    with pytest.raises(TypeError, match="keep must be an int"):
        tokenprune.apply(model(), "uniform", keep=keep)


def test_no_budget_and_two_budgets():
    with pytest.raises(ValueError, match="how many visual tokens"):
        tokenprune.apply(model(), "uniform")
    with pytest.raises(ValueError, match="Two budgets"):
        tokenprune.apply(model(), "uniform@64", keep=32)
    with pytest.raises(ValueError, match="A budget is a number.*'many'"):
        tokenprune.apply(model(), "uniform@many")


def test_unknown_method_names_the_near_ones():
    with pytest.raises(UnknownName, match=r"no method called 'holow'.*Did you mean 'holov'"):
        tokenprune.apply(model(), "holow", keep=9)


def test_unknown_option_names_the_near_ones():
    with pytest.raises(TypeError, match=r"'vtc_cls' has no option 'start_layr'.*Did you mean 'start_layer'"):
        tokenprune.apply(model(), "vtc_cls", keep=9, start_layr=2)


@pytest.mark.parametrize("name", METHODS.names())
def test_unknown_position_policy(name):
    with pytest.raises(ValueError, match="positions must be"):
        tokenprune.apply(model(), name, keep=9, positions="original")


def test_methods_as_mapping_file_and_object(tmp_path):
    file = tmp_path / "method.yaml"
    file.write_text("method: todre\nkeep: 9\nobjective: k_center\n")
    with tokenprune.applied(model(), file) as handle:
        assert handle.method.objective == "k_center"
    with tokenprune.applied(model(), {"method": "random", "keep": 0.25, "seed": 3}) as handle, torch.no_grad():
        model()(**prompts([1]))
        assert handle.method.seed == 3 and len(handle.kept[0][0]) == 9
    method = METHODS.get("uniform")(positions="keep")
    with tokenprune.applied(model(), method, keep=9) as handle:
        assert handle.method.positions == "keep"
    with pytest.raises(ValueError, match="beside a method object"):
        tokenprune.apply(model(), method, keep=9, positions="compact")
    with pytest.raises(ValueError, match="'methd' for 'method'"):
        tokenprune.apply(model(), {"methd": "random", "keep": 9})
    with pytest.raises(FileNotFoundError, match="no file"):
        tokenprune.apply(model(), tmp_path / "missing.yaml")
    file.write_text("- {at: input, prune: todre, keep: 12, fade: false}\n- {at: 'layer:2', prune: random, keep: 9}\n")
    with tokenprune.applied(model(), file) as handle:
        assert [stage.site for stage in handle.stages] == ["input", "layer:2"]
    file.write_text("todre\n")
    with pytest.raises(ValueError, match="must hold a mapping"):
        tokenprune.apply(model(), file)
    with pytest.raises(TypeError, match="method must be a name"):
        tokenprune.apply(model(), 7, keep=9)


@pytest.mark.parametrize(
    ("method", "says"),
    [
        ({"method": "holov", "power": "a"}, "power of holov must be a number, got 'a'"),
        ({"method": "holov", "crops": 2.5}, "crops of holov must be an integer, got 2.5"),
        ({"method": "vtc_cls", "start_layer": 1.5}, "start_layer of vtc_cls must be an integer, got 1.5"),
        ({"method": "todre", "fade": "maybe"}, "fade of todre must be true or false, got 'maybe'"),
        ({"method": "todre", "tau": True}, "tau of todre must be a number, got True"),
        ({"method": "random", "seed": "a"}, "seed of random must be an integer, got 'a'"),
        ({"method": "var", "p": "a"}, "p of var must be a number, got 'a'"),
        ({"method": "holov", "variant": 3}, "variant of holov must be a text, got 3"),
        ({"method": "holov", "power": float("nan")}, "power of holov must be a number, got nan"),
        ({"method": "transprune", "layers": 0.25}, "layers of transprune must be a list of integers, got 0.25"),
        ({"method": "pixelprune", "mean": [None]}, r"mean of pixelprune must be a list of numbers, got \[None\]"),
        ({"method": "holov", 3: 1}, "An option of 'holov' must have a name that is a text, got 3"),
    ],
)
def test_options_of_another_kind_are_refused(method, says):
    budget = {} if method["method"] == "var" else {"keep": 8}
    with pytest.raises(TypeError, match=says):
        tokenprune.apply(tiny_llava(), {**method, **budget})


def test_options_may_be_none_and_numbers_of_any_kind():
    for method in ({"method": "holov", "crops": None, "power": 1}, {"method": "todre", "tau": 1}):
        tokenprune.apply(tiny_llava(), {**method, "keep": 8}).remove()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[" * 3000, "is nested too deeply to be read"),
        ("method: holov\nkeep: 2020-13-40\n", "has a value that is none: month must be in 1..12"),
        ("method: holov\nkeep: " + "9" * 5000, "has a value that is none"),
        ("method: !!python/object/apply:os.system ['true']\nkeep: 9\n", "is no YAML"),
    ],
)
def test_yaml_that_cannot_be_read(tmp_path, text, says):
    file = tmp_path / "plan.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=says):
        parse_method(file)
    with pytest.raises(FileNotFoundError, match="There is no file"):
        parse_method("x" * 3000 + ".yaml")
    with pytest.raises(ValueError, match=r"no other keys, got \['None', 'a'\]"):
        parse_method({"method": ["holov@9"], None: 1, "a": 2})
