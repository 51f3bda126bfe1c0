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
from transformers.video_utils import VideoMetadata

from tokenprune.adapters.generic import VIDEOS_BY_FRAME, WHOLE_VIDEOS
from tokenprune.hooks import Ledger
from tokenprune.registry import MODELS

_FILES = ("processor_config.json", "video_preprocessor_config.json", "preprocessor_config.json")
_STEPS = (
    "do_convert_rgb", "do_resize", "size", "resample", "do_center_crop", "crop_size", "do_rescale", "rescale_factor",
    "do_normalize", "image_mean", "image_std",
)  # fmt: skip


def load_processor(source: str, trust_remote_code: bool = False) -> Any:
    """The processor of the folder or hub id `source`.

    Without torchvision its `video_processor` is a `FrameProcessor`; everything else is transformers' own.
    """
    try:
        return AutoProcessor.from_pretrained(source, trust_remote_code=trust_remote_code)
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
        processor = AutoProcessor.from_pretrained(source, trust_remote_code=trust_remote_code)
    finally:
        ledger.undo()
    processor.video_processor.image_processor = processor.image_processor
    return processor


class FrameProcessor(PushToHubMixin):
    """Stands in for the video processor of a checkpoint: prepares frame by frame what it would prepare all at once.

    Frames are not sampled: all that are handed in are used, and where the model joins frames, the last one again until
    their number fits. Resizing is PIL's, whose bicubic filter differs slightly from torchvision's.

    Attributes:
        settings: what the checkpoint says of its video processor; of its image processor where it says nothing.
        image_processor: the stock image processor of the same checkpoint.
        kind: name of the stock class that it stands in for; "" where the checkpoint names none.
        num_frames, fps: how many frames the stock class would sample; processors read them.
    """

    def __init__(self, source: str) -> None:
        self.source = source
        self.image_processor: Any = None
        self.settings = _video_settings(source)
        self.kind = self.settings.get("video_processor_type", "").removesuffix("Fast")
        sampling = self.settings.get("video_sampling", {})
        self.num_frames = self.settings.get("num_frames", sampling.get("max_frames"))
        self.fps = self.settings.get("fps", sampling.get("fps"))
        self.merge_size = self.settings.get("merge_size", 2)
        self.temporal_patch_size = self.settings.get("temporal_patch_size", 2)

    def __call__(
        self, videos: Any, video_metadata: Any = None, return_tensors: Any = None, size: Any = None, **_: Any
    ) -> BatchFeature:
        """Prepare videos: one `[T, H, W, 3]` array or list of PIL frames, a list of those, or one such list a prompt.

        Args:
            video_metadata: of each video a mapping with `fps`, in which processors find the time of a frame;
                `total_num_frames` and `frames_indices` are the frames handed in where it does not say otherwise.
            size: limits in place of the checkpoint's, which some processors have.

        Raises:
            ImportError: the checkpoint does not say how its frames are prepared, or they are not one by one, so the
                stock class has to.
        """
        if self.kind and self.kind not in VIDEOS_BY_FRAME | WHOLE_VIDEOS:
            raise self._needs_stock()
        if not _is_clip(videos) and not _is_clip(videos[0]):
            videos = [clip for of_prompt in videos for clip in of_prompt]
        clips = [list(clip) for clip in ([videos] if _is_clip(videos) else videos)]
        feature = BatchFeature(
            self._prepare(clips, dict(size or self.settings.get("size") or {})), tensor_type=return_tensors
        )
        feature["video_metadata"] = [
            VideoMetadata(**{"total_num_frames": len(clip), "frames_indices": list(range(len(clip))), **(given or {})})
            for clip, given in zip(clips, video_metadata or [{}] * len(clips), strict=True)
        ]
        return feature

    def to_dict(self) -> dict[str, Any]:
        """The settings of the video processor that it stands in for."""
        return dict(self.settings)

    def _needs_stock(self) -> ImportError:
        return ImportError(
            f"The videos of {self.source} need the package torchvision, which is not installed; pictures do not."
        )

    def _prepare(self, clips: list[list[Any]], size: dict[str, Any]) -> dict[str, Any]:
        """Arguments of the model, as the kind of the image processor has them."""
        if hasattr(self.image_processor, "temporal_patch_size"):
            packed = [self._pack(clip, dict(size)) for clip in clips]
            return {
                "pixel_values_videos": np.concatenate([patches for patches, _ in packed]),
                "video_grid_thw": np.array([grid for _, grid in packed]),
            }
        if hasattr(self.image_processor, "do_image_splitting"):
            # a frame is a picture that is not split
            limits = {"size": size or self.settings.get("video_sampling", {}).get("video_size")}
            limits["max_image_size"] = self.settings.get("max_image_size")
            limits = {name: limit for name, limit in limits.items() if limit}
            return dict(self.image_processor(clips, do_image_splitting=False, return_tensors="np", **limits))
        if not ("shortest_edge" in size or {"height", "width"} <= set(size)) or "image_mean" not in self.settings:
            raise self._needs_stock()
        from transformers import CLIPImageProcessorPil

        steps = {name: self.settings[name] for name in _STEPS if self.settings.get(name) is not None}
        single = CLIPImageProcessorPil(**{"do_center_crop": False, **steps})
        return {"pixel_values_videos": [single(clip, return_tensors="np")["pixel_values"] for clip in clips]}

    def _pack(self, frames: list[Any], size: dict[str, Any]) -> tuple[np.ndarray, list[int]]:
        """Patches `[grids * patches, width]` and the grid (time, height, width) of one video."""
        pair = self.temporal_patch_size
        frames = frames + [frames[-1]] * (-len(frames) % pair)
        for older, limit in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
            if self.settings.get(older) is not None:
                size[limit] = self.settings[older]
        if size and self.kind in WHOLE_VIDEOS:
            size["longest_edge"] //= len(frames)
            size["shortest_edge"] = -(-size["shortest_edge"] // len(frames))
        limits = {"size": size} if size else {}
        single = self.image_processor(images=frames, return_tensors="np", temporal_patch_size=1, **limits)
        _, height, width = single["image_grid_thw"][0].tolist()
        edge = self.image_processor.patch_size
        patches = single["pixel_values"].reshape(-1, pair, height * width, 3, edge, edge)
        patches = patches.transpose(0, 2, 3, 1, 4, 5).reshape(-1, 3 * pair * edge * edge)
        return patches, [len(frames) // pair, height, width]


def _read(source: str, name: str) -> dict[str, Any]:
    """A JSON file of a checkpoint, {} if it has none of that name."""
    path = cached_file(source, name, _raise_exceptions_for_missing_entries=False)
    return json.loads(Path(path).read_text(encoding="utf-8")) if path else {}


def _video_settings(source: str) -> dict[str, Any]:
    """What the stock class would be made with: transformers 5 saves it inside the processor's own file."""
    of_processor, *single = _FILES
    inside = _read(source, of_processor).get("video_processor")
    return inside or next(filter(None, (_read(source, name) for name in single)), {})


def family_of(source: str) -> Any:
    """The family file of the folder or hub id `source`; None if its kind of model has none."""
    name = _read(source, "config.json").get("model_type", "")
    return MODELS.get(name) if name in MODELS.names() else None


def _is_clip(videos: Any) -> bool:
    """Whether it is one video and not a list of them."""
    if isinstance(videos, np.ndarray):
        return videos.ndim == 4
    return not isinstance(videos[0], (list, tuple)) and getattr(videos[0], "ndim", 3) == 3
