import subprocess
import sys
import time
import warnings
from types import SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from torch_feather.errors import ConfigurationError, FeatherWarning
from torch_feather.training import loggers
from torch_feather.training.checkpoint import RunDirectory
from torch_feather.training.config import Config, SystemConfig
from torch_feather.training.loggers import TensorBoardWatch, WandbWatch, observers
from torch_feather.training.watch import Watch, Watches

EVENTS = {
    "message": ("text",),
    "begin": (Config(), 100, 0, RunDirectory("run")),
    "step": (8,),
    "epoch": ({"epoch": 1, "step": 10},),
    "end": (None,),
}


class Recorder(Watch):
    """Remembers what it was told; fails at the event with that name."""

    def __init__(self, fails_at=None, dispensable=False):
        self.told, self.fails_at, self.dispensable = [], fails_at, dispensable

    def __getattribute__(self, name):
        if name not in EVENTS:
            return super().__getattribute__(name)

        def event(*details):
            self.told.append((name, *details))
            if name == self.fails_at:
                raise ConnectionError("no network\nat all")

        return event


def metrics(epoch, **more):
    return {"epoch": epoch, "step": 10 * epoch, "train_loss": 1 / epoch, "val_acc": None} | more


# --- several observers


def test_every_event_reaches_every_observer():
    told = [("begin", *EVENTS["begin"]), *((name, *EVENTS[name]) for name in EVENTS)]
    first, second = Recorder(), Recorder()
    watches = Watches([first, second])
    assert {name for name in vars(Watch) if callable(getattr(Watch, name))} == EVENTS.keys()
    for name, *details in told:
        getattr(watches, name)(*details)
    assert first.told == second.told == told


def test_who_began_last_ends_first():
    order = []
    watches = Watches([outer := Watch(), inner := Watch()])
    for watch, name in ((outer, "outer"), (inner, "inner")):
        watch.begin = lambda *details, name=name: order.append(name)
        watch.end = lambda results, name=name: order.append(name)
    watches.begin(*EVENTS["begin"])
    watches.end()
    assert order == ["outer", "inner", "inner", "outer"]


@pytest.mark.parametrize("event", EVENTS)
def test_a_dispensable_observer_that_fails_is_left_out_with_one_warning(event):
    failing, other = Recorder(event, dispensable=True), Recorder()
    watches = Watches([failing, other])
    with pytest.warns(FeatherWarning, match=r"Recorder failed .*ConnectionError: no network\)"):
        getattr(watches, event)(*EVENTS[event])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        getattr(watches, event)(*EVENTS[event])
    assert failing.told == [(event, *EVENTS[event])]
    assert other.told == 2 * [(event, *EVENTS[event])]


@pytest.mark.parametrize("event", EVENTS)
def test_the_failure_of_another_observer_is_not_hidden(event):
    with pytest.raises(ConnectionError):
        getattr(Watches([Recorder(event)]), event)(*EVENTS[event])


# --- which of them


@pytest.mark.parametrize("installed", [(), ("tensorboard",), ("tensorboard", "wandb")])
@pytest.mark.parametrize("wanted", [True, False])
def test_tensorboard_is_used_where_it_is_wanted_and_installed(monkeypatch, installed, wanted):
    monkeypatch.setattr(loggers, "find_spec", lambda name: name in installed or None)
    found = observers(Config(system=SystemConfig(tensorboard=wanted)))
    expected = [TensorBoardWatch] if wanted and "tensorboard" in installed else []
    assert [type(watch) for watch in found] == expected


def test_wandb_is_used_where_a_project_is_named(monkeypatch):
    monkeypatch.setattr(loggers, "find_spec", lambda name: name == "wandb" or None)
    (watch,) = observers(Config(system=SystemConfig(wandb="sparse")))
    assert isinstance(watch, WandbWatch)
    assert watch.project == "sparse"


def test_a_named_project_without_wandb_is_refused_before_anything_is_trained(monkeypatch):
    monkeypatch.setattr(loggers, "find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match=r"wandb is not installed; pip install"):
        observers(Config(system=SystemConfig(wandb="sparse")))


def test_neither_is_imported_before_it_is_needed():
    code = (
        "import sys; from torch_feather.training.config import Config, SystemConfig\n"
        "from torch_feather.training.loggers import observers\n"
        "observers(Config())\n"
        "print(sorted({'tensorboard', 'torch.utils.tensorboard', 'wandb'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout == "[]\n", done.stderr


# --- TensorBoard


def scalars(folder):
    """Steps and values that TensorBoard shows, by name."""
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    return {
        name: [(event.step, pytest.approx(event.value)) for event in events.Scalars(name)]
        for name in events.Tags()["scalars"]
    }


def watched(watch, folder, lines, done=0, results=None):
    watch.begin(Config(), 100, done, RunDirectory(folder))
    for line in lines:
        watch.epoch(line)
    watch.end(results)


def test_tensorboard_holds_every_number_of_every_epoch(tmp_path):
    lines = [metrics(1), metrics(2, val_acc=0.5, method="feather", flag=True)]
    watched(TensorBoardWatch(), tmp_path, lines)
    assert scalars(tmp_path) == {
        "epoch": [(10, 1), (20, 2)],
        "step": [(10, 10), (20, 20)],
        "train_loss": [(10, 1), (20, 0.5)],
        "val_acc": [(20, 0.5)],
    }


@pytest.mark.parametrize("goes_on_with", [2, 3, 4])
def test_no_epoch_is_in_tensorboard_twice_after_a_resume(tmp_path, monkeypatch, goes_on_with):
    watched(TensorBoardWatch(), tmp_path, [metrics(epoch) for epoch in (1, 2, 3)])
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + 60)  # file names have whole seconds
    again = [metrics(epoch, train_loss=7.0) for epoch in range(goes_on_with, 6)]
    watched(TensorBoardWatch(), tmp_path, again, done=10 * goes_on_with - 5)
    before = [(10 * epoch, 1 / epoch) for epoch in range(1, goes_on_with)]
    after = [(10 * epoch, 7.0) for epoch in range(goes_on_with, 6)]
    assert scalars(tmp_path)["train_loss"] == before + after


def test_a_resumed_run_that_has_no_epoch_left_keeps_what_it_wrote(tmp_path):
    watched(TensorBoardWatch(), tmp_path, [metrics(1), metrics(2)])
    before = scalars(tmp_path)
    watched(TensorBoardWatch(), tmp_path, [], done=20)
    assert scalars(tmp_path) == before


def test_an_epoch_can_be_seen_at_once(tmp_path):
    watch = TensorBoardWatch()
    watch.begin(Config(), 100, 0, RunDirectory(tmp_path))
    watch.epoch(metrics(1))
    assert scalars(tmp_path)["epoch"] == [(10, 1)]
    watch.end()


def test_runs_one_after_the_other_have_folders_of_their_own(tmp_path):
    watch = TensorBoardWatch()
    watched(watch, tmp_path, [metrics(1)])
    watched(watch, tmp_path / "dense", [metrics(1, train_loss=3.0)])
    assert scalars(tmp_path)["train_loss"] == [(10, 1)]
    assert scalars(tmp_path / "dense")["train_loss"] == [(10, 3)]


# --- Weights & Biases, with a stand-in for its package, which is large


class Runs:
    """The part of wandb that is used here; keeps what it was given."""

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
    watched(WandbWatch("sparse"), folder, [metrics(1), metrics(2)], results=results)
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


def test_a_stopped_run_goes_on_under_its_own_identity(wandb, tmp_path):
    watched(WandbWatch("sparse"), tmp_path, [metrics(1)])
    watched(WandbWatch("sparse"), tmp_path, [metrics(2)], done=15, results={})
    (tmp_path / "dense").mkdir()
    watched(WandbWatch("sparse"), tmp_path / "dense", [metrics(1)], results={})
    stopped, resumed, twin = wandb.runs
    assert stopped.options["id"] == resumed.options["id"] == (tmp_path / "wandb-id").read_text()
    assert stopped.options["resume"] == resumed.options["resume"] == "allow"
    assert stopped.exit_code != 0
    assert resumed.exit_code == 0
    assert twin.options["id"] != stopped.options["id"]
