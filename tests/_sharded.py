"""One of two processes that train a pruned tiny LLaVA together, run by `test_sharded.py`:
`python -m torch.distributed.run --nproc-per-node 2 tests/_sharded.py WRAPPER METHOD`.

Each process has a prompt of its own; logits must be those of the model alone, and gradients the mean over both prompts.
A ValueError is printed and is no failure: the test says which sentence it wants.
"""

from __future__ import annotations

import copy
import sys
from typing import Any

import torch
import torch.distributed as dist
from _decoders import llava_with
from _tiny import prompts
from masked_reference import relative_error

import tokenprune


def batch_of(rank: int) -> dict[str, Any]:
    batch = prompts([1, 2], seed=1 + rank)
    return {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}


def sharded(model: Any, layers: bool = True) -> Any:
    from torch.distributed.fsdp import fully_shard

    for layer in model.model.language_model.layers if layers else ():
        fully_shard(layer)
    return fully_shard(model)


def shard_parts(model: Any) -> Any:
    """Finer than layers: each attention and each MLP is sharded for itself."""
    from torch.distributed.fsdp import fully_shard

    for layer in model.model.language_model.layers:
        fully_shard(layer.self_attn)
        fully_shard(layer.mlp)
    return sharded(model)


def distributed(model: Any) -> Any:
    return torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)


WRAPPERS = {"ddp": distributed, "fsdp2": sharded, "fsdp2-root": lambda m: sharded(m, False), "fsdp2-parts": shard_parts}


def full(value: Any) -> torch.Tensor:
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def expected(model: Any, method: Any, rank: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits of this process's prompt, and gradients, of the model alone."""
    logits: list[torch.Tensor] = []
    with tokenprune.applied(model, method) as handle:
        for other in range(2):
            output = handle.model(**batch_of(other))
            (output.loss / 2).backward()
            logits.append(output.logits.detach())
    return logits[rank], {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def main(wrapper: str, method: str, decoder: str, first: str) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    model = llava_with(decoder).train()
    logits, gradients = expected(copy.deepcopy(model), method, rank)
    assert gradients
    if first == "apply":
        tokenprune.apply(model, method)
        wrapped = WRAPPERS[wrapper](model)
    else:
        wrapped = WRAPPERS[wrapper](model)
        tokenprune.apply(model, method)
    output = wrapped(**batch_of(rank))
    assert output.logits.shape == logits.shape
    assert relative_error(output.logits.detach(), logits) < 1e-5
    output.loss.backward()
    found = {name: full(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() >= gradients.keys()
    for name, gradient in gradients.items():
        assert relative_error(found[name], gradient) < 1e-4 or float(gradient.norm()) < 1e-8, name
    if rank == 0:
        print("equal")
    dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except ValueError as error:
        print(f"refused: {error}")
