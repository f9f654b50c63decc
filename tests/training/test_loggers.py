import subprocess
import sys
import time
import warnings
from types import SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from torch_feather.errors import ConfigurationError, FeatherWarning
from torch_feather.training import loggers
from torch_feather.training.callbacks import Callback, Callbacks
from torch_feather.training.checkpoint import RunDirectory
from torch_feather.training.config import Config, SystemConfig
from torch_feather.training.loggers import TensorBoardCallback, WandbCallback, logging_callbacks

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
        self.runs = []

    def init(self, **options):
        run = SimpleNamespace(options=options, rows=[], summary={}, exit_code=None)
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
