"""Processors: the stock one where it loads; where torchvision is missing, the stock one but for its video processor.

transformers prepares images with PIL where there is no torchvision, but has no such way for videos, and a processor
that brings a video processor then does not load at all, not even for images.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoProcessor, BatchFeature
from transformers.utils.hub import PushToHubMixin, cached_file

from tokenprune.ledger import Ledger

_FPS = 24.0
_FILES = ("video_preprocessor_config.json", "preprocessor_config.json")


def load_processor(source: str) -> Any:
    """The processor of the folder or hub id `source`.

    Without torchvision its `video_processor` is a `FrameProcessor`; everything else is transformers' own.
    """
    try:
        return AutoProcessor.from_pretrained(source)
    except ImportError as error:
        if "torchvision" not in str(error).lower():
            raise
    from transformers import processing_utils

    loader = processing_utils.MODALITY_TO_AUTOPROCESSOR_MAPPING["video_processor"]
    mixin = processing_utils.ProcessorMixin
    check = mixin.check_argument_for_proper_class

    def checked(self: Any, name: str, argument: Any) -> Any:
        return type(argument) if isinstance(argument, FrameProcessor) else check(self, name, argument)

    ledger = Ledger()
    try:
        ledger.set(loader, "from_pretrained", lambda path, *_, **__: FrameProcessor(str(path)))
        ledger.set(mixin, "check_argument_for_proper_class", checked)
        processor = AutoProcessor.from_pretrained(source)
    finally:
        ledger.undo()
    processor.video_processor.image_processor = processor.image_processor
    return processor


class FrameProcessor(PushToHubMixin):
    """Stands in for the video processor of a Qwen-VL model, frame by frame through its image processor.

    Frames are not sampled: all that are handed in are used, the last one twice if their number is odd. Resizing is
    PIL's, whose bicubic filter differs slightly from torchvision's.
    """

    def __init__(self, source: str) -> None:
        self.source = source
        self.image_processor: Any = None
        self.settings: dict[str, Any] = {}
        for name in _FILES:
            found = cached_file(source, name, _raise_exceptions_for_missing_entries=False)
            if found:
                self.settings = json.loads(Path(found).read_text(encoding="utf-8"))
                break
        self.merge_size = self.settings.get("merge_size", 2)
        self.temporal_patch_size = self.settings.get("temporal_patch_size", 2)

    def __call__(self, videos: Any, video_metadata: Any = None, return_tensors: Any = None, **_: Any) -> BatchFeature:
        """Pack videos: one `[T, H, W, 3]` array or list of PIL frames, or a list of those.

        Args:
            video_metadata: of each video a mapping with `fps`; 24 frames a second where nothing is said, as in
                transformers.

        Raises:
            ImportError: the family packs videos in another way than Qwen-VL does.
        """
        if not hasattr(self.image_processor, "temporal_patch_size"):
            raise ImportError(
                f"The videos of {self.source} need the package torchvision, which is not installed; pictures do not."
            )
        clips = [videos] if _is_clip(videos) else list(videos)
        packed = [self._pack(list(clip)) for clip in clips]
        data = {
            "pixel_values_videos": np.concatenate([patches for patches, _ in packed]),
            "video_grid_thw": np.array([grid for _, grid in packed]),
        }
        feature = BatchFeature(data, tensor_type=return_tensors)
        given = video_metadata or [{}] * len(clips)
        feature["video_metadata"] = [_Metadata(float(one.get("fps") or _FPS)) for one in given]
        return feature

    def to_dict(self) -> dict[str, Any]:
        """The settings of the video processor that it stands in for."""
        return dict(self.settings)

    def _pack(self, frames: list[Any]) -> tuple[np.ndarray, list[int]]:
        """Patches `[grids * patches, width]` and the grid (time, height, width) of one video."""
        pair = self.temporal_patch_size
        frames += [frames[-1]] * (-len(frames) % pair)
        limits = {"size": self.settings["size"]} if "size" in self.settings else {}
        single = self.image_processor(images=frames, return_tensors="np", temporal_patch_size=1, **limits)
        _, height, width = single["image_grid_thw"][0].tolist()
        edge = self.image_processor.patch_size
        patches = single["pixel_values"].reshape(-1, pair, height * width, 3, edge, edge)
        patches = patches.transpose(0, 2, 3, 1, 4, 5).reshape(-1, 3 * pair * edge * edge)
        return patches, [len(frames) // pair, height, width]


class _Metadata:
    """What processors ask of a video beside its pixels."""

    def __init__(self, fps: float) -> None:
        self.fps = self.sampled_fps = fps


def _is_clip(videos: Any) -> bool:
    """Whether it is one video and not a list of them."""
    if isinstance(videos, np.ndarray):
        return videos.ndim == 4
    return not isinstance(videos[0], (list, tuple)) and getattr(videos[0], "ndim", 3) == 3
