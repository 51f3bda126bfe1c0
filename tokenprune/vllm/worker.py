"""The worker's side: a mixin before vLLM's own model classes, whose pictures' embeddings it cuts."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from tokenprune.interfaces.vision_tower import VisionTower
from tokenprune.vllm.families import Family
from tokenprune.vllm.processing import field_name
from tokenprune.vllm.seams import check_config
from tokenprune.vllm.selection import Kept, Row, Selector, try_methods
from tokenprune.vllm.settings import ModelFacts, engine_text, read_setting


@contextlib.contextmanager
def plain_tensors() -> Iterator[None]:
    """vLLM makes a model with its device and its dtype as the defaults of torch; what methods are tried on, and what
    they make meanwhile, is made on the host and in float32, as while they serve."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(dtype)


class PrunedModel:
    """What pruned models have in common. A model of an engine without a setting is vLLM's own in all it does."""

    family: ClassVar[Family]
    config: Any

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        self._selector: Selector | None = None
        self._rows: dict[str, list[Row]] = {}
        self._tried = False
        text = engine_text(vllm_config.model_config.get_multimodal_config().mm_processor_kwargs)
        if text is None:
            return
        facts = self.family.facts(self.config)
        setting = read_setting(text, facts)
        check_config(vllm_config, setting, facts)
        width = self.config.get_text_config().hidden_size
        with plain_tensors():
            try_methods(setting, facts.tower, self.family.example(self.config), width)
        self._selector = Selector(setting, self.tower(facts))

    def tower(self, facts: ModelFacts) -> VisionTower:
        """This model's tower, as it is read."""
        raise NotImplementedError

    def embed_multimodal(self, **kwargs: Any) -> Any:
        """`[P, D]` of each picture or video of a call, one for each placeholder."""
        self._rows = {}
        for kind in self.family.kinds:
            given = kwargs.pop(field_name(kind), None)
            if given is not None:
                self._rows[kind] = [Row(*row) for row in torch.as_tensor(given).tolist()]
        try:
            return super().embed_multimodal(**kwargs)  # type: ignore[misc]
        finally:
            self._rows = {}

    def pruned(
        self, kind: str, inputs: Mapping[str, Any], pixels: Sequence[Tensor], run_tower: Callable[[], Sequence[Tensor]]
    ) -> list[Kept] | None:
        """What stays of the visuals of one kind; None where the engine has no methods.

        Args:
            inputs: what a worker got of them.
            pixels: of each.
            run_tower: vLLM's own way to their features, `[P, D']` each.
        """
        if self._selector is None:
            return None
        visuals = self.family.visuals(self.config, kind, inputs)
        features, recording = self._selector.watch(visuals, pixels, run_tower)
        rows = self._rows.get(kind)
        if rows is None:  # pictures that did not come through our processor: memory is being measured
            rows = [Row(visual.length, visual.num_tokens, 0, visual.length) for visual in visuals]
        width = self.config.get_text_config().hidden_size
        measuring = all(row.budget >= visual.num_tokens for row, visual in zip(rows, visuals))
        if measuring and not self._tried:  # memory is measured with whole pictures, once, before any request
            self._selector.try_all(list(features), recording, width)
        self._tried = True
        return self._selector.select(rows, list(features), recording, width)
