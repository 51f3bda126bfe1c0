"""InternVL (Hugging Face's form) inside vLLM: tiles of one size, patches joined by a pixel shuffle, 1-D positions."""

# vLLM is not there where types are checked
# pyright: reportMissingImports=false

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.models import interns1
from vllm.multimodal import MULTIMODAL_REGISTRY

from tokenprune.interfaces.vision_tower import VisionTower
from tokenprune.vllm.families import FAMILIES
from tokenprune.vllm.processing import PruningInfo, PruningProcessor
from tokenprune.vllm.settings import ModelFacts
from tokenprune.vllm.towers import TiledTower
from tokenprune.vllm.worker import PrunedModel

FAMILY = FAMILIES["InternVLForConditionalGeneration"]


class Info(PruningInfo, interns1.InternS1ProcessingInfo):
    """What vLLM asks of the model's processor."""

    family = FAMILY


class Processor(PruningProcessor, interns1.InternS1MultiModalProcessor):
    """From a prompt and its pictures to placeholders and pixels."""

    family = FAMILY


@MULTIMODAL_REGISTRY.register_processor(Processor, info=Info, dummy_inputs=interns1.InternS1DummyInputsBuilder)
class PrunedInternVL(PrunedModel, interns1.InternS1ForConditionalGeneration):
    """vLLM's own class, whose pictures are cut behind the projector."""

    family = FAMILY

    def tower(self, facts: ModelFacts) -> VisionTower:
        vision, module = self.config.vision_config, self.vision_tower
        rows, cols = (side // patch for side, patch in zip(vision.image_size, vision.patch_size))
        # the model's own shuffle, called on patch numbers, says which patches make a token
        numbers = torch.arange(rows * cols, dtype=torch.float64, device="cpu").view(1, rows, cols, 1)
        cells = self.pixel_shuffle(numbers, scale_factor=self.downsample_ratio).flatten(0, 2).long()
        blocks = module.encoder.layer
        return TiledTower(module, blocks, lambda b: b.attention.attn, facts.tower, vision.patch_size[0], cells)

    def _process_vision_input(self, image_input: Any) -> Any:
        own = super()._process_vision_input
        if image_input["type"] != "pixel_values":
            return own(image_input)
        tiles = image_input["pixel_values"].split([int(count) for count in image_input["num_patches"]])
        found = self.pruned("image", image_input, list(tiles), lambda: own(image_input))
        return own(image_input) if found is None else tuple(kept.embeddings for kept in found)
