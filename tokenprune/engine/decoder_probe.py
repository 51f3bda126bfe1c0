"""What `apply` asks of a decoder that no test knows: is taking tokens out of its rows hiding them from attention?

A few random embeddings in two rows, one of them padded, go through the decoder twice: shortened by the engine at the
places that a plan cuts at, with a KV cache and one token after them, and at full length with the same tokens hidden by
masks. Both must say the same of every token that stays. A decoder in which a token's place counts beyond its position
id (convolutions, distances in the row) differs here, and is refused. It says nothing of what only long rows do. Of many
layers that are alike a few run (`layer_sample.py`).
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from tokenprune.engine.engine import Engine
from tokenprune.engine.layer_check import hooked, there, undisturbed
from tokenprune.engine.layer_sample import only, sampled_layers
from tokenprune.engine.whole_masks import RECURRENT
from tokenprune.hooks import Ledger
from tokenprune.interfaces.adapter import Adapter
from tokenprune.interfaces.budget import Budget
from tokenprune.interfaces.capability import INPUT_CUTS, LAYER_CUTS
from tokenprune.interfaces.pruner import Pruner, Stage
from tokenprune.interfaces.selection import Selection
from tokenprune.interfaces.view import View
from tokenprune.interfaces.visual import unplaced
from tokenprune.seams import cache_argument, cache_in, empty_cache
from tokenprune.state.prompt_layout import Layout, Span
from tokenprune.state.prompt_state import Prompt
from tokenprune.state.tower_recording import Recording

_PADDING, _FIRST, _VISUAL, _BEHIND = 3, 2, 8, 3
"""Places of padding in the first row, of text, of visual tokens, and of text behind them."""
_LENGTH = _PADDING + _FIRST + _VISUAL + _BEHIND
_KNOWN = ("LlamaModel", "MistralModel", "Qwen2Model", "Qwen3Model")
"""Decoders that the tests of family files run in several families."""

_tried: weakref.WeakKeyDictionary[Any, set[tuple[int, ...]]] = weakref.WeakKeyDictionary()
"""Decoders that were tried, with the layers before which they were cut."""


@dataclass
class _EveryThird(Pruner):
    """Keeps tokens from all over a visual, and asks for nothing."""

    name: ClassVar[str] = "probe"
    published_positions: ClassVar[str] = "keep"

    def select(self, view: View) -> Selection:
        chosen = torch.arange(view.budget, device=view.features.device) * view.num_tokens // view.budget
        return Selection(chosen.expand(view.num_images, -1))


def to_be_tried(adapter: Adapter) -> bool:
    """Whether a decoder is none that tests of its family run: of a class without a file, or put in place of another."""
    decoder = type(adapter.language_model)
    own = decoder.__module__ == type(adapter.entry).__module__
    return not adapter.verified or not (own or decoder.__name__ in _KNOWN)


def check_removal(adapter: Adapter, stages: Sequence[Stage]) -> None:
    """Try the decoder at the places where a plan cuts.

    It takes three passes of a few tokens, once for each decoder and plan, of a few layers of each kind; weights that
    are not here (on the meta device, sharded, split over processes) are not tried.

    Raises:
        ValueError: what is left differs from what hiding gives; the message says which cuts the model lacks.
    """
    layers = tuple(sorted({stage.depth for stage in stages if stage.place == "layer"}))
    decoder = adapter.language_model
    known = _tried.setdefault(decoder, set())
    split = getattr(adapter.model, "_tp_size", None) or getattr(adapter.model, "tp_size", None) or 1
    if layers in known or split > 1 or not there(decoder):
        return
    says = _differs(adapter, layers)  # cut at the input too
    known |= {(), layers} if not says else set()
    if says and layers and () not in known:
        _refuse(adapter, INPUT_CUTS, _differs(adapter, ()))
        known.add(())
    _refuse(adapter, LAYER_CUTS if layers else INPUT_CUTS, says)


def _differs(adapter: Adapter, layers: tuple[int, ...]) -> str:
    """In what removing differs from hiding; "" if it does not."""
    decoder = adapter.language_model
    try:
        with undisturbed(decoder), only(adapter, sampled_layers(adapter, layers)):
            error = removal_error(adapter, layers)
    except Exception as raised:  # whatever a decoder of an unknown kind raises when it is called in this way
        return str(raised).partition("\n")[0].rstrip(".") or type(raised).__name__
    bound = max(1e-3, 16 * torch.finfo(decoder.dtype).eps)
    return "" if error < bound else f"what stays differs by {error:.1e}, and at most {bound:.1e} is rounding"


def _refuse(adapter: Adapter, lacks: str, says: str) -> None:
    """Raise ValueError if there is something to say."""
    decoder, works = adapter.language_model, ""
    if not says:
        return
    if lacks == LAYER_CUTS:
        works = " Methods that cut at 'input' or before it work (random, divprune)."
    raise ValueError(
        f"{type(adapter.model).__name__} has no {lacks}: taking tokens out of the rows of its {type(decoder).__name__} "
        f"is not hiding them from attention ({says}).{works} verify=False leaves out this trial."
    )


def removal_error(adapter: Adapter, layers: Sequence[int] = ()) -> float:
    """How far the last hidden states of the tokens that stay are from those of the decoder in which the others are
    hidden: the relative error, in the median over the tokens of the prompt, or of the token after it, if that is more.

    Args:
        adapter: the model's family.
        layers: before which tokens leave, besides those that leave at the input.
    """
    keeps = [Budget(6 - index) for index in range(len(layers) + 1)][:6]
    sites = ["input", *(f"layer:{layer}" for layer in list(layers)[:5])]
    stages = [Stage(site, _EveryThird(), keep) for site, keep in zip(sites, keeps)]
    engine = Engine(adapter, stages, outputs="full")
    embeds = _embeddings(adapter)
    with torch.no_grad():
        prompt, cut = _shortened(engine, embeds)
        stays = _standing(prompt, embeds.shape[1])
        whole = _hidden(adapter, [int(cut.site.partition(":")[2] or 0) for cut in prompt.cuts], stays, embeds)
    errors = (cut.double() - whole.double()).norm(dim=-1) / whole.double().norm(dim=-1)  # [2, S + 1]
    seen = (stays[-1] & _real()[:, :-1]).to(errors.device)
    return float(torch.stack([errors[:, :-1][seen].median(), *errors[:, -1]]).max())


def _embeddings(adapter: Adapter) -> Tensor:
    """`[2, S + 1, D]` random embeddings; the last column comes after the prompt."""
    decoder = adapter.language_model
    weight = next(part for part in adapter.layers[0].parameters() if part.is_floating_point())
    generator = torch.Generator().manual_seed(0)
    embeds = torch.randn(2, _LENGTH + 1, decoder.config.hidden_size, generator=generator)
    return embeds.to(device=weight.device, dtype=decoder.dtype)


def _real() -> Tensor:
    """`[2, S + 1]` bool, False at padding."""
    real = torch.ones(2, _LENGTH + 1, dtype=torch.bool)
    real[0, :_PADDING] = False
    return real


def _positions(adapter: Adapter) -> Tensor:
    """Position ids of the two rows, counted without padding."""
    return adapter.position_ids((_real().long().cumsum(1) - 1).clamp(min=0))


def _prompt(embeds: Tensor) -> Prompt:
    """Two rows with one visual each, of which the second has two tokens more."""
    counts = (_VISUAL, _VISUAL + 2)
    visuals = [unplaced(count) for count in counts]
    recording = Recording(visuals, embeds, [embeds[0], embeds[1]])
    firsts = (_PADDING + _FIRST, _FIRST)
    spans = [
        Span(row, 0, visual, torch.arange(first, first + visual.length))
        for row, (visual, first) in enumerate(zip(visuals, firsts))
    ]
    prompt = Prompt(Layout(tuple(spans), 2, _LENGTH, (0, 1)), sources=[(recording, 0), (recording, 1)])
    prompt.attended = _real()[:, :-1]
    prompt.lengths = prompt.attended.sum(1).tolist()
    return prompt


def _shortened(engine: Engine, embeds: Tensor, cache: Any = None) -> tuple[Prompt, Tensor]:
    """A prompt, and `[2, S + 1, D]` of it: as the engine prunes it, put back at full length, and one token after it.

    Args:
        cache: for a decoder that makes none by itself; None: to be found out.
    """
    adapter, ledger, prompt = engine.adapter, Ledger(), _prompt(embeds)
    given = {} if cache is None else cache_argument(cache)
    decoder, real, positions = adapter.language_model, _real().long().to(embeds.device), _positions(adapter)
    positions = positions.to(embeds.device)
    engine.install_decoder(ledger)
    try:
        call = engine.calls.begin(adapter.entry)
        call.entered, call.prompt = True, prompt
        first = decoder(
            inputs_embeds=embeds[:, :-1], attention_mask=real[:, :-1], position_ids=positions[..., :-1], use_cache=True,
            **given,
        )  # fmt: skip
        engine.calls.end(adapter.entry)
        made = cache_in(first)
        if made is not None:
            then = decoder(
                inputs_embeds=embeds[:, -1:], attention_mask=real, position_ids=positions[..., -1:], use_cache=True,
                **cache_argument(made),
            )  # fmt: skip
            return prompt, torch.cat([first.last_hidden_state, then.last_hidden_state], dim=1)
    finally:
        engine.calls.drop_to(None)
        ledger.undo()
    if cache is not None:
        raise ValueError(f"{type(decoder).__name__} was given a KV cache and returns none")
    return _shortened(engine, embeds, empty_cache(decoder.config))


def _standing(prompt: Prompt, length: int) -> list[Tensor]:
    """`[2, S]` bool behind each cut of a prompt: what is still there."""
    found = []
    for cut in prompt.cuts:
        stays = torch.ones(2, length - 1, dtype=torch.bool)
        for span, tokens in zip(prompt.layout.spans, cut.tokens):
            stays[span.sample, span.places] = False
            stays[span.sample, span.places if tokens is None else span.places[tokens.cpu()]] = True
        found.append(stays)
    return found


def _hidden(adapter: Adapter, firsts: Sequence[int], stays: Sequence[Tensor], embeds: Tensor) -> Tensor:
    """`[2, S + 1, D]`: the full-length rows without a cache, in which tokens are hidden from the layer on before which
    they left."""
    decoder = adapter.language_model
    seen = [torch.cat([own, torch.ones(2, 1, dtype=torch.bool)], 1) & _real() for own in stays]
    seen = [own.to(embeds.device) for own in seen]
    cuts = [max((f, i) for i, f in enumerate(firsts) if f <= layer)[1] for layer in range(len(adapter.layers))]
    along = [layer for layer in range(len(adapter.layers)) if adapter.layer_kind(layer) in RECURRENT]
    later = [
        adapter.layers[layer].register_forward_pre_hook(functools.partial(hide, cut, seen), with_kwargs=True)
        for layer, cut in enumerate(cuts)
        if cut > 0 and layer not in along
    ]
    with hooked(*later), passed_by([(adapter.layers[layer], seen[cuts[layer]]) for layer in along]):
        return decoder(
            inputs_embeds=embeds, attention_mask=seen[0].long(), position_ids=_positions(adapter).to(embeds.device),
            use_cache=False,
        ).last_hidden_state  # fmt: skip


def hide(cut: int, seen: Sequence[Tensor], module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """As a hook before a decoder layer: hide from the layer's own mask what has left by a cut.

    Args:
        cut: which of `seen`.
        seen: behind each cut `[B, S]` bool, False at what left and at padding.
    """
    mask, own = kwargs.get("attention_mask"), seen[cut]
    if isinstance(mask, Tensor) and mask.dim() == 2:  # flash attention
        return args, {**kwargs, "attention_mask": own.to(mask.dtype)}
    if mask is not None and not isinstance(mask, Tensor):
        raise ValueError(
            f"its layers are given a {type(mask).__name__} for a mask; load it with attn_implementation='sdpa'"
        )
    length = own.shape[1]
    allowed = torch.ones(length, length, dtype=torch.bool, device=own.device).tril()[None, None]
    if mask is not None:
        allowed = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    itself = torch.eye(length, dtype=torch.bool, device=own.device)
    allowed = allowed & own.to(allowed.device)[:, None, None] | itself.to(allowed.device)
    if mask is not None and mask.dtype != torch.bool:
        allowed = torch.zeros(allowed.shape, dtype=mask.dtype, device=mask.device).masked_fill(
            ~allowed, torch.finfo(mask.dtype).min
        )
    return args, {**kwargs, "attention_mask": allowed}


@contextmanager
def passed_by(layers: Sequence[tuple[Any, Tensor]]) -> Iterator[None]:
    """Run layers that go along the row over the tokens alone that stay, `[B, S]` bool each: a token that a mask hides
    would still move their state."""
    before = [vars(module).get("forward") for module, _ in layers]
    try:
        for module, stays in layers:
            module.forward = functools.partial(_along, module.forward, stays)
        yield
    finally:
        for (module, _), forward in zip(layers, before):
            if forward is None:
                del module.forward
            else:
                module.forward = forward


def _along(forward: Any, stays: Tensor, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
    made, left = hidden_states.clone(), ()
    for row, own in enumerate(stays):
        at = own.nonzero()[:, 0]
        output = forward(hidden_states[row : row + 1, at], *args, **{**kwargs, "attention_mask": None})
        made[row, at], left = (output[0][0], output[1:]) if isinstance(output, tuple) else (output[0], None)
    return made if left is None else (made, *left)
