import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from tokenprune.kernels import aot
from tokenprune.kernels import redistribute_attention as module
from tokenprune.kernels.redistribute_attention import redistribute_attention

SIZES = {"share": 0.6, "least_mass": 0.4, "most_sink": 0.3, "slack": 0.0}


def by_hand(query, key, value, groups, allowed, gate, share, least_mass, most_sink, slack, scale):
    """One softmax row at a time in fp64, from the card; output and weights."""
    batch, heads, rows, width = query.shape
    count, per = key.shape[2], heads // key.shape[1]
    out = torch.zeros(batch, heads, rows, value.shape[-1], dtype=torch.float64)
    changed = 0
    for b in range(batch):
        kinds = [int(kind) for kind in groups[b]] + [0] * (count - groups.shape[1])
        for h in range(heads):
            for r in range(rows):
                seen = [allowed is None or bool(allowed[b % len(allowed), r, j]) for j in range(count)]
                logits = [scale * float(query[b, h, r].double() @ key[b, h // per, j].double()) for j in range(count)]
                top = max(logit for logit, see in zip(logits, seen) if see)
                powers = [math.exp(logit - top) if see else 0.0 for logit, see in zip(logits, seen)]
                a = [power / sum(powers) for power in powers]
                mass = [sum(w for w, kind in zip(a, kinds) if kind == group) for group in range(4)]
                visual = mass[1] + mass[2]
                slacked = visual + slack * sum(kind in (1, 2) for kind in kinds)
                looks = visual >= least_mass and mass[2] <= most_sink * slacked and mass[1] > 0
                if looks and (gate is None or bool(gate[b, r])):
                    changed += 1
                    grow = 1 + share * (mass[2] + mass[3]) / mass[1]
                    a = [w * (grow if kind == 1 else 1 - share if kind > 1 else 1) for w, kind in zip(a, kinds)]
                assert abs(sum(a) - 1) < 1e-12 and min(a) >= 0
                for w, v in zip(a, value[b, h // per].double()):
                    out[b, h, r] += w * v
    return out, changed


def test_a_picture_of_nothing_but_sinks_keeps_its_attention():
    """Nobody could receive what they give, however lax the rule."""
    query, key, value, groups, _, _ = case(0, 2, 2, 2, 3, 10, 2)
    groups[:] = torch.tensor([2] * 7 + [3, 3, 0])
    found = redistribute_attention(
        query, key, value, groups, None, share=0.6, least_mass=0.0, most_sink=1.0, slack=1.0, scale=0.5
    )
    plain = torch.nn.functional.scaled_dot_product_attention(query, key, value, scale=0.5, enable_gqa=True)
    torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-6)
    groups[:, 0] = 1  # one that can
    moved = redistribute_attention(
        query, key, value, groups, None, share=0.6, least_mass=0.0, most_sink=1.0, slack=1.0, scale=0.5
    )
    assert (moved - plain).abs().max() > 0.05


def case(seed, batch, key_heads, per, rows, known, later, kinds=4, masked=True):
    g = torch.Generator().manual_seed(seed)
    count = known + later
    query = torch.randn(batch, key_heads * per, rows, 8, generator=g)
    key, value = (torch.randn(batch, key_heads, count, 8, generator=g) for _ in range(2))
    groups = torch.randint(0, kinds, (batch, known), generator=g, dtype=torch.int8)
    groups[:, : known // 2] = 1  # pictures are most of a prompt
    allowed = None
    if masked:
        allowed = torch.rand(batch, rows, count, generator=g) < 0.8
        allowed[..., 0] = True
    gate = torch.rand(batch, rows, generator=g) < 0.8 if masked else None
    return query, key, value, groups, allowed, gate


@settings(max_examples=40)
@given(
    st.integers(0, 10**6), st.integers(1, 3), st.integers(1, 2), st.integers(1, 3), st.integers(1, 4),
    st.integers(1, 12), st.integers(0, 4), st.integers(1, 4), st.booleans(), st.sampled_from([0.0, 0.4, 0.6, 1.0]),
    st.sampled_from([0.0, 0.2, 0.5]), st.sampled_from([0.0, 0.3, 1.0]), st.sampled_from([0.0, 1e-2]),
)  # fmt: skip
def test_equals_the_explicit_matrix(seed, batch, kv, per, rows, known, later, kinds, masked, share, least, most, slack):
    inputs = case(seed, batch, kv, per, rows, known, later, kinds, masked)
    rule = {"share": share, "least_mass": least, "most_sink": most, "slack": slack, "scale": 0.5}
    truth, _ = by_hand(*inputs, **rule)
    found = redistribute_attention(*inputs, **rule)
    assert float((found.double() - truth).norm() / truth.norm()) < 1e-5


def test_some_pairs_change_and_some_do_not():
    inputs = case(0, 2, 2, 2, 6, 20, 3)
    _, changed = by_hand(*inputs, **SIZES, scale=0.5)
    assert 0 < changed < 48
    stock = redistribute_attention(*inputs, **{**SIZES, "share": 0.0}, scale=0.5)
    assert float((redistribute_attention(*inputs, **SIZES, scale=0.5) - stock).norm() / stock.norm()) > 1e-2


def test_many_rows_are_done_in_blocks():
    query, key, value, groups, allowed, gate = case(1, 2, 1, 2, 150, 20, 3)
    whole = redistribute_attention(query, key, value, groups, allowed, gate, **SIZES, scale=0.5)
    for r in (0, 63, 64, 149):
        one = redistribute_attention(
            query[:, :, r : r + 1], key, value, groups, allowed[:, r : r + 1], gate[:, r : r + 1], **SIZES, scale=0.5
        )
        torch.testing.assert_close(one, whole[:, :, r : r + 1], rtol=1e-5, atol=1e-6)


def test_order_of_keys_does_not_matter():
    query, key, value, groups, allowed, gate = case(2, 2, 2, 2, 3, 20, 0)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(3))
    found = redistribute_attention(query, key, value, groups, allowed, gate, **SIZES, scale=0.5)
    moved = redistribute_attention(
        query, key[:, :, order], value[:, :, order], groups[:, order], allowed[..., order], gate, **SIZES, scale=0.5
    )
    torch.testing.assert_close(moved, found, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    query, key, value, groups, allowed, gate = case(4, 2, 2, 2, 4, 40, 3)
    wide = redistribute_attention(query, key, value, groups, allowed, gate, **SIZES, scale=0.5)
    half = redistribute_attention(
        query.to(dtype), key.to(dtype), value.to(dtype), groups, allowed, gate, **SIZES, scale=0.5
    )
    assert half.dtype == dtype
    assert float((half.float() - wide).norm() / wide.norm()) < (0.03 if dtype == torch.bfloat16 else 0.01)


def test_a_plan_that_is_kept_belongs_to_its_settings():
    inputs = case(5, 2, 2, 2, 3, 20, 3)
    groups = inputs[3]
    first = redistribute_attention(*inputs, **SIZES, scale=0.5)
    kept = groups._plan
    assert torch.equal(redistribute_attention(*inputs, **SIZES, scale=0.5), first) and groups._plan is kept
    other = {**SIZES, "share": 0.2}
    again = case(5, 2, 2, 2, 3, 20, 3)
    expected = redistribute_attention(*again, **other, scale=0.5)
    assert torch.equal(redistribute_attention(*inputs, **other, scale=0.5), expected)
    assert groups._plan is not kept


def test_no_plan_is_kept_by_the_op_nor_of_fake_tensors():
    inputs = case(6, 2, 2, 2, 3, 20, 3)
    rule = {**SIZES, "scale": 0.5}
    found = module._OP._op(*inputs, *rule.values())
    assert not hasattr(inputs[3], "_plan")
    assert torch.equal(found, redistribute_attention(*inputs, **rule)) and hasattr(inputs[3], "_plan")
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(tensor) for tensor in inputs]
        made = redistribute_attention(*fake, **rule)
    assert (made.shape, made.dtype, made.stride()) == (found.shape, found.dtype, found.stride())
    assert not hasattr(fake[3], "_plan")


def test_compiled_code_holds_the_op():
    graphs = []

    def keep(graph, given):
        graphs.append(graph)
        return graph.forward

    inputs = case(7, 2, 2, 2, 3, 20, 3)
    compiled = torch.compile(lambda *args: redistribute_attention(*args, **SIZES, scale=0.5), backend=keep)
    found = compiled(*inputs)
    assert torch.equal(found, redistribute_attention(*inputs, **SIZES, scale=0.5))
    called = [node.target for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert called == [torch.ops.tokenprune.redistribute_attention.default]


@pytest.mark.parametrize(
    ("place", "change", "said"),
    [
        (0, lambda query: query[:, :3], "must be a multiple"),
        (2, lambda value: value[:, :, 1:], "value must be"),
        (3, lambda groups: groups[:1], "groups must be"),
        (3, lambda groups: groups.repeat(1, 2), "P at most 23"),
        (4, lambda allowed: allowed[..., 1:], "allowed must be"),
        (5, lambda gate: gate[:, 1:], "gate must be"),
    ],
)
def test_shapes_that_do_not_fit_are_named_before_a_launch(place, change, said):
    inputs = [*case(8, 2, 2, 2, 3, 20, 3)]
    inputs[place] = change(inputs[place])
    with aot.noting() as noted, pytest.raises(ValueError, match=said):
        module.launch(*inputs, *SIZES.values(), 0.5)
    assert not noted


def test_what_is_kept_for_groups_is_of_the_groups_as_they_are() -> None:
    query, key, value, groups, *_ = case(0, 2, 2, 2, 3, 20, 4, masked=False)
    rule = {**SIZES, "least_mass": 0.0, "most_sink": 1.0, "scale": 0.4}
    before = redistribute_attention(query, key, value, groups, None, None, **rule)
    groups.zero_()
    after = redistribute_attention(query, key, value, groups, None, None, **rule)
    assert torch.equal(after, redistribute_attention(query, key, value, groups.clone(), None, None, **rule))
    assert not torch.equal(after, before)


def test_what_inference_mode_left_serves_a_gradient_too() -> None:
    query, key, value, groups, *_ = case(0, 2, 2, 2, 3, 20, 4, masked=False)
    rule = {**SIZES, "least_mass": 0.0, "most_sink": 1.0, "scale": 0.4}
    with torch.inference_mode():
        plain = redistribute_attention(query, key, value, groups, None, None, **rule)
    value.requires_grad_()
    redistribute_attention(query, key, value, groups, None, None, **rule).sum().backward()
    assert value.grad is not None and float(value.grad.norm()) > 0
    assert torch.equal(plain, redistribute_attention(query, key, value.detach(), groups, None, None, **rule))
