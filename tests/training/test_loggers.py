import csv
import errno
import json
import os
import signal
import struct
import subprocess
import sys
import time
import warnings
from types import SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils import tensorboard  # noqa: F401  (before a fork)

from torch_feather.errors import ConfigurationError, FeatherWarning
from torch_feather.training import loggers, writing
from torch_feather.training.callbacks import Callback, Callbacks
from torch_feather.training.checkpoint import RunDirectory
from torch_feather.training.config import Config, SystemConfig, apply, resolve_config
from torch_feather.training.loggers import (
    CSVLogger,
    LoggerCallback,
    TensorBoardCallback,
    TensorBoardLogger,
    WandbCallback,
    logging_callbacks,
)
from torch_feather.training.loop import train

EVENTS = {
    "message": ("text",),
    "begin": (Config(), 100, 0, RunDirectory("run")),
    "step": (8,),
    "epoch": ({"epoch": 1, "step": 10},),
    "end": (None,),
}


class Recorder(Callback):
    """Records its events; fails at the event named `fails_at`."""

    def __init__(self, fails_at=None, optional=False):
        self.events, self.fails_at, self.optional = [], fails_at, optional

    def __getattribute__(self, name):
        if name not in EVENTS:
            return super().__getattribute__(name)

        def event(*details):
            self.events.append((name, *details))
            if name == self.fails_at:
                raise ConnectionError("no network\nat all")

        return event


def metrics(epoch, **more):
    return {"epoch": epoch, "step": 10 * epoch, "train_loss": 1 / epoch, "val_acc": None} | more


# --- several callbacks


def test_every_event_reaches_every_callback():
    expected = [("begin", *EVENTS["begin"]), *((name, *EVENTS[name]) for name in EVENTS)]
    first, second = Recorder(), Recorder()
    callbacks = Callbacks([first, second])
    methods = {name for name, value in vars(Callback).items() if callable(value)}
    assert EVENTS.keys() <= methods
    assert all(name.startswith("_") for name in methods - EVENTS.keys())
    for name, *details in expected:
        getattr(callbacks, name)(*details)
    assert first.events == second.events == expected


def test_callbacks_end_in_reverse_order():
    order = []
    callbacks = Callbacks([outer := Callback(), inner := Callback()])
    for callback, name in ((outer, "outer"), (inner, "inner")):
        callback.begin = lambda *details, name=name: order.append(name)
        callback.end = lambda results, name=name: order.append(name)
    callbacks.begin(*EVENTS["begin"])
    callbacks.end()
    assert order == ["outer", "inner", "inner", "outer"]


@pytest.mark.parametrize("event", EVENTS)
def test_an_optional_callback_that_fails_is_removed_with_one_warning(event):
    failing, other = Recorder(event, optional=True), Recorder()
    callbacks = Callbacks([failing, other])
    with pytest.warns(FeatherWarning, match=r"Recorder failed \(ConnectionError: no network\)"):
        getattr(callbacks, event)(*EVENTS[event])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        getattr(callbacks, event)(*EVENTS[event])
    assert failing.events == [(event, *EVENTS[event])]
    assert other.events == 2 * [(event, *EVENTS[event])]


@pytest.mark.parametrize("event", EVENTS)
def test_the_failure_of_a_required_callback_is_raised(event):
    with pytest.raises(ConnectionError):
        getattr(Callbacks([Recorder(event)]), event)(*EVENTS[event])


# --- the choice of callbacks


@pytest.mark.parametrize("installed", [(), ("tensorboard",), ("tensorboard", "wandb")])
@pytest.mark.parametrize("requested", [True, False])
def test_tensorboard_is_used_if_it_is_requested_and_installed(monkeypatch, installed, requested):
    monkeypatch.setattr(loggers, "find_spec", lambda name: name in installed or None)
    found = logging_callbacks(Config(system=SystemConfig(tensorboard=requested)))
    expected = [TensorBoardCallback] if requested and "tensorboard" in installed else []
    assert [type(callback) for callback in found] == expected


def test_wandb_is_used_if_a_project_is_named(monkeypatch):
    monkeypatch.setattr(loggers, "find_spec", lambda name: name == "wandb" or None)
    (callback,) = logging_callbacks(Config(system=SystemConfig(wandb="sparse")))
    assert isinstance(callback, WandbCallback)
    assert callback.project == "sparse"


def test_a_named_project_without_wandb_is_an_error_before_training(monkeypatch):
    monkeypatch.setattr(loggers, "find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match=r"wandb is not installed\. .* Run pip install"):
        logging_callbacks(Config(system=SystemConfig(wandb="sparse")))


def test_neither_is_imported_before_it_is_used():
    code = (
        "import sys; from torch_feather.training.config import Config, SystemConfig\n"
        "from torch_feather.training.loggers import logging_callbacks\n"
        "logging_callbacks(Config())\n"
        "print(sorted({'tensorboard', 'torch.utils.tensorboard', 'wandb'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout == "[]\n", done.stderr


# --- TensorBoard


def scalars(folder):
    """Return the steps and values that TensorBoard shows, by name."""
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    return {
        name: [(event.step, pytest.approx(event.value)) for event in events.Scalars(name)]
        for name in events.Tags()["scalars"]
    }


def log_run(callback, folder, lines, done=0, results=None):
    folder.mkdir(exist_ok=True)
    callback.begin(Config(), 100, done, RunDirectory(folder))
    for line in lines:
        callback.epoch(line)
    callback.end(results)


def test_tensorboard_holds_every_number_of_every_epoch(tmp_path):
    lines = [metrics(1), metrics(2, val_acc=0.5, method="feather", flag=True)]
    log_run(TensorBoardCallback(), tmp_path, lines)
    assert scalars(tmp_path) == {
        "epoch": [(10, 1), (20, 2)],
        "step": [(10, 10), (20, 20)],
        "train_loss": [(10, 1), (20, 0.5)],
        "val_acc": [(20, 0.5)],
    }


@pytest.mark.parametrize("resumed_at", [2, 3, 4])
def test_no_epoch_is_in_tensorboard_twice_after_a_resume(tmp_path, monkeypatch, resumed_at):
    log_run(TensorBoardCallback(), tmp_path, [metrics(epoch) for epoch in (1, 2, 3)])
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + 60)  # file names have a resolution of seconds
    again = [metrics(epoch, train_loss=7.0) for epoch in range(resumed_at, 6)]
    log_run(TensorBoardCallback(), tmp_path, again, done=10 * resumed_at - 5)
    before = [(10 * epoch, 1 / epoch) for epoch in range(1, resumed_at)]
    after = [(10 * epoch, 7.0) for epoch in range(resumed_at, 6)]
    assert scalars(tmp_path)["train_loss"] == before + after


def test_a_resumed_run_without_a_remaining_epoch_keeps_its_scalars(tmp_path):
    log_run(TensorBoardCallback(), tmp_path, [metrics(1), metrics(2)])
    before = scalars(tmp_path)
    log_run(TensorBoardCallback(), tmp_path, [], done=20)
    assert scalars(tmp_path) == before


def test_an_epoch_is_visible_immediately(tmp_path):
    callback = TensorBoardCallback()
    callback.begin(Config(), 100, 0, RunDirectory(tmp_path))
    callback.epoch(metrics(1))
    assert scalars(tmp_path)["epoch"] == [(10, 1)]
    callback.end()


def test_consecutive_runs_write_to_their_own_folders(tmp_path):
    callback = TensorBoardCallback()
    log_run(callback, tmp_path, [metrics(1)])
    log_run(callback, tmp_path / "dense", [metrics(1, train_loss=3.0)])
    assert scalars(tmp_path)["train_loss"] == [(10, 1)]
    assert scalars(tmp_path / "dense")["train_loss"] == [(10, 3)]


# --- Weights & Biases, with a stand-in for its package, which is large


class Runs:
    """A stand-in for the used part of wandb; records its arguments."""

    Settings = SimpleNamespace

    def __init__(self):
        self.runs, self.steps = [], 0  # steps that the service has

    def init(self, **options):
        run = SimpleNamespace(options=options, rows=[], summary={}, exit_code=None)
        run.resumed, run.starting_step = bool(self.steps), self.steps + 1 if self.steps else 0
        run.log = lambda row, step, commit: run.rows.append((step, row))
        run.finish = lambda exit_code: setattr(run, "exit_code", exit_code)
        self.runs.append(run)
        return run


@pytest.fixture
def wandb(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", runs := Runs())
    return runs


def test_wandb_gets_settings_metrics_and_results(wandb, tmp_path):
    folder = tmp_path / "runs" / "a"
    folder.mkdir(parents=True)
    results = {"test_accuracy": 0.5, "report": {"layers": []}}
    log_run(WandbCallback("sparse"), folder, [metrics(1), metrics(2)], results=results)
    (run,) = wandb.runs
    assert run.options["project"] == "sparse"
    assert run.options["name"] == "runs/a"
    assert run.options["config"]["optimizer"]["lr"] == Config().optimizer.lr
    assert run.options["dir"] == folder
    assert run.rows == [
        (10, {"epoch": 1, "step": 10, "train_loss": 1.0}),
        (20, {"epoch": 2, "step": 20, "train_loss": 0.5}),
    ]
    assert run.summary == {"test_accuracy": 0.5}
    assert run.exit_code == 0


def test_a_resumed_run_keeps_its_identifier(wandb, tmp_path):
    log_run(WandbCallback("sparse"), tmp_path, [metrics(1)])
    log_run(WandbCallback("sparse"), tmp_path, [metrics(2)], done=15, results={})
    (tmp_path / "dense").mkdir()
    log_run(WandbCallback("sparse"), tmp_path / "dense", [metrics(1)], results={})
    stopped, resumed, baseline = wandb.runs
    assert stopped.options["id"] == resumed.options["id"] == (tmp_path / "wandb-id").read_text()
    assert stopped.options["resume"] == resumed.options["resume"] == "allow"
    assert stopped.exit_code != 0
    assert resumed.exit_code == 0
    assert baseline.options["id"] != stopped.options["id"]


@pytest.mark.parametrize("kept", [0, 10, 20])
def test_wandb_gets_the_rows_that_the_service_lacks(wandb, tmp_path, kept):
    run = RunDirectory(tmp_path)
    log_run(WandbCallback("sparse"), tmp_path, [full_row(1), full_row(2)])
    run.write_metrics([full_row(1), full_row(2)])
    wandb.steps = kept
    log_run(WandbCallback("sparse"), tmp_path, [full_row(2), full_row(3)], done=15)
    assert [step for step, _ in wandb.runs[1].rows] == [s for s in (10, 20, 30) if s > kept]


# --- CSV


def csv_rows(folder):
    with open(folder / "metrics.csv", newline="") as file:
        return [{k: float(v) for k, v in row.items() if v != ""} for row in csv.DictReader(file)]


def test_a_full_disk_ends_logging_with_one_warning_and_keeps_the_file(tmp_path, monkeypatch):
    callbacks = Callbacks([LoggerCallback(CSVLogger), other := Recorder()])
    callbacks.begin(Config(), 100, 0, RunDirectory(tmp_path))
    callbacks.epoch(metrics(1))

    def full(path, write):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writing, "replace_file", full)
    with pytest.warns(FeatherWarning, match=r"CSVLogger failed .*metrics\.csv.* disk is full"):
        callbacks.epoch(metrics(2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        callbacks.epoch(metrics(3))
        callbacks.end({})
    assert [row["step"] for row in csv_rows(tmp_path)] == [10]
    assert len(other.events) == 5


@pytest.mark.parametrize("make", [CSVLogger, TensorBoardLogger])
def test_a_logger_that_is_added_to_a_resumed_run_gets_the_earlier_rows(tmp_path, make):
    RunDirectory(tmp_path).write_metrics([full_row(1), full_row(2), full_row(3)])
    log_run(LoggerCallback(make), tmp_path, [full_row(3, train_loss=7.0)], done=25)
    if make is CSVLogger:
        assert [row["train_loss"] for row in csv_rows(tmp_path)] == [1, 0.5, 7]
    else:
        assert scalars(tmp_path)["train_loss"] == [(10, 1), (20, 0.5), (30, 7)]


def full_row(epoch, **more):
    """A row that metrics.jsonl may hold."""
    return {
        "epoch": epoch, "step": 10 * epoch, "lr": 0.1, "train_loss": 1 / epoch, "val_loss": 1.0,
        "val_acc": 0.5, "test_loss": None, "test_acc": None, "sparsity": 0.5, "macs": 8,
        "images_per_s": 9.0,
    } | more  # fmt: skip


# --- loggers in a training run

OWN = """
import json, os, signal
from torch import nn
from torch_feather.training import Logger

def linear(num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, num_classes))

class Lines(Logger):
    \"\"\"Appends to a file, as simple loggers do.\"\"\"

    def begin(self, run):
        self.path = run.folder / "lines.jsonl"
        lines = self.path.read_text().splitlines() if run.step else []
        return max((json.loads(line)["step"] for line in lines), default=0)

    def log(self, step, metrics):
        with open(self.path, "a") as file:
            file.write(json.dumps(metrics) + "\\n")

class Kill(Logger):
    \"\"\"Kills the process after the third epoch was logged.\"\"\"

    def log(self, step, metrics):
        if metrics["epoch"] == 3:
            os.kill(os.getpid(), signal.SIGKILL)

class Fails(Logger):
    def begin(self, run):
        self.fail("begin")
        return 0

    def log(self, step, metrics):
        self.fail("log")

    def end(self, results):
        self.fail("end")

    def fail(self, event):
        if event == os.environ["FAILS_AT"]:
            raise ConnectionError("no server")

no_class = Lines.log
"""


@pytest.fixture(scope="module")
def own_module(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    (folder / "own_loggers_of_a_test.py").write_text(OWN)
    sys.path.append(str(folder))
    yield folder
    sys.path.remove(str(folder))


def small(**changes):
    usual = {"network": "own_loggers_of_a_test:linear", "epochs": 4, "compare_dense": False,
             "batch_size": 512, "sparsity": 0.5, "system.threads": 1, "system.tensorboard": False,
    }  # fmt: skip
    return apply(resolve_config("digits"), usual | changes, "test")


def killed_and_resumed(folder, **loggers):
    """Kill a run that logs the third epoch, resume it from a step of the second, and return it."""
    own = "own_loggers_of_a_test:"
    settings = {"system.checkpoint_steps": 4, "system.checkpoint_seconds": 1e9, **loggers}
    config = small(**settings, **{"system.loggers": [f"{own}Lines", f"{own}Kill"]})
    child = os.fork()
    if child == 0:
        try:
            train(config, folder, callback=Callbacks(logging_callbacks(config)))
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    run = RunDirectory(folder)
    assert [row["epoch"] for row in run.read_metrics()] == [1, 2, 3]
    config = small(**settings, **{"system.loggers": [f"{own}Lines"]})
    notes = []
    callbacks = Callbacks([*logging_callbacks(config), listener := Callback()])
    listener.message = notes.append
    with warnings.catch_warnings():
        warnings.simplefilter("error", FeatherWarning)
        train(config, folder, resume=True, callback=callbacks)
    # Three steps an epoch: the third epoch, which the log has, is trained again.
    assert "at step 8 of 12" in notes[0]
    return run


def rows_of(run):
    return [{k: v for k, v in row.items() if v is not None} for row in run.read_metrics()]


def without_times(rows):
    return [{k: v for k, v in row.items() if k != "images_per_s"} for row in rows]


def test_a_killed_run_resumes_without_double_or_lost_rows(tmp_path, without_loggers):
    loggers = {"system.csv": True, "system.tensorboard": True}
    run = killed_and_resumed(tmp_path / "run", **loggers)
    rows = rows_of(run)
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4]
    assert csv_rows(run.path) == rows
    own = [json.loads(line) for line in (run.path / "lines.jsonl").read_text().splitlines()]
    assert without_times(own) == without_times(rows)
    found = scalars(run.path)
    for name in rows[0]:
        values = [(row["step"], pytest.approx(row[name], rel=1e-6)) for row in rows]
        assert [(step, value.expected) for step, value in found[name]] == values


@pytest.fixture(scope="module")
def without_loggers(own_module, tmp_path_factory):
    return train(small(epochs=2), tmp_path_factory.mktemp("plain"))


@pytest.mark.parametrize("event", ["begin", "log", "end"])
def test_a_logger_that_fails_does_not_change_the_run(tmp_path, without_loggers, monkeypatch, event):
    monkeypatch.setenv("FAILS_AT", event)
    config = small(epochs=2, **{"system.loggers": ["own_loggers_of_a_test:Fails"]})
    with pytest.warns(FeatherWarning, match="Fails failed") as caught:
        results = train(config, tmp_path / "a", callback=Callbacks(logging_callbacks(config)))
    (message,) = [str(w.message) for w in caught if "failed" in str(w.message)]
    assert message == (
        "own_loggers_of_a_test:Fails failed (ConnectionError: no server). Training continues "
        "without it."
    )
    for key in ("epochs", "test_loss", "report"):
        assert results[key] == without_loggers[key]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("csv", r"'csv' must be package\.module:Class"),
        ("absent_module:A", "Logger 'absent_module:A': module 'absent_module' cannot be imported"),
        ("own_loggers_of_a_test:Line", "has no 'Line'; did you mean 'Lines'"),
        ("own_loggers_of_a_test:no_class", "must be a subclass of torch_feather.training.Logger"),
    ],
)
def test_what_is_no_logger_is_an_error_before_training(own_module, path, message):
    with pytest.raises(ConfigurationError, match=message):
        logging_callbacks(Config(system=SystemConfig(tensorboard=False, loggers=[path])))


# --- the real MLflow and W&B


@pytest.mark.apps
@pytest.mark.parametrize("kind", ["file", "sqlite"])
def test_mlflow_has_each_row_once_after_a_kill(tmp_path, without_loggers, monkeypatch, kind):
    mlflow = pytest.importorskip("mlflow")
    if kind == "sqlite":
        pytest.importorskip("sqlalchemy", reason="of the whole package, mlflow")
    store = f"{kind}://{'/' * (kind == 'sqlite')}{tmp_path / 'store'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    run = killed_and_resumed(tmp_path / "run", **{"system.mlflow": "digits"})
    client = mlflow.MlflowClient(store)
    experiment = client.get_experiment_by_name("digits")
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.status == "FINISHED"
    assert found.data.params["optimizer.lr"] == str(small().optimizer.lr)
    assert found.data.metrics["results/test_accuracy"] == run.read_report()["test_accuracy"]
    rows = rows_of(run)
    for name in rows[0]:
        history = client.get_metric_history(found.info.run_id, name)
        values = sorted((one.step, one.value) for one in history)
        assert [step for step, _ in values] == [row["step"] for row in rows]
        if name != "images_per_s":
            assert values == [(row["step"], row[name]) for row in rows]


@pytest.mark.apps
def test_a_row_that_mlflow_has_in_part_is_completed(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store := f"{(tmp_path / 'store').as_uri()}")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    system = SystemConfig(tensorboard=False, mlflow="digits")
    (callback,) = logging_callbacks(Config(system=system))
    log_run(callback, tmp_path / "run", [metrics(1)])
    client = mlflow.MlflowClient(store)
    name = (tmp_path / "run" / "mlflow-id").read_text()
    client.log_metric(name, "epoch", 2, step=20)
    log_run(callback, tmp_path / "run", [metrics(2)], done=15)
    for key in ("epoch", "step", "train_loss"):
        assert [one.step for one in client.get_metric_history(name, key)] == [10, 20]


@pytest.mark.apps
def test_offline_runs_of_wandb_have_each_row_once_after_a_kill(
    tmp_path, without_loggers, monkeypatch
):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = killed_and_resumed(tmp_path / "run", **{"system.wandb": "digits"})
    assert len(list((run.path / "wandb").glob("offline-run-*"))) == 2
    (file,) = (run.path / "wandb" / "latest-run").glob("*.wandb")
    logged, rows = list(wandb_rows(file)), rows_of(run)
    assert [row["epoch"] for row in logged] == [1, 2, 3, 4]
    assert [row["train_loss"] for row in logged] == [row["train_loss"] for row in rows]


def wandb_rows(path):
    """Yield the rows of a W&B file: blocks of 32 KiB in the format of LevelDB's logs."""
    from wandb.proto import wandb_internal_pb2

    content, position, data = path.read_bytes(), 7, b""
    while position < len(content):
        if -position % 2**15 < 7:  # the end of a block holds no header
            position += -position % 2**15
            continue
        _, length, kind = struct.unpack_from("<IHB", content, position)
        data += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or the end of one
            record, data = wandb_internal_pb2.Record.FromString(data), b""
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                yield {one.key or one.nested_key[0]: json.loads(one.value_json) for one in items}
