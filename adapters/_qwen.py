"""What the Qwen-VL families share: packed vision tower with rotary positions, 2 x 2 merger, M-RoPE, images and videos.

Positions are (time, row, column) ids; kept tokens and text keep the ids that they had, so `rope_deltas` stay right.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from tokenprune.adapters._cost import read_off, text_sizes
from tokenprune.adapters._vit import CLIP_PIXELS
from tokenprune.adapters._windows import has_windows, window_order
from tokenprune.cost import ModelShape, tower_flops
from tokenprune.hooks import Scratch
from tokenprune.interfaces.adapter import Adapter, submodule
from tokenprune.interfaces.signals import (
    ATTENTION_BY_HEAD,
    GREY_ENTROPY,
    MEAN_QUERY_ATTENTION,
    MEAN_VALUE_SIMILARITY,
    SINK_ATTENTION,
    SINK_ATTENTION_SUM,
    TOWER_KEYS,
    TOWER_STATES,
    VALUE_NORM,
    TowerInfo,
)
from tokenprune.interfaces.vision_tower import VisionTower
from tokenprune.interfaces.visual import Raster, TowerWork, Visual

_ORDERS = 64  # orders of windows that are kept, by the sizes of a batch


@dataclass
class PackedRun:
    """One run of a tower that has the patches of all pictures in one row, by cells.

    Attributes:
        counts: cells left of each picture.
        starts: where each picture begins among the cells of all pictures.
        alive: by picture, which of its cells are left, `[k]` int64 on the CPU.
        present: `[cells]` bool on the CPU, by place of the full row: whether its cell is left.
        order: `[cells]` int64, which cell stands at each place of the full row.
        bounds: by the number of a tensor of boundaries, that tensor and its values `[n]` on the CPU.
        patches: `[patches left]` int64, their places in the full row; None while all are there.
        before: `[patches + 1]` int64 on the CPU, how many patches are left before each place; None while all are there.
    """

    counts: list[int]
    starts: list[int]
    alive: list[Tensor]
    present: Tensor
    order: Tensor
    bounds: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    patches: Any = None
    before: Any = None


class QwenTower(VisionTower):
    """Blocks are called with all patches of a call in one row; each frame attends within itself, or within windows.

    Args:
        module: the tower.
        vision: its config.
        extra: blocks after which further mergers run, for costs.
        pixels: mean and standard deviation of the colours in the family's published processors.
    """

    signals = (
        MEAN_QUERY_ATTENTION, MEAN_VALUE_SIMILARITY, VALUE_NORM, SINK_ATTENTION, SINK_ATTENTION_SUM, GREY_ENTROPY,
        TOWER_STATES, TOWER_KEYS, ATTENTION_BY_HEAD,
    )  # fmt: skip
    can_cut = True
    can_resize = True

    def __init__(self, module: Any, vision: Any, extra: Sequence[int] = (), pixels: Any = CLIP_PIXELS) -> None:
        self.module, self.blocks, self.exit = module, module.blocks, module.merger
        self._vision, self._extra = vision, extra
        merge = vision.spatial_merge_size
        self.patches_per_cell, self.moments = merge**2, vision.temporal_patch_size
        self.facts = TowerInfo(
            num_layers=vision.depth,
            feature_layer=vision.depth - 1,
            has_cls=False,
            num_heads=vision.num_heads,
            hidden_size=getattr(vision, "embed_dim", None) or vision.hidden_size,
            pixel_mean=pixels[0],
            pixel_std=pixels[1],
        )
        self._windows = has_windows(vision)
        self._orders: dict[tuple[tuple[int, int], ...], Tensor] = {}

    @property
    def exits(self) -> Sequence[Any]:
        return (self.exit, *getattr(self.module, "deepstack_merger_list", ()))

    def hook_attention(self, block: int, done: Callable[[Any], None]) -> list[Any]:
        attention = self.blocks[block].attn
        seen = Scratch()

        def on_start(module: Any, args: Any, kwargs: Any) -> None:
            seen.values["rotation"] = kwargs["position_embeddings"]

        def on_projected(module: Any, args: Any, output: Tensor) -> None:
            seen.values["qkv"] = output.detach()

        def on_done(module: Any, args: Any, output: Any) -> None:
            parts = self._heads(*seen.take("qkv", "rotation"))

            def read(run: PackedRun, pictures: Sequence[int], count: int) -> tuple[Tensor, ...]:
                length = count * self.patches_per_cell
                if len(pictures) == len(run.counts):
                    return tuple(part.unflatten(1, (-1, length)).transpose(0, 1) for part in parts)  # [M, H, T, d]
                starts = [self.patches_per_cell * sum(run.counts[:picture]) for picture in pictures]
                return tuple(torch.stack([part[:, at : at + length] for at in starts]) for part in parts)

            done(read)

        return [
            attention.register_forward_pre_hook(on_start, with_kwargs=True),
            attention.qkv.register_forward_hook(on_projected),
            attention.register_forward_hook(on_done),
        ]

    def in_raster_order(self, run: PackedRun, values: Tensor, pictures: Sequence[int]) -> Tensor:
        if not self._windows:
            return values
        order = run.order[run.present].split(run.counts)
        index = torch.stack([order[picture].argsort() for picture in pictures])
        index = index.to(values.device)
        if values.dim() == 3:
            index = index[..., None].expand(-1, -1, values.shape[-1])
        return values.gather(1, index)

    def _heads(self, qkv: Tensor, rotation: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        """Query, key and value `[H, patches, d]` of a packed row, rotated."""
        query, key, value = qkv.unflatten(-1, (3, self.facts.num_heads, -1)).unbind(1)  # [S, H, d]
        cos, sin = (part[:, None].to(query.dtype) for part in rotation)  # [S, 1, d]

        def turned(values: Tensor) -> Tensor:
            first, second = values.chunk(2, dim=-1)
            return values * cos + torch.cat([-second, first], dim=-1) * sin

        return tuple(part.transpose(0, 1) for part in (turned(query), turned(key), value))

    # --- cutting: cells leave or stay whole, in the row as it is sorted -----------------------------------------------

    def start(self, grids: Sequence[tuple[int, int]]) -> PackedRun:
        counts = [rows * cols for rows, cols in grids]
        return PackedRun(
            counts=counts,
            starts=[sum(counts[:picture]) for picture in range(len(counts))],
            alive=[torch.arange(count) for count in counts],
            present=torch.ones(sum(counts), dtype=torch.bool),
            order=self._window_order(tuple(grids)),
        )

    def states(self, run: PackedRun, args: Any, pictures: Sequence[int], count: int) -> Tensor:
        hidden = args[0]
        present = run.order[run.present].to(hidden.device)
        cells = hidden.unflatten(0, (-1, self.patches_per_cell)).mean(dim=1)[present.argsort()]  # [cells, D]
        starts = [sum(run.counts[:picture]) for picture in pictures]
        return torch.stack([cells[at : at + count] for at in starts])  # [m, count, D]

    def drop_tokens(self, run: PackedRun, args: Any, kwargs: Any, kept: Sequence[Tensor] | None) -> tuple[Any, Any]:
        hidden, group = args[0], self.patches_per_cell
        if kept is not None:
            before = run.present
            chosen = torch.cat(list(kept)).cpu().split([index.shape[0] for index in kept])  # one read for all
            run.alive = [alive[index] for alive, index in zip(run.alive, chosen)]
            run.counts = [len(alive) for alive in run.alive]
            stays = torch.zeros(len(before), dtype=torch.bool)
            stays[torch.cat([start + alive for start, alive in zip(run.starts, run.alive)])] = True
            run.present = present = stays[run.order]
            patches = present.repeat_interleave(group)
            # numbers of places, made on the host: to index by a mask is to wait for the device
            run.patches = _places(patches, hidden.device)
            # how many patches are left before each place of the full row: boundaries of frames and windows follow it
            run.before = torch.cat([torch.zeros(1, dtype=torch.int64), patches.cumsum(0)])
            hidden = hidden[_places(present[before].repeat_interleave(group), hidden.device)]
        short = run.before[self._bounds(run, kwargs["cu_seqlens"])].unique_consecutive()
        changed = {**kwargs, "cu_seqlens": short.to(kwargs["cu_seqlens"])}
        if kwargs.get("max_seqlen") is not None:
            changed["max_seqlen"] = int(short.diff().max())
        changed["position_embeddings"] = tuple(part[run.patches] for part in kwargs["position_embeddings"])
        return (hidden, *args[1:]), changed

    @staticmethod
    def _bounds(run: PackedRun, bounds: Tensor) -> Tensor:
        """Boundaries of frames or windows on the CPU; all blocks of a run are given one or the other tensor."""
        known = run.bounds.get(id(bounds))
        if known is None:  # the tensor is kept, so that no other one gets its number
            known = run.bounds[id(bounds)] = bounds, bounds.cpu().long()
        return known[1]

    def restore_length(self, run: PackedRun, output: Tensor, alive: Sequence[Tensor]) -> Tensor:
        if output.shape[0] == len(run.present):
            return output
        full = output.new_zeros(len(run.present), output.shape[-1])
        return full.index_copy(0, _places(run.present, output.device), output)

    def _window_order(self, grids: tuple[tuple[int, int], ...]) -> Tensor:
        """`[cells]` int64: which cell, counted over all pictures, is at each place of the full row, which may be sorted
        by windows."""
        if not self._windows:
            return torch.arange(sum(rows * cols for rows, cols in grids))
        if grids in self._orders:
            return self._orders[grids]
        if len(self._orders) >= _ORDERS:
            self._orders.pop(next(iter(self._orders)))
        self._orders[grids] = window_order(self.module, self._vision, grids)
        return self._orders[grids]

    def resize(
        self, kind: str, call: Mapping[str, Any], visuals: Sequence[Visual], grids: Sequence[tuple[int, int]]
    ) -> Mapping[str, Any]:
        pixels = "pixel_values_videos" if "pixel_values_videos" in call else "pixel_values"
        name = f"{kind}_grid_thw" if f"{kind}_grid_thw" in call else "image_grid_thw"
        merge, patch = self._vision.spatial_merge_size, self._vision.patch_size
        cells = [(len(visual.rasters), *visual.rasters[0].grid) for visual in visuals]
        before = [(frames, rows * merge, cols * merge) for frames, rows, cols in cells]
        parts, after = [], []
        for pixels_of_visual, (frames, rows, cols), (small_rows, small_cols) in zip(
            call[pixels].split([t * h * w for t, h, w in before]), before, grids
        ):
            # patches come as (frame, cell row, cell column, row and column in it) x (channel and time, row, column)
            patches = pixels_of_visual.view(frames, rows // merge, cols // merge, merge, merge, -1, patch, patch)
            picture = patches.permute(0, 5, 1, 3, 6, 2, 4, 7).reshape(frames, -1, rows * patch, cols * patch)
            size = (small_rows * merge * patch, small_cols * merge * patch)
            small = torch.nn.functional.interpolate(
                picture.float(), size=size, mode="bicubic", antialias=True, align_corners=False
            )
            patches = small.view(frames, -1, small_rows, merge, patch, small_cols, merge, patch)
            patches = patches.permute(0, 2, 5, 3, 6, 1, 4, 7).reshape(-1, pixels_of_visual.shape[-1])
            parts.append(patches.to(pixels_of_visual.dtype))
            after.append([frames, small_rows * merge, small_cols * merge])
        return {**call, pixels: torch.cat(parts), name: call[name].new_tensor(after)}

    def patch_pixels(self, pixels: Tensor, pictures: int) -> Tensor:
        # a row is a patch, by cell of its frame: colours, then its two moments in time, its rows and columns
        return pixels.reshape(pictures, -1, self._vision.in_channels, pixels.shape[-1] // self._vision.in_channels)

    def by_cell(self, values: Tensor) -> Tensor:
        return values.unflatten(1, (-1, self.patches_per_cell)).mean(dim=2)

    def flops(self, shape: ModelShape, work: TowerWork) -> int:
        pictures = [rows * cols * self.patches_per_cell for rows, cols in work.grids]
        total = tower_flops(shape, pictures, work.blocks, work.first)
        sizes = cast("tuple[int, ...]", shape.projector)  # as this file made it
        for block in self._extra:
            counts = work.blocks[block - work.first] if work.blocks and block >= work.first else pictures
            merged = sum(counts) // self.patches_per_cell
            total += sum(2 * merged * a * b for a, b in zip(sizes[:-1], sizes[1:]))
        if not self._windows:
            return total
        width = self._vision.window_size // self._vision.spatial_merge_size // self._vision.patch_size
        for block in range(shape.vision_blocks_run):
            if block in self._vision.fullatt_block_indexes:
                continue
            counts = work.blocks[block - work.first] if work.blocks and block >= work.first else pictures
            for (rows, cols), patches, left in zip(work.grids, pictures, counts):
                windows = [
                    min(width, rows - top) * min(width, cols - start) * self.patches_per_cell
                    for top in range(0, rows, width)
                    for start in range(0, cols, width)
                ]
                # what is left is taken to be spread evenly over the windows
                total -= int(
                    4 * shape.vision_hidden * (left / patches) ** 2 * (patches**2 - sum(w**2 for w in windows))
                )
        return total


def _places(mask: Tensor, device: torch.device) -> Tensor:
    """Where a mask `[S]` on the CPU is True, on the device."""
    return mask.nonzero()[:, 0].to(device)


class QwenVL(Adapter):
    """What the families have in common; they differ in their tower's details and in what they add in the decoder."""

    features = {"image": "get_image_features", "video": "get_video_features"}
    mrope = True
    projector_path = "model.visual.merger"
    timestamps = False
    """Whether text comes between the frames of a video."""
    gated_tower = False
    pixel_facts = CLIP_PIXELS

    def __init__(self, model: Any) -> None:
        config = model.config
        super().__init__(model)
        module = submodule(model, "model.visual")
        self.vision = QwenTower(module, config.vision_config, self.extra_mergers(config), self.pixel_facts)

    def extra_mergers(self, config: Any) -> Sequence[int]:
        """Blocks of the tower after which further mergers run; the merger at its end is not among them."""
        return ()

    def visuals(self, kind: str, call: Mapping[str, Any]) -> list[Visual]:
        names = ("image_grid_thw",) if kind == "image" else ("video_grid_thw", "image_grid_thw")
        grids = next(call[name] for name in names if call.get(name) is not None)
        merge = self.model.config.vision_config.spatial_merge_size
        visuals = []
        for frames, rows, cols in grids.tolist():  # read here and nowhere else
            grid = (rows // merge, cols // merge)
            count = grid[0] * grid[1]
            name = "image" if kind == "image" else "frame"
            rasters = tuple(Raster(grid, frame * count, name) for frame in range(frames))
            visuals.append(Visual(rasters, kind=kind, scattered=kind == "video" and self.timestamps))
        return visuals

    def pixel_rows(self, kind: str, call: Mapping[str, Any], visuals: Sequence[Visual]) -> list[Tensor]:
        sizes = [visual.num_tokens * self.vision.patches_per_cell for visual in visuals]
        return list(call[self.pixels[kind]].split(sizes))

    def cost_shape(self) -> ModelShape:
        config = self.model.config
        vision, text = config.vision_config, config.get_text_config()
        width = self.vision.facts.hidden_size
        joined = width * vision.spatial_merge_size**2
        mlp = getattr(vision, "intermediate_size", None) or int(width * vision.mlp_ratio)
        shape = ModelShape(
            vision_layers=vision.depth,
            vision_blocks_run=vision.depth,
            vision_hidden=width,
            vision_mlp=mlp,
            patch=vision.patch_size,
            channels=vision.in_channels * vision.temporal_patch_size,
            image_patches=0,
            has_cls=False,
            vision_gated=self.gated_tower,
            projector=(joined, joined, text.hidden_size),
            **text_sizes(text),
        )
        return read_off(shape, self)
