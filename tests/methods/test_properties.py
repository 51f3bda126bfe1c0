"""What every method promises, whatever it does: generated from the registry."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from _views import TOWER, make_view, pick
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from tokenprune.interfaces.pruner import Pruner
from tokenprune.registry import METHODS

# options other than the defaults that take another way through a method; methods without a line are still tested
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "dart": [{"image_pivots": 7, "text_pivots": 0}, {"text_pivots": 9}],
    "era": [{"gamma": 0.5, "cap": 3.0}, {"beta": 0.0, "entropy_weight": 0.0}],
    "fsr": [{"relevance": "none"}, {"rho": 0.4, "kappa": 2.5}, {"relevance": "hint", "rho": 0.0}],
    "holitom": [{"contextual": 0.5}, {"contextual": 1.0, "merge": "mean", "neighbours": 3}, {"total": "official"}],
    "holov": [{"variant": "paper"}, {"variant": "paper", "crops": 7}, {"crops": 1}],
    "prumerge": [{"neighbours": 0}, {"neighbours": 3}],
    "prumerge_plus": [{"neighbours": 0}, {"neighbours": 3}],
    "random": [{"seed": 5}],
    "sparsevlm": [{"heads": 3}, {"version": "v1"}],
    "todre": [{"objective": "k_center"}, {"pivot": "center"}, {"pivot": "random"}],
    "transprune": [{"variant": "paper"}, {"alpha": 0.2}],
    "vflowopt": [{"alpha": -0.7, "cell": 2.5}, {"variant": "paper", "cell": 1.3}, {"recycle": False}],
    "visionzip": [{"merge": "mean"}, {"contextual": 0.5}, {"contextual": 0.0}],
    "vispruner": [{"important": 0.75}, {"important": 0.0}, {"important": 1.0}],
    "vmtc": [{"placement": "append"}],
    "vtc_cls": [{"start_layer": 0}],
}


def cases() -> list[Any]:
    found = []
    for name in METHODS.names():
        if METHODS.get(name).site == "pixels":
            continue  # these select before there are tokens
        for options in [{}, *VARIANTS.get(name, [])]:
            label = ",".join(f"{key}={value}" for key, value in options.items())
            found.append(pytest.param(METHODS.get(name)(**options), id=f"{name}({label})"))
    return found


every_method = pytest.mark.parametrize("method", cases())
small = settings(max_examples=12, derandomize=True)


@st.composite
def problems(draw: st.DrawFn) -> tuple[tuple[int, int], int, int, int]:
    """A grid, a budget below its size, a number of images and a seed."""
    grid = (draw(st.integers(1, 9)), draw(st.integers(2, 9)))
    budget = draw(st.integers(1, grid[0] * grid[1] - 1))
    return grid, budget, draw(st.integers(1, 3)), draw(st.integers(0, 10**6))


@every_method
@small
@given(problem=problems())
def test_keeps_exactly_the_budget_in_order(method: Pruner, problem: Any) -> None:
    grid, budget, images, seed = problem
    count = grid[0] * grid[1]
    selection = method.select(make_view(method, grid, budget, images, seed=seed))
    kept = selection.indices.tolist()
    assert selection.indices.dtype == torch.int64
    assert len(kept) == images
    for row in kept:
        assert row == sorted(set(row))
        assert row[0] >= 0 and row[-1] < count
        if selection.features is None:
            assert len(row) == budget
        else:  # what is merged may have to form a raster
            assert 1 <= len(row) <= budget
    if selection.features is not None:
        assert selection.features.shape == (images, len(kept[0]), 16)


@every_method
@small
@given(problem=problems())
def test_an_image_is_selected_the_same_in_any_batch(method: Pruner, problem: Any) -> None:
    grid, budget, _, seed = problem
    view = make_view(method, grid, budget, images=4, seed=seed)
    together = method.select(view)
    for order in ([2, 0, 3, 1], [3], [1, 1]):
        part = method.select(pick(view, order))
        assert torch.equal(part.indices, together.indices[order])
        if together.features is not None and part.features is not None:
            torch.testing.assert_close(part.features, together.features[order])


@every_method
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("seed", range(5))
def test_half_precision_features_rank_as_in_fp32(method: Pruner, dtype: torch.dtype, seed: int) -> None:
    view = make_view(method, (8, 9), 20, width=48, seed=seed)
    halved = dataclasses.replace(view, features=view.features.to(dtype))
    assert torch.equal(halved.features.float(), view.features)
    full, half = method.select(view), method.select(halved)
    assert torch.equal(full.indices, half.indices)
    if half.features is not None and full.features is not None:
        assert half.features.dtype == dtype
        torch.testing.assert_close(half.features, full.features.to(dtype))


@every_method
def test_inputs_are_left_alone(method: Pruner) -> None:
    view = make_view(method)
    before = [view.features.clone(), *(rows.clone() for rows in view.signals.values())]
    method.select(view)
    assert all(torch.equal(a, b) for a, b in zip(before, [view.features, *view.signals.values()]))


@every_method
def test_a_selection_repeats(method: Pruner) -> None:
    view = make_view(method, (7, 8), 13)
    assert torch.equal(method.select(view).indices, type(method)(**vars(method)).select(view).indices)


@every_method
def test_nan_features_never_change_a_selection_silently(method: Pruner) -> None:
    view = make_view(method)
    clean = method.select(view).indices
    poisoned = view.features.clone()
    poisoned[1, 4, 3] = torch.nan
    try:
        kept = method.select(dataclasses.replace(view, features=poisoned)).indices
    except ValueError as error:
        assert "NaN" in str(error)
    else:
        assert torch.equal(kept, clean)


@every_method
def test_nan_signals_are_refused(method: Pruner) -> None:
    view = make_view(method)
    for signal, rows in view.signals.items():
        poisoned = rows.clone()
        poisoned[0, 2] = torch.nan
        with pytest.raises(ValueError, match="NaN"):
            method.select(dataclasses.replace(view, signals={**view.signals, signal: poisoned}))


@every_method
def test_a_signal_that_was_not_recorded_is_named(method: Pruner) -> None:
    view = make_view(method)
    if view.signals:
        with pytest.raises(KeyError, match="was not recorded"):
            method.select(dataclasses.replace(view, signals={}))


@every_method
def test_unknown_options_are_refused(method: Pruner) -> None:
    with pytest.raises(TypeError):
        type(method)(no_such_option=1)  # pyright: ignore[reportCallIssue]
    with pytest.raises(ValueError, match="positions"):
        type(method)(positions="elsewhere")


@every_method
@pytest.mark.parametrize(("grid", "budget"), [((6, 5), 7), ((10, 12), 3), ((10, 12), 90), ((3, 3), 1)])
def test_counted_flops_are_the_real_ones(method: Pruner, grid: tuple[int, int], budget: int) -> None:
    view = make_view(method, grid, budget, images=2, width=24)
    with FlopCounterMode(display=False) as counter:
        method.select(view)
    counted = method.flops(2, view.num_tokens, 24, budget, TOWER)
    assert counted == pytest.approx(counter.get_total_flops(), rel=0.01)


@every_method
def test_nothing_is_read_back_from_the_device(method: Pruner) -> None:
    """Tensors of the meta device hold no values, so reading one raises."""
    for grid, budget in (((6, 5), 7), ((10, 12), 3)):
        view = make_view(method, grid, budget)
        keys = view.keys().to("meta")
        selection = method.select(
            dataclasses.replace(
                view,
                features=view.features.to("meta"),
                signals={signal: rows.to("meta") for signal, rows in view.signals.items()},
                make_keys=lambda keys=keys: keys,
            )
        )
        assert selection.indices.device.type == "meta"
        assert selection.indices.shape[0] == 3


@every_method
def test_the_catalogue_line_is_one_sentence(method: Pruner) -> None:
    line = METHODS.describe(method.name)
    assert line.endswith((".", ")."))
    assert ". " not in line
    assert type(method).__doc__ and not type(method).__doc__.startswith(type(method).__name__ + "(")
