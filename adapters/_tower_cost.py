"""What vision towers and projectors of classes without a file cost: read off their modules where their class is one
whose computation is known, and not modelled elsewhere.

Which weights run over patches and which over tokens is not told by a module, so that these are lists of classes, each
held against what torch counts by `tests/adapters/test_costs.py`. Not among them: towers with several stages,
resamplers, neighbourhoods that are not Qwen's windows, and pictures filled up to the largest of a batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from tokenprune.adapters._layer_shapes import width_of
from tokenprune.interfaces.visual import TowerWork

FIXED = {
    "CLIPVisionModel", "Idefics3VisionTransformer", "JanusVisionModel", "Phi4MultimodalVisionModel",
    "QianfanOCRVisionModel", "SiglipVisionModel",
}  # fmt: skip
"""Towers that see every picture at one size."""
PACKED = {
    "CohereCompassVisionModel", "Cosmos3EdgeVisionModel", "Ernie4_5_VLMoeVisionTransformerPretrainedModel",
    "Glm4vMoeVisionModel", "Glm4vVisionModel", "GlmOcrVisionModel", "Kimi_K25VisionModel", "PaddleOCRVisionModel",
    "Qwen3OmniMoeVisionEncoder", "Qwen3VLMoeVisionModel", "Qwen3VLVisionModel", "Qwen3_5MoeVisionModel",
    "Qwen3_5VisionModel",
}  # fmt: skip
"""Towers that see pictures of any size, each for itself, and join s x s patches to a token."""
WINDOWS = {"Exaone4_5_VisionModel", "Qwen2_5OmniVisionEncoder", "Qwen2_5_VisionTransformerPretrainedModel"}
"""The same, with attention inside of windows in most blocks."""
TOGETHER = {"PixtralVisionModel"}
"""The same, all pictures of a batch in one row whose attention is masked."""
PROJECTORS = {
    "AyaVisionMultiModalProjector", "Cohere2VisionMultiModalProjector", "Cosmos3EdgePatchMerger", "DeepseekVLAligner",
    "Gemma3MultiModalProjector", "Gemma4MultimodalEmbedder", "Idefics3Connector", "JanusVisionAlignerMLP",
    "Kimi_K25MultimodalProjection", "LightOnOcrMultiModalProjector", "LlavaMultiModalProjector",
    "Mistral3MultiModalProjector", "MistralLarge4MultiModalProjector", "PaddleOCRProjector",
    "PaliGemmaMultiModalProjector", "QianfanOCRMultiModalProjector", "VideoLlama3Projector",
    "VideoLlavaMultiModalProjector", "VipLlavaMultiModalProjector",
}  # fmt: skip
"""Projectors of which every matrix runs once for each visual token."""
_ASIDE = ("audio_tower", "vqmodel", "generation_embeddings", "generation_aligner", "generation_head")
"""Parts of merging modules that no picture goes through."""
_MERGES = ("spatial_merge_size", "merge_kernel_size")
Projector = tuple[()] | int | None
_IN = ("q_proj", "qkv", "wqkv")
_OUT = ("out_proj", "o_proj", "proj", "projection_layer")
_POOLERS = ("Phi4MultimodalVisionMultiheadAttentionPoolingHead", "SiglipMultiheadAttentionPoolingHead")


@dataclass(frozen=True)
class TowerCost:
    """The sizes that decide the cost of a tower, in multiply-adds.

    Attributes:
        embedded: for each patch, before the blocks.
        linear: for each patch, in the linear layers of a block, by block.
        scores: for each pair of patches, by block.
        after: for each token, behind the blocks.
        pooled: width and MLP width of a pooling head at the end; () if there is none.
        cls: tokens that run along with the patches of a picture.
        patches: of each picture, where all have one size; else None.
        merge: patches along a side of a token, where pictures have any size.
        window: tokens along a side of a window; 0 if there are none.
        whole: blocks whose attention sees the whole picture in spite of windows.
        together: whether all pictures are computed as one row.
    """

    embedded: int
    linear: tuple[int, ...]
    scores: tuple[int, ...]
    after: int
    pooled: tuple[int, ...]
    cls: int
    patches: int | None
    merge: int = 1
    window: int = 0
    whole: tuple[int, ...] = ()
    together: bool = False

    def flops(self, work: TowerWork) -> int | None:
        """Of one run; None for videos, whose frames may see each other, and where patches leave windows: how many of
        which is not told."""
        if work.videos or (work.blocks and self.window):
            return None
        counts = [self.patches or rows * cols * self.merge**2 for rows, cols in work.grids]
        cut = sum(counts)
        if self.together and work.grids:  # before they stand in one row, each has the size of the largest
            high, wide = (max(sides) for sides in zip(*work.grids))
            cut = len(counts) * high * wide * self.merge**2
        near = sum(self._in_windows(*grid) for grid in work.grids) if self.window else None
        total = cut * self.embedded + work.left * self.after
        for block, (linear, scores) in enumerate(zip(self.linear, self.scores)):
            short = bool(work.blocks) and block >= work.first
            rows = [count + self.cls for count in (work.blocks[block - work.first] if short else counts)]
            pairs = sum(rows) ** 2 if self.together else sum(count**2 for count in rows)
            pairs = pairs if near is None or block in self.whole else near
            total += sum(rows) * linear + pairs * scores
        return 2 * (total + sum(self._pooled(count + self.cls) for count in counts))

    def _in_windows(self, rows: int, cols: int) -> int:
        """Pairs of patches that are in one window."""
        highs, wides = ([min(self.window, side - at) for at in range(0, side, self.window)] for side in (rows, cols))
        return sum((high * wide * self.merge**2) ** 2 for high in highs for wide in wides)

    def _pooled(self, count: int) -> int:
        if not self.pooled:
            return 0
        d, mlp = self.pooled  # one learnt query over the patches of a picture, and an MLP
        return 2 * count * d * d + 2 * d * d + 2 * count * d + 2 * d * mlp


def tower_and_projector(entry: Any, tower: Any, decoder: Any, config: Any) -> tuple[TowerCost | None, Projector]:
    """What comes before the decoder, and multiply-adds of the projector for each visual token: () if there is none;
    None where a class is not one of those above.

    Args:
        entry: the merging module.
        tower, decoder: in it.
        config: of the model.
    """
    others = (tower, decoder)
    left = [
        module
        for name, module in entry.named_children()
        if module not in others and name not in _ASIDE and not any(part in others for part in module.modules())
    ]
    if tower is None or len(left) > 1:  # a second tower, or stages between
        return None, None
    cost = tower_cost(tower, config)
    if not left:
        return cost, None if cost is None else ()
    known = PROJECTORS if cost is None else PROJECTORS | {"Linear"}
    if type(left[0]).__name__ not in known:
        return cost, None
    return cost, sum(weight.numel() for weight in left[0].parameters() if weight.dim() > 1)


def tower_cost(tower: Any, model_config: Any) -> TowerCost | None:
    """What a tower costs; None where its class is not one of those above.

    Args:
        tower: the module.
        model_config: of the model that it is part of.
    """
    kind = type(tower).__name__
    config = getattr(tower, "config", None) or model_config.vision_config
    blocks = _blocks(tower)
    if blocks is None or kind not in FIXED | PACKED | WINDOWS | TOGETHER:
        return None
    patch, side = (_side(getattr(config, name, None)) for name in ("patch_size", "image_size"))
    sizes = [_side(getattr(own, name, 0)) for own in (config, model_config) for name in _MERGES]
    merge = next((size for size in sizes if size), 0)
    patches = (side // patch) ** 2 if kind in FIXED and side and patch else None
    if (patches is None and kind in FIXED) or (not merge and kind in PACKED | WINDOWS) or not patch:
        return None
    inside = {id(module) for block in blocks for module in block.modules()}
    embedded = after = 0
    pooled: tuple[int, ...] = ()
    for name, module in tower.named_modules():
        if type(module).__name__ in _POOLERS:
            pooled = (config.hidden_size, config.intermediate_size)
            inside |= {id(part) for part in module.modules()}
        if id(module) in inside:
            continue
        if "patch" in name and "merger" not in name:
            embedded += _matrix(module)
        else:
            after += _matrix(module)
    scores = [_scores(block) for block in blocks]
    if any(each is None for each in scores):
        return None
    merged = merge or 1
    return TowerCost(
        embedded=embedded,
        linear=tuple(sum(_matrix(module) for module in block.modules()) for block in blocks),
        scores=tuple(each or 0 for each in scores),
        after=after,
        pooled=pooled,
        cls=int(any(name.endswith(("class_embedding", "cls_token")) for name, _ in tower.named_parameters())),
        patches=patches,
        merge=merged,
        window=config.window_size // merged // patch if kind in WINDOWS else 0,
        whole=tuple(config.fullatt_block_indexes) if kind in WINDOWS else (),
        together=kind in TOGETHER,
    )


def _blocks(tower: Any) -> nn.ModuleList | None:
    """The transformer blocks of a tower: of all lists of modules the longest whose parts attend."""
    found = [part for part in tower.modules() if isinstance(part, nn.ModuleList) and part and _out(part[0]) is not None]
    return max(found, key=len, default=None)


def _out(block: Any) -> Any:
    """The output projection of a block's attention; None if it has none that is known."""
    attends = [module for module in block.modules() if any(name in module._modules for name in _IN)]
    outs = [module._modules[name] for module in attends[:1] for name in _OUT if name in module._modules]
    return next(iter(outs), None)


def _scores(block: Any) -> int | None:
    width = width_of(_out(block))
    return None if width is None else 2 * width[0]


def _matrix(module: Any) -> int:
    """Multiply-adds of a linear layer or of a convolution without overlaps, each time that it is used."""
    width = width_of(module)
    if width is not None:
        return width[0] * width[1]
    return module.weight.numel() if isinstance(module, (nn.Conv2d, nn.Conv3d)) else 0


def _side(size: Any) -> int:
    """A side of a square, however a config gives it; 0 if it does not."""
    if isinstance(size, (list, tuple)):
        size = size[0]
    return size if isinstance(size, int) else 0
