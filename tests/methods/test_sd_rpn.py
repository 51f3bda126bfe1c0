"""SD-RPN: the branch beside the decoder, and the prompt that gets its region once more."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from _families import batch_of, family
from _tiny import prompts, tiny_llava
from masked_reference import relative_error

import tokenprune
from tokenprune.api import adapter_for
from tokenprune.capture.branch import CONFIG, WEIGHTS, Branch, load_branch, save_branch
from tokenprune.interfaces.pruner import ModelDepths, Pruner
from tokenprune.interfaces.selection import Selection
from tokenprune.interfaces.signals import BRANCH_LOGITS, Signal
from tokenprune.methods.sd_rpn import SdRpn, default_place
from tokenprune.regions import boxes_of, picture_window, smoothed, to_pixels


def probed(model: Any, batch: dict[str, Any], site: str, layers: int, source: str) -> list[torch.Tensor]:
    """The branch's logits of each visual, in the order of the prompt's spans where all have one shape."""
    seen: list[torch.Tensor] = []
    depth = int(site.partition(":")[2])

    class Probe(Pruner):
        name, adaptive, default_scope, site = "probe", True, "visual", "layer"

        def signals(self, tower: Any) -> tuple[Signal, ...]:
            return (Signal(BRANCH_LOGITS, depth, (layers,), source),)

        def select(self, view: Any) -> Selection:
            seen.extend(view.signal(BRANCH_LOGITS, depth, layers, source=source))
            return Selection(torch.arange(view.num_tokens).expand(view.num_images, -1))

    with tokenprune.applied(model, {"at": site, "prune": Probe(), "keep": 1.0}), torch.no_grad():
        model(**batch)
    return seen


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "qwen3_vl"])
def test_at_first_the_branch_is_the_models_own_layers(name: str, layers: int) -> None:
    """Logits of T of its layers from K on: products of layer K + T - 1 on what really enters that."""
    model, batch = family(name), batch_of(name, "one_left")
    adapter = adapter_for(model)
    (found,) = probed(model, batch, "layer:2", layers, "own")
    entered: list[Any] = []
    hook = adapter.layers[1 + layers].register_forward_pre_hook(
        lambda _, args, kwargs: entered.append((args[0] if args else kwargs["hidden_states"], kwargs)), with_kwargs=True
    )
    with torch.no_grad():
        model(**batch)
    hook.remove()
    hidden, given = entered[0]
    reading = adapter.reading(adapter.layers[1 + layers])
    query, key = (reading.heads(hidden, part) for part in "qk")
    if adapter.mrope:
        query, key = (reading.rotate(part, given["position_embeddings"]) for part in (query, key))
    heads = query.shape[1]
    expected = torch.zeros(hidden.shape[1])
    for head in range(heads):
        expected += key[0, head // (heads // key.shape[1])] @ query[0, head, -1] / heads * reading.width**-0.5
    places = (batch["input_ids"][0] == 5).nonzero()[:, 0]
    assert relative_error(found, expected[places]) < 1e-5


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_logit(side: str) -> None:
    model, together = tiny_llava(), prompts([1, 2, 1], side)
    found = probed(model, together, "layer:2", 2, "own")
    images = 0
    for row, count in enumerate((1, 2, 1)):
        real = together["attention_mask"][row].bool()
        alone = {
            "input_ids": together["input_ids"][row : row + 1, real],
            "attention_mask": together["attention_mask"][row : row + 1, real],
            "pixel_values": together["pixel_values"][images : images + count],
        }
        for one, other in zip(found[images : images + count], probed(model, alone, "layer:2", 2, "own")):
            assert relative_error(one, other) < 1e-5
        images += count


def test_only_the_branch_learns() -> None:
    model = tiny_llava()
    branch = Branch(adapter_for(model), 2, 2)
    branch.requires_grad_(True)
    hidden = torch.randn(1, 9, 48)
    rotation = adapter_for(model).rotary(hidden, torch.arange(9)[None], 2)
    logits, flops = branch.logits(hidden, rotation, None, torch.tensor([8]))
    logits.sum().backward()
    assert all(parameter.grad is None for parameter in model.parameters()) and flops > 0
    learned = {name for name, value in branch.named_parameters() if value.grad is not None}
    assert {name for name in learned if name.startswith("layers.1")} == {
        "layers.1.input_layernorm.weight", "layers.1.self_attn.q_proj.weight", "layers.1.self_attn.k_proj.weight",
    }  # fmt: skip
    assert {name for name in learned if name.startswith("layers.0")} == {
        name for name, _ in branch.named_parameters() if name.startswith("layers.0")
    }


def written(folder: Path, model: Any, layer: int = 2, layers: int = 2) -> str:
    branch = Branch(adapter_for(model), layer, layers)
    with torch.no_grad():
        for value in branch.parameters():
            value.add_(torch.randn(value.shape, generator=torch.Generator().manual_seed(0)) * 0.1)
    save_branch(branch, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps({"layer": layer, "layers": layers}), encoding="utf-8")
    return str(folder)


def test_a_saved_branch_is_the_same_and_chooses_by_its_logits(tmp_path: Path) -> None:
    model, batch = tiny_llava(), prompts([1])
    folder = written(tmp_path, model)
    (found,) = probed(model, batch, "layer:2", 2, folder)
    assert relative_error(found, probed(model, batch, "layer:2", 2, "own")[0]) > 0.05
    branch = load_branch(adapter_for(model), 2, 2, folder)
    assert not any(value.requires_grad for value in branch.parameters())
    with tokenprune.applied(model, "sd_rpn", keep=9, branch=folder) as handle, torch.no_grad():
        assert [stage.site for stage in handle.stages] == ["layer:2"]
        model(**batch)
        assert handle.kept[0][0].tolist() == found.topk(9).indices.sort().values.tolist()


def test_what_does_not_fit_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="tokenprune train sd_rpn --model MODEL --data DATA --output FOLDER"):
        SdRpn(branch=None)
    with pytest.raises(ValueError, match="is no folder of a branch"):
        SdRpn(branch=str(tmp_path))
    with pytest.raises(ValueError, match="layers says how many of the model's own"):
        SdRpn(layers=0)
    folder = written(tmp_path, tiny_llava(hidden_size=32))
    with pytest.raises(ValueError, match="holds the weights of a branch of another model"):
        tokenprune.apply(tiny_llava(), "sd_rpn", keep=9, branch=folder)
    with pytest.raises(ValueError, match="trained at 'layer:2', and 'layer:3' was asked for"):
        tokenprune.apply(tiny_llava(), {"at": "layer:3", "prune": "sd_rpn", "keep": 9, "branch": folder})
    with pytest.raises(ValueError, match="acts at 'layer:K', not at 'input'"):
        tokenprune.apply(tiny_llava(), {"at": "input", "prune": "sd_rpn", "keep": 9})
    with pytest.raises(ValueError, match="T goes from 1 to 1"):
        Branch(adapter_for(tiny_llava()), 3, 2)


def test_where_it_acts() -> None:
    assert default_place(ModelDepths(24, 22, 32)) == (16, 3)
    assert default_place(ModelDepths(3, 2, 4, first_cut=3)) == (3, 1)


# --- two passes -------------------------------------------------------------------------------------------------------


def test_smoothing_is_a_gaussian() -> None:
    logits = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    found, p = smoothed(logits), logits.sigmoid()
    weight = [2.718281828 ** (-(d**2) / 2) for d in (-1, 0, 1)]
    total = sum(weight) ** 2

    def at(place: int, size: int) -> int:
        return -place if place < 0 else 2 * size - 2 - place if place >= size else place

    for row in range(5):
        for col in range(7):
            value = sum(
                weight[y + 1] * weight[x + 1] * float(p[at(row + y, 5), at(col + x, 7)]) / total
                for y in (-1, 0, 1)
                for x in (-1, 0, 1)
            )
            assert float(found[row, col]) == pytest.approx(value, rel=1e-5)
    assert smoothed(torch.zeros(1, 1)).item() == pytest.approx(0.5)


def reference_components(mask: list[list[bool]]) -> list[set[tuple[int, int]]]:
    """By joining sets, pair by pair."""
    groups = [{(r, c)} for r, row in enumerate(mask) for c, on in enumerate(row) if on]
    joined = True
    while joined:
        joined = False
        for i, one in enumerate(groups):
            for other in groups[i + 1 :]:
                if any(abs(a - c) <= 1 and abs(b - d) <= 1 for a, b in one for c, d in other):
                    one |= other
                    groups.remove(other)
                    joined = True
                    break
            if joined:
                break
    return sorted(groups, key=min)


def test_boxes_are_those_of_connected_components() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        rows, cols = (int(torch.randint(1, 9, (), generator=generator)) for _ in range(2))
        mask = torch.rand(rows, cols, generator=generator) < 0.25
        parts = [part for part in reference_components(mask.tolist()) if len(part) > 1]
        boxes = boxes_of(mask)
        assert len(boxes) == len(parts)
        for (left, top, right, bottom), part in zip(boxes, parts):
            tight = (min(c for _, c in part), min(r for r, _ in part), max(c for _, c in part) + 1,
                     max(r for r, _ in part) + 1)  # fmt: skip
            assert 0 <= left <= tight[0] and 0 <= top <= tight[1] and tight[2] <= right <= cols
            assert tight[3] <= bottom <= rows
            if len(part) >= 4:
                assert (left, top, right, bottom) == tight
            else:
                assert right - left == max(tight[2] - tight[0], min(3, cols))
                assert bottom - top == max(tight[3] - tight[1], min(3, rows))
    assert boxes_of(torch.ones(16, 16, dtype=torch.bool)) == []
    assert boxes_of(torch.ones(15, 15, dtype=torch.bool)) == [(0, 0, 15, 15)]


class Images:
    def __init__(self, **settings: Any) -> None:
        vars(self).update(settings)


@pytest.mark.parametrize("settings", [{}, {"do_center_crop": True}, {"do_pad": True}], ids=str)
@pytest.mark.parametrize("size", [(640, 480), (480, 640), (300, 300)])
def test_from_cells_to_pixels_and_back(settings: dict[str, bool], size: tuple[int, int]) -> None:
    window, grid = picture_window(Images(**settings), size), (24, 24)
    for box in [(3, 5, 9, 12), (0, 0, 24, 24), (10, 10, 13, 13), (20, 2, 24, 6)]:
        left, top, right, bottom = to_pixels(box, grid, window, size)
        assert 0 <= left < right <= size[0] and 0 <= top < bottom <= size[1]
        back = [(value - window[i % 2]) * 24 / (window[2 + i % 2] - window[i % 2])
                for i, value in enumerate((left, top, right, bottom))]  # fmt: skip
        inside = [max(0, -window[0]) / (window[2] - window[0]) * 24, max(0, -window[1]) / (window[3] - window[1]) * 24]
        for i, (mine, cell) in enumerate(zip(back, box)):
            low, high = inside[i % 2], 24 - inside[i % 2]
            if low < cell < high:  # within the picture
                assert abs(mine - cell) <= 1
