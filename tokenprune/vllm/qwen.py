"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL inside vLLM: kept tokens keep their 3-D ids, see `positions`."""

# vLLM is not there where types are checked
# pyright: reportMissingImports=false

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.model_executor.models import qwen2_5_vl, qwen2_vl, qwen3_vl
from vllm.multimodal import MULTIMODAL_REGISTRY

from tokenprune.interfaces.vision_tower import VisionTower
from tokenprune.vllm.families import Qwen3Family, QwenFamily
from tokenprune.vllm.positions import grid_positions, pack, place_visuals, prompt_positions, unpack
from tokenprune.vllm.processing import PruningInfo, PruningProcessor
from tokenprune.vllm.settings import ModelFacts
from tokenprune.vllm.towers import PackedTower
from tokenprune.vllm.worker import PrunedModel

FAMILY2 = FAMILY25 = QwenFamily()
FAMILY3 = Qwen3Family()


class PrunedQwen(PrunedModel):
    """What is not a matter of one class of the family."""

    family: ClassVar[QwenFamily]
    visual: Any
    multimodal_config: Any
    iter_mm_grid_thw: Any

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        if self._selector is not None:
            # vLLM's own cutting of videos, which would act behind ours; `check_config` has refused both at once
            self.is_multimodal_pruning_enabled = False
            # asked of an object, so that the class says of itself what vLLM's says
            self.supports_multimodal_pruning = True

    def tower(self, facts: ModelFacts) -> VisionTower:
        vision = self.config.vision_config
        merge = vision.spatial_merge_size

        def order(rows: int, cols: int) -> Tensor:
            return self.visual.get_window_index_thw(1, rows * merge, cols * merge)[0].cpu()

        return PackedTower(
            self.visual,
            lambda block: block.attn.attn,
            facts.tower,
            merge,
            vision.in_channels,
            vision.temporal_patch_size,
            order if hasattr(self.visual, "get_window_index_thw") else None,
        )

    def get_encoder_cudagraph_config(self) -> Any:
        """None of the tower's runs may pass `embed_multimodal` by."""
        config = super().get_encoder_cudagraph_config()  # type: ignore[misc]
        return config if self._selector is None else dataclasses.replace(config, modalities=[])

    def _process_image_input(self, image_input: Any) -> Any:
        own = super()._process_image_input  # type: ignore[misc]
        return self._cut("image", image_input, image_input.get("pixel_values"), lambda: own(image_input))

    def _process_video_input(self, video_input: Any) -> Any:
        own = super()._process_video_input  # type: ignore[misc]
        return self._cut("video", video_input, video_input.get("pixel_values_videos"), lambda: own(video_input))

    def _cut(self, kind: str, inputs: Any, pixels: Tensor | None, run_tower: Any) -> Any:
        merge = self.config.vision_config.spatial_merge_size
        sizes = inputs[f"{kind}_grid_thw"].prod(-1).tolist()
        found = self.pruned(kind, inputs, [] if pixels is None else pixels.split(sizes), run_tower)
        if found is None:
            return run_tower()
        packed = []
        for index, kept in enumerate(found):
            frames, rows, cols = inputs[f"{kind}_grid_thw"][index].tolist()
            ids = grid_positions(
                frames, rows // merge, cols // merge, self.family.step(self.config, kind, inputs, index)
            )
            own = ids if kept.tokens is None else ids[:, kept.tokens.cpu()]
            packed.append(pack(kept.embeddings, own.to(kept.embeddings.device)))
        return packed

    def grids(self, mm_features: list[Any]) -> Iterator[tuple[int, int, int, int, float]]:
        """Where each visual begins, its (frames, rows, cols) and the ids between frames."""
        return self.iter_mm_grid_thw(mm_features)

    # --- positions --------------------------------------------------------------------------------------------------

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: list[Any]) -> tuple[Tensor, int]:
        """Ids of a prompt whose pictures are cut, see `prompt_positions`."""
        if self._selector is None:
            return super().get_mrope_input_positions(input_tokens, mm_features)  # type: ignore[misc]
        lengths = {feature.mm_position.offset: feature.mm_position.length for feature in mm_features}
        visuals = [
            (offset, lengths[offset], grid_positions(frames, rows, cols, step))
            for offset, frames, rows, cols, step in self.grids(mm_features)
        ]
        return prompt_positions(len(input_tokens), visuals)

    def recompute_mrope_positions(
        self, input_ids: Any, multimodal_embeddings: Sequence[Tensor], mrope_positions: Tensor, num_computed_tokens: int
    ) -> tuple[Sequence[Tensor], Tensor, int]:
        """Take the ids of kept tokens from behind their embeddings and put them where the tokens stand."""
        if self._selector is None:
            return super().recompute_mrope_positions(  # type: ignore[misc]
                input_ids, multimodal_embeddings, mrope_positions, num_computed_tokens
            )
        delta = int(mrope_positions[0, -1]) + 1 - mrope_positions.shape[1]  # a prompt ends with text
        parts = [unpack(one) for one in multimodal_embeddings]
        media = [self.family.placeholders(self.config, kind) for kind in self.family.kinds]
        ids = torch.as_tensor(input_ids)
        placed = place_visuals(ids, media, mrope_positions, [own for _, own in parts], num_computed_tokens)
        return [embeddings for embeddings, _ in parts], placed, delta


class Info2(PruningInfo, qwen2_vl.Qwen2VLProcessingInfo):
    """What vLLM asks of the processor of Qwen2-VL."""

    family = FAMILY2


class Processor2(PruningProcessor, qwen2_vl.Qwen2VLMultiModalProcessor):
    """From a prompt and its pictures to placeholders and pixels."""

    family = FAMILY2


@MULTIMODAL_REGISTRY.register_processor(Processor2, info=Info2, dummy_inputs=qwen2_vl.Qwen2VLDummyInputsBuilder)
class PrunedQwen2VL(PrunedQwen, qwen2_vl.Qwen2VLForConditionalGeneration):
    """vLLM's own class, whose pictures and videos are cut behind the merger."""

    family = FAMILY2


class Info25(PruningInfo, qwen2_5_vl.Qwen2_5_VLProcessingInfo):
    """What vLLM asks of the processor of Qwen2.5-VL."""

    family = FAMILY25


class Processor25(PruningProcessor, qwen2_5_vl.Qwen2_5_VLMultiModalProcessor):
    """From a prompt and its pictures to placeholders and pixels."""

    family = FAMILY25


@MULTIMODAL_REGISTRY.register_processor(Processor25, info=Info25, dummy_inputs=qwen2_5_vl.Qwen2_5_VLDummyInputsBuilder)
class PrunedQwen25VL(PrunedQwen, qwen2_5_vl.Qwen2_5_VLForConditionalGeneration):
    """vLLM's own class, whose pictures and videos are cut behind the merger."""

    family = FAMILY25


class Info3(PruningInfo, qwen3_vl.Qwen3VLProcessingInfo):
    """What vLLM asks of the processor of Qwen3-VL."""

    family = FAMILY3


class Processor3(PruningProcessor, qwen3_vl.Qwen3VLMultiModalProcessor):
    """From a prompt and its pictures to placeholders and pixels."""

    family = FAMILY3


@MULTIMODAL_REGISTRY.register_processor(Processor3, info=Info3, dummy_inputs=qwen3_vl.Qwen3VLDummyInputsBuilder)
class PrunedQwen3VL(PrunedQwen, qwen3_vl.Qwen3VLForConditionalGeneration):
    """vLLM's own class, whose pictures are cut behind the merger: a token's DeepStack features stand behind its own, in
    one row, and go where it goes."""

    family = FAMILY3

    def grids(self, mm_features: list[Any]) -> Iterator[tuple[int, int, int, int, float]]:
        merge = self.config.vision_config.spatial_merge_size
        for feature in sorted(mm_features, key=lambda one: one.mm_position.offset):
            _, rows, cols = feature.data["image_grid_thw"].data.tolist()
            yield feature.mm_position.offset, 1, rows // merge, cols // merge, 1.0
