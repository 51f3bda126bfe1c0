"""What a run with vLLM in place of transformers is told before vLLM is imported."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from transformers import AutoConfig

from tokenprune.cli import main
from tokenprune.evals.config.engines import check_engine, engine_made_of
from tokenprune.evals.config.points import Point
from tokenprune.evals.config.run_config import RunConfig
from tokenprune.evals.errors import UserError
from tokenprune.evals.evaluation import vllm_engine
from tokenprune.evals.evaluation.vllm_engine import check_vllm, engine_setting, request_text
from tokenprune.evals.models.load import model_source
from tokenprune.evals.sweep.dry_run import make_plan
from tokenprune.evals.sweep.executors.local import Local
from tokenprune.evals.sweep.sweep import run


def point(method, keep=64, options=(), seed=None, model="pocket-llava"):
    return Point(model, "pocket", method, keep, tuple(options), seed=seed)


@pytest.mark.parametrize(
    "engine, options, device, says",
    [
        ("vlm", {}, None, "Did you mean 'vllm'"),
        ("transformers", {"max_model_len": 5}, None, "leave them out"),
        ("vllm", {}, "cuda:1", "CUDA_VISIBLE_DEVICES"),
        ("vllm", {"dtype": "float16"}, None, "says under 'dtype'"),
        ("vllm", {"mm_processor_kwargs": {}}, None, "says under 'methods'"),
        ("vllm", [3], None, "must be a mapping"),
    ],
)
def test_an_engine_or_an_option_that_cannot_be(engine, options, device, says):
    with pytest.raises(ValueError, match=says):
        check_engine(engine, options, device)


def test_a_request_says_the_point():
    assert request_text(point("none", None), 3) == "@1.0"
    assert request_text(point("divprune"), 3) == "divprune@64"
    assert request_text(point("random", 0.25), 0) == "random@0.25"
    assert request_text(point("random"), 3) == "random(seed=3)@64"
    assert request_text(point("random", seed=5), 3) == "random(seed=5)@64"
    assert request_text(point("random", options=[("seed", 0)]), 3) == "random(seed=0)@64"
    written = request_text(point("holov", options=[("variant", "official")]), 3)
    assert written == 'holov(variant="official")@64'
    config = AutoConfig.from_pretrained(model_source("pocket-llava"))
    both = [point("holov", options=[("variant", "official")]), point("uniform", 32), point("uniform", 0.5)]
    assert engine_setting(config, both, 0) == 'holov(variant="official")@64 | uniform@32'
    assert engine_setting(config, [point("none", None)], 0) is None


@pytest.mark.parametrize(
    "method, keep, options, says",
    [
        ("fastv", 64, [], "inside the decoder"),
        ("cdpruner", 64, [], "words of the prompt"),
        ("vtc_cls+var", 64, [], "several things at once"),
        ("divprune", "avg64", [], "mean over"),
        ("oracle", 64, [], "needs boxes"),
        ("prumerge", 64, [("count", "outliers")], "decides by picture"),
    ],
)
def test_a_method_that_cannot_be_served(method, keep, options, says):
    config = AutoConfig.from_pretrained(model_source("pocket-llava"))
    with pytest.raises(ValueError, match=says):
        engine_setting(config, [point(method, keep, options)], 0)


def test_a_model_that_is_not_covered():
    with pytest.raises(ValueError, match="does not cover Idefics3ForConditionalGeneration inside vLLM; it covers"):
        engine_setting(SimpleNamespace(architectures=["Idefics3ForConditionalGeneration"]), [point("uniform")], 0)


def test_vllm_or_the_plug_in_is_missing(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(vllm_engine, "vllm_release", lambda: None)
    with pytest.raises(ImportError, match="needs vLLM, which is not installed"):
        check_vllm()
    command = ["eval", "--method", "uniform", "--keep", "9", "--engine", "vllm", "--limit", "2"]
    assert main([*command, "--output", str(tmp_path / "run")]) == 2
    assert "needs vLLM, which is not installed" in capsys.readouterr().err
    from tokenprune.vllm import seams

    monkeypatch.setattr(vllm_engine, "vllm_release", lambda: "0.32.0")
    monkeypatch.setattr(seams, "check_release", lambda: "")
    monkeypatch.setattr(vllm_engine.metadata, "entry_points", lambda group: [])
    with pytest.raises(ImportError, match="imported and not installed"):
        check_vllm()
    monkeypatch.setattr(vllm_engine.metadata, "entry_points", lambda group: [SimpleNamespace(name="tokenprune")])
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    with pytest.raises(ImportError, match="keeps tokenprune out"):
        check_vllm()
    monkeypatch.delenv("VLLM_PLUGINS")
    check_vllm()


def test_a_plan_says_what_vllm_would_refuse(tmp_path):
    config = RunConfig(
        "x", "pocket-llava", ["pocket"], ["fastv", "uniform"], [64], references=False, output=str(tmp_path),
        engine="vllm",
    )  # fmt: skip
    (refused,) = make_plan(config).refused
    assert refused.point.method == "fastv" and "inside the decoder" in str(refused.refused)


def test_one_process_asks_vllm(tmp_path):
    config = RunConfig("x", "pocket-llava", ["pocket"], ["uniform"], [64], output=str(tmp_path), engine="vllm")
    with pytest.raises(UserError, match="start one process without a launcher or --executor"):
        run(config, executor=Local())


def test_answers_of_two_engines_are_filed_apart():
    assert engine_made_of("transformers", {}) == []
    assert engine_made_of("vllm", {"quantization": "fp8"}) != engine_made_of("vllm", {})
    assert RunConfig("x", "m", [], []).prompts_together == 8
    assert RunConfig("x", "m", [], [], engine="vllm").prompts_together == 256
    assert RunConfig("x", "m", [], [], engine="vllm", batch_size=5).prompts_together == 5
