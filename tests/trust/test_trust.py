"""A few hundred cases and cycles of what `tests/trust/fuzz.py` and `tests/trust/soak.py` run by the thousand, and that
nothing in the library runs what it reads."""

from __future__ import annotations

import ast
import os
import pickle
from pathlib import Path

import pytest
from _fuzz import complaint, judge
from _fuzz_cases import KINDS, case
from _fuzz_prompts import prompt
from _paths import ROOT
from _soak import METHODS, cycles
from _tiny import tiny_llava
from _tiny_processor import tiny_processor, word_tokenizer

from tokenprune.evals.models.load import LoadedModel
from tokenprune.plan.parse import parse_method

FEW = {"plan": 100, "task": 60, "request": 100, "sweep": 30, "run": 150, "prompt": 12}
FIRST = 1_000_000  # other cases than those of the long run


@pytest.mark.parametrize("kind", FEW)
def test_wrong_input_gets_a_result_or_a_sentence(kind, tmp_path, monkeypatch):
    monkeypatch.setitem(KINDS, "prompt", prompt)
    folder = tmp_path / "case"
    folder.mkdir()
    found = [judge(kind, number, case(kind, number, folder)) for number in range(FIRST, FIRST + FEW[kind])]
    assert [f"{one.kind} {one.number}: {one.why}\n{one.where}" for one in found if one is not None] == []


def test_the_judge_tells_sentences_from_what_falls_out():
    def error_of(act) -> BaseException:
        with pytest.raises(BaseException) as caught:
            act()
        return caught.value

    assert complaint(error_of(lambda: parse_method("holov@0"))) is None
    assert complaint(error_of(lambda: [][1])) == "IndexError that the library did not raise"
    assert "RecursionError" in str(complaint(error_of(lambda: (lambda f: f(f))(lambda f: f(f)))))
    assert judge("plan", 0, lambda: parse_method("holov@9")) is None
    for act in (lambda: os.system("true"), lambda: pickle.loads(pickle.dumps(Path()))):
        finding = judge("plan", 0, act)
        assert finding is not None and "it did" in finding.why, "a forbidden act goes unseen"


def test_cycles_leave_nothing_behind():
    processor = tiny_processor(word_tokenizer())
    processor.tokenizer.padding_side = "left"
    marks, changed = cycles(LoadedModel("tiny", tiny_llava(), processor, ""), 96, 48)
    assert changed == 0 and [mark.cycles for mark in marks] == [0, 48, 96]
    assert {mark.hooks for mark in marks} == {marks[0].hooks}
    assert marks[-1].objects - marks[0].objects < 96 // len(METHODS), "fewer than one a round"


def test_nothing_that_is_read_is_run():
    """Weights are safetensors, or `torch.load` with weights only; YAML is read by PyYAML's safe loader."""
    files = [
        file for folder in ("tokenprune", "adapters", "kernels", "evals") for file in (ROOT / folder).rglob("*.py")
    ]
    assert [problem for file in sorted(files) for problem in _dangers(file)] == []
    strict = (ROOT / "tokenprune/plan/expression.py").read_text(encoding="utf-8")
    assert "class StrictLoader(yaml.SafeLoader)" in strict


@pytest.mark.parametrize(
    "line",
    [
        "torch.load(path)", "torch.load(path, weights_only=False)", "yaml.load(text, Loader=yaml.Loader)",
        "exec(text)", "np.load(path, allow_pickle=True)", "subprocess.run(text, shell=True)", "import pickle",
        "from dill import loads",
    ],
)  # fmt: skip
def test_what_runs_what_it_reads_is_seen(line, tmp_path):
    file = tmp_path / "module.py"
    file.write_text(line)
    assert len(_dangers(file)) == 1


def _dangers(file: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            found += [f"{file}: imports {name}" for name in names if name in ("pickle", "marshal", "shelve", "dill")]
        elif isinstance(node, ast.Call):
            said, given = ast.unparse(node.func), {one.arg: ast.unparse(one.value) for one in node.keywords}
            reads = said.startswith("yaml.") and "load" in said and said != "yaml.safe_load"
            if (
                said in ("eval", "exec", "os.system", "yaml.unsafe_load")
                or (said == "torch.load" and given.get("weights_only") != "True")
                or (reads and (file.name, given.get("Loader")) != ("expression.py", "_strict_loader()"))
                or "True" in (given.get("allow_pickle"), given.get("shell"))
            ):
                found.append(f"{file}:{node.lineno}: {ast.unparse(node)}")
    return found
