"""Recommendations: on tables of answers whose right setting is known, and end to end on a tiny model."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
import yaml

pytest.importorskip("optuna")

from _answer_tables import LADDER, Table, asked_for, drawn

import tokenprune
from tokenprune.cli import main
from tokenprune.evals.config.points import Point
from tokenprune.evals.errors import UserError
from tokenprune.evals.tuning.recommend import halving
from tokenprune.evals.tuning.recommend.evaluator import default_budgets, split
from tokenprune.evals.tuning.recommend.output import sentences, write
from tokenprune.evals.tuning.recommend.search import recommend
from tokenprune.evals.tuning.recommend.settings import RecommendConfig


def test_the_cheapest_setting_that_holds_is_found(tmp_path):
    found = recommend(asked_for(tmp_path, 0.03), bench=drawn(0, 1200, LADDER), keep_study=False)
    assert found.chosen is not None and found.chosen.setting.label == "holov@96"
    assert found.chosen.held_out is not None and found.chosen.held_out.bound <= 0.03
    costs = [one.cost for one in found.tested]
    assert costs == sorted(costs, reverse=True), "from the safest to the cheapest"
    kept = {row["setting"]: row["samples"] for row in found.history}
    assert kept["random@32"] < kept["holov@96"] == 600, "what is surely bad answers few samples"


def test_the_held_out_half_is_untouched_by_the_search(tmp_path):
    table = drawn(1, 800, LADDER)
    search, held_out = split(table.pictures, 0)
    found = recommend(asked_for(tmp_path, 0.03), bench=table, keep_study=False)
    finalists = {f"('{one.setting.method}', {one.setting.keep})" for one in found.tested} | {"('none', 0)"}
    answered = {key for key, sample in table.asked if sample in set(held_out)}
    assert finalists <= answered and len(answered) <= 4
    assert set(search).isdisjoint(held_out) and sorted([*search, *held_out]) == list(range(800))


def test_trials_draw_that_many_settings_and_the_seed_decides_which(tmp_path):
    tried = []
    for seed in (0, 0, 1):
        config = asked_for(tmp_path, 0.03, trials=3, seed=seed)
        found = recommend(config, bench=drawn(0, 800, LADDER), keep_study=False)
        tried.append({row["setting"] for row in found.history})
    assert all(len(own) == 3 for own in tried)
    assert tried[0] == tried[1] and tried[2] != tried[0]


def test_out_of_time_it_decides_on_what_the_first_round_asked(tmp_path):
    """Whatever it then recommends still has to hold on the whole held-out half."""
    table = drawn(0, 1200, LADDER)
    search, held_out = split(table.pictures, 0)
    found = recommend(asked_for(tmp_path, 0.03, minutes=1e-9), bench=table, keep_study=False)
    asked = {sample for _, sample in table.asked}
    first = {row["samples"] for row in found.history}
    assert len(first) == 1 and max(first) < len(search)
    assert len(asked & set(search)) == max(first)
    if found.chosen is not None:
        assert found.chosen.held_out is not None and found.chosen.held_out.bound <= 0.03
        assert set(held_out) <= asked


def test_questions_on_one_picture_stay_in_one_half():
    pictures = [str(number // 3) for number in range(300)]
    for seed in range(5):
        search, held_out = split(pictures, seed)
        assert not {pictures[i] for i in search} & {pictures[i] for i in held_out}
        assert abs(len(search) - 150) <= 2
    assert split(pictures, 0) != split(pictures, 1)


def test_where_nothing_holds_it_names_the_closest_and_writes_no_yaml(tmp_path):
    config = asked_for(tmp_path, 0.03)
    bad = {("holov", 96): (0.5, 0.05, 0.0), ("holov", 64): (0.4, 0.2, 0.0), ("random", 64): (0.39, 0.6, 0.0)}
    config.results.mkdir(parents=True)
    (config.results / "recommended.yaml").write_text("method: stale\n")
    found = recommend(config, bench=drawn(2, 1000, bad))
    assert found.chosen is None and found.closest.setting.label == "holov@96"
    assert found.needed is None, "a drop of 5 points is not within 3 with any number of samples"
    write(config, found)
    assert not (config.results / "recommended.yaml").exists()
    said = " ".join(sentences(config, found))
    assert "No setting is shown" in said and "holov@96" in said and "no number of samples" in said


def test_too_few_samples_are_counted_and_more_of_them_suffice(tmp_path):
    # a true drop of half a point: too close to one point for 800 samples
    near = {("holov", 96): (0.5, 0.025, 0.02)}
    found = recommend(asked_for(tmp_path, 0.015), bench=drawn(6, 800, near), keep_study=False)
    assert found.chosen is None and found.needed is not None and found.needed > 800
    held = sum(
        recommend(asked_for(tmp_path, 0.015), bench=drawn(seed, 8000, near), keep_study=False).chosen is not None
        for seed in range(4)
    )
    assert held >= 3


def test_a_recommendation_is_wrong_at_most_once_in_twenty(tmp_path):
    """Every setting's true drop is the bound itself, so each recommendation is wrong; many settings invite picking."""
    runs, within = 100, 0.04
    edge = {(method, keep): (0.2 + keep / 1000 + 0.01 * i, 0.06, 0.02)
            for i, method in enumerate(("holov", "random", "fastv")) for keep in (192, 96, 64)}  # fmt: skip
    wrong = picked = 0
    for seed in range(runs):
        found = recommend(asked_for(tmp_path, within, seed=seed), bench=drawn(seed, 400, edge), keep_study=False)
        wrong += found.chosen is not None
        picked += min(one.search.bound for one in found.tested) <= within
    # 0.999 quantile of Binomial(100, 0.05)
    assert wrong <= 13
    assert picked > 13, "without the held-out half the best of many would have been recommended far too often"


def test_a_killed_search_gives_the_same_answer(tmp_path):
    whole = drawn(4, 600, LADDER)
    expected = recommend(asked_for(tmp_path / "whole", 0.03), bench=whole)
    for share in (0.1, 0.6, 0.95):  # in the first rung, in a later one, on the held-out half
        config = asked_for(tmp_path / str(share), 0.03)
        table = drawn(4, 600, LADDER)
        table.die_after = int(share * len(whole.asked))
        with pytest.raises(SystemExit):
            recommend(config, bench=table)
        table.die_after = None
        found = recommend(config, bench=table)
        assert found.tested == expected.tested and found.chosen == expected.chosen
        assert found.history == expected.history
        assert table.asked == whole.asked, "no sample is asked that an undisturbed run does not ask"


def test_a_search_killed_between_two_decisions_gives_the_same_answer(tmp_path, monkeypatch):
    expected = recommend(asked_for(tmp_path / "whole", 0.03), bench=drawn(4, 600, LADDER))
    tell = halving.optuna.Study.tell
    for after in (1, 6):
        config, calls = asked_for(tmp_path / str(after), 0.03), []

        def dies(self, *args, calls=calls, after=after, **kwargs):
            calls.append(args)
            if len(calls) == after:
                raise SystemExit("killed")
            return tell(self, *args, **kwargs)

        monkeypatch.setattr(halving.optuna.Study, "tell", dies)
        with pytest.raises(SystemExit):
            recommend(config, bench=drawn(4, 600, LADDER))
        monkeypatch.setattr(halving.optuna.Study, "tell", tell)
        found = recommend(config, bench=drawn(4, 600, LADDER))
        assert found.tested == expected.tested and found.history == expected.history


def test_a_study_of_something_else_is_refused(tmp_path):
    config = asked_for(tmp_path, 0.03)
    recommend(config, bench=drawn(5, 400, LADDER))
    other = drawn(5, 400, LADDER)
    other.made_of = {"table": "another"}
    with pytest.raises(UserError, match="made with another table .'toy', now 'another'.; give another"):
        recommend(config, bench=other)


def test_pareto_layers_keep_the_cheap_and_the_safe():
    costs, drops = [0.2, 0.3, 0.4, 0.5, 0.6, 0.7], [0.3, 0.02, 0.02, 0.0, 0.01, -0.01]
    assert halving.pareto(list(zip(costs, drops))) == [0, 1, 3, 5]
    assert halving.survivors(costs, drops, [True, *[False] * 5], 1) == {1, 3, 5}
    assert halving.survivors(costs, drops, [False] * 6, 6) == set(range(6))
    assert halving.survivors(costs, drops, [True] * 6, 3) == {5}
    assert halving.rungs(300) == [18, 37, 75, 150, 300] and halving.rungs(9) == [9]


def test_budgets_suit_the_model():
    assert default_budgets(576) == [288, 192, 128, 96, 64, 32]
    assert default_budgets(36) == [18, 12, 8, 6, 4, 2]
    assert default_budgets(None) == [0.5, 0.333, 0.222, 0.167, 0.111, 0.056]


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--max-drop", "1"], "--max-drop is a fraction in [0, 1), 0.01 for one point of accuracy; got 1.0"),
        (["--max-drop", "0.05", "--methods", "holv"], "Did you mean 'holov'"),
        (["--max-drop", "0.05", "--methods", "holov,holov"], "none twice"),
        (["--max-drop", "0.05", "--cost", "flop"], "Did you mean 'flops'"),
        (["--max-drop", "0.05", "--budgets", "0"], "at least 1 token"),
        (["--max-drop", "0.05", "--budgets", "avg64"], "--budgets takes tokens per image"),
        (["--max-drop", "0.05", "--trials", "0"], "--trials must be above 0, got 0"),
        (["--max-drop", "0.05", "--data", "poket"], "Did you mean 'pocket'"),
        (["--max-drop", "0.05", "--model", "pocket-lava"], "Did you mean 'pocket-llava'"),
        (["--max-drop", "0.01"], "60 samples can at best show a drop within 9.56%"),
        (["--max-drop", "0"], "no number of samples shows a drop of exactly 0"),
        (["--max-drop", "0.2", "--methods", "oracle"], "oracle needs boxes, which nobody knows in use"),
    ],
)
def test_refuses_with_a_sentence(argv, says, capsys, tiny_folder, tiny_task, tmp_path):
    argv = ["recommend", *argv, "--output", str(tmp_path / "none")]
    argv += [] if "--model" in argv else ["--model", tiny_folder]
    argv += [] if "--data" in argv else ["--data", tiny_task]
    assert main(argv) == 2
    captured = capsys.readouterr()
    last = captured.err.splitlines()[-1]  # datasets may draw a bar before
    assert last.startswith("tokenprune: ") and says in last and "Traceback" not in captured.err
    assert not (tmp_path / "none" / "flops-drop0.05").exists()


def test_from_the_command_line(tiny_folder, tiny_task, tmp_path, capsys, tiny, monkeypatch):
    """Whatever a tiny random model says counts as right, pruned or not, so the cheapest setting holds."""
    monkeypatch.setattr("tokenprune.evals.evaluation.evaluate.scored", lambda *given: {"correct": 1.0})
    out = tmp_path / "out"
    argv = ["recommend", "--model", tiny_folder, "--data", tiny_task, "--max-drop", "0.2", "--output", str(out)]
    argv += ["--methods", "uniform,fastv,downsample", "--budgets", "18,4"]
    assert main(argv) == 0
    printed = " ".join(capsys.readouterr().out.split())
    file = out / "flops-drop0.2" / "recommended.yaml"
    assert "is the cheapest that holds" in printed and str(file) in printed.replace(" ", "")
    text = file.read_text()
    assert text.startswith("# tokenprune recommend --model") and "one-sided, at 95 percent" in text
    with tokenprune.applied(tiny.model, file) as handle:
        assert handle.label == f"{yaml.safe_load(text)['method']}@{yaml.safe_load(text)['keep']}"
    with (file.parent / "search.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    cheapest = min(rows, key=lambda row: float(row["cost"]))["setting"]
    assert handle.label == cheapest and len(rows) == 6
    # again, and from the study: nothing is asked twice, and the answer is the same
    before = (out / "samples.jsonl").read_bytes()
    assert main(argv) == 0 and (out / "samples.jsonl").read_bytes() == before
    assert file.read_text() == text
    # another bound uses the same answers
    argv[argv.index("0.2")] = "0.15"
    assert main(argv) == 0 and (out / "samples.jsonl").read_bytes() == before
    argv = ["eval", "--model", tiny_folder, "--tasks", tiny_task, "--method", str(file), "--limit", "4", "--no-timing"]
    assert main([*argv, "--no-references", "--output", str(tmp_path / "eval")]) == 0


def test_nothing_found_exits_with_one(tiny_folder, tiny_task, tmp_path, capsys, monkeypatch):
    from tokenprune.evals.tuning.recommend import evaluator as bench

    def scores(self, settings, samples, on_answers):
        return [[float(setting is None)] * len(samples) for setting in settings]

    monkeypatch.setattr(bench.ModelBench, "scores", scores)
    argv = ["recommend", "--model", tiny_folder, "--data", tiny_task, "--max-drop", "0.2"]
    argv += ["--methods", "uniform", "--budgets", "18,4", "--cost", "kv", "--output", str(tmp_path / "out")]
    assert main(argv) == 1
    printed = " ".join(capsys.readouterr().out.split())
    assert "No setting is shown to drop accuracy by at most 20.00%" in printed and "kv" in printed
    result = json.loads((tmp_path / "out" / "kv-drop0.2" / "result.json").read_text())
    assert result["chosen"] is None and not (tmp_path / "out" / "kv-drop0.2" / "recommended.yaml").exists()


def test_a_latency_is_kept_for_its_machine_only(tiny_folder, tiny_task, tmp_path, monkeypatch):
    from rich.console import Console

    from tokenprune.evals.tuning.recommend.evaluator import ModelBench

    measured: list[str] = []
    for cost, machines in (("latency", 2), ("kv", 1)):
        settings = RecommendConfig(tiny_folder, tiny_task, 0.2, cost=cost, output=str(tmp_path), limit=2)
        bench = ModelBench(settings, Console(quiet=True))
        bench.open()
        monkeypatch.setattr(bench, "_measure", lambda setting: measured.append(setting.label) or 0.5)
        made_of = []
        for threads in (1, 1, 512):
            monkeypatch.setattr("torch.get_num_threads", lambda threads=threads: threads)
            bench.cost(Point(tiny_folder, tiny_task, "uniform", 9))
            made_of.append(bench.made_of)
        assert len(measured) == machines and made_of[0] == made_of[1]
        assert (made_of[1] == made_of[2]) == (machines == 1)
        measured.clear()


@pytest.mark.parametrize("right", [0, 6])
def test_a_model_that_has_nothing_to_lose_gets_no_recommendation(tmp_path, right):
    unpruned = np.zeros(400)
    unpruned[:right] = 1
    table = Table(unpruned, {("holov", 288): (0.9, unpruned.copy()), ("random", 1): (0.2, np.zeros(400))})
    with pytest.raises(UserError, match="a setting that answers nothing right would be within it"):
        recommend(asked_for(tmp_path, 0.03), bench=table, keep_study=False)


@pytest.mark.parametrize("cost", ["flops", "kv", "latency"])
def test_costs_are_of_prompts_with_a_picture(cost, tiny_folder, tiny, tmp_path):
    from PIL import Image
    from rich.console import Console

    from tokenprune.evals.tuning.recommend.evaluator import ModelBench

    Image.new("RGB", (42, 42)).save(tmp_path / "a.png")
    rows = [{"image": None if i < 2 else "a.png", "question": "what is this", "answer": "x"} for i in range(4)]
    data = tmp_path / "own.yaml"
    data.write_text("data: rows.jsonl\n")
    settings = RecommendConfig(tiny_folder, str(data), 0.5, cost=cost, output=str(tmp_path / "out"))
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    bench = ModelBench(settings, Console(quiet=True))
    bench.open()
    found, _ = bench.cost(Point(tiny_folder, str(data), "random", 1))
    assert found < 1 or cost == "latency"
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({**row, "question": "?"}) + "\n" for row in rows[:2]))
    bench = ModelBench(settings, Console(quiet=True))
    bench.open()
    with pytest.raises(UserError, match="None of the samples .* has a picture"):
        bench.cost(Point(tiny_folder, str(data), "random", 1))
