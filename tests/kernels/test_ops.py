"""What holds for every op: compilers and counters see one node, and the package needs no triton."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tokenprune.evals.flops import flop_counter
from tokenprune.kernels import (
    aot,
    attention_received,
    attention_rows,
    compact_rows,
    greedy_diversity,
    merge,
    redistribute_attention,
    segmented_topk,
    token_transition,
)

ROOT = Path(__file__).resolve().parents[2]


def examples() -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """Each op and the arguments of one call."""
    torch.manual_seed(0)
    x, half = torch.randn(2, 4, 9, 8), torch.randn(2, 2, 9, 8)
    flags, wide = torch.rand(2, 9) < 0.5, torch.randn(2, 9, 6)
    groups, seen = torch.randint(4, (2, 7), dtype=torch.int8), flags[:1, None] | (torch.arange(9) < 3)
    index = torch.tensor([[0, 2, 8], [1, 3, -1]])
    quotas = torch.tensor([[1, 2], [3, 0]])
    return {
        "attention_rows": (attention_rows, (x[:, :, :2], half, 0.3, None)),
        "attention_received": (attention_received, (x, half, 0.3, torch.tensor([9, 4]))),
        "greedy_diversity": (greedy_diversity, (wide, 4, "k_center", None, None)),
        "segmented_topk": (segmented_topk, (wide[..., 0], [4, 5], quotas, 3)),
        "compact_rows": (compact_rows, (index, [wide, flags])),
        "merge": (merge, (wide, index.repeat(1, 3), 9, flags.float())),
        "token_transition": (token_transition, (wide, wide + 1, wide - 1, wide * 2)),
        "redistribute_attention": (
            redistribute_attention,
            (x[:, :, :2], half, half, groups, seen.expand(1, 2, 9), flags[:, :2], 0.6, 0.1, 0.9, 1e-3, 0.3),
        ),
    }


NAMES = list(examples())


def test_every_op_is_here_and_is_compiled_ahead_of_time() -> None:
    modules = {path.stem for path in (ROOT / "kernels").glob("[a-z]*.py")} - {"aot"}
    assert modules == set(NAMES) == {case.op for case in aot.CASES}


@pytest.mark.parametrize("name", NAMES)
def test_the_op_equals_the_reference_and_its_fake(name: str) -> None:
    """What torch says of custom ops: schema, aliasing, fake tensors of the right shape, stride and dtype."""
    module, args = examples()[name]
    found, expected = module._OP._op(*args), module.reference(*args)
    for one, other in zip(leaves(found), leaves(expected)):
        assert torch.equal(one, other)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(module._OP._op, args, test_utils=tests)


@pytest.mark.parametrize("name", NAMES)
def test_the_launch_makes_what_the_fake_says(name: str) -> None:
    """Kernels noted, not run: shapes and dtypes of their outputs."""
    module, args = examples()[name]
    on_meta = torch.utils._pytree.tree_map(lambda arg: arg.to("meta") if isinstance(arg, Tensor) else arg, args)
    with aot.noting() as noted:
        launched = module.launch(*on_meta)
    assert noted
    for one, other in zip(leaves(launched), leaves(module._OP._op(*on_meta))):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)


def leaves(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else list(value)


@pytest.mark.parametrize("name", ["attention_rows", "attention_received", "greedy_diversity", "redistribute_attention"])
def test_the_formula_counts_what_the_reference_multiplies(name: str) -> None:
    module, args = examples()[name]
    counts = []
    for run in (module._OP._op, module.reference):
        with FlopCounterMode(display=False) as counter:
            run(*args)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_products_outside_torch_are_not_hidden_from_a_counter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the reference multiplies in NumPy: as many numbers as the formula says, and the same choice."""
    rows: list[int] = []
    dot = np.dot

    def noted(matrix: Any, vector: Any, out: Any) -> Any:
        rows.append(matrix.size)
        return dot(matrix, vector, out=out)

    features, first = torch.randn(3, 200, 12), torch.tensor([1, 0, 199])
    monkeypatch.setattr(greedy_diversity.np, "dot", noted)
    plain = greedy_diversity.greedy_diversity(features, 5, "max_sum", first)
    multiplied = 2 * sum(rows)
    for counter in (FlopCounterMode(display=False), flop_counter()):
        with counter:
            counted = greedy_diversity.greedy_diversity(features, 5, "max_sum", first)
        assert torch.equal(counted, plain)
        assert counter.get_total_flops() == multiplied == 2 * 3 * 4 * 200 * 12


def test_compiled_code_holds_the_op_and_not_its_parts() -> None:
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    query, key = torch.randn(1, 2, 1, 4), torch.randn(1, 2, 9, 4)
    compiled = torch.compile(lambda q, k: attention_rows.attention_rows(q, k, 0.5) + 1, backend=keep, fullgraph=True)
    torch.testing.assert_close(compiled(query, key), attention_rows.attention_rows(query, key, 0.5) + 1)
    called = [node.target for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert torch.ops.tokenprune.attention_rows.default in called and len(called) == 2


def test_nothing_needs_triton(tmp_path: Path) -> None:
    """With triton out of reach every op runs, and none is imported for it."""
    code = f"""
import importlib.util as util, sys
find = util.find_spec
util.find_spec = lambda name, *rest: None if name == "triton" else find(name, *rest)
sys.modules["triton"] = None
import torch
from tokenprune.kernels import {", ".join(NAMES)}
print(attention_rows.attention_rows(torch.randn(1, 2, 1, 4), torch.randn(1, 1, 3, 4), 0.5).sum().item())
print(segmented_topk.segmented_topk(torch.arange(6.0)[None], [6], None, 2).tolist())
from tokenprune.evals.flops import flop_counter
with flop_counter() as counter:
    greedy_diversity.greedy_diversity(torch.randn(1, 200, 12), 5, "max_sum", torch.tensor([7]))
print(counter.get_total_flops())
"""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    env.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[1:3] == ["[[4, 5]]", str(2 * 4 * 200 * 12)]
