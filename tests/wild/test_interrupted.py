"""A call that is stopped from outside (Ctrl-C, the stop button of a notebook): torch runs no hooks after that, and the
next call must not take what the stopped one left for its own."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from _families import _tile_batch, batch_of, family

import tokenprune

VAR = "var(channels=[1, 2], tau=0.1)"
INSIDE = {"at": "vision:1", "prune": "random", "keep": 9}


def answer(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    """Logits of two tokens."""
    with torch.no_grad():
        output = model.generate(
            **batch, max_new_tokens=2, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
    return torch.stack(output.logits)


def stop(model: Any, handle: Any, batch: dict[str, Any], generate: bool) -> None:
    """Run a prompt that is interrupted in the second layer of the decoder."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    hook = handle.adapter.layers[1].register_forward_pre_hook(interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            answer(model, batch) if generate else model(**batch)
    finally:
        hook.remove()


@pytest.mark.parametrize("generate", [True, False])
@pytest.mark.parametrize(
    ("name", "method"),
    [("llava", "uniform@9"), ("llava", "fastv@9"), ("llava", VAR), ("qwen2_5_vl", "fastv@9"), ("smolvlm", INSIDE)],
)
def test_the_next_prompt_is_answered_as_ever(name: str, method: Any, generate: bool) -> None:
    model, batch = family(name), batch_of(name, "one_left")
    with tokenprune.applied(model, method) as handle:
        before = answer(model, batch)
        stop(model, handle, batch_of(name, "ragged_left"), generate)
        assert torch.equal(answer(model, batch), before)


@pytest.mark.parametrize("generate", [True, False])
def test_tiles_are_those_of_the_prompt_that_runs(generate: bool) -> None:
    """Both prompts have three tiles in two pictures, so nothing but the budgets shows which of them was read."""
    model = family("internvl")
    stopped, batch = (_tile_batch("internvl", [tiles], "left", 1) for tiles in ([1, 2], [2, 1]))
    with tokenprune.applied(model, INSIDE) as handle:
        stop(model, handle, stopped, generate)
        answer(model, batch)
        assert [len(tokens) for tokens in handle.kept[0]] == [9, 9]


def test_the_decoder_alone_is_given_what_it_was_called_with() -> None:
    model = family("llava")
    with tokenprune.applied(model, "uniform@9") as handle, torch.no_grad():
        rows = torch.randn(1, 5, 48, generator=torch.Generator().manual_seed(0))
        before = handle.adapter.language_model(inputs_embeds=rows).last_hidden_state
        stop(model, handle, batch_of("llava", "ragged_left"), generate=True)
        assert torch.equal(handle.adapter.language_model(inputs_embeds=rows).last_hidden_state, before)


def test_what_interventions_learn_under_is_free_for_other_threads() -> None:
    model, batch = family("llava"), batch_of("llava", "one_left")
    with tokenprune.applied(model, "var(calibrate=6)") as handle:
        stop(model, handle, batch, generate=True)
        other = threading.Thread(target=answer, args=(model, batch), daemon=True)
        other.start()
        other.join(30)
        assert not other.is_alive()
