"""One of two processes that train pruned tiny LLaVAs together, run by `test_sharded.py`:
`python -m torch.distributed.run --nproc-per-node 2 tests/_sharded.py WRAPPER,METHOD,DECODER,FIRST ...`.

Each process has a prompt of its own; logits must be those of the model alone, and gradients the mean over both prompts.
Starting takes far longer than a cell, so one start serves several; each has a model of its own. A line of JSON a cell
says what came of it: "equal", what differs, or the sentence of a ValueError, of which the test says whether it wants
it. Any other exception ends both processes, as one of them may wait for the other: later cells then have no line.

The processes leave without the interpreter's own end. Torch keeps the group of a sharded model alive whatever is
destroyed, and a thread of gloo's that lets go of its last tensors while the interpreter ends aborts the process: plain
DDP without this library did so in 7 of 20 starts on a busy machine.
"""

from __future__ import annotations

import copy
import json
import os
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


def differences(wrapper: str, method: str, decoder: str, first: str) -> list[str]:
    """What this process finds to differ. Nothing is raised before both processes are through with the cell."""
    rank = dist.get_rank()
    model = llava_with(decoder).train()
    logits, gradients = expected(copy.deepcopy(model), method, rank)
    if first == "apply":
        tokenprune.apply(model, method)
        wrapped = WRAPPERS[wrapper](model)
    else:
        wrapped = WRAPPERS[wrapper](model)
        tokenprune.apply(model, method)
    output = wrapped(**batch_of(rank))
    output.loss.backward()
    found = {name: full(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    wrong = [] if gradients else ["the model alone has no gradients"]
    if output.logits.shape != logits.shape:
        wrong.append(f"logits are {tuple(output.logits.shape)} and should be {tuple(logits.shape)}")
    elif not (error := relative_error(output.logits.detach(), logits)) < 1e-5:
        wrong.append(f"logits are {error:.1e} off")
    for name, gradient in gradients.items():
        if name not in found:
            wrong.append(f"{name} has no gradient")
        elif not (error := relative_error(found[name], gradient)) < 1e-4 and not float(gradient.norm()) < 1e-8:
            wrong.append(f"the gradient of {name} is {error:.1e} off")
    return [f"process {rank}: {text}" for text in wrong]


def outcome(cell: str) -> str:
    """What came of a cell in both processes."""
    try:
        own = differences(*cell.split(","))
    except ValueError as error:
        own = [f"refused: {error}"]
    both: list[list[str]] = [[], []]
    dist.all_gather_object(both, own)
    return "; ".join(both[0] + both[1]) or "equal"


def main(*cells: str) -> None:
    dist.init_process_group("gloo")
    for cell in cells:
        found = outcome(cell)
        if dist.get_rank() == 0:
            print(json.dumps([cell, found]), flush=True)
    dist.destroy_process_group()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
