"""Every seam of transformers and torch that this project reaches through, and what releases call the same thing.

`SEAMS` is the list: where a thing is, what of it is used, and what for. `moved` names what an installed release lacks;
a test walks the whole list, `check_seams` the part of it that one model needs, before anything is changed.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

LOWEST = {"transformers": (5, 17), "torch": (2, 11)}
NEWEST = {"transformers": (5, 24), "torch": (2, 15)}
"""The lowest releases that are supported, and the newest that the tests have been run on. Newer ones are tried."""

CANDIDATE_GENERATOR = "_get_candidate_generator"  # the method of a model that makes what proposes drafts
_CACHE = ("cache", "past_key_values", "layer_past")
"""The newer name, since 5.24, the older one, which goes with 5.40, and that of GPT-NeoX' layers."""


def cache_of(kwargs: Mapping[str, Any]) -> Any:
    """The KV cache among the arguments of a model, decoder or layer; None if there is none."""
    return next((kwargs[name] for name in _CACHE if kwargs.get(name) is not None), None)


def cache_in(output: Any) -> Any:
    """The KV cache in the output of a model or decoder; None if there is none."""
    return next((cache for name in _CACHE if (cache := getattr(output, name, None)) is not None), None)


@functools.cache
def cache_name() -> str:
    """What the installed release calls the KV cache, as an argument and in outputs."""
    from transformers.modeling_outputs import BaseModelOutputWithPast

    fields = BaseModelOutputWithPast.__dataclass_fields__
    return next((name for name in _CACHE if name in fields), _CACHE[0])


def cache_argument(cache: Any) -> dict[str, Any]:
    """The KV cache as an argument of a model or of `generate`: `model(**inputs, **cache_argument(cache))`."""
    return {cache_name(): cache}


def empty_cache(config: Any) -> Any:
    """A KV cache as `generate` makes one for a decoder of this config; some decoders make none by themselves."""
    from transformers.cache_utils import DynamicCache

    return DynamicCache(config=config)


def with_cache(call: Callable[..., Any], config: Any) -> Any:
    """What `call(**more)` returns, a KV cache in it: where a decoder made none by itself, or its class gave none back
    unasked, of a second call with one.

    Args:
        config: of the decoder.
    """
    output = call()
    return call(**cache_argument(empty_cache(config)), use_cache=True) if cache_in(output) is None else output


_MODELS = "transformers.models."

# --- the list ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Seam:
    """Something of another package that is used here.

    Attributes:
        where: `module:name` or `module:Class.name`; after "|" come other places of the same thing, in older releases.
        use: what needs it, as it ends the sentence "..., which USE needs".
        what: of a function the parameters that it must take, of a class the attributes that it must have or set; names
            joined by "|" are the same thing in different releases.
    """

    where: str
    use: str
    what: tuple[str, ...] = ()

    @property
    def module(self) -> str:
        """The module of the first place."""
        return self.where.partition(":")[0]

    def missing(self) -> list[str]:
        """What the installed release does not have of it, by name; [] if nothing is missing."""
        thing = next(filter(lambda place: place is not None, map(_find, self.where.split("|"))), None)
        if thing is None:
            return [self.where.partition("|")[0].replace(":", ".")]
        has, shown = _names(thing), self.where.partition("|")[0].partition(":")[2]
        lost = [name for name in self.what if has.isdisjoint(name.split("|"))]
        kind = "attribute" if inspect.isclass(thing) else "argument"
        return [f"the {kind} {name.partition('|')[0]!r} of {shown}" for name in lost]


def _find(place: str) -> Any:
    """The object at `module:name.name`, or None."""
    module, _, names = place.partition(":")
    try:
        thing = importlib.import_module(module)
    except ImportError:
        return None
    for name in filter(None, names.split(".")):
        thing = getattr(thing, name, None)
    return thing


def _names(thing: Any) -> set[str]:
    """Parameters of a function; attributes of a class, with those that it and its bases set on instances."""
    if not inspect.isclass(thing):
        return set(inspect.signature(thing).parameters) if callable(thing) else set(dir(thing))
    names = set(dir(thing)) | set(getattr(thing, "__dataclass_fields__", ()))
    of_family = thing.__module__.startswith(_MODELS)  # whose common bases speak of everybody's attributes
    for cls in (cls for cls in thing.__mro__ if not of_family or cls.__module__.startswith(_MODELS)):
        names |= set(vars(cls).get("__annotations__", ()))
        for value in vars(cls).values():
            code = getattr(inspect.unwrap(value), "__code__", None) if callable(value) else None
            names |= set(code.co_names) if code is not None else set()
    return names


_CACHE_NAMES = "|".join(_CACHE)
_EMBEDS = ("input_ids", "attention_mask", "position_ids", _CACHE_NAMES, "inputs_embeds")
_OUTER = ("logits_to_keep", "labels")


def _model(family: str, *names: str, use: str, what: tuple[str, ...] = ()) -> list[Seam]:
    """Seams in the modeling module of a family."""
    where = f"{_MODELS}{family}.modeling_{family}"
    return [Seam(f"{where}:{name}", use, what) for name in names]


def _decoder(family: str, prefix: str, stack: str = "") -> list[Seam]:
    """A decoder stack: its layers, what they are called with, and their attention. `stack` is its class, where that is
    not called as its layers are."""
    cuts, rows = "a cut inside the decoder", "the attention rows of a decoder layer"
    layer = ("hidden_states", "attention_mask", "position_ids", _CACHE_NAMES, "position_embeddings")
    return [
        *_model(family, stack or f"{prefix}Model", use=cuts, what=("layers", "rotary_emb", "embed_tokens")),
        *_model(family, f"{stack or prefix + 'Model'}.forward", use="every method", what=_EMBEDS),
        *_model(family, f"{prefix}DecoderLayer.forward", use=cuts, what=layer),
        *_model(family, f"{prefix}DecoderLayer", use=rows, what=("self_attn", "mlp", "input_layernorm")),
        *_model(family, f"{prefix}Attention", use=rows, what=("q_proj", "k_proj", "v_proj", "head_dim", "config")),
        *_model(family, "eager_attention_forward", use="an intervention", what=("module", "query", "key", "value")),
    ]


def _family(family: str, prefix: str, images: tuple[str, ...], videos: tuple[str, ...] = ()) -> list[Seam]:
    """A vision-language model: the calls that are wrapped, and what they are asked by name."""
    seams = [
        *_model(family, f"{prefix}ForConditionalGeneration.forward", use="every method", what=(*_EMBEDS, *_OUTER)),
        *_model(family, f"{prefix}ForConditionalGeneration", use="every method", what=("model", "lm_head")),
        *_model(family, f"{prefix}Model.forward", use="every method", what=_EMBEDS),
        *_model(family, f"{prefix}Model.get_image_features", use="every method", what=images),
    ]  # fmt: skip
    if videos:
        seams += _model(family, f"{prefix}Model.get_video_features", use="every method on videos", what=videos)
    return seams


_CLIP = [
    *_model("clip", "CLIPEncoder", use="the vision tower", what=("layers",)),
    *_model("clip", "CLIPEncoderLayer.forward", use="the vision tower", what=("hidden_states", "attention_mask")),
    *_model("clip", "CLIPAttention", use="a signal of the tower", what=("q_proj", "k_proj", "v_proj", "num_heads")),
]
_SIGLIP = [
    *_model("siglip", "SiglipEncoder", use="the vision tower", what=("layers",)),
    *_model("siglip", "SiglipEncoderLayer.forward", use="the vision tower", what=("hidden_states", "attention_mask")),
    *_model("siglip", "SiglipAttention", use="a signal of the tower", what=("q_proj", "k_proj", "v_proj", "num_heads")),
]


_PACKED = ("hidden_states", "cu_seqlens", "position_embeddings|kwargs")


def _qwen_tower(family: str, tower: str, block: str, attention: str) -> list[Seam]:
    cut, signal = "a cut inside the vision tower", "a signal of the tower"
    return [
        *_model(family, tower, use="the vision tower", what=("blocks", "merger")),
        *_model(family, f"{block}.forward", use=cut, what=_PACKED),
        *_model(family, block, use=signal, what=("attn",)),
        *_model(family, attention, use=signal, what=("qkv",)),
    ]  # fmt: skip


_LAYERS, _IDS = ("layers",), ("input_ids",)
_QKV = ("q_proj", "k_proj", "v_proj", "num_heads")
_NORMS = ("q_norm", "k_norm")
_CROPS, _COUNT = "pictures in crops", ("image_size", "grid_pinpoints", "patch_size")
_PACK = ("image_features", "image_sizes", "image_newline")
_PACK_NEXT, _PACK_ONEVISION = (*_PACK, "vision_feature_select_strategy"), (*_PACK, "vision_aspect_ratio")
_FRAMES = "the frames of a video"
_IMAGES, _GRIDS = ("pixel_values", "image_sizes"), ("pixel_values", "image_grid_thw")
_VIDEOS, _VIDEO_GRIDS = ("pixel_values_videos|pixel_values",), ("pixel_values_videos", "video_grid_thw")
_GENERATION = "transformers.generation.utils"
_CANDIDATES = "transformers.generation.candidate_generator:CandidateGenerator"
_PARTS = ("vision_tower", "multi_modal_projector", "language_model")
_DEEPSTACK = ("visual_pos_masks", "deepstack_visual_embeds")
_TOWER25, _TILE = "Qwen2_5_VisionTransformerPretrainedModel", "the raster of a tile"
_WINDOWS = (
    "transformers.vision_utils:get_vision_window_index|"
    f"{_MODELS}qwen2_5_vl.modeling_qwen2_5_vl:{_TOWER25}.get_window_index"
)
_CACHES = "the bookkeeping of a pruned cache"
_WINDOWED = "a prompt longer than a decoder's window"

SEAMS: tuple[Seam, ...] = (
    # the KV cache, of which a pruned one is a subclass
    Seam("transformers.cache_utils:Cache", _CACHES, _LAYERS),
    Seam("transformers.cache_utils:Cache.get_mask_sizes", _CACHES),
    Seam("transformers.cache_utils:Cache.get_seq_length", _CACHES, ("layer_idx",)),
    Seam("transformers.cache_utils:Cache.update", _CACHES, ("key_states", "value_states", "layer_idx")),
    Seam("transformers.cache_utils:Cache.reorder_cache", _CACHES, ("beam_idx",)),
    Seam("transformers.cache_utils:Cache.crop", _CACHES),
    Seam("transformers.cache_utils:Cache.batch_select_indices", _CACHES, ("indices",)),
    Seam("transformers.cache_utils:Cache.batch_repeat_interleave", _CACHES, ("repeats",)),
    Seam("transformers.cache_utils:Cache.reset", _CACHES),
    Seam("transformers.cache_utils:Cache.is_compileable", "the refusal of static caches"),
    Seam("transformers.cache_utils:DynamicLayer", _CACHES, ("keys", "values", "get_seq_length")),
    Seam("transformers.cache_utils:DynamicCache", _CACHES, _LAYERS),
    # outputs
    Seam("transformers.modeling_outputs:BaseModelOutputWithPast", _CACHES, (_CACHE_NAMES, "last_hidden_state")),
    Seam("transformers.modeling_outputs:BaseModelOutputWithPooling", "every method", ("pooler_output",)),
    # attention and masks
    Seam("transformers.modeling_utils:ALL_ATTENTION_FUNCTIONS", "an intervention", ("get_interface", "pop")),
    Seam("transformers.masking_utils:create_causal_mask", "every method", ("attention_mask", _CACHE_NAMES)),
    Seam("transformers.masking_utils:create_sliding_window_causal_mask", _WINDOWED, ("attention_mask", _CACHE_NAMES)),
    Seam("transformers.masking_utils:create_chunked_causal_mask", _WINDOWED, ("attention_mask", _CACHE_NAMES)),
    Seam("transformers.modeling_layers:GradientCheckpointingLayer.__call__", "the check of gradient checkpointing"),
    Seam("transformers.modeling_utils:PreTrainedModel.get_input_embeddings", "a prompt given as embeddings"),
    # generation
    Seam(f"{_GENERATION}:GenerationMixin.generate", "every method"),
    Seam(f"{_GENERATION}:GenerationMixin.prepare_inputs_for_generation", "assisted decoding", _IDS),
    Seam(f"{_GENERATION}:GenerationMixin.{CANDIDATE_GENERATOR}", "assisted decoding"),
    Seam(f"{_CANDIDATES}.get_candidates", "assisted decoding", _IDS),
    # decoders
    *_decoder("llama", "Llama"),
    *_decoder("mistral", "Mistral"),
    *_decoder("qwen2", "Qwen2"),
    *_decoder("qwen3", "Qwen3"),
    *_model("qwen3", "Qwen3Attention", use="the attention rows of a decoder layer", what=_NORMS),
    # families, and their towers
    *_CLIP,
    *_SIGLIP,
    *_family("llava", "Llava", ("pixel_values", "vision_feature_layer", "return_dict|kwargs")),
    *_model("llava", "LlavaModel", use="every method", what=_PARTS),
    *_family("llava_next", "LlavaNext", (*_IMAGES, "vision_feature_layer")),
    *_model("llava_next", "image_size_to_num_patches", use=_CROPS, what=_COUNT),
    *_model("llava_next", "get_anyres_image_grid_shape", "unpad_image", use="pictures in crops, inside vLLM"),
    *_model("llava_next", "LlavaNextModel.pack_image_features", use=_CROPS, what=_PACK_NEXT),
    *_family("llava_next_video", "LlavaNextVideo", _IMAGES, _VIDEOS),
    *_model("llava_next_video", "LlavaNextVideoModel", use=_FRAMES, what=("vision_resampler",)),
    *_model("llava_next_video", "LlavaNextVideoModel.pack_image_features", use=_CROPS, what=_PACK),
    *_family("llava_onevision", "LlavaOnevision", (*_IMAGES, "batch_num_images"), _VIDEOS),
    *_model("llava_onevision", "image_size_to_num_patches", use=_CROPS, what=_COUNT),
    *_model("llava_onevision", "LlavaOnevisionModel.pack_image_features", use=_CROPS, what=_PACK_ONEVISION),
    *_model("llava_onevision", "LlavaOnevisionModel.apply_pooling", use=_FRAMES, what=("image_features",)),
    *_family("qwen2_vl", "Qwen2VL", _GRIDS, _VIDEO_GRIDS),
    *_qwen_tower("qwen2_vl", "Qwen2VisionTransformerPretrainedModel", "Qwen2VLVisionBlock", "VisionAttention"),
    *_decoder("qwen2_vl", "Qwen2VL", "Qwen2VLTextModel"),
    *_family("qwen2_5_vl", "Qwen2_5_VL", _GRIDS, _VIDEO_GRIDS),
    *_qwen_tower("qwen2_5_vl", _TOWER25, "Qwen2_5_VLVisionBlock", "Qwen2_5_VLVisionAttention"),
    *_decoder("qwen2_5_vl", "Qwen2_5_VL", "Qwen2_5_VLTextModel"),
    *_family("qwen3_vl", "Qwen3VL", _GRIDS, _VIDEO_GRIDS),
    *_qwen_tower("qwen3_vl", "Qwen3VLVisionModel", "Qwen3VLVisionBlock", "Qwen3VLVisionAttention"),
    *_decoder("qwen3_vl", "Qwen3VLText"),
    *_model("qwen3_vl", "Qwen3VLTextModel.forward", use="every method", what=_DEEPSTACK),
    *_model("qwen3_vl", "Qwen3VLVisionModel", use="a cut inside the vision tower", what=("deepstack_merger_list",)),
    Seam(_WINDOWS, "a cut inside the tower of Qwen2.5-VL", ("grid_thw",)),
    *_family("internvl", "InternVL", ("pixel_values", "vision_feature_layer")),
    *_model("internvl", "InternVLModel.pixel_shuffle", use=_TILE, what=("vision_features", "scale_factor")),
    *_model("internvl", "InternVLVisionAttention", use="a signal of the tower", what=(*_QKV, *_NORMS)),
    *_family("smolvlm", "SmolVLM", ("pixel_values", "pixel_attention_mask")),
    *_model("smolvlm", "SmolVLMConnector.pixel_shuffle", use=_TILE, what=("x", "scale_factor")),
    *_model("smolvlm", "SmolVLMVisionAttention", use="a signal of the tower", what=_QKV),
    # torch
    Seam("torch.compiler:disable", "every hook", ("reason",)),
    Seam("torch._dynamo:reset", "a model that was compiled"),
    Seam("torch._dynamo:config.skip_nnmodule_hook_guards", "a model that was compiled"),
    Seam("torch.nn:Module.register_forward_hook", "every hook", ("with_kwargs", "always_call")),
    Seam("torch.nn:Module.register_forward_pre_hook", "every hook", ("with_kwargs",)),
    Seam("torch.nn:Module", "every hook", ("_forward_hooks", "_forward_pre_hooks", "_modules")),
)  # fmt: skip
"""What `apply` needs; of the modeling modules, only those that a model is made of are asked."""

EVALUATION_SEAMS: tuple[Seam, ...] = (
    Seam("transformers:AutoConfig.from_pretrained", "planning a run"),
    Seam("transformers:AutoModelForImageTextToText.from_pretrained", "loading a model"),
    Seam("transformers:AutoModelForImageTextToText._model_mapping", "loading the part of a model that takes pictures"),
    Seam("transformers:AutoModelForMultimodalLM._model_mapping", "loading a model of pictures and audio"),
    Seam("transformers:AutoProcessor.from_pretrained", "loading a processor"),
    Seam("transformers:StoppingCriteria.__call__", "timing decode steps", ("input_ids", "scores")),
    Seam("transformers:StoppingCriteriaList", "timing decode steps"),
    Seam("transformers:LogitsProcessor.__call__", "the server's check of logits", ("input_ids", "scores")),
    Seam("transformers:LogitsProcessorList", "the server's check of logits"),
    Seam("transformers:BatchFeature", "videos without torchvision"),
    Seam("transformers:CLIPImageProcessorPil", "videos without torchvision"),
    Seam("transformers.processing_utils:MODALITY_TO_AUTOPROCESSOR_MAPPING", "videos without torchvision"),
    Seam("transformers.processing_utils:ProcessorMixin.check_argument_for_proper_class", "videos without torchvision"),
    Seam("transformers.utils.hub:PushToHubMixin", "videos without torchvision"),
    Seam("transformers.utils.hub:cached_file", "videos without torchvision", ("path_or_repo_id", "filename")),
    Seam("transformers.video_utils:VideoMetadata", "videos", ("total_num_frames", "fps", "frames_indices")),
    Seam("transformers.video_utils:load_video", "video files", ("backend", "sample_indices_fn")),
    Seam("transformers.utils.import_utils:is_av_available", "video files"),
    Seam("transformers.utils:logging.set_verbosity_error", "a quiet command line"),
    Seam("torch.utils.flop_counter:FlopCounterMode.__init__", "measured FLOPs", ("display", "custom_mapping")),
    Seam("torch.utils.flop_counter:FlopCounterMode.get_total_flops", "measured FLOPs"),
    Seam("torch.utils.flop_counter:sdpa_flop_count", "measured FLOPs"),
)
"""What evaluations need in addition."""


# --- the check --------------------------------------------------------------------------------------------------------


@functools.cache
def _lost(seam: Seam) -> tuple[str, ...]:
    return tuple(seam.missing())


def moved(seams: Iterable[Seam]) -> str:
    """One sentence on what the installed releases do not have of these seams; "" if nothing is missing."""
    lost = {f"{name} (which {seam.use} needs)": seam for seam in seams for name in _lost(seam)}
    if not lost:
        return ""
    package = "torch" if all(seam.where.startswith("torch") for seam in lost.values()) else "transformers"
    lowest, newest = LOWEST[package], NEWEST[package]
    return (
        f"{package} {_installed(package)} has no longer {'; nor '.join(lost)}: install a release that tokenprune "
        f"was tested with, pip install '{package}>={_text(lowest)},<{_text((newest[0], newest[1] + 1))}'."
    )


def too_old() -> str:
    """One sentence on an installed release below the lowest that is supported; "" if there is none."""
    for package, lowest in LOWEST.items():
        installed = _installed(package)
        if _release(installed) < lowest:
            return (
                f"tokenprune needs {package} {_text(lowest)} or newer, and {installed} is installed: "
                f"pip install -U '{package}>={_text(lowest)}'."
            )
    return ""


def check_seams(model: Any) -> None:
    """See that the installed releases have what a model's methods will need, before anything is changed.

    Asks each seam once a process, and imports no modeling module that the model is not made of.

    Raises:
        ImportError: a release is older than supported, or has moved something; the message says what.
    """
    made_of = {type(module).__module__ for module in (model.modules() if hasattr(model, "modules") else ())}
    needed = [seam for seam in SEAMS if not seam.where.startswith(_MODELS) or seam.module in made_of]
    sentence = too_old() or moved(needed)
    if sentence:
        raise ImportError(sentence)


def _installed(package: str) -> str:
    return importlib.import_module(package).__version__


def _release(version: str) -> tuple[int, ...]:
    """2.13.0+cpu -> (2, 13); a pre-release counts as its release."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


def _text(release: tuple[int, ...]) -> str:
    return ".".join(map(str, release))
