"""The front end's side: how many placeholders a picture gets, and what the model is told of it."""

# vLLM is not there where types are checked
# pyright: reportMissingImports=false

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from vllm.logger import init_logger
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.processing import InputProcessingContext, PromptUpdateDetails

from tokenprune.interfaces.visual import Visual
from tokenprune.vllm.families import Family
from tokenprune.vllm.positions import check_strays
from tokenprune.vllm.settings import KEY, WHOLE, Choice, Setting, engine_text, read_setting

# handlers and levels are those of vLLM's loggers, and reach what is named below it
LOGGER = init_logger(f"vllm.{KEY}")


def field_name(kind: str) -> str:
    """What the numbers of `selection.Row` are called beside the inputs of images or videos."""
    return f"{KEY}_{kind}"


class Context(InputProcessingContext):
    """Keeps our key away from Hugging Face's processors."""

    def get_merged_mm_kwargs(self, kwargs: Mapping[str, Any], **more: Any) -> dict[str, Any]:
        return without(super().get_merged_mm_kwargs(without(kwargs), **more))


def without(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The other arguments of a processor."""
    return {name: value for name, value in kwargs.items() if name != KEY}


def hidden_context(ctx: InputProcessingContext) -> tuple[Context, str | None]:
    """A context whose config does not speak of us, since processors are made from that too; and our text in it."""
    model_config = copy.copy(ctx.model_config)
    mm_config = model_config.multimodal_config = copy.copy(model_config.get_multimodal_config())
    text = engine_text(mm_config.mm_processor_kwargs)
    mm_config.mm_processor_kwargs = without(mm_config.mm_processor_kwargs or {}) or None
    fields = {field.name: getattr(ctx, field.name) for field in dataclasses.fields(ctx)}
    return Context(**{**fields, "model_config": model_config}), text


@contextlib.contextmanager
def refused_at_once() -> Iterator[None]:
    """What is wrong with an engine's setting, as an error that ends its start.

    vLLM makes a `BaseProcessingInfo` first of all, and takes a ValueError there for a model without a processor: it
    would go on as with one for text, until a worker fails, with the sentence far above the end of its log.
    """
    try:
        yield
    except ValueError as error:
        raise RuntimeError(f"The setting {KEY} of this engine: {error}") from None


class PruningInfo:
    """Mixin before a model's own `BaseProcessingInfo`: reads the engine's setting when it starts."""

    family: ClassVar[Family]
    setting: Setting | None

    def __init__(self, ctx: Any) -> None:
        with refused_at_once():
            ctx, text = hidden_context(ctx)
            config = ctx.model_config.hf_config
            self.setting = None if text is None else read_setting(text, self.family.facts(config))
        super().__init__(ctx)  # type: ignore[call-arg]
        if self.setting is not None:
            LOGGER.info_once("%s", self.setting.summary())

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        """As the model's own; of an engine with a setting, no videos where they are not covered."""
        limits = super().get_supported_mm_limits()  # type: ignore[misc]
        if self.setting is None:
            return limits
        return {kind: limit if kind in self.family.kinds else 0 for kind, limit in limits.items()}

    def validate_num_items(self, modality: str, num_items: int) -> None:
        """As vLLM's own, with a sentence on videos that are not covered."""
        if self.setting is not None and modality == "video" and self.family.no_videos and num_items:
            raise ValueError(
                f"An engine with {KEY} takes no videos on this model: {self.family.no_videos}. Ask one without it."
            )
        super().validate_num_items(modality, num_items)  # type: ignore[misc]


class PruningProcessor:
    """Mixin before a model's own `BaseMultiModalProcessor`."""

    family: ClassVar[Family]
    info: Any

    def _choice(self, kwargs: Mapping[str, Any]) -> Choice | None:
        """What holds for one request; None where the engine has no methods."""
        if self.info.setting is None:
            if KEY in kwargs:
                raise ValueError(
                    f"The request asks for {KEY}={kwargs[KEY]!r}, and this engine was started without {KEY} in its "
                    "mm_processor_kwargs: start one with it, or leave it out of the request."
                )
            return None
        return self.info.setting.choice(kwargs.get(KEY))

    def get_dummy_inputs(self, *args: Any, **kwargs: Any) -> Any:
        """What memory is measured with: whole pictures, because a request may ask for them."""
        inputs = super().get_dummy_inputs(*args, **kwargs)  # type: ignore[misc]
        if self.info.setting is None:
            return inputs
        return dataclasses.replace(inputs, hf_processor_mm_kwargs={**inputs.hf_processor_mm_kwargs, KEY: WHOLE})

    def apply(self, inputs: Any, timing_ctx: Any) -> Any:
        """As vLLM's own, with what holds for the request, the engine's default included, in every picture's hash."""
        kwargs = inputs.hf_processor_mm_kwargs
        choice = self._choice(kwargs)
        if choice is None:
            return super().apply(inputs, timing_ctx)  # type: ignore[misc]
        kwargs = {**without(kwargs), KEY: self.info.setting.text(choice)}
        result = super().apply(dataclasses.replace(inputs, hf_processor_mm_kwargs=kwargs), timing_ctx)  # type: ignore[misc]
        if self.family.mrope:
            _check_text_around(result)
            config = self.info.ctx.model_config.hf_config
            media = [self.family.placeholders(config, kind) for kind in self.family.kinds]
            check_strays(result["prompt_token_ids"], media, _ranges(result))
        return result

    def _get_mm_fields_config(self, hf_inputs: Any, hf_processor_mm_kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
        fields = dict(super()._get_mm_fields_config(hf_inputs, without(hf_processor_mm_kwargs)))  # type: ignore[misc]
        choice = self._choice(hf_processor_mm_kwargs)
        if choice is None:
            return fields
        config = self.info.ctx.model_config.hf_config
        for kind in self.family.kinds:
            visuals = self.family.visuals(config, kind, hf_inputs)
            if visuals:
                # read right behind this, one more input of the model beside the pixels
                hf_inputs[field_name(kind)] = torch.tensor([self._row(choice, visual) for visual in visuals])
                fields[field_name(kind)] = MultiModalFieldConfig.batched(kind, keep_on_cpu=True)
        return fields

    def _row(self, choice: Choice, visual: Visual) -> list[int]:
        return [self.info.setting.length(choice, visual), choice.tokens(visual), choice.method, visual.length]

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, Any], out_mm_kwargs: Any
    ) -> Sequence[Any]:
        updates = super()._get_prompt_updates(mm_items, without(hf_processor_mm_kwargs), out_mm_kwargs)  # type: ignore[misc]
        if self._choice(hf_processor_mm_kwargs) is None:
            return updates
        config = self.info.ctx.model_config.hf_config

        def shorter(update: Any) -> Any:
            kind = update.modality
            if kind not in self.family.kinds:
                return update

            def replacement(item: int) -> Any:
                whole = update.replacement(item) if callable(update.replacement) else update.replacement
                length, _, _, before = out_mm_kwargs[kind][item][field_name(kind)].data.tolist()
                return _shortened(whole, self.family.placeholders(config, kind), before, length)

            return dataclasses.replace(update, replacement=replacement)

        return [shorter(update) for update in updates]


def _shortened(whole: Any, placeholder: int, before: int, length: int) -> Any:
    """What stands in a prompt for a picture, with `length` of its `before` placeholders: the first ones, with the text
    around them."""
    details = whole if isinstance(whole, PromptUpdateDetails) else None
    ids = list(whole if details is None else details.full)
    if ids.count(placeholder) != before:
        raise ValueError(
            f"A picture has {ids.count(placeholder)} placeholders of id {placeholder} in the prompt, and its grid "
            f"makes {before} tokens: this release of vLLM lays it out differently."
        )
    spare = before - length
    last = len(ids) - 1 - ids[::-1].index(placeholder)
    # the last of an unbroken run: what is left out stands together
    cut = ids[: last + 1 - spare] + ids[last + 1 :]
    if cut.count(placeholder) != length:
        raise ValueError("The placeholders of a picture stand apart in this model's prompts, so they are not cut.")
    return cut if details is None else dataclasses.replace(details, full=cut)


def _ranges(result: Mapping[str, Any]) -> list[tuple[int, int]]:
    """(begin, end) of each visual in a prompt, in order."""
    places = [place for of_kind in result["mm_placeholders"].values() for place in of_kind]
    return sorted((place.offset, place.offset + place.length) for place in places)


def _check_text_around(result: Mapping[str, Any]) -> None:
    """Raise ValueError where a picture has no text before it, or the prompt ends with one: positions of kept tokens
    count from the token before, and those of what is generated from the text behind."""
    ranges = _ranges(result)
    for (start, _), before in zip(ranges, [0, *(end for _, end in ranges)]):
        if start == before:
            raise ValueError(
                "A picture stands at the beginning of the prompt or right behind another one; this model needs a text "
                "token before each, as its chat template writes them (<|vision_start|>)."
            )
    if ranges and ranges[-1][1] == len(result["prompt_token_ids"]):
        raise ValueError(
            "The prompt ends with a picture; this model needs a text token behind it, as its chat template writes one "
            "(<|vision_end|>)."
        )
