"""One process, several launched ones, a Ray cluster: the same rows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from _paths import ROOT
from _runs import QUIET, answers_of, config, table_of

from tokenprune import user_files
from tokenprune.cli import main
from tokenprune.evals.config.measure import Overlays
from tokenprune.evals.errors import UserError
from tokenprune.evals.evaluation.batching import Share, batches
from tokenprune.evals.sweep.executors import ray as cluster
from tokenprune.evals.sweep.model_worker import Worked
from tokenprune.evals.sweep.sweep import run
from tokenprune.evals.tasks.load import load_task
from tokenprune.registry import METHODS
from tokenprune.user_files import VARIABLE

EVERY_THIRD = """
from dataclasses import dataclass
import torch
from tokenprune import Pruner, register_method

@register_method("every_third")
@dataclass
class EveryThird(Pruner):
    def score(self, view):
        return (torch.arange(view.features.shape[1]) % 3 == 0).float().expand(view.features.shape[:2])
"""

DIES_ONCE = """
import os, signal
from dataclasses import dataclass
from pathlib import Path
import torch
from tokenprune import Pruner, register_method

DRIVER, DIED = (Path(__file__).with_name(name) for name in ("driver", "died"))
asked = 0

@register_method("dies_once")
@dataclass
class DiesOnce(Pruner):
    def score(self, view):
        global asked
        asked += 1
        if asked == 20 and os.getpid() != int(DRIVER.read_text()) and not DIED.exists():
            DIED.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return (torch.arange(view.features.shape[1]) % 3 == 0).float().expand(view.features.shape[:2])
"""


def test_shares_are_the_batches_of_one(tiny_task):
    task = load_task(tiny_task)
    whole = [batch.ids for batch in batches(task, 30, 4, Share())]
    assert [len(ids) for ids in whole] == [4] * 7 + [2]
    for count in (2, 3, 11):
        shares = [[batch.ids for batch in batches(task, 30, 4, Share(rank, count))] for rank in range(count)]
        assert sorted((ids for share in shares for ids in share), key=min) == whole


LEAVING = """
import atexit, os

def leave():
    threads = [open(f"/proc/self/task/{thread}/comm").read().strip() for thread in os.listdir("/proc/self/task")]
    print("leaves with gloo:", [name for name in threads if "gloo" in name], flush=True)

atexit.register(leave)  # the last of those that are called
from tokenprune.cli import main
main()
"""


@pytest.mark.slow
def test_two_processes_answer_as_one(tmp_path, tiny_folder, tiny_task):
    sweep = tmp_path / "sweep.yaml"
    settings = {"model": tiny_folder, "tasks": [tiny_task], "methods": ["none", "vtc_cls"], "keep": [9], "limit": 10,
                "batch_size": 4, "overlays": {"samples": 0},
                "measure": {"samples": 1, "times": False, "flops": False}}  # fmt: skip
    sweep.write_text(json.dumps(settings))
    launch = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
              "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]  # fmt: skip
    script = tmp_path / "leaving.py"
    script.write_text(LEAVING)
    command = [sys.executable, "-m", *launch, str(script), "sweep", str(sweep), "--output"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([*command, str(tmp_path / "two")], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    assert done.stdout.count("Written:") == 1, "one process prints"
    assert done.stdout.count("leaves with gloo: []") == 2, "the group's threads are gone before the interpreter ends"
    run(config(tmp_path / "one", tiny_folder, tiny_task), QUIET)
    counts = [(tmp_path / "two" / name).read_text().count("\n") for name in ("samples.jsonl", "samples.rank1.jsonl")]
    assert counts == [18, 12]  # batches of 4, 4 and 2 samples at three points
    assert answers_of(tmp_path / "two") == answers_of(tmp_path / "one")
    assert table_of(tmp_path / "two") == table_of(tmp_path / "one")

    # another number of processes goes on with what two have left
    rank1 = tmp_path / "two" / "samples.rank1.jsonl"
    left = rank1.read_bytes().splitlines(keepends=True)
    rank1.write_bytes(b"".join(left[:7]) + left[7][:20])
    run(config(tmp_path / "two", tiny_folder, tiny_task), QUIET)
    assert rank1.read_bytes() == b"".join(left[:7]) + left[7][:20]
    rank1.write_bytes(b"".join(left[:7]))
    assert answers_of(tmp_path / "two") == answers_of(tmp_path / "one")


class InTurn:
    """The tasks of the Ray executor in this process, one after the other: what they do, without the cluster."""

    first, writer = True, ""

    def work(self, config, points, tasks, console):
        here, worked = (str(Path.cwd()), ""), Worked()
        for point in points:
            worked.answered.update(cluster._answer(config, point, here))
        worked.take(cluster._measure(config, config.models[0], points, worked.answered, here))
        return worked


def test_tasks_of_single_points_answer_as_one_process(tmp_path, tiny_folder, tiny_task, monkeypatch):
    monkeypatch.chdir(Path.cwd())  # a task goes to the driver's folder and stays there
    changes = {"limit": 6, "overlays": Overlays(samples=1)}
    done = run(config(tmp_path / "tasks", tiny_folder, tiny_task, **changes), QUIET, InTurn())
    run(config(tmp_path / "one", tiny_folder, tiny_task, **changes), QUIET)
    assert answers_of(tmp_path / "tasks") == answers_of(tmp_path / "one")
    assert table_of(tmp_path / "tasks") == table_of(tmp_path / "one")
    assert len(list((tmp_path / "tasks").glob("samples.ray-*.jsonl"))) == 3 == len(done.records)
    assert not (tmp_path / "tasks" / "samples.jsonl").exists(), "the driver asks nothing itself"
    with pytest.raises(UserError, match="does not see .*elsewhere"):
        cluster._answer(
            config(tmp_path / "elsewhere", tiny_folder, tiny_task), done.config.points()[0], (str(tmp_path), "")
        )
    assert VARIABLE not in os.environ, "a run that imported nothing names nothing"


@pytest.fixture
def two_cores():
    """Two cores of this machine."""
    for name, value in cluster.SETTINGS.items():
        os.environ.setdefault(name, value)
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=2, num_gpus=0, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


@pytest.mark.slow
def test_ray_retries_the_point_of_a_dead_worker(tmp_path, tiny_folder, tiny_task, two_cores):
    own, died = tmp_path / "dies_once.py", tmp_path / "died"
    own.write_text(DIES_ONCE)
    (tmp_path / "driver").write_text(str(os.getpid()))
    sweep = tmp_path / "sweep.yaml"
    settings = {"model": tiny_folder, "tasks": [tiny_task], "methods": ["none", "dies_once"], "keep": [9], "limit": 60,
                "batch_size": 1, "references": False, "measure": {"times": False}}  # fmt: skip
    sweep.write_text(json.dumps(settings))
    try:
        for executor in ("ray", "local"):
            more = ["--executor", executor, "--output", str(tmp_path / executor)]
            assert main(["sweep", str(sweep), *more, "--import", str(own)]) == 0
            assert died.exists(), "a worker was to die in the middle of a point"
    finally:
        METHODS.unregister("dies_once")
        user_files._imported.pop(own.resolve(), None)
    assert answers_of(tmp_path / "ray") == answers_of(tmp_path / "local")
    assert table_of(tmp_path / "ray") == table_of(tmp_path / "local")
    rows = [file.read_text().count("\n") for file in (tmp_path / "ray").glob("samples.ray-*.jsonl")]
    assert rows == [60, 60], "the second start went on with what the dead worker had answered"
    assert not (tmp_path / "ray" / "samples.jsonl").exists(), "the driver asks nothing itself"


@pytest.mark.slow
def test_workers_of_a_cluster_know_methods_of_ones_own(tmp_path, tiny_folder, tiny_task, two_cores):
    """The cluster runs before the command does, so its workers have nothing of the command's environment."""
    own = tmp_path / "every_third.py"
    own.write_text(EVERY_THIRD)
    sweep = tmp_path / "sweep.yaml"
    settings = {"model": tiny_folder, "tasks": [tiny_task], "methods": ["every_third"], "keep": [9], "limit": 4,
                "references": False, "overlays": {"samples": 4}, "measure": {"times": False}}  # fmt: skip
    sweep.write_text(json.dumps(settings))
    try:
        for executor in ("ray", "local"):
            more = ["--executor", executor, "--output", str(tmp_path / executor)]
            assert main(["sweep", str(sweep), *more, "--import", str(own)]) == 0
        assert answers_of(tmp_path / "ray") == answers_of(tmp_path / "local")
        rows = [json.loads(line) for line in next((tmp_path / "ray").glob("samples.ray-*.jsonl")).open()]
        assert len(rows) == 4 and {tuple(row["kept"][0]) for row in rows} == {tuple(range(0, 27, 3))}
    finally:
        METHODS.unregister("every_third")
        user_files._imported.pop(own.resolve(), None)


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--gpus-per-point", "-1"], "got 1 CPUs and -1 GPUs"),
        (["--cpus-per-point", "0"], "got 0 CPUs"),
    ],
)
def test_shares_that_cannot_be_are_refused(argv, says, tmp_path, capsys):
    pytest.importorskip("ray")
    command = ["sweep", "demo", "--executor", "ray", "--output", str(tmp_path / "out")]
    assert main([*command, *argv]) == 2
    assert says in capsys.readouterr().err
