"""Grids of runs: nothing is trained twice, and a study that was ended goes on."""

import json
import os
import signal
import subprocess
import sys
import time
import types
from concurrent.futures import Future
from dataclasses import replace

import pytest

from torch_feather.errors import ConfigurationError
from torch_feather.studies.grid import Run, train_all
from torch_feather.studies.study import Choices, grid
from torch_feather.training.config import apply, resolve_config

SMALL = {
    "epochs": 1,
    "batch_size": 256,
    "compare_dense": False,
    "system.threads": 1,
    "system.tensorboard": False,
}


def small(**changes):
    return apply(resolve_config("digits"), SMALL | changes, "test")


def test_a_grid_trains_what_is_missing_and_nothing_twice(tmp_path):
    runs = grid(small(), {"feather": {"method": "feather"}}, Choices([0.5, 0.9], [0]))
    a, b = (run.name for run in runs)
    first = train_all(runs[:1], tmp_path)
    model = tmp_path / a / "model.safetensors"
    written = model.stat().st_mtime_ns
    both = train_all(runs, tmp_path)
    assert model.stat().st_mtime_ns == written
    assert both.rows[a] == first.rows[a]
    assert list(both.rows) == [a, b]
    assert both.rows[b]["zeros"] == round(0.9 * 306720)

    # The same runs with their masks: there are none, and they are not trained again.
    with_masks = [replace(run, config=replace(run.config, track_masks=True)) for run in runs]
    outcome = train_all(with_masks, tmp_path)
    assert model.stat().st_mtime_ns == written
    assert not outcome.rows
    assert "was trained without --track-masks" in outcome.failed[a]


def test_a_run_that_fails_stops_no_other_and_says_why(tmp_path):
    diverging = small(**{"optimizer.lr": 1e20, "optimizer.clip": None})
    outcome = train_all([Run("bad", diverging, "b"), Run("good", small(), "g")], tmp_path)
    assert list(outcome.rows) == ["good"]
    assert "are NaN" in outcome.failed["bad"]


def test_after_its_time_a_grid_starts_nothing_but_knows_what_is_done(tmp_path):
    a, b = Run("a", small(), "a"), Run("b", small(), "b")
    train_all([a], tmp_path)
    outcome = train_all([a, b], tmp_path, minutes=0)
    assert list(outcome.rows) == ["a"]
    assert outcome.waiting == ["b"]
    assert not (tmp_path / "b").exists()


class FakeRay(types.ModuleType):
    """Runs tasks at once, and remembers what they asked for."""

    def __init__(self, resources):
        super().__init__("ray")
        self.resources, self.asked, self.addresses, self.up = resources, [], [], False

    def init(self, address, **options):
        if address == "nobody":
            raise ConnectionError("no answer")
        self.addresses.append(address)
        self.up = True

    def cluster_resources(self):
        return self.resources

    def remote(self, **asked):
        self.asked.append(asked)

        def task(function):
            def run(*arguments):
                future = Future()
                future.set_result(function(*arguments))
                return types.SimpleNamespace(future=lambda: future)

            return types.SimpleNamespace(remote=run)

        return task

    def shutdown(self):
        self.up = False


@pytest.mark.parametrize(
    ("resources", "share"),
    [({"CPU": 4.0}, 0), ({"CPU": 4.0, "GPU": 2.0}, 0.5)],
    ids=["cpus", "gpus"],
)
def test_with_ray_a_training_asks_for_its_threads_and_its_share_of_a_gpu(
    tmp_path, monkeypatch, resources, share
):
    ray = FakeRay(resources)
    monkeypatch.setitem(sys.modules, "ray", ray)
    run = Run("a", small(**{"system.threads": 2}), "a")
    outcome = train_all([run], tmp_path, ray="local", jobs=2, minutes=0)
    assert outcome.waiting == ["a"]
    assert ray.asked == [{"num_cpus": 2, "num_gpus": share}]
    assert ray.addresses == ["local"]
    assert not ray.up


def test_where_ray_is_missing_or_silent_it_is_said(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigurationError, match=r"torch-feather\[ray\]"):
        train_all([], tmp_path, ray="local")
    monkeypatch.setitem(sys.modules, "ray", FakeRay({}))
    with pytest.raises(ConfigurationError, match="--ray nobody: no cluster"):
        train_all([], tmp_path, ray="nobody")


STUDY = [
    *("study", "compare", "--methods", "dense,feather", "--sparsity", "0.9", "--seeds", "0"),
    *(word for key, value in SMALL.items() for word in ("--set", f"{key}={value}")),
    *("--set", "system.checkpoint_steps=5", "--set", "epochs=20"),
]


@pytest.mark.parametrize(
    "how",
    [
        pytest.param(signal.SIGINT, id="ctrl-c"),
        pytest.param(signal.SIGKILL, id="killed", marks=pytest.mark.slow),
    ],
)
def test_a_study_that_was_ended_goes_on(tmp_path, how):
    command = [sys.executable, "-m", "torch_feather.cli", *STUDY, "--out", str(tmp_path)]
    process = subprocess.Popen(
        command, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    begun = tmp_path / "runs" / "dense-epochs20-batch_size256-0" / "checkpoints" / "last.pt"
    limit = time.monotonic() + 120
    while not begun.exists() and process.poll() is None and time.monotonic() < limit:
        time.sleep(0.05)
    os.killpg(process.pid, how)
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "Traceback" not in errors
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "runs.json").read_text())
    assert [r["method"] for r in rows] == ["dense", "feather"]
    assert [r["curve"]["epoch"][-1] for r in rows] == [20, 20]
    assert (tmp_path / "accuracy.svg").stat().st_size > 1000
    assert "| feather | 90 % |" in (tmp_path / "table.md").read_text()
