"""A model's own answer, and its decoder's attention while that answer is read once more, all tokens at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokenprune.engine.prompt_reader import PromptReader
from tokenprune.interfaces.adapter import Adapter
from tokenprune.state.call_inputs import CallInputs


@dataclass
class Replay:
    """One prompt with its answer, S = P + T tokens.

    Attributes:
        logits: `[S, V]`.
        attention: by decoder layer `[1, H, S, S]`, softmax rows of all query heads, the very tensors
            of the pass.
        answer: `[T]` int64.
        visuals: for each visual of the prompt, `[N]` int64, where its tokens stand (separators are none).
        instruction: `[n]` int64, places of the text after the last visual token, the last place of the prompt where
            there is none.
    """

    logits: Tensor
    attention: list[Tensor]
    answer: Tensor
    visuals: list[Tensor]
    instruction: Tensor

    @property
    def prompt_length(self) -> int:
        """P."""
        return self.logits.shape[0] - self.answer.shape[0]


@torch.no_grad()
def greedy_answer(model: Any, inputs: Mapping[str, Any], max_new_tokens: int) -> Tensor:
    """`[T]` int64 that the model generates for one prompt; a last token that ends it is left out, unless it is all."""
    made = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    answer = made[0, inputs["input_ids"].shape[1] :]
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    return answer[:-1] if len(answer) > 1 and int(answer[-1]) in ends else answer


def replay(adapter: Adapter, inputs: Mapping[str, Any], answer: Tensor, gradients: bool) -> Replay:
    """Run the prompt and its answer in one pass, with eager attention.

    Args:
        inputs: of one prompt without padding, as the processor made them.
        answer: `[T]`.
        gradients: whether attention shall know its gradient.
    """
    model = adapter.model
    prompt = PromptReader(adapter).read_alone(CallInputs(inputs))
    if prompt is None or prompt.layout.batch_size != 1:
        raise ValueError("A replay takes one prompt with a picture in it.")
    found: list[Tensor] = []
    with eager_attention(adapter, found, gradients), torch.set_grad_enabled(gradients):
        logits = model(**_lengthened(inputs, answer), use_cache=False).logits[0]
    visuals = []
    for span in prompt.layout.spans:
        offsets = span.visual.offsets
        visuals.append(span.places if offsets is None else span.places[offsets])
    length = prompt.layout.length
    text = max(prompt.text_after_visual()[0], 1)
    return Replay(logits, found, answer, visuals, torch.arange(length - text, length))


def _lengthened(inputs: Mapping[str, Any], answer: Tensor) -> dict[str, Any]:
    """Inputs of the prompt with the answer behind it."""
    ids = inputs["input_ids"]
    longer = dict(inputs)
    for name, value in inputs.items():
        if isinstance(value, Tensor) and value.shape == ids.shape:
            fill = answer[None].to(value.device) if name == "input_ids" else torch.zeros_like(answer)[None]
            fill = torch.ones_like(answer)[None] if name == "attention_mask" else fill
            longer[name] = torch.cat([value, fill.to(value)], dim=1)
    return longer


@contextmanager
def eager_attention(adapter: Adapter, found: list[Tensor], gradients: bool) -> Iterator[None]:
    """Let the decoder attend in plain operations and put each layer's `[1, H, S, S]` into `found`; a batch of one."""
    decoder: Any = adapter.language_model
    before = decoder.config._attn_implementation

    def keep(module: Any, args: Any, output: Any) -> None:
        found.append(output[1])

    def begin(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        # frozen weights and frozen embeddings have no gradient; attention gets one by what enters the decoder
        return args, {**kwargs, "inputs_embeds": kwargs["inputs_embeds"].detach().requires_grad_()}

    hooks = [adapter.attention(layer).register_forward_hook(keep) for layer in adapter.layers]
    if gradients:
        hooks.append(decoder.register_forward_pre_hook(begin, with_kwargs=True))
    try:
        decoder.set_attn_implementation("eager")
        yield
    finally:
        decoder.set_attn_implementation(before)
        for hook in hooks:
            hook.remove()
