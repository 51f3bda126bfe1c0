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

from tokenprune.evals.profiling.flops import flop_counter
from tokenprune.kernels import (
    aot,
    attention_received,
    attention_rows,
    compact_rows,
    greedy_coverage,
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
        "greedy_coverage": (greedy_coverage, (wide, flags.float(), 4, False)),
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
    modules = {path.stem for path in (ROOT / "kernels").glob("*.py")} - {"aot", "dispatch", "launch"}
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


@pytest.mark.parametrize(
    "name", ["attention_rows", "attention_received", "greedy_coverage", "greedy_diversity", "redistribute_attention"]
)
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
from tokenprune.evals.profiling.flops import flop_counter
with flop_counter() as counter:
    greedy_diversity.greedy_diversity(torch.randn(1, 200, 12), 5, "max_sum", torch.tensor([7]))
print(counter.get_total_flops())
"""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    env.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[1:3] == ["[[4, 5]]", str(2 * 4 * 200 * 12)]


GRADIENTS: dict[str, Any] = {
    "attention_rows": lambda x: attention_rows.attention_rows(x[:, :, :2], x, 0.3) @ x[:, 0],
    "attention_received": lambda x: attention_received.attention_received(x, x, 0.3)[:, None, :, None] * x,
    "compact_rows": lambda x: compact_rows.compact_rows(torch.tensor([[0, 2], [1, -1]]), [x])[0],
    "merge": lambda x: merge.merge(x[:, 0], torch.tensor([[0, 1, 1, -1, 0]] * 2), 2),
    "token_transition": lambda x: torch.cat(
        token_transition.token_transition(x[:, 0], x[:, 1], x[:, 2], x[:, 3])
    )[..., None],
    "redistribute_attention": lambda x: redistribute_attention.redistribute_attention(
        x[:, :, :2], x, x, torch.tensor([[1, 2, 1, 1, 3]] * 2, dtype=torch.int8), None, None,
        share=0.6, least_mass=0.1, most_sink=0.9, slack=1e-3, scale=0.3,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", list(GRADIENTS))
def test_gradients_of_compiled_code_are_those_of_the_reference(name: str) -> None:
    """Ops have no backward, so where a gradient is asked for no op may be in the graph."""
    function, given = GRADIENTS[name], torch.randn(2, 4, 5, 8, generator=torch.Generator().manual_seed(0))
    grads = []
    for call in (function, torch.compile(function, backend="aot_eager")):
        x = given.clone().requires_grad_()
        (call(x) * torch.arange(1, 9)).sum().backward()
        assert x.grad is not None
        grads.append(x.grad)
    assert float(grads[0].norm()) > 0 and float((grads[1] - grads[0]).norm() / grads[0].norm()) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_autocast_changes_nothing(name: str, dtype: torch.dtype) -> None:
    """Scores are promised in fp32; choices in bf16 would be others than those made without autocast."""
    module, args = examples()[name]
    for call in (module._OP, module._OP._op):
        plain = leaves(call(*args))
        with torch.autocast("cpu", dtype):
            cast = leaves(call(*args))
        for one, other in zip(plain, cast, strict=True):
            assert one.dtype == other.dtype and torch.equal(one, other)


def test_a_mask_of_another_shape_is_refused() -> None:
    query, key = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 9, 8)
    for mask in (torch.ones(1, 3, 9, dtype=torch.bool), torch.ones(2, 1, 9, dtype=torch.bool), torch.ones(2, 3, 9)):
        with pytest.raises(ValueError, match=r"mask must be bool \[2, 3, 9\]"):
            attention_rows.attention_rows(query, key, 1.0, mask)


def test_a_target_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Targets must be in \[-1, 3\), got 3"):
        merge.merge(torch.randn(2, 4, 5), torch.tensor([[0, 1, 2, -1], [0, 3, 1, 1]]), 3)


def test_strides_of_scores_are_not_those_of_the_choice() -> None:
    """A compiler trusts the fake implementation."""
    scores = torch.randn(7, 3).t()
    op = segmented_topk._OP._op
    torch.library.opcheck(op, (scores, [7], None, 2), test_utils=("test_schema", "test_faketensor"))
    assert op(scores, [7], None, 2).is_contiguous()


@pytest.mark.parametrize("batch", [0, 1])
def test_nothing_to_do_is_done(batch: int) -> None:
    x, groups = torch.randn(batch, 2, 0, 4), torch.zeros(batch, 3, dtype=torch.int8)
    keys = torch.randn(batch, 1, 3, 4)
    settings = (None, None, 0.6, 0.1, 0.9, 0.0, 0.5)
    assert redistribute_attention._OP(x, keys, keys, groups, *settings).shape == (batch, 2, 0, 4)
    none = torch.randn(batch, 2, 3, 4)[:0]
    assert redistribute_attention._OP(none, keys[:0], keys[:0], groups[:0], *settings).shape == (0, 2, 3, 4)
    assert greedy_diversity._OP(torch.randn(0, 5, 4), 2, "k_center", None, None).shape == (0, 2)
    assert greedy_coverage._OP(torch.randn(0, 5, 4), torch.ones(0, 5), 2, False).shape == (0, 2)
    assert merge._OP(torch.randn(batch, 5, 4), torch.full((batch, 5), -1), 0, None).shape == (batch, 0, 4)


def test_a_batch_has_the_bits_of_its_parts() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 9, 4, 8).transpose(1, 2)
    rows = attention_rows.attention_rows(x[:, :, :2], x, 0.3)
    received = attention_received.attention_received(x, x, 0.3)
    target = torch.randint(-1, 3, (3, 9))
    merged = merge.merge(x[:, 0], target, 3)
    for one in range(3):
        own = x[one : one + 1]
        assert torch.equal(rows[one], attention_rows.attention_rows(own[:, :, :2], own, 0.3)[0])
        assert torch.equal(received[one], attention_received.attention_received(own, own, 0.3)[0])
        assert torch.equal(merged[one], merge.merge(own[:, 0], target[one : one + 1], 3)[0])
