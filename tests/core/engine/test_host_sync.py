"""Between the features of a prompt and the decoder's start, selection at a fixed budget waits for nothing on a GPU.

There is no GPU here: the engine's own code runs on tensors of the device `meta`, which have no values. Whatever needs
one on the host raises: `item`, `bool`, `tolist`, `cpu`, `nonzero`, reading by a mask.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

import pytest
import torch
from _tiny import prompts, tiny_llava

import tokenprune
from tokenprune.engine.decoder_pass import DecoderPass
from tokenprune.interfaces.selection import Selection
from tokenprune.methods.divprune import DivPrune
from tokenprune.state.call_inputs import CallInputs
from tokenprune.state.device_timer import DeviceTimer

METHODS = ["vtc_cls", "holov", "todre", "divprune", "random", "uniform", {"prune": "holov", "variant": "paper"}]


class Entered(Exception):
    """Raised in place of the cut: the test goes on from there."""

    def __init__(self, *args: Any) -> None:
        self.args = args


def reach_the_cut(model: Any, inputs: dict[str, Any], handle: Any) -> tuple[Any, ...]:
    """Run the model up to the point where the features are known; what the engine was about to cut."""
    engine = handle._engine  # its own code is run on another device, from the middle of a call: no view gives that
    kept: list[Any] = []

    def stop(prompt: Any, inputs: CallInputs, kwargs: Any) -> Any:
        prompt.sources = engine._recorded(prompt.layout)
        kept.extend([prompt.sources, prompt, inputs])
        raise Entered

    original, engine._cut_input = engine._cut_input, stop
    try:
        with torch.no_grad():
            model(**inputs)
    except Entered:
        pass
    finally:
        engine._cut_input = original
    sources, prompt, entering = kept
    prompt.sources = sources  # the engine forgets them when a call fails
    return prompt, entering


@contextmanager
def nothing_timed(self: Any, device: torch.device) -> Any:
    yield


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("images", [[1], [2, 1]], ids=["one", "ragged"])
def test_a_fixed_budget_needs_nothing_from_the_device(
    method: Any, images: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    run(method, images, monkeypatch)


@pytest.mark.parametrize(
    "read", [lambda x: bool(x.isnan().any()), lambda x: x.cpu(), lambda x: x[x > 0], lambda x: x.nonzero()]
)
def test_what_reads_a_value_is_found(read: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above can fail."""
    select = DivPrune.select

    def reads(self: Any, view: Any) -> Selection:
        read(view.features)
        return select(self, view)

    monkeypatch.setattr(DivPrune, "select", reads)
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        run("divprune", [1], monkeypatch)


def run(method: Any, images: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DeviceTimer, "_timed", nothing_timed)
    model, inputs = tiny_llava(), prompts(images)
    handle = tokenprune.apply(model, method, keep=12)
    try:
        prompt, entering = reach_the_cut(model, inputs, handle)
        engine = handle._engine
        for recording in {id(recording): recording for recording, _ in prompt.sources}.values():
            recording.signals = {name: [value.to("meta") for value in rows] for name, rows in recording.signals.items()}
            recording.pixels = [pixels.to("meta") for pixels in recording.pixels]
        with torch.no_grad():
            given = {"inputs_embeds": entering.embeds.to("meta"), "attention_mask": entering.mask.to("meta")}
            elsewhere = CallInputs(given)
            embeds, compaction = engine._cut_input(prompt, elsewhere, {})
            handed = DecoderPass(engine.adapter, None, elsewhere).begin(compaction, engine._policy, embeds)
        assert handed["inputs_embeds"].is_meta
        kept = 12 * max(images) + int((inputs["input_ids"][0] != 0).sum()) - 36 * images[0]
        assert handed["inputs_embeds"].shape[1] == kept
    finally:
        handle.remove()
