"""`tokenprune ls methods`: its table, read from sources, says what the classes say; one method tells all of itself."""

from __future__ import annotations

import dataclasses
import json

import pytest

from tokenprune.cli import main
from tokenprune.commands._methods import FACTS, described, facts, method_details, method_lines
from tokenprune.interfaces.pruner import Pruner
from tokenprune.registry import METHODS

BUILT_IN = [name for name in METHODS.names() if METHODS.file_of(name)]


@pytest.mark.parametrize("name", BUILT_IN)
def test_the_sources_say_what_the_class_says(name):
    cls, found = METHODS.get(name), facts(name)
    for fact in FACTS:
        if fact != "adaptive":
            assert found[fact] == getattr(cls, fact), fact
    own = cls.is_adaptive is not Pruner.is_adaptive
    assert found["adaptive"] in ({"by options"} if own else {cls.adaptive, "by options"})


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_option_of_a_method_is_explained(name):
    options = method_details(name)["options"]
    assert [option["name"] for option in options] == [field.name for field in dataclasses.fields(METHODS.get(name))]
    assert [option["name"] for option in options if not option["means"]] == []
    json.dumps(method_details(name), default=str)


def test_the_table_has_a_line_a_method(capsys):
    main(["ls", "methods"])
    lines = capsys.readouterr().out.splitlines()
    assert lines == method_lines() and [line.split()[0] for line in lines[1:]] == METHODS.names()
    fastv = next(line for line in lines if line.startswith("fastv "))
    assert fastv.split()[1:6] == ["layer", "yes", "keep", "exact", "no"]
    assert next(line for line in lines if line.startswith("todre ")).split()[4:6] == ["by", "options"]


def test_json_holds_the_same(capsys):
    main(["ls", "methods", "--json"])
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["fastv"]["site"] == "layer" and "README" in rows["fastv"]["reproduces"]
    main(["ls", "methods", "holov", "--json"])
    one = json.loads(capsys.readouterr().out)
    assert one["variants"] == ["paper", "official"] and one["does"] == rows["holov"]["does"]


def test_one_method_shows_its_options_and_its_source(capsys):
    main(["ls", "methods", "todre"])
    out = capsys.readouterr().out
    for words in (
        "site         input",
        "signals      ",
        "arXiv 2505.18757",
        "no published number is known",
        "tau = 0.1",
        "0.1 in the paper",
        "Our choices",
    ):
        assert words in out


def test_a_method_says_which_signals_its_sources_name():
    assert method_details("uniform")["signals"] == []
    assert method_details("fastv")["signals"] == ["last_attention"]
    assert "cls_attention" in method_details("vtc_cls")["signals"]


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["ls", "methods", "holv"], "Did you mean 'holov'"),
        (["ls", "models", "holov"], "A name and --json go with `ls methods`"),
        (["ls", "tasks", "--json"], "not with `ls tasks`"),
    ],
)
def test_what_does_not_work_is_a_sentence(argv, says, capsys):
    assert main(argv) == 2
    assert says in capsys.readouterr().err


def test_entries_of_a_docstring():
    text = """One.

    Attributes:
        a: first,
            and on.
        b, c: both.

    More: not this.
    """
    assert described(text) == {"a": "first, and on.", "b": "both.", "c": "both."}
