"""What others put around a model or its modules: looked through, right, or refused with a sentence."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from _families import BUILDERS, batch_of
from _trainers import METHODS
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper

import tokenprune

ACTING = "var(channels=[1,2,3],tau=2.2,layers=[1,2],s_min=0,rho=0,p=0.9)"
AGAIN = r"Call the handle's remove\(\) and apply the method again"


def batch() -> dict[str, Any]:
    given = batch_of("llava", "ragged_left")
    return {**given, "labels": given["input_ids"], "use_cache": False}


def gradients(model: Any) -> torch.Tensor:
    """Loss and all gradients, in one row."""
    model.train()
    loss = model(**batch()).loss
    loss.backward()
    found = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return torch.cat([loss.detach()[None], *found])


def plain(method: Any) -> torch.Tensor:
    model = BUILDERS["llava"]()
    with tokenprune.applied(model, method):
        return gradients(model)


def wrap(model: Any, what: str, reentrant: bool) -> None:
    impl = CheckpointImpl.REENTRANT if reentrant else CheckpointImpl.NO_REENTRANT
    decoder, tower = model.model.language_model, model.model.vision_tower
    blocks = getattr(tower, "vision_model", tower).encoder.layers

    def around(module: Any) -> Any:
        return checkpoint_wrapper(module, checkpoint_impl=impl)

    if what == "decoder":
        model.model.language_model = around(decoder)
    for layers in [decoder.layers] * (what == "layers") + [blocks] * (what == "tower"):
        for place, layer in enumerate(list(layers)):
            layers[place] = around(layer)
    if what == "attention":
        for layer in decoder.layers:
            layer.self_attn = around(layer.self_attn)


WRAPS = [(what, False) for what in ("layers", "tower", "attention", "decoder")]
WRAPS += [("layers", True), ("tower", True)]  # of others, called by keyword, reentrant ones lose all gradients anyway


@pytest.mark.parametrize(("what", "reentrant"), WRAPS)
@pytest.mark.parametrize("method", [*METHODS, "pyramiddrop@9", "todre@9", "flowcut@9", "transprune@9", ACTING], ids=str)
def test_checkpoint_wrappers_before(method: Any, what: str, reentrant: bool) -> None:
    """Loss and gradients are those without them, or the call is refused before anything runs."""
    model = BUILDERS["llava"]()
    wrap(model, what, reentrant)
    cuts_layers = method not in (ACTING, "vtc_cls@9", "uniform@9")
    refused = (method == ACTING and what != "tower") or (cuts_layers and what == "decoder")
    with tokenprune.applied(model, method):
        if refused:
            with pytest.raises(ValueError, match="gradient checkpointing"):
                gradients(model)
            return
        own = gradients(model)
    truth = plain(method)
    assert own.shape == truth.shape and float((own - truth).norm() / truth.norm()) < 1e-5


@pytest.mark.parametrize("what", ["layers", "tower", "decoder"])
@pytest.mark.parametrize("method", [*METHODS, ACTING], ids=str)
def test_checkpoint_wrappers_after(method: Any, what: str) -> None:
    model = BUILDERS["llava"]()
    handle = tokenprune.apply(model, method)
    wrap(model, what, False)
    with pytest.raises(RuntimeError, match=AGAIN):
        gradients(model)
    handle.remove()


@pytest.fixture
def one_process(tmp_path: Any) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("method", METHODS)
def test_data_parallel(method: str, one_process: None) -> None:
    """DDP around the model, and around what torch.compile made of it."""
    from torch.nn.parallel import DistributedDataParallel

    truth = plain(method)
    for nested in (False, True):
        model = BUILDERS["llava"]()
        inner = torch.compile(model, backend="eager") if nested else model
        wrapped = DistributedDataParallel(inner, find_unused_parameters=True)
        with tokenprune.applied(wrapped, method) as handle:
            assert handle.adapter.model is model
            own = gradients(wrapped)
        assert own.shape == truth.shape and float((own - truth).norm() / truth.norm()) < 1e-5
    torch.compiler.reset()


@pytest.mark.parametrize("method", METHODS)
def test_compiled(method: str) -> None:
    truth, model = plain(method), BUILDERS["llava"]()
    wrapped = torch.compile(model, backend="eager")
    with tokenprune.applied(wrapped, method) as handle:
        assert handle.adapter.model is model
        own = gradients(wrapped)
        assert [len(row) for row in handle.kept] == [1, 3, 0, 2] and len(handle.kept[0][0]) == 9
    assert own.shape == truth.shape and float((own - truth).norm() / truth.norm()) < 1e-5
    torch.compiler.reset()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch_of("llava", "ragged_left")).logits


@pytest.mark.parametrize("method", [*METHODS, "holov@9", "flowcut@9", "vflowopt@9", "todre@9", "transprune@9"])
def test_linears_replaced_by_quantized_ones(method: str) -> None:
    """Quantizers put modules of their own in place: before, the method reads theirs; after, it says to apply again."""
    quantize = pytest.importorskip("torch.ao.quantization").quantize_dynamic
    model = BUILDERS["llava"]()
    handle = tokenprune.apply(model, method)
    quantize(model, {torch.nn.Linear}, inplace=True)
    before = quantize(BUILDERS["llava"](), {torch.nn.Linear})
    try:
        own = logits(model)
    except RuntimeError as error:
        assert "Call the handle's remove() and apply the method again" in str(error) and method != "uniform@9"
        handle.remove()
        handle = tokenprune.apply(model, method)
        own = logits(model)
    with tokenprune.applied(before, method) as other:
        assert torch.equal(own, logits(before))
        assert all(torch.equal(a, b) for one, two in zip(handle.kept, other.kept) for a, b in zip(one, two))
    handle.remove()
