import itertools
import json
import math
import re
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from training_callbacks import StopAt

import torch_feather as feather
from torch_feather import cli
from torch_feather.errors import ConfigurationError
from torch_feather.training import loop
from torch_feather.training.automatic import with_class_names
from torch_feather.training.callbacks import Callback
from torch_feather.training.checkpoint import RunDirectory
from torch_feather.training.config import Config, apply, load_config, resolve_config, to_yaml
from torch_feather.training.console import percent
from torch_feather.training.data import EvalLoader, Images, load_dataset
from torch_feather.training.errors import Interrupted, RunError, TrainingDiverged
from torch_feather.training.evaluation import evaluate
from torch_feather.training.loop import train
from torch_feather.training.task import Task, make_optimizer

CPU = torch.device("cpu")
BLOBS = {"epochs": 4, "batch_size": 32, "system.threads": 1, "optimizer.lr": 0.05}


class TinyNetwork(torch.nn.Module):
    def __init__(self, classes, channels):
        super().__init__()
        self.conv = torch.nn.Conv2d(channels, 8, 3, padding=1, bias=False)
        self.norm = torch.nn.BatchNorm2d(8)
        self.dropout = torch.nn.Dropout(0.1)  # its random state is part of the checkpoint
        self.fc = torch.nn.Linear(8 * 64, classes)

    def forward(self, x):
        return self.fc(self.dropout(torch.relu(self.norm(self.conv(x)))).flatten(1))


@pytest.fixture(autouse=True)
def tiny_network(monkeypatch):
    monkeypatch.setitem(feather.models._MODELS, "tiny", TinyNetwork)


def tiny(**changes):
    return apply(
        resolve_config("digits"),
        {**BLOBS, "network": "tiny", "compare_dense": False} | changes,
        "test",
    )


def without_times(history):
    return [{k: v for k, v in line.items() if k != "images_per_s"} for line in history]


def results_of(folder):
    run = RunDirectory(folder)
    report = run.read_report()
    for key in ("seconds", "commit"):  # a commit may be made meanwhile
        report.pop(key)
    return run.model_file.read_bytes(), without_times(run.read_metrics()), report


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    feather.models._MODELS["tiny"] = TinyNetwork
    folder = tmp_path_factory.mktemp("finished") / "run"
    results = train(tiny(), folder)
    del feather.models._MODELS["tiny"]
    return folder, results


def test_a_run_directory_has_all_its_files(finished):
    folder, results = finished
    names = {p.name for p in folder.iterdir()} - {".lock"}
    assert names == {
        "config.yaml",
        "metrics.jsonl",
        "checkpoints",
        "model.safetensors",
        "report.json",
        "curves.png",
        "layers.png",
        "operator.png",
    }
    expected = with_class_names(tiny(), tuple("0123456789")).written_out()
    assert load_config(folder / "config.yaml") == expected
    assert json.loads((folder / "report.json").read_text()) == results
    assert {"versions", "commit", "hardware", "seed", "seconds", "macs"} <= results.keys()
    history = RunDirectory(folder).read_metrics()
    assert [line["epoch"] for line in history] == [1, 2, 3, 4]
    assert list(history[0]) == [
        "epoch",
        "step",
        "lr",
        "train_loss",
        "val_loss",
        "val_acc",
        "test_loss",
        "test_acc",
        "sparsity",
        "macs",
        "images_per_s",
    ]
    assert history[-1]["train_loss"] < history[0]["train_loss"]
    assert history[-1]["macs"] == results["macs"]["sparse"]


def test_the_stored_network_has_exactly_the_zeros_and_accuracy_reported(finished):
    folder, results = finished
    data = load_dataset(tiny().data, tiny().seed)
    model = TinyNetwork(10, 1)
    RunDirectory(folder).load_model(model)
    weights = 8 * 9 + 8 * 64 * 10
    assert results["report"]["weights"] == weights
    zeros = sum(int((p == 0).sum()) for p in (model.conv.weight, model.fc.weight))
    assert zeros == results["report"]["zeros"] == round(0.95 * weights)
    _, accuracy = evaluate(model, EvalLoader(data, data.test, CPU))
    assert accuracy == results["test_accuracy"]


def test_runs_are_bitwise_identical_for_the_same_seed_only(finished, tmp_path):
    train(tiny(), tmp_path / "again")
    assert results_of(tmp_path / "again") == results_of(finished[0])
    train(tiny(seed=1), tmp_path / "other")
    assert results_of(tmp_path / "other")[0] != results_of(finished[0])[0]


@pytest.mark.parametrize("step", [1, 40, 41, 100])  # an epoch has 41 steps
def test_after_ctrl_c_a_run_resumes_bitwise_identically(finished, tmp_path, step):
    folder, before = tmp_path / "run", signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted, match=f"stopped at step {step} of 164; resume with .*--resume"):
        train(tiny(), folder, callback=StopAt(step))
    assert signal.getsignal(signal.SIGINT) is before
    train(tiny(), folder, resume=True)
    assert results_of(folder) == results_of(finished[0])


@pytest.mark.parametrize("before", range(4))
def test_a_stop_request_always_leaves_the_checkpoint_of_that_step(tmp_path, before):
    config = tiny()
    run = RunDirectory(tmp_path / "run")
    answers = iter([False] * before + [True] * 4)
    task = Task(config, load_dataset(config.data, config.seed), CPU)
    with run.locked(), pytest.raises(Interrupted, match=f"stopped at step {before + 1} "):
        task.fit(run, Callback(), lambda: next(answers))
    assert run.load()["step"] == before + 1


def test_a_failing_step_keeps_the_checkpoint_before_it(finished, tmp_path, monkeypatch):
    class Failing(Callback):
        def __init__(self):
            self.left = 60

        def step(self, images):
            self.left -= 1
            if self.left == 0:
                raise OSError("the disk went away")

    with pytest.raises(OSError, match="went away"):
        train(tiny(**{"system.checkpoint_steps": 7}), tmp_path / "run", callback=Failing())
    train(tiny(), tmp_path / "run", resume=True)
    assert results_of(tmp_path / "run") == results_of(finished[0])


KILLED = """
import os, signal, sys
from pathlib import Path
from torch_feather.training import checkpoint, load_config, train
from torch_feather.training.callbacks import Callback

folder, where = Path(sys.argv[1]), sys.argv[2]

def kill():
    os.kill(os.getpid(), signal.SIGKILL)

class Kill(Callback):
    steps = 0
    def step(self, images):
        self.steps += 1
        if where == "step" and self.steps == 30:
            kill()
    def epoch(self, metrics):
        if where == "epoch":
            kill()

real, saves = os.replace, []
def replace(source, target):
    if str(target).endswith("last.pt"):
        saves.append(target)
        if where == "save" and len(saves) == 3:
            kill()
    real(source, target)
checkpoint.os.replace = replace
train(load_config(folder.with_suffix(".yaml")), folder, callback=Kill())
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    config = apply(
        resolve_config("digits"),
        {
            "epochs": 2,
            "batch_size": 64,
            "compare_dense": False,
            "select": "best",
            "system.threads": 1,
            "system.checkpoint_steps": 8,
        },
        "test",
    )
    folder = tmp_path_factory.mktemp("whole") / "run"
    train(config, folder)
    return config, results_of(folder)


@pytest.mark.slow
@pytest.mark.parametrize("where", ["step", "save", "epoch"])
def test_a_killed_run_resumes_bitwise_identically(tmp_path, whole, where):
    config, expected = whole
    killed = tmp_path / "killed"
    killed.with_suffix(".yaml").write_text(to_yaml(config))
    process = subprocess.run([sys.executable, "-c", KILLED, str(killed), where], timeout=120)
    assert process.returncode == -signal.SIGKILL
    assert not RunDirectory(killed).report_file.exists()
    assert RunDirectory(killed).load()["step"] in (16, 24)
    train(config, killed, resume=True)
    assert results_of(killed) == expected
    epochs = [line["epoch"] for line in RunDirectory(killed).read_metrics()]
    assert epochs == [1, 2]


def test_a_finished_run_is_only_read(finished):
    folder, results = finished
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert train(tiny(), folder, resume=True) == results
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(RunError, match="already holds a run"):
        train(tiny(), folder)


def test_resume_without_a_run_starts_one(finished, tmp_path):
    train(tiny(), tmp_path / "new", resume=True)
    assert results_of(tmp_path / "new") == results_of(finished[0])


@pytest.mark.parametrize("storage", ["memory", "stream"])
def test_a_run_on_an_image_folder_resumes_bitwise_identically(
    tmp_path, monkeypatch, capsys, storage
):
    monkeypatch.setenv("TORCH_FEATHER_CACHE", str(tmp_path / "cache"))
    random = np.random.RandomState(0)
    for part, i in itertools.product(("train", "val"), range(20)):
        path = tmp_path / "images" / part / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.randint(0, 256, (12, 12, 3), dtype=np.uint8)).save(path)
    config = tiny(
        epochs=3,
        batch_size=6,
        sparsity=0.5,
        data={
            "name": "imagefolder",
            "path": str(tmp_path / "images"),
            "storage": storage,
            "crop": "resized",
            "resolution": 8,
        },
        system={"workers": 2, "micro_batch": 4},
    )
    results = train(config, tmp_path / "whole")
    with pytest.raises(Interrupted):
        train(config, tmp_path / "run", callback=StopAt(5))  # an epoch has 3 steps
    train(config, tmp_path / "run", resume=True)
    assert results_of(tmp_path / "run") == results_of(tmp_path / "whole")
    cli.evaluate(tmp_path / "run", device="cpu")
    accuracy = f"20 test images of imagefolder: accuracy {percent(results['test_accuracy'])}"
    assert accuracy in capsys.readouterr().out


class Scripted(Task):
    """Given validation accuracies, of which the densest epoch has the best."""

    accuracies = (0.9, 0.8, 0.3, 0.5, 0.4, 0.5)

    def _update_best(self, val_acc):
        super()._update_best(self.accuracies[self.epoch - 1])


@pytest.mark.parametrize(("method", "expected"), [("feather", 4), ("dense", 1)])
def test_best_is_chosen_only_at_the_final_sparsity(tmp_path, method, expected):
    config = tiny(epochs=6, select="best", method=method, data={"validation": 0.2})
    results = train(config, tmp_path / "run", make_task=Scripted)
    assert results["chosen_epoch"] == expected
    assert results["report"]["sparsity"] == pytest.approx(config.sparsity, abs=1e-3)
    history = RunDirectory(tmp_path / "run").read_metrics()
    assert results["validation_accuracy"] == history[expected - 1]["val_acc"]
    assert all(line["sparsity"] < 0.95 for line in history[:2]) or method == "dense"


def test_the_report_contains_the_learned_sparsity(tmp_path):
    results = train(tiny(epochs=1, method="asl"), tmp_path / "run")
    assert results["report"]["learned_sparsity"] == results["learned_sparsity"]
    assert results["learned_sparsity"] < results["report"]["sparsity"]


def test_test_images_do_not_influence_the_choice_of_the_epoch(tmp_path, monkeypatch):
    real = load_dataset

    def other_test_images(config, seed):
        data = real(config, seed)
        wrong = Images(data.test.pixels.flip(0), (data.test.labels + 1) % 10)
        return replace(data, test=wrong)

    config = tiny(epochs=2, select="best", data={"validation": 0.2})
    train(config, tmp_path / "a")
    monkeypatch.setattr(loop, "load_dataset", other_test_images)
    train(config, tmp_path / "b")
    a, b = results_of(tmp_path / "a"), results_of(tmp_path / "b")
    assert a[:2] == b[:2]
    assert a[2]["chosen_epoch"] == b[2]["chosen_epoch"]
    assert a[2]["test_accuracy"] != b[2]["test_accuracy"]


def test_without_validation_images_test_images_are_recorded_and_the_last_epoch_is_used(tmp_path):
    results = train(tiny(epochs=2, data={"validation": 0.0}), tmp_path / "run")
    assert results["validation_accuracy"] is None
    assert results["chosen_epoch"] == 2
    history = RunDirectory(tmp_path / "run").read_metrics()
    assert [line["val_acc"] for line in history] == [None, None]
    assert history[-1]["test_acc"] == results["test_accuracy"]


def test_with_validation_images_the_test_images_are_evaluated_once(finished):
    history = RunDirectory(finished[0]).read_metrics()
    assert all(line["test_acc"] is None and line["val_acc"] > 0 for line in history)


def test_the_dense_baseline_has_the_same_training_budget_and_survives_a_stop(tmp_path):
    config = tiny(compare_dense=True, epochs=1)
    whole = f"--resume --compare-dense --out {tmp_path / 'run'}'"
    with pytest.raises(Interrupted, match=re.escape(whole)):
        train(config, tmp_path / "run", callback=StopAt(41 + 20))
    with pytest.raises(RunError, match=re.escape(whole)):
        RunDirectory(tmp_path / "run" / "dense").read_report()
    results = train(config, tmp_path / "run", resume=True)
    dense = RunDirectory(tmp_path / "run" / "dense")
    assert results["dense"]["test_accuracy"] == dense.read_report()["test_accuracy"]
    assert dense.read_report()["report"]["zeros"] == 0
    assert dense.read_metrics()[-1]["step"] == 41
    assert RunDirectory(tmp_path / "run").read_report()["dense"] == results["dense"]


def test_a_standalone_run_named_dense_is_resumed_itself(tmp_path):
    folder = tmp_path / "dense"
    with pytest.raises(Interrupted, match=re.escape(f"--resume --out {folder}'")):
        train(tiny(method="dense"), folder, callback=StopAt(3))


@pytest.mark.gpu
@pytest.mark.parametrize("devices", [("cpu", "cuda"), ("cuda", "cpu")])
def test_a_run_resumes_on_another_device(tmp_path, devices):
    first, second = (tiny(**{"system.device": device}) for device in devices)
    with pytest.raises(Interrupted):
        train(first, tmp_path / "run", callback=StopAt(60))
    results = train(second, tmp_path / "run", resume=True)
    assert results["report"]["sparsity"] == pytest.approx(0.95, abs=1e-3)
    assert results["test_accuracy"] > 0.5


def test_a_diverging_run_is_an_error_that_says_so(tmp_path):
    config = tiny(method="dense", sparsity=0.0, **{"optimizer.lr": 1e20, "optimizer.clip": None})
    with pytest.raises(TrainingDiverged, match=r"epoch 1\. Try a smaller optimizer\.lr"):
        train(config, tmp_path / "run")


def test_two_processes_cannot_write_one_run(tmp_path):
    with RunDirectory(tmp_path / "run").locked(), pytest.raises(RunError, match="another process"):
        train(tiny(), tmp_path / "run")


def test_the_learning_rate_is_a_cosine_per_step_after_a_linear_warm_up():
    config = tiny(**{"optimizer.warmup_epochs": 1})
    task = Task(config, load_dataset(config.data, 0), CPU)
    n, total = len(task.loader), task.total_steps
    rates = [task.learning_rate(step) for step in range(total)]
    assert rates[: n - 1] == sorted(rates[: n - 1])
    assert rates[n - 1] == pytest.approx(0.05)
    assert rates[n] == max(rates) == pytest.approx(0.05)
    assert rates[n:] == sorted(rates[n:], reverse=True)
    assert rates[n + (total - n) // 2] == pytest.approx(0.025, rel=0.05)
    assert rates[-1] < 1e-4


def test_norms_and_biases_do_not_decay():
    model = feather.models.resnet8(10)
    decayed, free = make_optimizer(model, Config().optimizer).param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    assert all(names[id(p)].endswith("weight") and p.ndim > 1 for p in decayed["params"])
    assert decayed["weight_decay"] == 5e-4
    assert free["weight_decay"] == 0
    assert {id(p) for g in (decayed, free) for p in g["params"]} == set(names)


def test_global_switches_are_restored(tmp_path):
    torch.set_num_threads(2)
    try:
        train(tiny(epochs=1), tmp_path / "run")
        assert torch.get_num_threads() == 2
        assert not torch.are_deterministic_algorithms_enabled()
    finally:
        torch.set_num_threads(1)


def test_excluded_weights_stay_dense_and_are_not_counted(tmp_path, monkeypatch, capsys):
    config = tiny(epochs=1, sparsity=0.5, exclude="conv.*", **{"options.pattern": "2:4"})
    report = train(config, tmp_path / "run")["report"]
    assert [layer["name"] for layer in report["layers"]] == ["fc.weight"]
    assert report["sparsity"] == 0.5
    run = RunDirectory(tmp_path / "run")
    assert run.read_config() == with_class_names(config, tuple("0123456789")).written_out()
    assert run.read_metrics()[-1]["sparsity"] == 0.5
    monkeypatch.setattr("sys.argv", ["feather", "evaluate", str(run.path)])
    with pytest.raises(SystemExit):
        cli.main()
    assert f"{percent(0.5)} of the weights are zero" in " ".join(capsys.readouterr().out.split())


def test_a_method_that_counts_multiply_adds_receives_an_example_input(tmp_path):
    biased = tiny(epochs=2, method="feather-flops", **{"options.gamma": 0.3})
    results = [train(biased, tmp_path / "biased"), train(tiny(epochs=2), tmp_path / "plain")]
    assert results[0]["report"]["zeros"] == results[1]["report"]["zeros"]
    assert results[0]["macs"]["sparse"] < results[1]["macs"]["sparse"]


def test_any_allocation_can_be_biased_by_multiply_adds_by_name(tmp_path):
    common = {"epochs": 2, "method": "hard-ste"}
    biased, plain = (
        train(tiny(**common, **options), tmp_path / str(len(options)))
        for options in ({"options.allocation": "flops^0.3"}, {})
    )
    assert biased["report"]["zeros"] == plain["report"]["zeros"]
    assert biased["macs"]["sparse"] < plain["macs"]["sparse"]
    with pytest.raises(
        ConfigurationError, match=r"'flops\^x' must be 'flops\^' followed by a number"
    ):
        train(tiny(**common, **{"options.allocation": "flops^x"}), tmp_path / "other")


def test_costs_of_a_method_can_be_milliseconds_on_this_machine(tmp_path):
    options = {"options.costs": "milliseconds", "options.gamma": 0.3}
    results = train(tiny(epochs=1, method="feather-flops", **options), tmp_path / "run")
    assert results["report"]["zeros"] == round(0.95 * results["report"]["weights"])
    with pytest.raises(
        ConfigurationError, match=r"'costs' of .* must be None or a mapping, got 'hours'"
    ):
        train(tiny(method="feather-flops", **{"options.costs": "hours"}), tmp_path / "other")


def test_a_missing_device_is_a_one_line_error():
    with pytest.raises(RunError, match="device 'tpu' cannot be used") as caught:
        loop.resolve_device("tpu")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("switch", ["amp", "compile"])
def test_a_speed_switch_trains_the_same_network(tmp_path, switch, finished):
    if switch == "compile":
        # The eager backend of the compiler: the test covers the wiring, not code generation.
        real = torch.compile
        torch.compile = lambda model, **how: real(model, backend="eager", **how)
    try:
        results = train(tiny(epochs=2, **{f"system.{switch}": True}), tmp_path / "run")
    finally:
        if switch == "compile":
            torch.compile = real
    assert results["report"]["sparsity"] == pytest.approx(0.95, abs=1e-3)
    assert results["test_accuracy"] > 0.5


def test_evaluation_is_the_mean_over_images_not_batches():
    data = load_dataset(tiny().data, 0)
    model = TinyNetwork(10, 1).train()
    whole = evaluate(model, EvalLoader(data, data.test, CPU, batch_size=10**6))
    parts = evaluate(model, EvalLoader(data, data.test, CPU, batch_size=100))
    assert model.training
    assert whole[0] == pytest.approx(parts[0])
    assert whole[1] == parts[1]
    assert math.isclose(whole[1] * len(data.test) % 1, 0, abs_tol=1e-6)


def test_a_compiled_model_evaluates_all_but_a_smaller_last_batch():
    data = load_dataset(tiny().data, 0)
    model, sizes = TinyNetwork(10, 1), []

    class Compiled(torch.nn.Module):
        def forward(self, x):
            sizes.append((len(x), model.training))
            return model(x)

    batches = EvalLoader(data, data.test, CPU, batch_size=100)  # of 359 images
    assert evaluate(model, batches, compiled=Compiled()) == evaluate(model, batches)
    assert sizes == [(100, False)] * 3


def test_new_tensors_are_not_filled_before_they_are_written(tmp_path):
    """PyTorch fills them in deterministic mode, about 700 times per step of a ResNet-20."""
    seen = []

    class Inspect(Callback):
        def step(self, images):
            seen.append(torch.utils.deterministic.fill_uninitialized_memory)
            assert torch.are_deterministic_algorithms_enabled()

    train(tiny(epochs=1), tmp_path / "run", callback=Inspect())
    assert not any(seen)
    assert torch.utils.deterministic.fill_uninitialized_memory


def test_a_cuda_graph_requires_a_gpu(tmp_path):
    with pytest.raises(ConfigurationError, match=r"system\.cuda_graph requires a CUDA device"):
        train(tiny(**{"system.cuda_graph": True, "system.device": "cpu"}), tmp_path / "run")


@pytest.mark.gpu
@pytest.mark.parametrize("also", [{}, {"system.compile": True}], ids=["alone", "compiled"])
def test_a_cuda_graph_trains_the_same_network(tmp_path, also):
    """Beyond the end of the schedule, with a smaller last batch per epoch, and a resume."""
    usual = {"system.device": "cuda", "system.deterministic": True, "epochs": 6} | also
    eager = train(tiny(**usual), tmp_path / "eager")
    config = tiny(**usual | {"system.cuda_graph": True})
    captured = train(config, tmp_path / "graph")
    assert captured["report"]["zeros"] == eager["report"]["zeros"]
    graph, plain = (RunDirectory(tmp_path / n).read_metrics() for n in ("graph", "eager"))
    assert graph[0]["train_loss"] == pytest.approx(plain[0]["train_loss"], rel=0.05)
    assert [line["sparsity"] for line in graph] == [line["sparsity"] for line in plain]
    with pytest.raises(Interrupted):
        train(config, tmp_path / "again", callback=StopAt(60))
    again = train(config, tmp_path / "again", resume=True)
    assert again["report"]["zeros"] == captured["report"]["zeros"]
    assert again["test_accuracy"] == pytest.approx(captured["test_accuracy"], abs=0.03)


def test_a_stop_during_an_evaluation_keeps_the_epoch(finished, tmp_path, monkeypatch):
    """The checkpoint is that of the end of the epoch, and the run ends with the same bits."""
    folder, evaluations = tmp_path / "run", itertools.count(1)
    real = Task.evaluate

    def evaluate_and_stop(self, images):
        if next(evaluations) == 2:
            signal.raise_signal(signal.SIGTERM)
        return real(self, images)

    monkeypatch.setattr(Task, "evaluate", evaluate_and_stop)
    with pytest.raises(Interrupted, match="stopped in the evaluation after step"):
        train(tiny(), folder)
    monkeypatch.undo()
    monkeypatch.setitem(feather.models._MODELS, "tiny", TinyNetwork)
    saved = RunDirectory(folder).load()
    assert (saved["epoch"], saved["images"] > 0) == (1, True)
    train(tiny(), folder, resume=True)
    assert results_of(folder) == results_of(finished[0])
