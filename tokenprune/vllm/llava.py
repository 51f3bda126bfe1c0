"""LLaVA-1.5, LLaVA-NeXT and LLaVA-OneVision inside vLLM: 1-D positions, which vLLM counts over the tokens that are
there (the policy "compact")."""

# vLLM is not there where types are checked
# pyright: reportMissingImports=false

from __future__ import annotations

from typing import Any

from vllm.model_executor.models import llava as stock
from vllm.model_executor.models import llava_next, llava_onevision
from vllm.model_executor.models.utils import WeightsMapper
from vllm.multimodal import MULTIMODAL_REGISTRY

from tokenprune.interfaces.vision_tower import VisionTower
from tokenprune.vllm.families import FAMILIES
from tokenprune.vllm.processing import PruningInfo, PruningProcessor, refused_at_once
from tokenprune.vllm.settings import ModelFacts, engine_text
from tokenprune.vllm.towers import BatchTower
from tokenprune.vllm.worker import PrunedModel

FAMILY, NEXT, ONEVISION = (FAMILIES[f"Llava{name}ForConditionalGeneration"] for name in ("", "Next", "Onevision"))

TOWER_NAMES = WeightsMapper(
    orig_to_new_prefix={
        f"{prefix}vision_tower.{part}": f"vision_tower.vision_model.{part}"
        for prefix in ("", "model.")
        for part in ("embeddings.", "encoder.", "pre_layrnorm.", "post_layernorm.")
    }
)
"""Checkpoints that transformers 5 saved have no `vision_model.` in the names of a tower's weights, and vLLM has."""


class PrunedClipOrSiglip(PrunedModel):
    """What the three classes share: a CLIP or SigLIP tower, read by batches."""

    vision_tower: Any

    def tower(self, facts: ModelFacts) -> VisionTower:
        module = self.vision_tower
        blocks = module.vision_model.encoder.layers
        return BatchTower(module, blocks, lambda b: b.self_attn.attn, facts.tower, self.config.vision_config.patch_size)

    def _process_image_input(self, image_input: Any) -> Any:
        pixels = image_input.get("pixel_values")
        own = super()._process_image_input  # type: ignore[misc]
        found = self.pruned("image", image_input, [] if pixels is None else list(pixels), lambda: own(image_input))
        return own(image_input) if found is None else [kept.embeddings for kept in found]


class Info(PruningInfo, stock.LlavaProcessingInfo):
    """What vLLM asks of the model's processor."""

    family = FAMILY


class Processor(PruningProcessor, stock.LlavaMultiModalProcessor):
    """From a prompt and its pictures to placeholders and pixels."""

    family = FAMILY


def build_info(ctx: Any) -> Any:
    """Ours, but for LLaVA with Pixtral's tower, which is another model to vLLM."""
    if ctx.model_config.hf_config.vision_config.model_type != "pixtral":
        return Info(ctx)
    if engine_text(ctx.model_config.get_multimodal_config().mm_processor_kwargs) is not None:
        with refused_at_once():
            FAMILY.facts(ctx.model_config.hf_config)  # says why not
    return stock._build_llava_or_pixtral_hf_info(ctx)


def build_processor(info: Any, dummy_inputs: Any) -> Any:
    """The processor that fits."""
    if isinstance(info, Info):
        return Processor(info, dummy_inputs)  # pyright: ignore[reportCallIssue]
    return stock._build_llava_or_pixtral_hf_processor(info, dummy_inputs)


@MULTIMODAL_REGISTRY.register_processor(build_processor, info=build_info, dummy_inputs=stock.LlavaDummyInputsBuilder)
class PrunedLlava(PrunedClipOrSiglip, stock.LlavaForConditionalGeneration):
    """vLLM's own class, whose pictures are cut behind the projector."""

    family = FAMILY
    hf_to_vllm_mapper = TOWER_NAMES | stock.LlavaForConditionalGeneration.hf_to_vllm_mapper


class InfoNext(PruningInfo, llava_next.LlavaNextProcessingInfo):
    """What vLLM asks of the processor of LLaVA-NeXT."""

    family = NEXT


class ProcessorNext(PruningProcessor, llava_next.LlavaNextMultiModalProcessor):
    """From a prompt and its pictures to placeholders and pixels."""

    family = NEXT


@MULTIMODAL_REGISTRY.register_processor(ProcessorNext, info=InfoNext, dummy_inputs=stock.LlavaDummyInputsBuilder)
class PrunedLlavaNext(PrunedClipOrSiglip, llava_next.LlavaNextForConditionalGeneration):
    """vLLM's own class, whose pictures are cut behind the packing of their crops."""

    family = NEXT
    hf_to_vllm_mapper = TOWER_NAMES | llava_next.LlavaNextForConditionalGeneration.hf_to_vllm_mapper


class InfoOnevision(PruningInfo, llava_onevision.LlavaOnevisionProcessingInfo):
    """What vLLM asks of the processor of LLaVA-OneVision."""

    family = ONEVISION


class ProcessorOnevision(PruningProcessor, llava_onevision.LlavaOnevisionMultiModalProcessor):
    """From a prompt and its pictures to placeholders and pixels."""

    family = ONEVISION


@MULTIMODAL_REGISTRY.register_processor(
    ProcessorOnevision, info=InfoOnevision, dummy_inputs=llava_onevision.LlavaOnevisionDummyInputsBuilder
)
class PrunedLlavaOnevision(PrunedClipOrSiglip, llava_onevision.LlavaOnevisionForConditionalGeneration):
    """vLLM's own class, whose pictures are cut behind the packing of their crops."""

    family = ONEVISION
    hf_to_vllm_mapper = TOWER_NAMES | llava_onevision.LlavaOnevisionForConditionalGeneration.hf_to_vllm_mapper
