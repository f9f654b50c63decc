"""Training of a study's runs: finished runs are not repeated, interrupted ones resume."""

import functools
import json
import os
import signal
import subprocess
import sys
import threading
import time
import types
from concurrent.futures import Future
from dataclasses import replace

import pytest

from torch_feather.errors import ConfigurationError
from torch_feather.studies import runner
from torch_feather.studies.planning import grid
from torch_feather.studies.runner import _processes, _result, train_all
from torch_feather.studies.runs import Run, read_rows, row_matches
from torch_feather.studies.study import GridAxes
from torch_feather.training.checkpoint import RunDirectory
from torch_feather.training.config import apply, flatten, resolve_config, to_dict
from torch_feather.training.errors import RunError

SMALL = {
    "epochs": 1,
    "batch_size": 256,
    "compare_dense": False,
    "system.threads": 1,
    "system.tensorboard": False,
}


def small(**changes):
    return apply(resolve_config("digits"), SMALL | changes, "test")


class FakeRay(types.ModuleType):
    """Runs tasks immediately and records the resources that they request."""

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


@pytest.fixture
def train_here(monkeypatch):
    """`train_all` in this process."""
    monkeypatch.setitem(sys.modules, "ray", FakeRay({}))
    return functools.partial(train_all, ray="local")


def test_missing_runs_are_trained_and_finished_ones_are_not(tmp_path, train_here):
    runs = grid(small(), {"feather": {"method": "feather"}}, GridAxes([0.5, 0.9], [0]))
    a, b = (run.name for run in runs)
    first = train_here(runs[:1], tmp_path)
    model = tmp_path / a / "model.safetensors"
    written = model.stat().st_mtime_ns
    both = train_here(runs, tmp_path)
    assert model.stat().st_mtime_ns == written
    assert both.rows[a] == first.rows[a]
    assert list(both.rows) == [a, b]
    assert both.rows[b]["zeros"] == round(0.9 * 306720)

    # The same runs with their masks: there are none, and they are not trained again.
    with_masks = [replace(run, config=replace(run.config, track_masks=True)) for run in runs]
    outcome = train_here(with_masks, tmp_path)
    assert model.stat().st_mtime_ns == written
    assert not outcome.rows
    assert "was trained without --track-masks" in outcome.failed[a]


def test_a_run_in_the_rows_of_an_earlier_study_is_not_trained(tmp_path, train_here):
    [run] = grid(small(), {"feather": {"method": "feather"}}, GridAxes([0.5], [0]))
    known = list(train_here([run], tmp_path / "earlier").rows.values())
    known = json.loads(json.dumps(known))  # as read from its runs.json
    again = replace(run, label="another label")
    outcome = train_here([again], tmp_path / "here", known=known)
    assert outcome.rows == {run.name: known[0] | {"label": "another label"}}
    assert not (tmp_path / "here").exists()

    masks = replace(run, config=replace(run.config, track_masks=True))
    other = [
        known[0] | {"config": known[0]["config"] | {key: value}}
        for key, value in {"options.p": 2.0, "epochs": 3, "optimizer.lr": 0.2, "gone": 1}.items()
    ]
    for asked, rows in ((masks, known), (run, other), (run, [known[0] | {"amp": True}])):
        outcome = train_here([asked], tmp_path / "here", known=rows, minutes=0)
        assert outcome.pending == [run.name]
    assert train_here([run], tmp_path / "here", known=[*other, *known], minutes=0).rows


def test_rows_of_version_0_1_are_read(tmp_path, row):
    old = row("asl", learned_sparsity=0.89) | {"config": {"method": "asl"}}
    old["own_sparsity"] = old.pop("learned_sparsity")
    (tmp_path / "runs.json").write_text(json.dumps([old]))
    (read,) = read_rows(tmp_path / "runs.json")
    assert read["learned_sparsity"] == 0.89
    assert "own_sparsity" not in read


def test_a_report_of_version_0_1_has_a_row(tmp_path, train_here):
    run = Run("a", small(), "a")
    train_here([run], tmp_path)
    file = tmp_path / "a" / "report.json"
    report = json.loads(file.read_text())
    report.pop("learned_sparsity", None)
    file.write_text(json.dumps(report | {"own_sparsity": 0.94}))
    assert train_here([run], tmp_path).rows["a"]["learned_sparsity"] == 0.94


def test_an_option_of_version_0_1_has_the_same_run_name_and_matches_its_row(row):
    """Version 0.1 called the option `lr` of probmask `rate`."""
    new, old = (GridAxes([0.9], [0], [f"probmask:{name}=0.02"]) for name in ("lr", "rate"))
    runs = grid(resolve_config("cifar100"), new.variants, new)
    with pytest.warns(DeprecationWarning, match="'probmask' is deprecated. Use 'lr'"):
        runs += grid(resolve_config("cifar100"), old.variants, old)
    assert {run.name for run in runs} == {"cifar100-probmask-rate0.02-0.9-0"}
    assert [run.config.options for run in runs] == [{"lr": 0.02}] * 2
    settings = flatten(to_dict(runs[0].config.written_out()))
    settings["options.rate"] = settings.pop("options.lr")
    earlier = row("probmask", name=runs[0].name, config=settings)
    assert row_matches(earlier, runs[0])
    assert not row_matches(earlier | {"config": settings | {"options.rate": 0.03}}, runs[0])


@pytest.mark.parametrize("content", ["", "{}", "[1]", '[{"name": "a", "curve": {}}]', None])
def test_files_without_rows_are_errors(tmp_path, content):
    file = tmp_path / "runs.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(RunError, match=r"runs\.json: (no such file|cannot be used: )"):
        read_rows(file)


def test_a_failed_run_has_a_reason_and_does_not_stop_the_others(tmp_path, train_here):
    diverging = small(**{"optimizer.lr": 1e20, "optimizer.clip": None})
    outcome = train_here([Run("bad", diverging, "b"), Run("good", small(), "g")], tmp_path)
    assert list(outcome.rows) == ["good"]
    assert "are NaN" in outcome.failed["bad"]


def test_after_the_deadline_no_run_starts_but_finished_ones_are_reported(tmp_path, train_here):
    a, b = Run("a", small(), "a"), Run("b", small(), "b")
    train_here([a], tmp_path)
    outcome = train_here([a, b], tmp_path, minutes=0)
    assert list(outcome.rows) == ["a"]
    assert outcome.pending == ["b"]
    assert not (tmp_path / "b").exists()


@pytest.mark.slow
def test_a_process_that_dies_does_not_affect_the_others():
    with _processes(1) as submit:
        died, fine = submit(os._exit, 1), submit(pow, 2, 3)
        row, reason = _result(died)
        assert row is None
        assert "killed" in reason
        assert fine.result() == 8


@pytest.mark.slow
def test_an_unexpected_error_does_not_stop_the_other_runs(tmp_path, train_here, monkeypatch):
    a, b = Run("a", small(), "a"), Run("b", small(), "b")
    train_here([a, b], tmp_path)
    report = tmp_path / "a" / "report.json"
    found = json.loads(report.read_text())
    right_row = runner.row_of

    def row_of(run, directory):
        return {}["seconds"] if run.name == "a" else right_row(run, directory)

    with monkeypatch.context() as patch:
        patch.setattr(runner, "row_of", row_of)
        outcome = train_here([a, b], tmp_path)
    assert outcome.failed == {"a": "KeyError: 'seconds'"}
    assert list(outcome.rows) == ["b"]

    del found["seconds"]
    report.write_text(json.dumps(found))
    outcome = train_here([a, b], tmp_path)
    assert "report.json: cannot be used: lacks seconds" in outcome.failed["a"]
    assert list(outcome.rows) == ["b"]


def test_a_run_that_another_process_trains_is_waited_for(tmp_path, train_here, monkeypatch):
    monkeypatch.setattr(runner, "RETRY_SECONDS", 0.1)
    run = Run("a", small(), "a")
    others = RunDirectory(tmp_path / "a").locked()
    others.__enter__()
    released = threading.Timer(1, others.__exit__, (None, None, None))
    released.start()
    outcome = train_here([run], tmp_path)
    assert released.finished.is_set()
    assert list(outcome.rows) == ["a"]
    with RunDirectory(tmp_path / "b").locked():
        outcome = train_here([Run("b", small(), "b")], tmp_path, minutes=0.01)
    assert (outcome.rows, outcome.failed, outcome.pending) == ({}, {}, ["b"])


def test_changed_defaults_make_another_run(tmp_path, train_here):
    run = Run("a", small(), "a")
    train_here([run], tmp_path)
    config = tmp_path / "a" / "config.yaml"
    written = config.read_text()
    assert "theta: auto" in written
    config.write_text(written.replace("p: 3.0", "p: 4.0"))
    assert "options.p was 4.0, not 3.0" in train_here([run], tmp_path).failed["a"]


@pytest.mark.parametrize(
    ("resources", "gpu"),
    [({"CPU": 4.0}, 0), ({"CPU": 4.0, "GPU": 2.0}, 0.5)],
    ids=["cpus", "gpus"],
)
def test_with_ray_a_run_requests_its_threads_and_its_fraction_of_a_gpu(
    tmp_path, monkeypatch, resources, gpu
):
    ray = FakeRay(resources)
    monkeypatch.setitem(sys.modules, "ray", ray)
    run = Run("a", small(**{"system.threads": 2}), "a")
    outcome = train_all([run], tmp_path, ray="local", jobs=2, minutes=0)
    assert outcome.pending == ["a"]
    assert ray.asked == [{"num_cpus": 2, "num_gpus": gpu}]
    assert ray.addresses == ["local"]
    assert not ray.up


def test_errors_about_ray(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigurationError, match=r"torch-feather\[ray\]"):
        train_all([], tmp_path, ray="local")
    monkeypatch.setitem(sys.modules, "ray", FakeRay({}))
    with pytest.raises(ConfigurationError, match="--ray nobody: no cluster"):
        train_all([], tmp_path, ray="nobody")


STUDY = [
    *("study", "compare", "--methods", "dense,feather", "--sparsity", "0.9", "--seeds", "0"),
    *(word for key, value in SMALL.items() for word in ("--set", f"{key}={value}")),
    *("--set", "system.checkpoint_steps=5", "--set", "epochs=8"),
]


def begun(folder):
    """Starts a study and waits until its first run has a checkpoint."""
    command = [sys.executable, "-m", "torch_feather.cli", *STUDY, "--out", str(folder)]
    process = subprocess.Popen(
        command, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    first = RunDirectory(folder / "runs" / "digits-dense-epochs8-batch_size256-0")
    limit = time.monotonic() + 120
    while not first.last.exists() and process.poll() is None and time.monotonic() < limit:
        time.sleep(0.05)
    return command, process, first


@pytest.mark.slow
def test_the_processes_of_a_killed_study_exit(tmp_path):
    _, process, first = begun(tmp_path)
    process.kill()
    _, errors = process.communicate(timeout=120)  # until the last of its processes has ended
    assert "Traceback" not in errors
    assert not first.report_file.exists()
    with first.locked():
        assert first.load()["step"] >= 5


@pytest.mark.slow
@pytest.mark.parametrize(
    "how",
    [
        pytest.param(signal.SIGINT, id="ctrl-c"),
        pytest.param(signal.SIGKILL, id="killed"),
    ],
)
def test_an_interrupted_study_resumes(tmp_path, how):
    command, process, _ = begun(tmp_path)
    os.killpg(process.pid, how)
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "Traceback" not in errors
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "runs.json").read_text())
    assert [r["method"] for r in rows] == ["dense", "feather"]
    assert [r["curve"]["epoch"][-1] for r in rows] == [8, 8]
    assert (tmp_path / "accuracy.svg").stat().st_size > 1000
    assert "| feather | 90% |" in (tmp_path / "table.md").read_text()
