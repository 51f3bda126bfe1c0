"""The benches at true size: the sizes are the published checkpoints', and each command works on small copies."""

from __future__ import annotations

import csv

import pytest
import torch

from tokenprune.evals.bench import bypass, decode, end_to_end, growth, kernels, prefill, probes
from tokenprune.evals.bench.sizes import SizedModel, build, find_size
from tokenprune.evals.profiling.timing import ideal_prefill
from tokenprune.registry import UnknownName


# billions of parameters of the checkpoints, as their safetensors indices and cards give them
@pytest.mark.parametrize(
    ("name", "billions"), [("llava-1.5-7b", 7.063), ("llava-next-7b", 7.063), ("qwen2.5-vl-7b", 8.292)]
)
def test_sizes_are_those_of_the_checkpoints(name, billions):
    model = build(name, "bfloat16", "meta")
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e9, 3) == billions


# CLIP-L/14-336 to its feature layer, its projector and Qwen2-0.5B (0.494) with tied embeddings
@pytest.mark.parametrize(
    ("name", "billions"), [("llava-1.5-0.5b", 0.799), ("llava-next-0.5b", 0.799), ("qwen2.5-vl-0.5b", 0.592)]
)
def test_sizes_for_a_cpu_keep_the_prompts_of_the_large_ones(name, billions):
    model = build(name, "bfloat16", "meta")
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e9, 3) == billions
    large = find_size(name.replace("0.5b", "7b"))
    assert (find_size(name).picture, find_size(name).budgets) == (large.picture, large.budgets)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_a_size_for_a_cpu_runs_and_can_be_pruned():
    """Its own configs with few and narrow layers: the decoder is of another kind than those of the 7B sizes."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    from tokenprune import apply

    config = dict(find_size("llava-1.5-0.5b").config)
    small = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 32, "image_size": 56}
    config["vision_config"] = config["vision_config"] | small
    config["text_config"] = config["text_config"] | {"num_hidden_layers": 2, "vocab_size": 128}
    settings = {name: value for name, value in config.items() if name != "model_type"}
    model = AutoModelForImageTextToText.from_config(AutoConfig.for_model("llava", **settings)).eval()
    sized = SizedModel("tiny-llava-1.5", model)
    with torch.no_grad(), apply(model, "vtc_cls", 4) as handle:
        assert model(**sized.inputs(), logits_to_keep=1).logits.isfinite().all()
        assert list(handle.visual_by_layer[0]) == [4, 4]


def test_the_peak_on_a_cpu_is_what_tensors_hold_at_one_time():
    linear, rows = torch.nn.Linear(256, 1024, bias=False), torch.zeros(64, 256)
    weights, out = 256 * 1024 * 4, 64 * 1024 * 4
    with torch.inference_mode():
        assert end_to_end.peak_mib(linear, lambda: linear(rows)) * 2**20 == weights + out
        # one after another: what was freed before does not count again; a tensor of before that is freed counts nothing
        held = [torch.zeros(1 << 22)]

        def two() -> None:
            held.clear()
            linear(rows)
            linear(rows)

        assert end_to_end.peak_mib(linear, two) * 2**20 == weights + out
        both = end_to_end.peak_mib(linear, lambda: (linear(rows), linear(rows)))
        assert both * 2**20 == weights + 2 * out
    tied = torch.nn.ModuleList([linear, torch.nn.Linear(256, 1024, bias=False)])
    tied[1].weight = linear.weight
    assert end_to_end.peak_mib(tied, lambda: None) * 2**20 == weights


@pytest.mark.parametrize(
    ("name", "more", "visual"),
    [
        ("tiny-llava-1.5", {"batch": 2}, 16),
        ("tiny-llava-next", {}, 16 + 8 * 9),
        ("tiny-qwen2.5-vl", {"batch": 2, "images": 2}, 2 * 36),
        ("tiny-qwen2.5-vl", {"images": 0, "frames": 8}, 4 * 36),
    ],
)
def test_prompts_have_the_places_that_the_model_fills(name, more, visual):
    """The stock forward refuses a prompt whose placeholders and features differ in number."""
    sized = SizedModel(name, build(name, "float32", "cpu"), **more)
    inputs = sized.inputs()
    config = sized.model.config
    ids = (config.image_token_id, getattr(config, "video_token_id", -1))
    assert sum(int((inputs["input_ids"][0] == token).sum()) for token in ids) == visual
    with torch.no_grad():
        assert sized.model(**inputs, logits_to_keep=1).logits.isfinite().all()


def test_an_unknown_size_is_named_before_anything_is_built():
    with pytest.raises(UnknownName, match="Did you mean 'llava-1.5-7b'"):
        find_size("llava-1.5-7")


def test_videos_are_for_sizes_that_take_them():
    with pytest.raises(ValueError, match="Qwen sizes only"):
        SizedModel("tiny-llava-1.5", build("tiny-llava-1.5", "float32", "cpu"), frames=4).inputs()


def test_the_ideal_of_a_batch_is_that_of_its_prompts():
    sized = SizedModel("tiny-llava-1.5", build("tiny-llava-1.5", "float32", "cpu"), batch=2)
    inputs = sized.inputs()
    stays = torch.rand(inputs["input_ids"].shape, generator=torch.Generator().manual_seed(0)).argsort(1) < 40
    with torch.inference_mode():
        whole = ideal_prefill(sized, inputs, stays)().logits
        for row in range(2):
            one = {name: value[row : row + 1] for name, value in inputs.items()}
            alone = ideal_prefill(sized, one, stays[row : row + 1])().logits
            assert (whole[row] - alone[0]).norm() / alone.norm() < 1e-5
    with pytest.raises(ValueError, match=r"equally many tokens, got \[40, 41\]"):
        more = stays.clone()
        more[1, (~stays[1]).nonzero()[0]] = True
        ideal_prefill(sized, inputs, more)


def _rows(path):
    with path.open(encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def test_end_to_end_writes_a_row_a_method_and_budget(tmp_path):
    out = tmp_path / "e2e.csv"
    end_to_end.main(
        ["--sizes", "tiny-llava-1.5", "--methods", "random", "oracle", "--batch", "2", "--rounds", "1", "--decode", "3",
         "--out", str(out)]
    )  # fmt: skip
    rows = _rows(out)
    assert [(row["method"], row["keep"]) for row in rows] == [
        ("none", ""), ("random", "8"), ("oracle", "8"), ("random", "4"), ("oracle", "4"),
    ]  # fmt: skip
    assert "boxes" in rows[2]["error"] and not rows[2]["pruned_ms"], "one that cannot run does not stop the others"
    assert float(rows[1]["kept_tokens"]) == 8 and float(rows[1]["visual_tokens"]) == 16
    # 62 words and markers, 16 or 8 or 4 visual tokens; keys and values of 16 layers of 2 heads of 16 in fp32, batch 2
    for row, tokens in ((rows[0], 78), (rows[1], 70), (rows[3], 66)):
        held = float(row["kv_mib"] or row["unpruned_kv_mib"])
        assert held == pytest.approx(2 * 2 * 16 * 2 * 16 * 4 * tokens / 2**20, rel=1e-4)
    assert all(float(rows[1][name]) > 0 for name in ("pruned_ms", "ideal_ms", "unpruned_ms", "decode_ms", "tower_ms"))
    # on a CPU too, and the same in every run: the weights, and what is held beside them
    weights = sum(p.numel() for p in build("tiny-llava-1.5", "float32", "cpu").parameters()) * 4 / 2**20
    for row in (rows[1], rows[3]):
        peak = [float(row[name]) for name in ("ideal_peak_mib", "peak_mib", "unpruned_peak_mib")]
        assert weights + float(row["kv_mib"]) < min(peak) and max(peak) < 2 * weights + 8
        assert row["unpruned_peak_mib"] == rows[0]["unpruned_peak_mib"]


def test_growth_goes_over_pictures_and_frames(tmp_path):
    out = tmp_path / "growth.csv"
    growth.main(
        ["--sizes", "tiny-llava-1.5", "tiny-qwen2.5-vl", "--methods", "uniform", "--images", "1", "2", "--frames", "2",
         "8", "--rounds", "1", "--decode", "2", "--keep", "0.25", "--out", str(out)]
    )  # fmt: skip
    found = [
        (row["images"], row["frames"], row["method"], row["visual_tokens"], row["kept_tokens"]) for row in _rows(out)
    ]
    assert found == [
        ("1", "0", "none", "16", ""), ("1", "0", "uniform", "16", "4"),
        ("2", "0", "none", "32", ""), ("2", "0", "uniform", "32", "8"),
        ("0", "2", "none", "16", ""), ("0", "2", "uniform", "16", "4"),
        ("0", "8", "none", "64", ""), ("0", "8", "uniform", "64", "16"),
    ]  # fmt: skip


@pytest.mark.pocket
def test_prefill_writes_what_the_timing_measured(tmp_path):
    out = tmp_path / "prefill.csv"
    prefill.main(
        ["--methods", "random", "--keep", "64", "0.5", "--repeats", "1", "--samples", "1", "--output", str(out)]
    )
    rows = _rows(out)
    assert [(row["method"], row["keep"]) for row in rows] == [("random", "64"), ("random", "0.5")]
    # keys and values in fp32 of every layer: 512 tokens fewer at 64, 288 at one half
    saved = [float(row["kv_bytes_unpruned"]) - float(row["kv_bytes"]) for row in rows]
    assert saved[0] / 512 == pytest.approx(saved[1] / 288, rel=1e-3)
    for row in rows:
        assert float(row["to_ideal"]) == pytest.approx(float(row["pruned_ms"]) / float(row["ideal_ms"]), rel=1e-3)


def test_kernels_are_held_against_the_floor(tmp_path):
    out = tmp_path / "kernels.csv"
    kernels.main(
        ["--tokens", "63", "--widths", "64", "--batch", "2", "--keep", "9", "--rounds", "1", "--out", str(out)]
    )
    rows = {row["op"]: row for row in _rows(out)}
    assert list(rows) == list(kernels.CALLS)
    assert all(float(row["reference_ms"]) > 0 for row in rows.values())
    # one product of all pairs; nine rows of 64 fp32, their places and flags, read and written, and the index read
    assert float(rows["greedy_diversity"]["gflops"]) == pytest.approx(2 * 2 * 63**2 * 64 / 1e9, rel=1e-3)
    moved = 2 * 9 * (2 * (64 * 4 + 8 + 1) + 8)
    assert float(rows["compact_rows"]["gbytes"]) == pytest.approx(moved / 1e9, rel=1e-3)


@pytest.mark.pocket
def test_decode_says_what_was_applied(capsys, tmp_path):
    asked = ["--methods", "var(channels=[47, 75, 250], tau=4.8)", "holov@64", "--steps", "2", "--prompts", "1"]
    decode.main([*asked, "--runs", "2", "--out", str(tmp_path / "decode.csv")])
    decode.main(["--models", "tiny-llava-1.5", "--methods", "uniform@4", "--steps", "2", "--prompts", "1"])
    rows = list(csv.DictReader((tmp_path / "decode.csv").open()))
    assert [row["kept_tokens"] for row in rows] == ["576", "576", "64", "64"]
    assert all(float(row["changed_ms"]) > 0 and row["commit"] for row in rows)
    said = capsys.readouterr().out
    assert "var" in said and "ratio" in said


def test_trials_at_apply_and_layers_passed_by_write_a_row_each(tmp_path):
    probes.main(["--layers", "2", "6", "--rounds", "1", "--out", str(tmp_path / "probes.csv")])
    bypass.main(["--methods", "naavit", "naavit(variant=mask)", "--rounds", "1", "--out", str(tmp_path / "bypass.csv")])
    with (tmp_path / "probes.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [row["layers"] for row in rows] == ["2"] * 9 + ["6"] * 9 + ["16"] * 5
    whole = {row["trial"]: row for row in rows[-5:]}
    assert [row["runs"] for row in whole.values()] == ["16", "2", "3", "16", "16"], "a sample, whatever the depth"
    assert all("worked out from 2 and 6" in row["how"] for row in whole.values())
    assert all(float(row["of_prefill"]) > 0 for row in rows if row["trial"] not in ("prefill", "one picture"))
    with (tmp_path / "bypass.csv").open() as stream:
        skip, mask = csv.DictReader(stream)
    assert float(skip["flops_share"]) < 1 == float(mask["flops_share"])
    assert skip["kv_mib"] == mask["kv_mib"]
