"""Signals of sinks and of pixels, against loops in float64 and against the models' own attention and processors."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch
from _families import BUILDERS, batch_of, family, layouts
from _tiny import prompts, tiny_llava
from hypothesis import given, settings
from hypothesis import strategies as st
from masked_reference import relative_error

import tokenprune
from tokenprune.api import adapter_for
from tokenprune.capture.vision import grey_entropy, grey_levels, sink_attention
from tokenprune.interfaces.pruner import Pruner
from tokenprune.interfaces.selection import Selection
from tokenprune.interfaces.signals import (
    ATTENTION_BY_HEAD,
    GREY_ENTROPY,
    SINK_ATTENTION,
    TOWER_KEYS,
    TOWER_STATES,
    VECTOR_SIGNALS,
    Signal,
    TowerInfo,
    summary_attention,
)
from tokenprune.interfaces.view import View
from tokenprune.methods.holov import HoloV
from tokenprune.methods.vflowopt import VFlowOpt


def attention_of(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Head-mean softmax attention `[T, T]` of one picture, float64."""
    query, key = query.double(), key.double()
    return (query @ key.transpose(1, 2) / math.sqrt(query.shape[-1])).softmax(-1).mean(0)


def reference_sinks(attention: list[list[float]], threshold: float, total: bool) -> tuple[list[float], int]:
    """Card: received attention, the patches above t times its mean, and the mean (or sum) of their rows."""
    count = len(attention)
    received = [sum(attention[i][j] for i in range(count)) / count for j in range(count)]
    mean = sum(received) / count
    chosen = [j for j in range(count) if received[j] > threshold * mean]
    if not chosen:
        chosen = [max(range(count), key=lambda j: received[j])]
    sums = [sum(attention[k][i] for k in chosen) for i in range(count)]
    return (sums if total else [value / len(chosen) for value in sums]), len(chosen)


@settings(max_examples=60)
@given(
    st.integers(1, 3), st.integers(1, 40), st.integers(0, 1), st.floats(0, 5), st.booleans(), st.integers(0, 10**6),
    st.floats(0.1, 4),
)  # fmt: skip
def test_sinks_equal_the_card(pictures, count, before, threshold, total, seed, loud):
    generator = torch.Generator().manual_seed(seed)
    query, key = (loud * torch.randn(pictures, 2, before + count, 4, generator=generator) for _ in range(2))
    found, rows = sink_attention(query, key, before, threshold, total)
    numbers = []
    for picture in range(pictures):
        attention = attention_of(query[picture], key[picture])[before:, before:]
        truth, number = reference_sinks(attention.tolist(), threshold, total)
        numbers.append(number)
        assert relative_error(found[picture], torch.tensor(truth)) < 1e-5
    # all rows once; those of sinks again, unless they are all
    assert rows == (count if min(numbers) == count else count + max(numbers))


def test_more_rows_than_a_chunk_holds_and_no_threshold():
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, 2, 300, 4, generator=generator) for _ in range(2))
    plain, _ = sink_attention(query, key, 0, 0.0, False)
    columns = torch.stack([attention_of(q, k).mean(0) for q, k in zip(query, key)])
    assert relative_error(plain, columns) < 1e-6, "t = 0 takes all patches: column means"
    for threshold in (0.0, 0.97, 1.05, 40.0):
        found, _ = sink_attention(query, key, 0, threshold, False)
        torch.testing.assert_close(found.sum(1), torch.ones(2))  # no [CLS]: rows sum to 1
        truth = [reference_sinks(attention_of(q, k).tolist(), threshold, False)[0] for q, k in zip(query, key)]
        assert relative_error(found, torch.tensor(truth)) < 1e-5


def reference_entropy(levels: list[int], base: float) -> float:
    shares = [levels.count(level) / len(levels) for level in set(levels)]
    return -sum(p * math.log(p, base) for p in shares)


def test_entropy_of_even_patches_and_of_all_different_ones():
    even, different = torch.full((196,), 77), torch.arange(196) + 20
    assert grey_entropy(torch.stack([even, different]), 2.0).tolist() == pytest.approx([0.0, math.log2(196)], abs=1e-5)
    assert float(grey_entropy(even, 2.0)) == 0.0
    draw = random.Random(0)
    for _ in range(200):
        levels = [draw.randint(0, draw.choice([1, 5, 255])) for _ in range(draw.randint(1, 60))]
        for base in (2.0, math.e):
            assert float(grey_entropy(torch.tensor(levels), base)) == pytest.approx(
                reference_entropy(levels, base), abs=2e-6
            )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_grey_levels_are_the_pictures_own(dtype):
    levels = torch.randint(0, 256, (50, 3, 196), generator=torch.Generator().manual_seed(0))
    mean, std = torch.tensor([0.48, 0.46, 0.41]), torch.tensor([0.27, 0.26, 0.28])
    pixels = ((levels / 255 - mean[:, None]) / std[:, None]).to(dtype)
    assert torch.equal(grey_levels(pixels, mean.tolist(), std.tolist()), (levels.sum(1).double() / 3).round().long())


def by_picture(model, batch, method, **options):
    """The signals that a method is given at the input for each picture of a batch, in batch order: name -> `[N]`."""
    seen: dict[int, dict[str, torch.Tensor]] = {}

    @dataclass
    class Watched(method):
        hints: ClassVar[tuple[str, ...]] = ("place",)

        def select(self, view):
            if view.site == "input":
                for row, place in enumerate(view.hints["place"]):
                    assert place not in seen, "a picture is asked about once"
                    seen[place] = {signal.name: values[row] for signal, values in view.signals.items()}
            return super().select(view)

    with tokenprune.applied(model, Watched(**options), 9) as handle, torch.no_grad():
        handle.set_hints(place=list(range(64)))
        model(**batch)
        assert sorted(seen) == list(range(len(handle.last.layout.spans)))
    return [seen[place] for place in sorted(seen)]


def recorded(model, batch, **options):
    """What vflowopt's signals are for the first picture of a batch, by name, `[N]` each."""
    return by_picture(model, batch, VFlowOpt, **options)[0]


def test_sinks_of_a_model_are_those_of_its_own_attention():
    model, batch = tiny_llava(attention="eager"), prompts([1])
    layer = adapter_for(model).tower.feature_layer
    with torch.no_grad():
        attention = model.model.vision_tower(batch["pixel_values"], output_attentions=True).attentions[layer]
    truth, _ = reference_sinks(attention[0].double().mean(0)[1:, 1:].tolist(), 1.1, False)
    found = recorded(model, batch, threshold=1.1)[SINK_ATTENTION]
    assert relative_error(found, torch.tensor(truth)) < 1e-5


def picture(rows: int, cols: int, patch: int, seed: int = 0) -> torch.Tensor:
    """`[rows * patch, cols * patch, 3]` uint8: patches with few or many levels."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.zeros(rows * patch, cols * patch, 3, dtype=torch.uint8)
    for row in range(rows):
        for col in range(cols):
            levels = int(torch.randint(1, 60, (1,), generator=generator))
            values = torch.randint(0, levels, (patch, patch, 3), generator=generator)
            image[row * patch : (row + 1) * patch, col * patch : (col + 1) * patch] = values.to(torch.uint8)
    return image


def reference_shares(image: torch.Tensor, patch: int, cell: int) -> list[float]:
    """Softmax over the patches of a picture of their entropies, mean over cells of `cell` x `cell` patches."""
    rows, cols = image.shape[0] // patch, image.shape[1] // patch
    entropies = {}
    for row in range(rows):
        for col in range(cols):
            own = image[row * patch : (row + 1) * patch, col * patch : (col + 1) * patch].reshape(-1, 3).tolist()
            entropies[row, col] = reference_entropy([round(sum(pixel) / 3) for pixel in own], 2.0)
    total = sum(math.exp(value) for value in entropies.values())
    return [
        sum(math.exp(entropies[r, c]) for r in range(row, row + cell) for c in range(col, col + cell)) / total / cell**2
        for row in range(0, rows, cell)
        for col in range(0, cols, cell)
    ]


def normalised(image: torch.Tensor, tower) -> torch.Tensor:
    """`[3, H, W]`, as the family's processors would give it."""
    mean, std = torch.tensor(tower.pixel_mean), torch.tensor(tower.pixel_std)
    return ((image / 255 - mean) / std).permute(2, 0, 1).float()


@pytest.mark.parametrize(
    ("name", "patch", "side", "cell"), [("llava", 7, 6, 1), ("internvl", 4, 12, 2), ("smolvlm", 4, 12, 2)]
)
def test_entropy_of_towers_with_one_picture_size(name, patch, side, cell):
    model, batch = family(name), batch_of(name, "one_left")
    image = picture(side, side, patch)
    pixels = batch["pixel_values"].clone()
    first = pixels[0, 0] if name == "smolvlm" else pixels[0]
    first.copy_(normalised(image, adapter_for(model).tower))
    found = recorded(model, {**batch, "pixel_values": pixels}, alpha=0.5)[GREY_ENTROPY]
    truth = torch.tensor(reference_shares(image, patch, cell))
    assert relative_error(found[: len(truth)], truth) < 1e-5


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_entropy_of_packed_patches_by_the_processor_of_the_family(name):
    from transformers import Qwen2VLImageProcessor

    model, batch = family(name), batch_of(name, "one_left")
    tower = adapter_for(model).tower
    image = picture(10, 12, 4)
    processor = Qwen2VLImageProcessor(
        patch_size=4, temporal_patch_size=2, merge_size=2, do_resize=False, image_mean=list(tower.pixel_mean),
        image_std=list(tower.pixel_std),
    )  # fmt: skip
    made = processor(images=[image.numpy()], return_tensors="pt")
    assert made["image_grid_thw"].tolist() == batch["image_grid_thw"].tolist() == [[1, 10, 12]]
    found = recorded(model, {**batch, "pixel_values": made["pixel_values"]}, alpha=0.5)[GREY_ENTROPY]
    assert relative_error(found, torch.tensor(reference_shares(image, 4, 2))) < 1e-5


def test_entropy_of_crops_is_packed_as_the_model_packs_them():
    """Thumbnail and mosaic: the softmax is over each crop's own patches; the mosaic is unpadded."""
    model, batch = family("llava_next"), batch_of("llava_next", "one_left")
    tower, crops = adapter_for(model).tower, batch["pixel_values"].shape[1]
    images = [picture(4, 4, 7, seed) for seed in range(crops)]
    pixels = torch.stack([normalised(image, tower) for image in images])[None]
    shares = torch.tensor([reference_shares(image, 7, 1) for image in images])
    found = recorded(model, {**batch, "pixel_values": pixels}, alpha=0.5)[GREY_ENTROPY]
    packed, _ = model.model.pack_image_features(
        [shares[..., None]], batch["image_sizes"], vision_feature_select_strategy="default",
        image_newline=torch.tensor([-1.0]),
    )  # fmt: skip
    packed = packed[0][:, 0]
    assert relative_error(found, packed[packed >= 0]) < 1e-5


@pytest.mark.parametrize("name", list(BUILDERS))
def test_every_family_gives_both(name):
    vision, layout = adapter_for(family(name)).vision, "mixed_left" if "mixed_left" in layouts(name) else "one_left"
    assert {SINK_ATTENTION, GREY_ENTROPY} <= set(vision.signals)
    found = recorded(family(name), batch_of(name, layout), alpha=0.5)
    assert set(found) == {SINK_ATTENTION, GREY_ENTROPY}
    assert all(bool((values > 0).all()) and len(values.unique()) > 1 for values in found.values())


def test_a_signal_with_other_settings_is_another_signal():
    assert Signal(SINK_ATTENTION, 3, (1.0,)) != Signal(SINK_ATTENTION, 3, (2.0,))


@pytest.mark.parametrize("layout", ["one_left", "ragged_left", "ragged_right"])
@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_received_attention_stands_at_the_token_that_receives_it(name, layout):
    """Rows of Qwen2.5-VL's tower are sorted by windows. Which patch stands where is read off the patch embeddings."""
    model, batch = family(name), batch_of(name, layout)
    tower, seen = model.model.visual, {}
    last = len(tower.blocks) - 1
    hooks = [
        tower.blocks[0].register_forward_pre_hook(lambda m, args, kwargs: seen.update(first=args[0]), with_kwargs=True),
        tower.blocks[last].attn.register_forward_pre_hook(lambda m, args, kw: seen.update(kw), with_kwargs=True),
        tower.blocks[last].attn.qkv.register_forward_hook(lambda m, args, output: seen.update(qkv=output)),
    ]
    embeds = tower.patch_embed(batch["pixel_values"]) if name != "qwen3_vl" else None
    try:
        found = [signals[SINK_ATTENTION] for signals in by_picture(model, batch, HoloV)]
    finally:
        for hook in hooks:
            hook.remove()
    if embeds is None:  # position embeddings were added: rows of this tower are not sorted
        place = torch.arange(len(seen["first"]))
    else:
        same = (seen["first"][:, None] == embeds[None]).all(-1)
        assert bool((same.sum(1) == 1).all())
        place = same.int().argmax(1)  # of the row's patches, in the order of the processor
    assert (name == "qwen2_5_vl") == (not torch.equal(place, torch.arange(len(place))))
    query, key, _ = (part.double() for part in seen["qkv"].unflatten(-1, (3, 4, -1)).unbind(1))
    cos, sin = (part[:, None].double() for part in seen["position_embeddings"])

    def turned(x):
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat([-second, first], -1) * sin

    raster = torch.empty_like(place)
    raster[place] = torch.arange(len(place))
    query, key = turned(query)[raster].transpose(0, 1), turned(key)[raster].transpose(0, 1)
    start = 0
    for grid, values in zip(batch["image_grid_thw"].tolist(), found, strict=True):
        part = slice(start, start + math.prod(grid))
        received = attention_of(query[:, part], key[:, part]).mean(0)
        assert relative_error(values, received.view(-1, 4).mean(1)) < 1e-5
        start += math.prod(grid)


# --- vectors: of every token one ---


@dataclass
class _Reader(Pruner):
    """Keeps everything and remembers what it was given."""

    adaptive: ClassVar[bool] = True
    default_scope: ClassVar[str] = "visual"
    wanted: tuple[Signal, ...] = ()
    seen: list[dict[Signal, torch.Tensor]] = field(default_factory=list)

    def signals(self, tower: TowerInfo) -> tuple[Signal, ...]:
        return self.wanted

    def select(self, view: View) -> Selection:
        self.seen.append(dict(view.signals))
        return Selection(torch.arange(view.num_tokens).expand(view.num_images, -1))


def read_signals(model: Any, batch: dict[str, torch.Tensor], *wanted: Signal) -> list[dict[Signal, torch.Tensor]]:
    reader = _Reader(wanted=wanted)
    with tokenprune.applied(model, reader, keep=1.0), torch.no_grad():
        model(**batch)
    return reader.seen


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_vectors_of_clip_are_its_own(attention):
    model, batch = tiny_llava(attention="eager"), prompts([2, 1])
    block = adapter_for(model).tower.feature_layer
    wanted = [Signal(name, block) for name in (TOWER_STATES, TOWER_KEYS, ATTENTION_BY_HEAD)]
    (seen,) = read_signals(tiny_llava(attention=attention), batch, *wanted)
    tower = model.model.vision_tower
    with torch.no_grad():
        output = tower(batch["pixel_values"], output_hidden_states=True, output_attentions=True)
        layer = tower.encoder.layers[block] if hasattr(tower, "encoder") else tower.vision_model.encoder.layers[block]
        keys = layer.self_attn.k_proj(layer.layer_norm1(output.hidden_states[block]))[:, 1:]
    states, heads = output.hidden_states[block + 1][:, 1:], output.attentions[block][:, :, 0, 1:].transpose(1, 2)
    for signal, truth in zip(wanted, (states, keys, heads), strict=True):
        assert seen[signal].dtype == torch.float32
        assert relative_error(seen[signal], truth) < 1e-5


@pytest.mark.parametrize("name", sorted(BUILDERS))
def test_vectors_of_every_family_agree_with_what_is_known_of_them(name):
    """The heads' mean is the received attention, keys and states are of the tower's width, two pictures keep apart."""
    model = family(name)
    tower = adapter_for(model).tower
    summary = summary_attention(tower, tower.feature_layer)
    wanted = [Signal(each, tower.feature_layer) for each in VECTOR_SIGNALS]
    for layout in layouts(name):
        for seen in read_signals(model, batch_of(name, layout), *wanted, summary):
            states, keys, heads = (seen[signal] for signal in wanted)
            count = seen[summary].shape[1]
            assert states.shape[1:] == (count, tower.hidden_size)
            assert keys.shape[:2] == states.shape[:2]
            assert relative_error(heads.mean(dim=2), seen[summary]) < 1e-5
            assert bool(states.isfinite().all()) and float(states.std(dim=1).max()) > 0
