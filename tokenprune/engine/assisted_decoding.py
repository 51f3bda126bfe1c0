"""What a draft proposed, and what was answered already, is no part of the prompt.

Assisted decoding hands the model the prompt and the first proposed tokens in one call; generation without a cache hands
it the prompt and the answer so far. A method that looks at the last token, or at the instruction, must not take those
for the prompt's, or its choice would depend on them. They are counted where they come in: `generate` prepares the
inputs of each of its forward calls, and its generators of candidates are asked before.
"""

from __future__ import annotations

import functools
from typing import Any

from tokenprune.hooks import Ledger
from tokenprune.seams import CANDIDATE_GENERATOR
from tokenprune.state.call_inputs import CallInputs
from tokenprune.state.forward_call import Calls, Generation


class Drafts:
    """Notes each `generate` call of one model, and how many tokens of its next forward call are not the prompt's.

    Args:
        calls: the calls at work.
        reads_text: whether the method looks at the text.
    """

    def __init__(self, calls: Calls, reads_text: bool) -> None:
        self._calls, self._reads_text = calls, reads_text

    def install(self, model: Any, ledger: Ledger) -> None:
        """Watch `generate` of this object and what it calls before each forward; `ledger` takes that back."""
        generate, prepare = model.generate, model.prepare_inputs_for_generation
        make = getattr(model, CANDIDATE_GENERATOR)

        @functools.wraps(generate)
        def generating(*args: Any, **kwargs: Any) -> Any:
            ids = kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else None))
            # no forward call runs `generate`: one that seems to be at work was interrupted, and no hook said so
            self._calls.drop_to(None)
            before, self._calls.generation = self._calls.generation, Generation(ids=ids)
            try:
                return generate(*args, **kwargs)
            finally:
                self._calls.drop_to(None)
                self._calls.generation, self._calls.drafted = before, 0

        @functools.wraps(prepare)
        def preparing(input_ids: Any, *args: Any, **kwargs: Any) -> Any:
            self._calls.drafted = self._behind_prompt(input_ids)
            return prepare(input_ids, *args, **kwargs)

        @functools.wraps(make)
        def noting(*args: Any, **kwargs: Any) -> Any:
            generator = make(*args, **kwargs)
            propose = generator.get_candidates

            def candidates(input_ids: Any, *more: Any, **rest: Any) -> Any:
                self._behind_prompt(input_ids)  # asked first, so that the prompt is known without its first candidates
                return propose(input_ids, *more, **rest)

            generator.get_candidates = candidates  # of this generator alone, which lives as long as the call
            return generator

        ledger.set(model, "generate", generating)
        ledger.set(model, "prepare_inputs_for_generation", preparing)
        ledger.set(model, CANDIDATE_GENERATOR, noting)

    def _behind_prompt(self, input_ids: Any) -> int:
        """How many of the ids `[B, S]` at work in `generate` came after its prompt."""
        generation, length = self._calls.generation, input_ids.shape[1]
        if generation is None:
            return 0
        if generation.prompt_length is None:
            generation.prompt_length = length
        return length - generation.prompt_length

    def proposed(self, inputs: CallInputs) -> int:
        """How many tokens at the end of the forward call that begins are not the prompt's; asked once a call.

        Args:
            inputs: what the call was given.

        Raises:
            ValueError: `generate` goes on without a cache, and something stands between it and the model, so that
                prompt and answer cannot be told apart.
        """
        drafted, self._calls.drafted = self._calls.drafted, 0
        generation = self._calls.generation
        unknown = generation is not None and generation.prompt_length is None
        if self._reads_text and unknown and inputs.arguments.get("use_cache") is False:
            raise ValueError(
                "generate() without a cache hands the model prompt and answer in one, and here its inputs are prepared "
                "by a wrapper (prompt tuning does that), so that the two cannot be told apart, and this method looks "
                "at the text. Generate with a cache (use_cache=True), or use a method that does not look at the text."
            )
        return drafted
