"""Do the tests notice? `python tests/trust/mutants.py runs/mutants.jsonl` changes one place of the code at a time and
runs the tests of that part; a change that no test fails for is a survivor, to be read.

The changes are Cosmic Ray's (an operator for another, a number one off, a condition negated, a loop that does not run);
it is installed by `pip install -c constraints.txt cosmic-ray`. A place is drawn by seed and then one of its changes, so
that an operator with twenty replacements counts no more than a number. Left out is what cannot change what the library
does: annotations, assertions and what an error says.

Each mutant is run in a fork of a process that has loaded torch and transformers and nothing of ours; no file is
touched. A line of the results is a mutant: started again, the command goes on where it was.
"""

from __future__ import annotations

import argparse
import ast
import collections
import contextlib
import difflib
import importlib.machinery
import itertools
import json
import os
import random
import re
import signal
import sys
import time
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
MASKED = ["tests/core/engine/test_masked_reference.py", "tests/core/engine/test_generation.py"]
PARTS: dict[str, tuple[list[str], list[str]]] = {
    "selection": (
        [
            "tokenprune/interfaces/selection.py",
            "tokenprune/interfaces/budget.py",
            "tokenprune/engine/batched_selection.py",
        ]
        + [f"tokenprune/methods/{name}.py" for name in ("divprune", "holov", "todre", "fastv", "vispruner", "uniform")],
        ["tests/core/interfaces", "tests/methods", "tests/core/engine/test_stages.py", *MASKED],
    ),
    "engine": (
        [f"tokenprune/engine/{name}.py" for name in ("decoder_pass", "layer_cuts", "prompt_selection", "outputs")]
        + [f"tokenprune/state/{name}.py" for name in ("compaction", "kv_cache", "prompt_layout")],
        ["tests/core/state", *MASKED, "tests/core/engine/test_whole_masks.py", "tests/core/engine/test_visual_kinds.py"]
        + [
            "tests/core/engine/test_stages.py",
            "tests/core/engine/test_layer_arguments.py",
            "tests/adapters/test_generation_families.py",
            "tests/adapters/test_families.py",
        ],
    ),
    "cost": (
        ["tokenprune/cost.py", "adapters/_layer_shapes.py", "adapters/_tower_cost.py", "adapters/_cost.py"],
        ["tests/evals/profiling/test_cost.py", "tests/core/test_published_flops.py", "tests/adapters/test_costs.py"]
        + [
            "tests/adapters/test_layer_costs.py",
            "tests/adapters/test_families.py",
            "tests/interventions/test_bypass.py",
        ],
    ),
}
# Two operators want to be told names; short strings and numbers that are equal are the same object in CPython.
LEFT_OUT = re.compile("Variable|_Eq_Is$|_NotEq_IsNot$")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--mutants", type=int, default=60, help="places drawn of each part")
    parser.add_argument("--part", choices=list(PARTS), help="this part alone")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--limit", type=float, default=600, help="seconds a mutant may take; one that hangs is noticed")
    parser.add_argument("--of", default="1/1", help="1/2 and 2/2 share the work between two processes")
    args = parser.parse_args()
    share, shares = map(int, args.of.split("/"))
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = _lines(args.output)
    known = {(line["part"], line["module"], line["operator"], line["occurrence"]) for line in done}
    _load_what_is_not_ours()
    for part in [args.part] if args.part else PARTS:
        _check_that_the_tests_pass(part, args.limit)
        drawn = draw(part, args.mutants, args.seed)
        for number, (module, operator, occurrence) in enumerate(drawn):
            if number % shares == share - 1 and (part, module, operator, occurrence) not in known:
                line = {"part": part, "module": module, "operator": operator, "occurrence": occurrence}
                line |= run(part, module, operator, occurrence, args.limit)
                args.output.parent.mkdir(parents=True, exist_ok=True)
                with args.output.open("a", encoding="utf-8") as out:
                    out.write(json.dumps(line) + "\n")
                print(part, module, line["line"], operator.removeprefix("core/"), line["outcome"], flush=True)
    print(table(_lines(args.output)))
    return 0


def table(lines: list[dict[str, Any]]) -> str:
    rows = ["| part | mutants | noticed | share |", "|---|---:|---:|---:|"]
    by_part: dict[str, list[bool]] = collections.defaultdict(list)
    for line in lines:
        by_part[line["part"]].append(line["outcome"] != "survived")
    for part, noticed in [*by_part.items(), ("all", sum(by_part.values(), []))]:
        if noticed:
            rows.append(f"| {part} | {len(noticed)} | {sum(noticed)} | {sum(noticed) / len(noticed):.0%} |")
    return "\n".join(rows)


def draw(part: str, count: int, seed: int) -> list[tuple[str, str, int]]:
    """Module, operator and occurrence of `count` places of a part; a place is a node of the parsed source."""
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.plugins import get_operator, operator_names

    operators = {name: get_operator(name)() for name in operator_names() if not LEFT_OUT.search(name)}
    places: dict[tuple[str, Any], list[tuple[str, int]]] = collections.defaultdict(list)
    for module in PARTS[part][0]:
        source = (ROOT / module).read_text(encoding="utf-8")
        left_out, nodes = _spans_without_effect(source), list(ast_nodes(get_ast(source)))
        for name, operator in operators.items():
            occurrence = 0
            for node in nodes:
                for start, _ in operator.mutation_positions(node):
                    if not any(first <= start <= last for first, last in left_out):
                        places[module, start].append((name, occurrence))
                    occurrence += 1
    generator = random.Random(f"{part} {seed}")
    in_order = generator.sample(sorted(places), len(places))
    drawn = ((module, *generator.choice(places[module, start])) for module, start in in_order)
    return list(itertools.islice(filter(_is_python, drawn), count))


def _is_python(mutant: tuple[str, str, int]) -> bool:
    """Not of a `**` or `*` that hands arguments on, which is read as an operator too."""
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator

    module, operator, occurrence = mutant
    mutated = mutate_code((ROOT / module).read_text(encoding="utf-8"), get_operator(operator)(), occurrence)
    try:
        with warnings.catch_warnings(action="ignore"):
            compile(mutated or "", module, "exec", dont_inherit=True)
    except SyntaxError:
        return False
    return mutated is not None


def _spans_without_effect(source: str) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """(line, column) of the first and the last character of annotations, assertions and `raise` statements."""
    found: list[ast.AST] = []
    for node in ast.walk(ast.parse(source)):
        found += [node] if isinstance(node, ast.Raise | ast.Assert) else []
        for field in ("annotation", "returns"):
            found += [part] if (part := getattr(node, field, None)) is not None else []
    return [((node.lineno, node.col_offset), (node.end_lineno, node.end_col_offset)) for node in found]  # type: ignore[attr-defined]


def run(part: str, module: str, operator: str, occurrence: int, limit: float) -> dict[str, Any]:
    """What became of one mutant ("killed", "hangs", "survived"), in which line, what it changed and the seconds."""
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator

    source = (ROOT / module).read_text(encoding="utf-8")
    mutated = mutate_code(source, get_operator(operator)(), occurrence)
    if mutated is None:
        raise RuntimeError(f"{operator} has no occurrence {occurrence} in {module}.")
    change = list(difflib.unified_diff(source.splitlines(), mutated.splitlines(), lineterm="", n=0))[2:]
    begun = time.monotonic()
    status = _fork_and_test(part, ROOT / module, mutated, limit)
    outcome = "hangs" if status is None else "survived" if status == 0 else "killed"
    line = int(re.match(r"@@ -(\d+)", change[0])[1])  # type: ignore[index]
    return {"line": line, "change": change[1:], "outcome": outcome, "seconds": round(time.monotonic() - begun, 1)}


def _check_that_the_tests_pass(part: str, limit: float) -> None:
    module = PARTS[part][0][0]
    if _fork_and_test(part, ROOT / module, (ROOT / module).read_text(encoding="utf-8"), limit) != 0:
        raise RuntimeError(f"The tests of {part} fail, or take more than {limit:.0f} s, on the code as it is.")


def _fork_and_test(part: str, path: Path, source: str, limit: float) -> int | None:
    """What pytest's process ended with, `path` being read as `source`; None past `limit` seconds."""
    begun, child = time.monotonic(), os.fork()
    if child == 0:
        os.setsid()
        _run_tests(path, source, PARTS[part][1])
    while time.monotonic() - begun < limit:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return status
        time.sleep(0.05)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def _run_tests(path: Path, mutated: str, tests: list[str]) -> None:
    """Never returns: ends the forked process with what pytest says of `tests`, `path` being read as `mutated`."""
    import pytest

    stock = importlib.machinery.SourceFileLoader.get_code

    def get_code(self: Any, name: str) -> Any:
        if Path(self.path).resolve() == path:
            return compile(mutated, self.path, "exec", dont_inherit=True)
        return stock(self, name)

    importlib.machinery.SourceFileLoader.get_code = get_code  # type: ignore[method-assign]
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    status = 1
    try:
        status = int(pytest.main(["-x", "-q", "--sampled", "-m", "not slow and not packaging", *tests]))
    finally:
        os._exit(status)


def _load_what_is_not_ours() -> None:
    import numpy  # noqa: F401
    import pytest  # noqa: F401
    import torch
    import transformers  # noqa: F401
    from transformers import LlavaForConditionalGeneration, Qwen2_5_VLForConditionalGeneration  # noqa: F401

    torch.set_num_threads(1)
    if any(name.partition(".")[0] == "tokenprune" for name in sys.modules):
        raise RuntimeError("tokenprune is loaded already, so its mutants would not be.")


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


if __name__ == "__main__":
    sys.exit(main())
