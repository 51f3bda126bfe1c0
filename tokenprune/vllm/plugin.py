"""vLLM's entry point: called in each of its processes (front end, engine core, workers), and more than once in some."""

# vLLM is not there where types are checked
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

from __future__ import annotations

from typing import Any

from tokenprune.vllm.families import FAMILIES
from tokenprune.vllm.seams import check_config, check_release
from tokenprune.vllm.settings import KEY, engine_text, read_setting

MODELS = {
    "InternVLForConditionalGeneration": "tokenprune.vllm.internvl:PrunedInternVL",
    "LlavaForConditionalGeneration": "tokenprune.vllm.llava:PrunedLlava",
    "LlavaNextForConditionalGeneration": "tokenprune.vllm.llava:PrunedLlavaNext",
    "LlavaOnevisionForConditionalGeneration": "tokenprune.vllm.llava:PrunedLlavaOnevision",
    "Qwen2VLForConditionalGeneration": "tokenprune.vllm.qwen:PrunedQwen2VL",
    "Qwen2_5_VLForConditionalGeneration": "tokenprune.vllm.qwen:PrunedQwen25VL",
    "Qwen3VLForConditionalGeneration": "tokenprune.vllm.qwen:PrunedQwen3VL",
}
"""By vLLM's class, ours: a subclass of it that is vLLM's own in all it does until an engine names a method."""


def register() -> None:
    """Put our classes in place of vLLM's, which changes nothing of an engine without a setting. On a release of vLLM
    that does not fit, engines with a setting are refused and all others are left alone."""
    wrong = check_release()
    _refuse_others(wrong)
    if wrong:
        return
    from vllm import ModelRegistry

    for name, ours in MODELS.items():
        ModelRegistry.register_model(name, ours)
    _refuse_beside()
    _positions_come_with_embeddings()
    _mend_cpu_runner()


def _replace(owner: Any, name: str, make: Any) -> None:
    """Put `make(stock)` in place of a method, once."""
    stock = getattr(owner, name)
    if not hasattr(stock, "tokenprune_stock"):
        ours = make(stock)
        ours.tokenprune_stock = stock
        setattr(owner, name, ours)


def _refuse_others(wrong: str) -> None:
    """Refuse engines that name a method where nothing would act on it: other models, other releases."""
    from vllm.multimodal.registry import MultiModalRegistry

    def make(stock: Any) -> Any:
        def create_processor(self: Any, model_config: Any, *args: Any, **kwargs: Any) -> Any:
            mm_config = getattr(model_config, "multimodal_config", None)
            if mm_config is not None and engine_text(mm_config.mm_processor_kwargs) is not None:
                names = model_config.architectures
                if wrong:
                    raise ValueError(wrong)
                if not any(name in MODELS for name in names):
                    raise ValueError(
                        f"{KEY} was given for {', '.join(names)}, which it does not cover inside vLLM; it covers "
                        f"{', '.join(sorted(MODELS))}."
                    )
            return stock(self, model_config, *args, **kwargs)

        return create_processor

    _replace(MultiModalRegistry, "create_processor", make)


def _refuse_beside() -> None:
    """Refuse what cannot stand beside a setting as soon as the engine's config is whole: a worker would do so a minute
    later, and its sentence would stand far above the end of the log."""
    from vllm.config import VllmConfig

    def make(stock: Any) -> Any:
        def try_verify_and_update_config(self: Any) -> None:
            stock(self)
            model_config = self.model_config
            family = FAMILIES.get(getattr(model_config, "architecture", None) or "")
            mm_config = getattr(model_config, "multimodal_config", None)
            if family is None or mm_config is None or (text := engine_text(mm_config.mm_processor_kwargs)) is None:
                return
            try:
                facts = family.facts(model_config.hf_config)
                check_config(self, read_setting(text, facts), facts)
            except ValueError as error:  # around which pydantic would write lines of its own
                raise RuntimeError(str(error)) from None

        return try_verify_and_update_config

    _replace(VllmConfig, "try_verify_and_update_config", make)


def _positions_come_with_embeddings() -> None:
    """The runner asks the config, and not the model alone, whether 3-D positions come with the embeddings."""
    from vllm.config.multimodal import MultiModalConfig

    def make(stock: Any) -> Any:
        def is_multimodal_pruning_enabled(self: Any) -> bool:
            return stock(self) or engine_text(self.mm_processor_kwargs) is not None

        return is_multimodal_pruning_enabled

    _replace(MultiModalConfig, "is_multimodal_pruning_enabled", make)


def _mend_cpu_runner() -> None:
    """The CPU runner has a `load_model` of its own that never asks. Mended for our engines alone."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    from vllm.model_executor.models.interfaces import supports_multimodal_pruning
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    def make(stock: Any) -> Any:
        def load_model(self: Any, *args: Any, **kwargs: Any) -> None:
            stock(self, *args, **kwargs)
            mm_config = self.model_config.multimodal_config
            if mm_config is not None and engine_text(mm_config.mm_processor_kwargs) is not None:
                self.is_multimodal_pruning_enabled = supports_multimodal_pruning(self.get_model())

        return load_model

    _replace(CPUModelRunner, "load_model", make)
