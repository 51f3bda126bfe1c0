"""ToMe against loops written from its card, a tower run by hand, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from _families import batch_of, family, layouts
from _tiny import prompts, tiny_llava
from _views import TOWER, make_view
from _zoo_all import zoo_batch, zoo_model
from masked_reference import compare, run_pruned

import tokenprune
from tokenprune.interfaces.pruner import ModelDepths
from tokenprune.interfaces.signals import TOWER_KEYS, Signal
from tokenprune.methods.tome import BlockBudget, ToMe
from tokenprune.state.kv_cache import key_facts
from tokenprune.state.tower_recording import sources_of

KEYS = Signal(TOWER_KEYS, 3)


class Close(Exception):
    """Two candidates closer than rounding."""


def cosine(a: list[float], b: list[float]) -> float:
    lengths = math.sqrt(sum(v * v for v in a)) * math.sqrt(sum(v * v for v in b))
    return sum(v * w for v, w in zip(a, b)) / lengths if lengths else 0.0


def ranked(values: dict[Any, float]) -> list[Any]:
    order = sorted(values, key=lambda i: (-values[i], i))
    if any(0 < values[i] - values[j] < 1e-6 for i, j in zip(order, order[1:])):
        raise Close
    return order


def by_hand(x: list[list[float]], keys: list[list[float]], sizes: list[float], budget: int) -> Any:
    """Places, states and sizes that are left of one image; `keys` are means over heads."""
    tokens = [(i, x[i], keys[i], sizes[i]) for i in range(len(x))]
    while len(tokens) > budget:
        a, b = tokens[::2], tokens[1::2]
        near = [ranked({j: cosine(token[2], b[j][2]) for j in range(len(b))})[0] for token in a]
        alike = {i: cosine(a[i][2], b[near[i]][2]) for i in range(len(a))}
        gone = ranked(alike)[: min(len(tokens) - budget, len(a))]
        left = [a[i] for i in range(len(a)) if i not in gone]
        for j in range(len(b)):
            joined = [b[j]] + [a[i] for i in gone if near[i] == j]
            total = sum(token[3] for token in joined)

            def mean(part: int) -> list[float]:
                columns = zip(*(token[part] for token in joined))  # noqa: B023
                return [sum(v * token[3] for v, token in zip(column, joined)) / total for column in columns]  # noqa: B023

            left.append((b[j][0], mean(1), mean(2), total))
        tokens = sorted(left)
    return [t[0] for t in tokens], [t[1] for t in tokens], [t[3] for t in tokens]


@pytest.mark.parametrize("ties", [False, True], ids=["random", "ties"])
def test_equals_the_definition(ties: bool) -> None:
    compared = 0
    for seed in range(700):
        generator = torch.Generator().manual_seed(seed)
        grid = (1 + seed % 4, 2 + seed % 6)
        count = grid[0] * grid[1]
        k = [1, count - 1, 1 + seed * 7 % (count - 1)][seed % 3] if count > 2 else 1
        images = 1 + seed % 3
        keys = torch.randn(images, count, 32, generator=generator)
        sizes = torch.randint(1, 5, (images, count), generator=generator).float()
        if ties:
            keys = torch.eye(5)[torch.randint(5, (images, count), generator=generator)].repeat(1, 1, 7)[..., :32]
            keys = torch.cat([keys[..., :16], keys[..., :16]], dim=2)
        view = make_view(ToMe(), grid, k, images, features=torch.randn(images, count, 6, generator=generator),
                         signals={KEYS: keys}, carry={"tome_sizes": sizes})  # fmt: skip
        selection = ToMe().select(view)
        assert selection.features is not None and selection.carry is not None and selection.sizes is not None
        for image in range(images):
            mean = keys[image].double().view(count, TOWER.num_heads, -1).mean(1).tolist()
            try:
                places, states, left = by_hand(view.features[image].double().tolist(), mean, sizes[image].tolist(), k)
            except Close:
                continue
            compared += 1
            assert selection.indices[image].tolist() == places, seed
            torch.testing.assert_close(selection.features[image], torch.tensor(states), rtol=1e-5, atol=1e-5)
            assert selection.carry["tome_sizes"][image, places].tolist() == left
            own = sizes[image, places]
            torch.testing.assert_close(selection.sizes[image] * own, torch.tensor(left))
            assert sum(left) == float(sizes[image].sum()), "no patch is lost"
    assert compared > 700


def test_a_token_that_nothing_was_merged_into_goes_on_bit_for_bit() -> None:
    view = make_view(ToMe(), (6, 6), 30)
    selection = ToMe().select(view)
    assert selection.features is not None and selection.sizes is not None
    alone = selection.sizes == 1
    rows = view.features.gather(1, selection.indices[..., None].expand(-1, -1, 16))
    assert int(alone.sum(1).min()) >= 24
    assert torch.equal(selection.features[alone], rows[alone])


def test_the_blocks_share_what_is_merged() -> None:
    depths = ModelDepths(vision=24, feature=22, decoder=32)
    left = [stage.budget.tokens(576) for stage in ToMe().stages(tokenprune.methods.tome.Budget(64), depths)]
    steps = [a - b for a, b in zip([576, *left], left)]
    assert len(left) == 22 and left[-1] == 64 and set(steps) == {23, 24}
    assert [BlockBudget(0.5, step, 2).tokens(36) for step in (1, 2)] == [27, 18]


def bias_of(cache: Any) -> Any:
    facts = key_facts(cache)
    assert facts is not None
    return facts.bias


def tower_by_hand(model: Any, pixels: torch.Tensor, budgets: list[int]) -> tuple[torch.Tensor, list[float]]:
    """What the decoder gets of one picture, and how many patches each token stands for: CLIP in the open."""
    tower = model.model.vision_tower
    tower = getattr(tower, "vision_model", tower)
    hidden = tower.pre_layrnorm(tower.embeddings(pixels))
    sizes = [1.0] * (hidden.shape[1] - 1)
    for block in range(3):
        layer = tower.encoder.layers[block]
        keys = layer.self_attn.k_proj(layer.layer_norm1(hidden))[0, 1:]
        output = layer(hidden, attention_mask=None)
        hidden = output[0] if isinstance(output, tuple) else output
        if block < 2:
            mean = keys.double().view(len(keys), 4, -1).mean(1).tolist()
            _, states, sizes = by_hand(hidden[0, 1:].double().tolist(), mean, sizes, budgets[block])
            hidden = torch.cat([hidden[:, :1], torch.tensor(states)[None]], 1)
    return model.model.multi_modal_projector(hidden[:, 1:])[0], sizes


def test_the_tower_goes_on_with_what_was_merged() -> None:
    model, checked = tiny_llava(), 0
    for seed in range(8):
        batch = prompts([1], seed=seed)
        with torch.no_grad():
            try:
                truth, sizes = tower_by_hand(model, batch["pixel_values"], [22, 9])
            except Close:
                continue
            run = run_pruned(model, "tome", 9, batch, tokens=2, key_bias=True)
        checked += 1
        at = int((batch["input_ids"][0] == 5).nonzero()[0])
        torch.testing.assert_close(run["fed"][0, at : at + 9], truth, rtol=1e-4, atol=1e-5)
        assert run["sizes"][-1][0].tolist() == pytest.approx(sizes)
        assert run["report"].merged_tokens == 27
        bias = bias_of(run["cache"])[0]
        torch.testing.assert_close(bias[0, at : at + 9].exp(), torch.tensor(sizes))
    assert checked > 3


def siglip_by_hand(model: Any, pixels: torch.Tensor, budgets: list[int]) -> tuple[torch.Tensor, list[float]]:
    """As `tower_by_hand`, of a tower without a file: SigLIP without [CLS], all of its blocks."""
    tower = model.model.vision_tower
    tower = getattr(tower, "vision_model", tower)
    hidden = tower.embeddings(pixels)
    sizes = [1.0] * hidden.shape[1]
    for block, layer in enumerate(tower.encoder.layers):
        keys = layer.self_attn.k_proj(layer.layer_norm1(hidden))[0]
        output = layer(hidden, attention_mask=None)
        hidden = output[0] if isinstance(output, tuple) else output
        if block < len(budgets):
            mean = keys.double().view(len(keys), layer.self_attn.num_heads, -1).mean(1).tolist()
            _, states, sizes = by_hand(hidden[0].double().tolist(), mean, sizes, budgets[block])
            hidden = torch.tensor(states)[None]
    return model.model.multi_modal_projector(tower.post_layernorm(hidden))[0], sizes


def test_a_tower_without_a_file_goes_on_with_what_was_merged() -> None:
    model, checked = zoo_model("paligemma"), 0
    for seed in range(8):
        batch = zoo_batch("paligemma", f"merged {seed}", [1])
        whole = int((batch["input_ids"] == 5).sum())
        with torch.no_grad():
            run = run_pruned(model, "tome", 9, batch, tokens=2, key_bias=True)
            budgets = [len(alive[0]) for _, alive in run["tower"][0][1].cuts]
            try:
                truth, sizes = siglip_by_hand(model, batch["pixel_values"], budgets)
            except Close:
                continue
        checked += 1
        at = int((batch["input_ids"][0] == 5).nonzero()[0])
        scale = model.config.text_config.hidden_size**0.5
        fed = run["fed"][0, at : at + 9]
        assert any(torch.allclose(fed, truth * factor, rtol=1e-4, atol=1e-5) for factor in (1.0, scale, 1 / scale))
        assert run["sizes"][-1][0].tolist() == pytest.approx(sizes) and sum(sizes) == pytest.approx(whole)
    assert checked > 3


def test_a_tower_without_a_file_of_several_patches_a_token_takes_no_merged_states() -> None:
    model = zoo_model("gemma3")
    with (
        tokenprune.applied(model, "tome", keep=2),
        torch.no_grad(),
        pytest.raises(ValueError, match="Merge at 'input'"),
    ):
        model(**zoo_batch("gemma3"))


@pytest.mark.parametrize("name", ["llava_next", "internvl", "qwen2_vl", "qwen2_5_vl", "smolvlm"])
def test_families(name: str) -> None:
    """Where a token is a group of patches, the tower takes no merged states, and says so."""
    model = family(name)
    if name == "llava_next":
        with tokenprune.applied(model, "tome", keep=9) as handle:
            assert [stage.site for stage in handle.stages][-1].startswith("vision:")
        return
    with pytest.raises(ValueError, match="merges tokens|cannot be cut"):
        tokenprune.apply(model, "tome", keep=5)
    with tokenprune.applied(model, {"method": "tome", "at": "input", "keep": 5}) as handle:
        assert handle.stages[0].site == "input"


def test_crops_keep_their_sizes() -> None:
    """LLaVA-NeXT: tokens of several crops, with the sizes that each got in the tower."""
    model, batch = family("llava_next"), batch_of("llava_next", layouts("llava_next")[0])
    run = run_pruned(model, "tome", 12, batch, tokens=3, key_bias=True)
    compare(run, batch, 1e-5)
    for sizes, kept in zip(run["sizes"][-1], run["cuts"][-1][1]):
        assert sizes is not None and len(sizes) == len(kept) and float(sizes.min()) >= 1 and float(sizes.max()) > 1


@pytest.mark.parametrize("at", ["input", "vision:0", "vision:1"])
def test_one_merge_at_a_site_of_ones_own(at: str) -> None:
    batch = prompts([1, 3, 0, 2])
    run = run_pruned(tiny_llava(), {"method": "tome", "at": at, "keep": 5, "key_bias": True}, None, batch, tokens=4)
    compare(run, batch, 1e-5)
    assert all(float(sizes.sum()) == pytest.approx(36) for sizes in run["sizes"][-1])


def test_layers_are_refused() -> None:
    with pytest.raises(ValueError, match="acts at 'vision:L' and 'input', not at 'layer'"):
        tokenprune.apply(tiny_llava(), {"method": "tome", "at": "layer:2", "keep": 5})


def test_spent_keys_are_not_kept() -> None:
    model, batch = tiny_llava(), prompts([1])
    with tokenprune.applied(model, "tome", keep=9) as handle, torch.no_grad():
        sources = sources_of(model.model.get_image_features(pixel_values=batch["pixel_values"]))
        assert sources is not None and not sources[0][0].signals
        left: Any = sources[0][0].kept[0]
        assert left.count == 9
        assert len(handle.stages) == 2
