"""Graphs that were compiled before a method was applied, or of another model of the class, know no hooks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from _families import batch_of, family
from _tiny import prompts, tiny_llava

import tokenprune

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def fresh_graphs() -> Any:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def small() -> Any:
    """Tracing takes as long as there are layers."""
    return tiny_llava(layers=1, vision_layers=3)


def logits(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch).logits


def plain(method: Any, batch: dict[str, Any]) -> torch.Tensor:
    with tokenprune.applied(small(), method) as handle:
        return logits(handle.model, batch)


@pytest.mark.parametrize("method", ["uniform@9", "flowcut@9"])
def test_a_model_that_ran_compiled_before(method: str) -> None:
    batch = prompts([1])
    pruned, model = plain(method, batch), small()
    model.compile(backend="eager")
    whole = logits(model, batch)
    handle = tokenprune.apply(model, method)
    torch.testing.assert_close(logits(model, batch), pruned, atol=1e-5, rtol=1e-5)
    assert handle.kept[0][0].numel() == 9
    handle.remove()
    assert torch.equal(logits(model, batch), whole)
    with tokenprune.applied(model, method):
        torch.testing.assert_close(logits(model, batch), pruned, atol=1e-5, rtol=1e-5)


def test_another_object_of_the_class_that_ran_compiled_before_and_after() -> None:
    batch, other, model = prompts([1]), small(), small()
    pruned, whole = plain("uniform@9", batch), logits(other, batch)
    other.compile(backend="eager")
    model.compile(backend="eager")
    logits(other, batch)
    with tokenprune.applied(model, "uniform@9"):
        logits(other, batch)
        torch.testing.assert_close(logits(model, batch), pruned, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(logits(other, batch), whole, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits(model, batch), whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("part", "how"), [("vision_tower", "in place"), ("vision_tower", "wrapped"), ("language_model", "wrapped")]
)
def test_a_part_that_ran_compiled_before(part: str, how: str) -> None:
    batch, model = prompts([1]), small()
    pruned = plain("flowcut@9", batch)
    if how == "in place":
        getattr(model.model, part).compile(backend="eager")
    else:
        setattr(model.model, part, torch.compile(getattr(model.model, part), backend="eager"))
    logits(model, batch)
    with tokenprune.applied(model, "flowcut@9") as handle:
        torch.testing.assert_close(logits(model, batch), pruned, atol=1e-5, rtol=1e-5)
        assert handle.kept[0][0].numel() == 9


def test_a_compiled_wrapper_is_looked_through_and_generates_the_same() -> None:
    model, batch = family("qwen2_5_vl"), batch_of("qwen2_5_vl", "ragged_left")
    with tokenprune.applied(model, "fastv@9"), torch.no_grad():
        alone = model.generate(**batch, max_new_tokens=3, do_sample=False)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        compiled(**batch)
        handle = tokenprune.apply(compiled, "fastv@9")
        assert handle.model is compiled
        assert torch.equal(compiled.generate(**batch, max_new_tokens=3, do_sample=False), alone)
        handle.remove()


def test_the_setting_of_dynamo_is_given_back() -> None:
    import torch._dynamo

    before = torch._dynamo.config.skip_nnmodule_hook_guards
    one, two = tokenprune.apply(small(), "uniform@9"), tokenprune.apply(small(), "uniform@9")
    one.remove()
    assert torch._dynamo.config.skip_nnmodule_hook_guards is False
    two.remove()
    assert torch._dynamo.config.skip_nnmodule_hook_guards is before
