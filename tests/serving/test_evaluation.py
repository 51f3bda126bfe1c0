"""`tokenprune eval --engine vllm` gives the rows that transformers gives, on both pocket models."""

from __future__ import annotations

import json

import pytest
from _vllm import MODELS, needs_vllm

needs_vllm()

from tokenprune.cli import main  # noqa: E402
from tokenprune.evals.config.run_config import RunConfig  # noqa: E402
from tokenprune.evals.errors import UserError  # noqa: E402
from tokenprune.evals.sweep.sweep import run  # noqa: E402

SAME = ("point", "sample_id", "family", "question", "answer", "prediction", "correct", "visual_tokens", "kept_tokens")
SMALL = {"enforce_eager": True, "max_model_len": 2048, "max_num_seqs": 16, "distributed_executor_backend": "uni"}
METHODS = ["none", "uniform", "divprune", "vtc_cls"]


def by_key(folder):
    lines = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    return {(row["point"], row["sample_id"]): {name: row.get(name) for name in SAME} for row in lines}


@pytest.mark.parametrize("model, keep", [("llava", [64, 0.1]), ("qwen", [0.25])])
def test_rows_are_those_of_transformers(tmp_path, model, keep):
    name, suite = MODELS[model]
    common = {"references": False, "measure": {"samples": 1, "repeats": 1}, "overlays": {"samples": 1}}
    file = {"model": name, "tasks": [suite], "methods": METHODS, "keep": keep, "limit": 14, **common}
    found = {}
    for engine in ("transformers", "vllm"):
        more = {"engine": engine, "engine_options": SMALL} if engine == "vllm" else {}
        written = tmp_path / f"{engine}.yaml"
        written.write_text(json.dumps({**file, **more, "output": str(tmp_path / engine)}))
        assert main(["sweep", str(written)]) == 0
        found[engine] = by_key(tmp_path / engine)
    assert len(found["vllm"]) == 14 * (1 + (len(METHODS) - 1) * len(keep))
    assert found["vllm"] == found["transformers"]
    records = [json.loads(line) for line in (tmp_path / "vllm" / "results.jsonl").read_text().splitlines()]
    for record in records:
        assert record["flops"]["analytic"]["prefill"] > 0 and "times" not in record and "kv" not in record
        assert (record["flops"]["analytic"]["total"] is None) == (record["method"] != "none")
        assert any("vLLM answered" in note for note in record["provenance"]["notes"])


def test_a_sample_that_fails_fails_alone_and_a_run_goes_on_where_it_was(tmp_path):
    config = {
        "name": "short", "model": "pocket-llava", "tasks": ["pocket"], "methods": ["uniform"], "keep": [64],
        "limit": 3, "references": False, "output": str(tmp_path / "run"), "engine": "vllm",
    }  # fmt: skip
    # no prompt of this suite fits but those whose pictures are cut
    done = run(RunConfig(**config, engine_options={**SMALL, "max_model_len": 160}))
    assert [record["failed"] for record in done.records] == [0]
    before = (tmp_path / "run" / "samples.jsonl").read_bytes()
    run(RunConfig(**config, engine_options={**SMALL, "max_model_len": 160}))
    assert (tmp_path / "run" / "samples.jsonl").read_bytes() == before


def test_what_vllm_refuses_is_a_sentence(tmp_path):
    config = RunConfig(
        "wrong", "pocket-llava", ["pocket"], ["uniform"], [64], output=str(tmp_path), engine="vllm",
        engine_options={"max_model_length": 5},
    )  # fmt: skip
    with pytest.raises(UserError, match="vLLM did not start with .*max_model_length"):
        run(config)


def test_the_bench_times_unpruned_and_pruned_in_turns(tmp_path):
    import csv

    from tokenprune.evals.bench import serving

    out = tmp_path / "serving.csv"
    given = [
        "--methods",
        "divprune",
        "--keep",
        "64",
        "--prompts",
        "3",
        "--rounds",
        "1",
        "--answer-tokens",
        "2",
        "--processor-time",
    ]
    options = [f"--engine-set={name}={str(value).lower()}" for name, value in SMALL.items()]
    assert serving.main([*given, *options, "--out", str(out)]) == 0
    plain, cut = csv.DictReader(out.open())
    assert (plain["method"], plain["kept_tokens"], float(plain["to_unpruned"])) == ("none", "576", 1.0)
    assert (cut["keep"], cut["kept_tokens"], cut["visual_tokens"]) == ("64", "64", "576")
    assert cut["clock"] == "processor" and float(cut["prompts_per_second"]) > 0 and float(cut["first_token_ms"]) > 0
