"""What is tried of a vision tower that no test knows, at its first picture: which of its patches make each visual
token, whether what is read of its attention is what it computes, and whether tokens can leave inside it.

The features call is run once more, with the states that each block leaves as the leaves of a graph. Gradients of the
features, with another weight for each token, say which tokens come from each patch: a patch of one token has gradients
of that token's weight. That is held against the orders in which towers have their patches; the one that fits is kept
for later pictures. What fits none is refused. Which patches go where does not follow from what blocks compute, so
blocks hand on what they are given, but for those that are tried by themselves.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from tokenprune.engine.tower_cut_probe import BlockCall, check_cut, kind_of
from tokenprune.engine.tower_layout import skipped
from tokenprune.hooks import Ledger
from tokenprune.interfaces.adapter import Adapter
from tokenprune.interfaces.capability import TOWER_CUTS, TOWER_SIGNALS
from tokenprune.interfaces.visual import Visual

_DIGIT = 3  # bits of a token's number that one pass of gradients tells: weights are 1, 2, 4, ... 128
_ROWS = 16  # of the attention of each picture that are computed in the open
_SMALL = 1e-2  # of a row's largest gradient: what is below says nothing


def check_tower(
    adapter: Adapter,
    kind: str,
    original: Callable[..., Any],
    call: Mapping[str, Any],
    visuals: Sequence[Visual],
    blocks: Sequence[int],
    short: Sequence[int] = (),
    verify: bool = True,
) -> None:
    """Find out the order of a tower's patches, unless it is known, and hold blocks that are read or that work on fewer
    patches against themselves.

    Args:
        adapter: a family whose tower is not known.
        kind: "image" or "video".
        original: the features call.
        call: its arguments, by name.
        visuals: what it made.
        blocks: those that a method reads.
        short: those before which patches left.
        verify: whether blocks are tried.

    Raises:
        ValueError: the tower is not what it would be read as; the message says in what.
    """
    vision: Any = adapter.vision
    grids = [grid for visual in visuals for grid in visual.tower_grids]
    known = vision.known.get(kind)
    seen = {"blocks": set(), "short": set(), **(known or {})}
    unseen = [block for block in blocks if block not in seen["blocks"]] if verify else []
    untried = [block for block in short if block not in seen["short"]] if verify else []
    if known is None or unseen or untried or not _agree(vision, known["orders"], grids):
        try:
            orders = _tried(adapter, original, call, visuals, grids, unseen, untried)
            if known is not None:
                orders = [order for order in orders if order in known["orders"]]
            if not orders:
                raise ValueError("its patches come in another order than in the pictures before")
        except (ValueError, RuntimeError, TypeError) as error:
            lacks, instead = (TOWER_CUTS, "cuts at 'input'") if short else (TOWER_SIGNALS, "reads none")
            raise ValueError(
                f"{type(adapter.model).__name__} has no {lacks} of this {kind}: "
                f"{str(error).partition(chr(10))[0].rstrip('.')}. Use a method that {instead} (divprune, fastv)."
            ) from error
        seen = {"blocks": seen["blocks"] | {*unseen}, "short": seen["short"] | {*untried}}
        known = vision.known[kind] = {"orders": orders, **seen}
    vision.use(known["orders"][0])


def _agree(vision: Any, orders: Sequence[Any], grids: Sequence[tuple[int, int]]) -> bool:
    """Whether orders that fitted so far say the same of some pictures."""
    if len(orders) == 1:
        return True
    first, *others = (_places(vision.laid_out(order, grids)) for order in orders)
    return all(torch.equal(first, other) for other in others)


def _places(run: Any) -> Tensor:
    """`[tokens, g]`: places of patches in one row of all pictures."""
    return torch.cat([own + start for own, start in zip(run.places, run.starts)])


def _tried(
    adapter: Adapter,
    original: Callable[..., Any],
    call: Mapping[str, Any],
    visuals: Sequence[Visual],
    grids: list[tuple[int, int]],
    blocks: Sequence[int],
    short: Sequence[int],
) -> list[Any]:
    vision: Any = adapter.vision
    leaves: dict[int, Tensor] = {}
    reads: dict[int, Any] = {}
    calls: dict[int, BlockCall] = {}
    with _probing(adapter, leaves, reads, calls, blocks, short):
        own = {name: value.clone() if isinstance(value, Tensor) else value for name, value in call.items()}
        rows = torch.cat(list(adapter.feature_rows(original(**own))))
        numbers = _token_numbers(visuals, rows)
        last, token_of = _tokens_of_patches(leaves, rows, numbers, short)
    if last != vision.facts.feature_layer:
        raise ValueError(
            f"features come from block {last} of {type(vision.module).__name__}, and block "
            f"{vision.facts.feature_layer} was expected"
        )
    orders = _fitting(vision, token_of, grids)
    vision.use(orders[0])
    run = vision.start(grids)
    for block in blocks:
        _check_attention(vision, block, reads[block], run)
        _check_rows(vision, block, reads[block], calls[block])
    _check_cuts(vision, short, calls, grids)
    return orders


def _check_cuts(
    vision: Any, short: Sequence[int], calls: Mapping[int, BlockCall], grids: list[tuple[int, int]]
) -> None:
    tried: set[Any] = set()
    for block in short:
        if block - 1 in calls and not _same(calls[block - 1].made, calls[block].states):
            raise ValueError(f"the states that block {block - 1} leaves are changed before they enter block {block}")
        kind = kind_of(vision, block, calls[block])
        if kind not in tried:
            tried.add(kind)
            check_cut(vision, block, calls[block], grids)


def _same(made: Tensor, entered: Tensor) -> bool:
    return made is entered or (made.shape == entered.shape and torch.equal(made, entered))


@contextmanager
def _probing(
    adapter: Adapter,
    leaves: dict[int, Tensor],
    reads: dict[int, Any],
    calls: dict[int, BlockCall],
    blocks: Sequence[int],
    short: Sequence[int],
) -> Iterator[None]:
    """Run the tower as in evaluation, each block's states cut off from those before it, and note what blocks are given
    and compute; those that nothing is asked of hand on what they are given."""
    vision, ledger = adapter.vision, Ledger()
    modes = [(part, part.training) for part in adapter.entry.modules()]
    try:
        for part, _ in modes:
            part.training = False
        for number, block in enumerate(vision.blocks):
            noted = calls if number in blocks or number in short or number + 1 in short else {}
            run = block.forward if number in blocks else functools.partial(skipped, vision.module, block, block.forward)
            ledger.set(block, "forward", functools.partial(_leave, number, block.forward, run, leaves, noted))
        for block in blocks:
            for hook in vision.hook_attention(block, functools.partial(reads.__setitem__, block)):
                ledger.hook(hook)
        with torch.inference_mode(False), torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        ledger.undo()
        for part, mode in modes:
            part.training = mode


def _leave(
    number: int,
    forward: Any,
    run: Any,
    leaves: dict[int, Tensor],
    calls: dict[int, BlockCall],
    *args: Any,
    **kwargs: Any,
) -> Any:
    with torch.no_grad():
        output = run(*args, **kwargs)
    states = output[0] if isinstance(output, tuple) else output
    leaf = leaves[number] = states.detach().requires_grad_()
    if not args and "hidden_states" not in kwargs:
        raise ValueError("a block is not handed its states by place or as hidden_states")
    given, *more = args or (kwargs["hidden_states"],)
    named = {name: value for name, value in kwargs.items() if name != "hidden_states"}
    calls[number] = BlockCall(forward, given.detach(), more, named, leaf.detach())
    return (leaf, *output[1:]) if isinstance(output, tuple) else leaf


def _token_numbers(visuals: Sequence[Visual], rows: Tensor) -> Tensor:
    """`[rows]` int64: the token that each feature is, counted over all visuals; -1 at separators."""
    parts, first = [], 0
    for visual in visuals:
        own = torch.full((visual.length,), -1)
        at = torch.arange(visual.num_tokens)
        own[at if visual.offsets is None else visual.offsets] = at + first
        first += visual.num_tokens
        parts.append(own)
    numbers = torch.cat(parts)
    if numbers.shape[0] != rows.shape[0]:
        raise ValueError(f"it makes {rows.shape[0]} features for {numbers.shape[0]} places")
    return numbers.to(rows.device)


def _tokens_of_patches(
    leaves: dict[int, Tensor], rows: Tensor, numbers: Tensor, short: Sequence[int]
) -> tuple[int, Tensor]:
    """The last block whose states become features, and `[patches]` int64 the token that each of its patches goes into;
    -1 for those that go into none.

    Args:
        short: blocks behind which patches are gone: those that feed features must do so in one way.

    Raises:
        ValueError: a patch goes into several tokens.
    """
    if not rows.requires_grad:
        raise ValueError("its features do not follow from the states of its blocks by a graph")
    generator = torch.Generator().manual_seed(0)
    along = torch.randn(rows.shape[-1], generator=generator).to(rows.device)
    summed = (rows.float() @ along) * (numbers >= 0)  # [rows]
    blocks = sorted(leaves)
    found = torch.autograd.grad(summed.sum(), [leaves[b] for b in blocks], retain_graph=True, allow_unused=True)
    used = [block for block, part in zip(blocks, found) if part is not None and bool(part.any())]
    if not used:
        raise ValueError("its features do not follow from the states of its blocks")
    token_of = {block: _token_of(leaves[block], found[blocks.index(block)], summed, numbers) for block in used[-1:]}
    for block in used[:-1]:
        if block in short:
            token_of[block] = _token_of(leaves[block], found[blocks.index(block)], summed, numbers)
            if not torch.equal(token_of[block], token_of[used[-1]]):
                raise ValueError(f"patches go into other tokens from block {block} than from block {used[-1]}")
    return used[-1], token_of[used[-1]]


def _token_of(leaf: Tensor, base: Tensor, summed: Tensor, numbers: Tensor) -> Tensor:
    """`[patches]` int64 of one block; `base` are the gradients of all features, and `summed` `[rows]` what they are
    of."""
    base = base.flatten(0, -2).float()  # [patches, C]
    size = base.abs()
    counts = size > _SMALL * size.amax(dim=1, keepdim=True)
    there = counts & (size > 0)
    token_of = torch.zeros(len(base), dtype=torch.int64, device=base.device)
    for shift in range(0, max(int(numbers.max()), 1).bit_length(), _DIGIT):
        weights = 2.0 ** ((numbers.clamp(min=0) >> shift) & (2**_DIGIT - 1))
        (part,) = torch.autograd.grad((summed * weights).sum(), [leaf], retain_graph=True)
        ratio = torch.where(there, part.flatten(0, -2).float() / base, torch.nan).log2()
        digit = ratio.nanmedian(dim=1).values.round()
        # a patch of several tokens has the weight of one in one channel, and of others elsewhere
        apart = (ratio - digit[:, None]).abs().nan_to_num(0).amax(dim=1) > 0.1
        lost = (there & ratio.isnan()).any(dim=1)  # of another sign
        if bool((apart | lost).any()):
            raise ValueError("a visual token is mixed from patches that go into other tokens too")
        token_of += digit.nan_to_num(0).long() << shift
    return torch.where(there.any(dim=1), token_of, -1)


def _fitting(vision: Any, token_of: Tensor, grids: list[tuple[int, int]]) -> list[Any]:
    """The orders by which each token comes from the patches that it came from."""
    tokens = sum(rows * cols for rows, cols in grids)
    used = int((token_of >= 0).sum())
    if used % tokens:
        raise ValueError(f"{tokens} visual tokens come from {used} patches, not from as many each")
    numbers = torch.arange(tokens, device=token_of.device)[:, None]
    found = []
    for order in vision.possible(used // tokens):
        run = vision.laid_out(order, grids)
        rows = _by_row(vision, token_of, run)
        places = [vision.rows(rows, run, p)[0, int(vision.facts.has_cls) :] for p in range(len(grids))]
        joined = torch.cat(places).view(tokens, -1)
        if torch.equal(joined, numbers.expand_as(joined)):
            found.append(order)
    if not found:
        raise ValueError("which of its patches make a visual token follows no order that is known here")
    return found


def _by_row(vision: Any, token_of: Tensor, run: Any) -> Tensor:
    """`[b, 1, T]` of values by patch, as the attention of the tower has its rows: one for each picture, or one."""
    before = int(vision.facts.has_cls)
    count = len(run.grids)
    longest = before + max(own.numel() for own in run.places)
    alone = len(token_of) >= count * longest and len(token_of) % count == 0
    batch = count if alone and not run.whole else 1
    return token_of.view(batch, 1, -1)


def _check_attention(vision: Any, block: int, read: Any, run: Any) -> None:
    """Softmax of the products that are read, over the patches of a picture, must give what attention made of the
    values; in windows, over those of each window."""
    held = read.attended
    if vision.in_windows(block):
        ends = torch.tensor(held.parts).cumsum(0).tolist()
        if held.mask is not None or len(held.parts) == 1:
            raise ValueError(f"the attention of block {block} sees a part of a picture, and does not say which")
        for end, length in zip(ends[:_ROWS], held.parts):
            at = slice(end - length, end)
            _check_close(block, *(part[0, :, at] for part in (held.query, held.key, held.value, held.mixed)))
        return
    for picture in range(len(run.grids)):
        parts = (held.query, held.key, held.value, held.mixed)
        _check_close(block, *(vision.rows(part, run, picture) for part in parts))


def _check_close(block: int, query: Tensor, key: Tensor, value: Tensor, mixed: Tensor) -> None:
    """Of one picture, `[H, T, d]` each."""
    rows = torch.linspace(0, query.shape[1] - 1, min(_ROWS, query.shape[1]), device=query.device).round().long()
    scores = query[:, rows].float() @ key.float().transpose(1, 2) * query.shape[-1] ** -0.5
    mine, truth = scores.softmax(-1) @ value.float(), mixed[:, rows].float()
    error = float((mine - truth).norm() / truth.norm())
    bound = max(1e-3, 8 * torch.finfo(mixed.dtype).eps)
    if not error < bound:
        raise ValueError(
            f"query, key, value and scale of block {block}, over the patches of a picture, do not give what its "
            f"attention computed (relative error {error:.1e}, at most {bound:.1e} is rounding)"
        )


def _check_rows(vision: Any, block: int, read: Any, call: BlockCall) -> None:
    """Row p of the queries must be of the patch whose state is row p: other states in every other row change those rows
    and no others."""
    hidden = call.states
    changed = torch.arange(hidden.shape[-2], device=hidden.device) % 3 == 1
    other = torch.where(changed[:, None], hidden.flip(-1), hidden)
    found: list[Any] = []
    ledger = Ledger()
    try:
        for hook in vision.hook_attention(block, found.append):
            ledger.hook(hook)
        call.run(other)
    finally:
        ledger.undo()
    before, after = read.attended.query, found[0].attended.query
    if before.shape != after.shape or before.shape[2] != hidden.shape[-2]:
        raise ValueError(f"the attention of block {block} has other rows than its states")
    moved = (before != after).any(dim=3).any(dim=1)  # [b, T]
    if not torch.equal(moved, changed.expand_as(moved)):
        raise ValueError(f"the attention of block {block} has its rows in another order than its states")
