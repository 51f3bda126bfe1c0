"""Every seam of vLLM that the plug-in reaches through, the releases it fits, and what of an engine it cannot serve.

The same kind of list as `tokenprune.seams`; a test walks all of it. Nothing here imports vLLM before it is asked.
"""

# vLLM is not there where types are checked
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from typing import Any

from tokenprune.seams import Seam
from tokenprune.vllm.settings import KEY, Setting

LOWEST, NEWEST = (0, 32), (0, 32)
"""The first and the last release that the tests have been run on; others are refused, because half of what is used here
has no promise behind it."""

_PROCESSING = "vllm.multimodal.processing.processor:BaseMultiModalProcessor"
_MODELS = "vllm.model_executor.models."
_FRONT, _SIZES = "every prompt with pictures", "the layout of pictures"
_SIGNALS, _IDS, _QWEN = "a signal of the tower", "positions of kept tokens", "Qwen-VL"
_ITER = ("iter_mm_grid_thw",)
_QKV = ("query", "key", "value")


def _qwen(module: str, name: str, tower: str, attention: str, grids: tuple[str, ...]) -> list[Seam]:
    where, model = f"{_MODELS}{module}", f"{name}ForConditionalGeneration"
    return [
        Seam(f"{where}:{model}", _QWEN, ("config", "visual", *grids)),
        Seam(f"{where}:{name}ProcessingInfo.get_supported_mm_limits", _QWEN),
        Seam(f"{where}:{name}MultiModalProcessor", _QWEN),
        Seam(f"{where}:{name}DummyInputsBuilder", _QWEN),
        Seam(f"{where}:{model}._process_image_input", _QWEN, ("image_input",)),
        Seam(f"{where}:{model}._process_video_input", _QWEN, ("video_input",)),
        Seam(f"{where}:{model}.embed_multimodal", _QWEN),
        Seam(f"{where}:{model}.get_mrope_input_positions", _IDS, ("input_tokens", "mm_features")),
        Seam(f"{where}:{model}.get_encoder_cudagraph_config", _QWEN),
        Seam(f"{where}:{tower}", _SIGNALS, ("blocks", "merger")),
        Seam(f"{_MODELS}{attention}", _SIGNALS, ("attn",)),
    ]


def _crops(module: str, name: str) -> list[Seam]:
    where, model = f"{_MODELS}{module}", f"{name}ForConditionalGeneration"
    return [
        Seam(f"{where}:{model}", name, ("vision_tower", "config", "hf_to_vllm_mapper")),
        Seam(f"{where}:{model}._process_image_input", name, ("image_input",)),
        Seam(f"{where}:{model}._merge_image_patch_embeddings", name),
        Seam(f"{where}:{model}.embed_multimodal", name),
        Seam(f"{where}:{name}ProcessingInfo.get_supported_mm_limits", name),
        Seam(f"{where}:{name}MultiModalProcessor", name),
    ]


SEAMS: tuple[Seam, ...] = (
    # the front end
    Seam(f"{_PROCESSING}.apply", _FRONT, ("inputs", "timing_ctx")),
    Seam(f"{_PROCESSING}.get_dummy_inputs", "measuring memory"),
    Seam(f"{_PROCESSING}._get_mm_fields_config", _FRONT, ("hf_inputs", "hf_processor_mm_kwargs")),
    Seam(f"{_PROCESSING}._get_prompt_updates", _FRONT, ("mm_items", "hf_processor_mm_kwargs", "out_mm_kwargs")),
    Seam(
        "vllm.multimodal.processing:BaseProcessingInfo.validate_num_items",
        "the refusal of videos",
        ("modality", "num_items"),
    ),
    Seam("vllm.multimodal.processing:InputProcessingContext.get_merged_mm_kwargs", _FRONT, ("kwargs",)),
    Seam("vllm.multimodal.processing:PromptUpdateDetails", _FRONT, ("full", "is_embed")),
    Seam("vllm.multimodal.processing:PromptReplacement", _FRONT, ("modality", "replacement")),
    Seam("vllm.multimodal.inputs:MultiModalFieldConfig.batched", _FRONT, ("modality", "keep_on_cpu")),
    Seam("vllm.multimodal.inputs:PlaceholderRange", _FRONT, ("offset", "length")),
    Seam(
        "vllm.multimodal.registry:MultiModalRegistry.register_processor", _FRONT, ("processor", "info", "dummy_inputs")
    ),
    Seam(
        "vllm.multimodal.registry:MultiModalRegistry.create_processor", "the refusal of other models", ("model_config",)
    ),
    Seam("vllm.config:VllmConfig.try_verify_and_update_config", "the refusal of what cannot stand beside a setting"),
    Seam("vllm.logger:init_logger", "the line in an engine's log", ("name",)),
    Seam("vllm.config.multimodal:MultiModalConfig", _FRONT, ("mm_processor_kwargs", "video_pruning_rate")),
    Seam("vllm.config.multimodal:MultiModalConfig.is_multimodal_pruning_enabled", _IDS),
    # workers
    Seam("vllm.v1.worker.gpu_model_runner:GPUModelRunner", _IDS, ("is_multimodal_pruning_enabled",)),
    Seam("vllm.v1.worker.cpu_model_runner:CPUModelRunner.load_model", _IDS),
    Seam(
        f"{_MODELS}interfaces:SupportsMultiModalPruning.recompute_mrope_positions",
        _IDS,
        ("input_ids", "multimodal_embeddings", "mrope_positions", "num_computed_tokens"),
    ),
    Seam("vllm.distributed:tensor_model_parallel_all_gather", _SIGNALS, ("dim",)),
    Seam("vllm.model_executor.layers.attention.mm_encoder_attention:MMEncoderAttention.forward_native", _SIGNALS, _QKV),
    # models
    Seam(f"{_MODELS}llava:LlavaForConditionalGeneration._process_image_input", "LLaVA", ("image_input",)),
    Seam(f"{_MODELS}llava:LlavaForConditionalGeneration.embed_multimodal", "LLaVA"),
    Seam(f"{_MODELS}llava:LlavaForConditionalGeneration", "LLaVA", ("vision_tower", "config", "hf_to_vllm_mapper")),
    Seam(f"{_MODELS}llava:LlavaProcessingInfo", "LLaVA", ("get_num_image_tokens",)),
    Seam(f"{_MODELS}llava:LlavaMultiModalProcessor", "LLaVA"),
    Seam(f"{_MODELS}llava:LlavaDummyInputsBuilder", "LLaVA"),
    Seam(f"{_MODELS}llava:_build_llava_or_pixtral_hf_info", "LLaVA", ("ctx",)),
    Seam(f"{_MODELS}llava:_build_llava_or_pixtral_hf_processor", "LLaVA", ("info", "dummy_inputs")),
    Seam(f"{_MODELS}clip:CLIPAttention", _SIGNALS, ("attn", "num_heads_per_partition")),
    Seam(f"{_MODELS}clip:CLIPEncoder", _SIGNALS, ("layers",)),
    *_crops("llava_next", "LlavaNext"),
    *_crops("llava_onevision", "LlavaOnevision"),
    Seam(f"{_MODELS}llava_onevision:LlavaOnevisionDummyInputsBuilder", "LlavaOnevision"),
    *_qwen("qwen2_vl", "Qwen2VL", "Qwen2VisionTransformer", "qwen2_vl:Qwen2VisionAttention", _ITER),
    *_qwen("qwen2_5_vl", "Qwen2_5_VL", "Qwen2_5_VisionTransformer", "qwen2_5_vl:Qwen2_5_VisionAttention", _ITER),
    *_qwen("qwen3_vl", "Qwen3VL", "Qwen3_VisionTransformer", "qwen2_5_vl:Qwen2_5_VisionAttention", ()),
    Seam(f"{_MODELS}interns1:InternS1ForConditionalGeneration", "InternVL", ("vision_tower", "downsample_ratio")),
    Seam(f"{_MODELS}interns1:InternS1ForConditionalGeneration._process_vision_input", "InternVL", ("image_input",)),
    Seam(f"{_MODELS}interns1:InternS1ForConditionalGeneration.pixel_shuffle", "InternVL", ("x", "scale_factor")),
    Seam(f"{_MODELS}interns1:InternS1ForConditionalGeneration.embed_multimodal", "InternVL"),
    Seam(f"{_MODELS}interns1:InternS1ProcessingInfo.get_supported_mm_limits", "InternVL"),
    Seam(f"{_MODELS}interns1:InternS1MultiModalProcessor", "InternVL"),
    Seam(f"{_MODELS}interns1:InternS1DummyInputsBuilder", "InternVL"),
    Seam(f"{_MODELS}interns1_vit:InternSdpaAttention", _SIGNALS, ("attn",)),
    Seam(f"{_MODELS}interns1_vit:InternS1VisionEncoder", _SIGNALS, ("layer",)),
    Seam(f"{_MODELS}qwen2_5_vl:Qwen2_5_VisionTransformer.get_window_index_thw", _SIGNALS),
)


@functools.cache
def check_release() -> str:
    """One sentence on an installed vLLM that does not fit; "" if it does."""
    import vllm

    release = tuple(int(part) for part in re.findall(r"\d+", vllm.__version__)[:2])
    fits = f"pip install 'vllm>={_text(LOWEST)},<{_text((NEWEST[0], NEWEST[1] + 1))}'"
    if not LOWEST <= release <= NEWEST:
        return (
            f"tokenprune runs inside vLLM {_text(LOWEST)} to {_text(NEWEST)}, and {vllm.__version__} is installed: "
            f"{fits}."
        )
    lost = missing(SEAMS)
    if lost:
        return f"vLLM {vllm.__version__} has no longer {'; nor '.join(lost)}: {fits}."
    return ""


def missing(seams: Iterable[Seam]) -> list[str]:
    """What the installed vLLM does not have of these seams, with what needs it."""
    return [f"{name} (which {seam.use} needs)" for seam in seams for name in seam.missing()]


def _text(release: tuple[int, ...]) -> str:
    return ".".join(map(str, release))


def check_config(vllm_config: Any, setting: Setting, facts: Any) -> None:
    """Raise ValueError where an engine is asked for something else that cannot stand beside the cuts.

    Args:
        vllm_config: vLLM's.
        facts: see `settings.ModelFacts`.
    """
    mm_config = vllm_config.model_config.get_multimodal_config()
    parallel, lora = vllm_config.parallel_config, vllm_config.lora_config
    reading = [
        name for name, stage in zip(setting.names, setting.stages, strict=True) if list(stage.signals(facts.tower))
    ]
    wrong = ""
    if mm_config.is_multimodal_pruning_enabled() and mm_config.video_pruning_rate:
        wrong = "video_pruning_rate: vLLM would cut the videos once more; use evs@0.5 as a method"
    elif parallel.pipeline_parallel_size > 1:
        wrong = "pipeline_parallel_size above 1: not every stage has a vision tower"
    elif reading and mm_config.mm_encoder_tp_mode == "data":
        wrong = f"mm_encoder_tp_mode='data' beside {reading[0]}, which reads the tower: use 'weights'"
    elif reading and getattr(vllm_config.compilation_config, "compile_mm_encoder", False):
        wrong = f"compile_mm_encoder beside {reading[0]}, which reads the tower while it runs"
    elif lora is not None and getattr(lora, "enable_tower_connector_lora", False):
        wrong = "enable_tower_connector_lora: vLLM counts a tower's rows from the placeholders"
    elif facts.mrope and vllm_config.speculative_config is not None:
        wrong = "speculative decoding on a model with 3-D positions"
    if wrong:
        raise ValueError(f"An engine with {KEY} cannot have {wrong}.")
