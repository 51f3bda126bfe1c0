"""What is tried of a vision tower that no test knows before tokens leave inside it: taking the patches of some cells
out of a block's rows must give the others what hiding them from attention gives.

Blocks are tried one by one, on the states that enter them, with other cells for each picture; blocks of one kind that
are given arguments of one form count as one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.engine.layer_check import hooked
from tokenprune.hooks import Ledger

_ROWS = 16  # of the attention of each picture that are computed in the open


class BlockCall:
    """One call of a block of a tower: its own forward, and what it was given.

    Args:
        states: what it was given first.
        args, kwargs: the rest.
        made: the states that it left.
    """

    def __init__(
        self,
        forward: Callable[..., Any],
        states: Tensor,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        made: Tensor | None = None,
    ) -> None:
        self.forward, self.states, self.args, self.kwargs = forward, states, tuple(args), dict(kwargs)
        self.made = states if made is None else made

    def run(self, states: Tensor | None = None) -> Tensor:
        """The states that it leaves, of its own or of others."""
        with torch.no_grad():
            made = self.forward(self.states if states is None else states, *self.args, **self.kwargs)
        return made[0] if isinstance(made, tuple) else made


def kind_of(vision: Any, block: int, call: BlockCall) -> tuple[Any, ...]:
    """What blocks of a kind have in common: classes, plain settings, and the forms of what they are given."""
    parts = [
        (type(part).__name__, *((name, value) for name, value in sorted(vars(part).items()) if _plain(name, value)))
        for part in vision.blocks[block].modules()
        if not isinstance(part, (nn.Linear, nn.LayerNorm))
    ]
    forms = [(name, _form(value)) for name, value in sorted(call.kwargs.items())]
    return (vision.in_windows(block), tuple(parts), tuple(map(_form, call.args)), tuple(forms))


def _plain(name: str, value: Any) -> bool:
    return isinstance(value, (bool, int, float, str)) and name not in ("layer_idx", "training")


def _form(value: Any) -> Any:
    if isinstance(value, Tensor):
        return tuple(value.shape)
    if isinstance(value, (tuple, list)):
        return tuple(map(_form, value))
    return value if isinstance(value, (bool, int, str)) else type(value).__name__


def check_cut(vision: Any, block: int, call: BlockCall, grids: Sequence[tuple[int, int]]) -> None:
    """Take some cells out before a block, and hide them from it.

    Raises:
        ValueError: that is not the same.
    """
    states = call.states
    run = vision.start(grids)
    kept = [index.to(states.device) for index in _some(grids)]
    if all(len(index) == rows * cols for index, (rows, cols) in zip(kept, grids)):
        return  # pictures of one token: nothing can leave
    args, kwargs = vision.drop_tokens(run, (states, *call.args), call.kwargs, kept)
    gone, stays = vision.left_rows(run, states)
    short = BlockCall(call.forward, args[0], args[1:], kwargs)
    ledger = Ledger()
    try:
        attention = vision.masked_attention(block)
        if attention is not None:

            def mask(module: Any, given: Any, named: Any) -> Any:
                own = vision.attention_mask(run, block, given[0] if given else named["hidden_states"])
                return None if own is None else (given, {**named, "attention_mask": own})

            ledger.hook(attention.register_forward_pre_hook(mask, with_kwargs=True))
        removed = vision.restore_length(run, short.run(), ())
    finally:
        ledger.undo()
    hiding = vision.hide_keys(block, gone, _ROWS)
    with hooked(*hiding):
        hidden = call.run()
    _check_close(block, states, removed, hidden, hiding[0].computed & stays)


def _some(grids: Sequence[tuple[int, int]]) -> list[Tensor]:
    """Cells of each picture that stay in a trial: half of them and fewer."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for picture, (rows, cols) in enumerate(grids):
        count = rows * cols
        keep = max(1, count // (2 + picture % 3))
        found.append(torch.randperm(count, generator=generator)[:keep].sort().values)
    return found


def _check_close(block: int, states: Tensor, removed: Tensor, hidden: Tensor, rows: Tensor) -> None:
    """Of `[M, T, D]` or `[T, D]` states, at some rows `[M, T]`."""
    entered, mine, truth = (part.reshape(*rows.shape, -1)[rows].float() for part in (states, removed, hidden))
    if not len(truth):
        raise ValueError(f"the attention of block {block} did not run")
    # of what the block adds: its input would drown a difference
    added = float((truth - entered).norm())
    bound = 1e-3 * added + 8 * torch.finfo(states.dtype).eps * float(truth.norm())
    error = float((mine - truth).norm())
    if not error < bound:
        raise ValueError(
            f"taking patches out before block {block} is not hiding them from it (relative error "
            f"{error / max(added, 1e-30):.1e}, at most {bound / max(added, 1e-30):.1e} is rounding)"
        )
