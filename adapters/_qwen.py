"""What the Qwen-VL families share: packed vision tower with rotary positions, 2 x 2 merger, M-RoPE, images and videos.

Positions are (time, row, column) ids; kept tokens keep theirs and text keeps its own, so `rope_deltas` stay right.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tokenprune.adapters._base import Adapter, VisionTower, decoder_of
from tokenprune.adapters._cost import text_sizes
from tokenprune.cost import ModelShape, tower_flops
from tokenprune.layout import Raster, Visual
from tokenprune.recording import TowerWork
from tokenprune.signals import MEAN_QUERY_ATTENTION, VALUE_NORM, Tower


class QwenTower(VisionTower):
    """Blocks are called with all patches of a call in one row; each frame attends within itself, or within windows.

    Args:
        module: the tower.
        vision: its config.
        extra: projections beside the merger, for costs: how many further mergers run on all cells.
    """

    signals = (MEAN_QUERY_ATTENTION, VALUE_NORM)
    can_resize = True

    def __init__(self, module: Any, vision: Any, extra: int = 0) -> None:
        self.module, self.blocks, self.exit = module, module.blocks, module.merger
        self._vision, self._extra = vision, extra
        merge = vision.spatial_merge_size
        self.patches_per_cell = merge**2
        self.facts = Tower(
            num_layers=vision.depth,
            feature_layer=vision.depth - 1,
            has_cls=False,
            num_heads=vision.num_heads,
            hidden_size=getattr(vision, "embed_dim", None) or vision.hidden_size,
        )
        self._windows = hasattr(vision, "window_size") and hasattr(vision, "fullatt_block_indexes")

    def watch(self, block: int, done: Callable[[Any], None]) -> list[Any]:
        attention = self.blocks[block].attn
        seen: dict[str, Any] = {}

        def on_tower(module: Any, args: Any, kwargs: Any) -> None:
            seen["grids"] = kwargs["grid_thw"] if "grid_thw" in kwargs else args[1]

        def on_start(module: Any, args: Any, kwargs: Any) -> None:
            seen["rotation"] = kwargs["position_embeddings"]

        def on_projected(module: Any, args: Any, output: Tensor) -> None:
            seen["qkv"] = output.detach()

        def on_done(module: Any, args: Any, output: Any) -> None:
            query, key, value = self._heads(seen.pop("qkv"), seen.pop("rotation"), seen["grids"])
            starts = self._starts(seen["grids"])

            def read(pictures: Sequence[int], count: int) -> tuple[Tensor, ...]:
                length = count * self.patches_per_cell
                return tuple(
                    torch.stack([part[:, starts[picture] : starts[picture] + length] for picture in pictures])
                    for part in (query, key, value)
                )

            done(read)

        return [
            self.module.register_forward_pre_hook(on_tower, with_kwargs=True),
            attention.register_forward_pre_hook(on_start, with_kwargs=True),
            attention.qkv.register_forward_hook(on_projected),
            attention.register_forward_hook(on_done),
        ]

    def _starts(self, grids: Tensor) -> list[int]:
        sizes = [rows * cols for frames, rows, cols in grids.tolist() for _ in range(frames)]
        return [sum(sizes[:picture]) for picture in range(len(sizes))]

    def _heads(self, qkv: Tensor, rotation: tuple[Tensor, Tensor], grids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value `[H, patches, d]` of a packed row, rotated, in the order of the frames."""
        query, key, value = qkv.unflatten(-1, (3, self.facts.num_heads, -1)).unbind(1)  # [S, H, d]
        cos, sin = (part[:, None].to(query.dtype) for part in rotation)

        def turned(values: Tensor) -> Tensor:
            first, second = values.chunk(2, dim=-1)
            return values * cos + torch.cat([-second, first], dim=-1) * sin

        parts = (turned(query), turned(key), value)
        if self._windows:
            order = self._cell_order(grids).to(qkv.device)
            group = self.patches_per_cell
            parts = tuple(part.unflatten(0, (-1, group))[order].flatten(0, 1) for part in parts)
        return tuple(part.transpose(0, 1) for part in parts)  # type: ignore[return-value]

    def _cell_order(self, grids: Tensor) -> Tensor:
        """Where each cell stands in the row that was sorted by windows."""
        own = getattr(self.module, "get_window_index", None)
        if own is not None:
            index = own(grids)[0]
        else:
            from transformers.vision_utils import get_vision_window_index

            index = get_vision_window_index(
                grids,
                spatial_merge_size=self._vision.spatial_merge_size,
                window_size=self._vision.window_size,
                patch_size=self._vision.patch_size,
                kwargs={},
            )[0]
        return torch.as_tensor(index).argsort()

    def resize(self, kind: str, call: Mapping[str, Any], grids: Sequence[tuple[int, int]]) -> Mapping[str, Any]:
        pixels = "pixel_values_videos" if "pixel_values_videos" in call else "pixel_values"
        name = f"{kind}_grid_thw" if f"{kind}_grid_thw" in call else "image_grid_thw"
        before: list[list[int]] = call[name].tolist()
        merge, patch = self._vision.spatial_merge_size, self._vision.patch_size
        parts, after = [], []
        for own, (frames, rows, cols), (small_rows, small_cols) in zip(
            call[pixels].split([t * h * w for t, h, w in before]), before, grids
        ):
            # patches come as (frame, cell row, cell column, row and column in it) x (channel and time, row, column)
            cells = own.view(frames, rows // merge, cols // merge, merge, merge, -1, patch, patch)
            picture = cells.permute(0, 5, 1, 3, 6, 2, 4, 7).reshape(frames, -1, rows * patch, cols * patch)
            size = (small_rows * merge * patch, small_cols * merge * patch)
            small = torch.nn.functional.interpolate(
                picture.float(), size=size, mode="bicubic", antialias=True, align_corners=False
            )
            cells = small.view(frames, -1, small_rows, merge, patch, small_cols, merge, patch)
            parts.append(cells.permute(0, 2, 5, 3, 6, 1, 4, 7).reshape(-1, own.shape[-1]).to(own.dtype))
            after.append([frames, small_rows * merge, small_cols * merge])
        return {**call, pixels: torch.cat(parts), name: call[name].new_tensor(after)}

    def by_cell(self, values: Tensor) -> Tensor:
        return values.unflatten(1, (-1, self.patches_per_cell)).mean(dim=2)

    def flops(self, shape: ModelShape, work: TowerWork) -> int:
        pictures = [rows * cols * self.patches_per_cell for rows, cols in work.grids]
        total = tower_flops(shape, pictures)
        merged = sum(rows * cols for rows, cols in work.grids)
        total += self._extra * sum(2 * merged * a * b for a, b in zip(shape.projector[:-1], shape.projector[1:]))
        if not self._windows:
            return total
        blocks = shape.vision_blocks_run - len(self._vision.fullatt_block_indexes)
        width = self._vision.window_size // self._vision.spatial_merge_size // self._vision.patch_size
        for (rows, cols), patches in zip(work.grids, pictures):
            windows = [
                min(width, rows - top) * min(width, cols - left) * self.patches_per_cell
                for top in range(0, rows, width)
                for left in range(0, cols, width)
            ]
            total -= blocks * 4 * shape.vision_hidden * (patches**2 - sum(size**2 for size in windows))
        return total


class QwenVL(Adapter):
    """What the families have in common; they differ in their tower's details and in what they add in the decoder."""

    features = {"image": "get_image_features", "video": "get_video_features"}
    mrope = True
    timestamps = False
    """Whether text stands between the frames of a video."""
    gated_tower = False

    def __init__(self, model: Any) -> None:
        config = model.config
        self.model = model
        self.entry = decoder_of(model, "model")
        self.language_model = decoder_of(model, "model.language_model")
        self.placeholder_ids = {"image": config.image_token_id, "video": config.video_token_id}
        module = decoder_of(model, "model.visual")
        self.projector = module.merger
        self.vision = QwenTower(module, config.vision_config, self.extra_mergers(config))

    def extra_mergers(self, config: Any) -> int:
        """Mergers of the tower beside the one at its end."""
        return 0

    def _grids(self, kind: str, call: Mapping[str, Any]) -> list[tuple[int, int, int]]:
        names = ("image_grid_thw",) if kind == "image" else ("video_grid_thw", "image_grid_thw")
        grids = next(call[name] for name in names if call.get(name) is not None)
        return [tuple(grid) for grid in grids.tolist()]

    def visuals(self, kind: str, call: Mapping[str, Any]) -> list[Visual]:
        merge = self.model.config.vision_config.spatial_merge_size
        found = []
        for frames, rows, cols in self._grids(kind, call):
            grid = (rows // merge, cols // merge)
            count = grid[0] * grid[1]
            name = "image" if kind == "image" else "frame"
            rasters = tuple(Raster(grid, frame * count, name) for frame in range(frames))
            found.append(Visual(rasters, kind=kind, scattered=kind == "video" and self.timestamps))
        return found

    def pixel_rows(self, kind: str, call: Mapping[str, Any], visuals: Sequence[Visual]) -> list[Tensor]:
        sizes = [frames * rows * cols for frames, rows, cols in self._grids(kind, call)]
        return list(call[self.pixels[kind]].split(sizes))

    def cost_shape(self) -> ModelShape:
        config = self.model.config
        vision, text = config.vision_config, config.get_text_config()
        width = self.vision.facts.hidden_size
        joined = width * vision.spatial_merge_size**2
        mlp = getattr(vision, "intermediate_size", None) or int(width * vision.mlp_ratio)
        return ModelShape(
            vision_layers=vision.depth,
            vision_blocks_run=vision.depth,
            vision_hidden=width,
            vision_mlp=mlp,
            vision_heads=vision.num_heads,
            patch=vision.patch_size,
            channels=vision.in_channels * vision.temporal_patch_size,
            image_patches=0,
            has_cls=False,
            vision_gated=self.gated_tower,
            projector=(joined, joined, text.hidden_size),
            **text_sizes(text),
        )
