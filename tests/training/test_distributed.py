"""Data-parallel training with several processes."""

import itertools
import os
import re
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import torch_feather as feather
from torch_feather.training import train
from torch_feather.training.callbacks import Callback
from torch_feather.training.checkpoint import RunDirectory
from torch_feather.training.config import apply, resolve_config, to_yaml
from torch_feather.training.distributed import Ranks


class Plain(torch.nn.Module):
    """Without batch statistics: the result does not depend on how a batch is divided."""

    def __init__(self, classes, channels):
        super().__init__()
        self.conv = torch.nn.Conv2d(channels, 8, 3, padding=1)
        self.fc = torch.nn.Linear(8 * 64, classes)

    def forward(self, x):
        return self.fc(torch.relu(self.conv(x)).flatten(1))


class Noisy(Plain):
    """With batch statistics and dropout, which differ between ranks."""

    def __init__(self, classes, channels):
        super().__init__(classes, channels)
        self.norm = torch.nn.BatchNorm2d(8)
        self.dropout = torch.nn.Dropout(0.1)

    def forward(self, x):
        return self.fc(self.dropout(torch.relu(self.norm(self.conv(x)))).flatten(1))


NETWORKS = {"plain": Plain, "noisy": Noisy}


class FailAt(Callback):
    """Ends the first process by an exception of a callback."""

    def __init__(self, step):
        self.left = step

    def step(self, images):
        self.left -= 1
        if self.left == 0:
            raise OSError("the disk went away")


def fail(where):
    """Make this process fail: while loading the data, or in its 5th step."""
    from torch_feather.training import loop
    from torch_feather.training.data import TrainLoader
    from torch_feather.training.errors import DataError

    def load_dataset(config, seed):
        raise DataError("data went away")

    def load(self, drawn, parts):
        for i, part in enumerate(real(self, drawn, parts)):
            if i == 4:
                raise DataError("data went away")
            yield part

    if where == "data":
        loop.load_dataset = load_dataset
    else:
        real, TrainLoader._load = TrainLoader._load, load


PROCESS = """
import os
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch_feather as feather
from test_distributed import NETWORKS, FailAt, fail
from training_callbacks import StopAt
from torch_feather.training import load_config, train

feather.models._MODELS |= NETWORKS
config, folder, stop, failing, where = sys.argv[2:]
callback = StopAt(int(stop))
if failing == os.environ["RANK"]:
    callback = FailAt(5) if where == "callback" else fail(where)
train(load_config(Path(config)), folder, resume=True, callback=callback)
"""


@pytest.fixture(autouse=True)
def networks(monkeypatch):
    for name, network in NETWORKS.items():
        monkeypatch.setitem(feather.models._MODELS, name, network)


def digits(**changes):
    usual = {"epochs": 3, "batch_size": 100, "system.threads": 1, "compare_dense": False}
    return apply(resolve_config("digits"), usual | changes, "test")


def together(config, folder, ranks=2, stop=0, failing=("", "")):
    """Train with `ranks` processes, one of which may fail; return exit codes and errors."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    file = Path(folder).with_suffix(".yaml")
    file.write_text(to_yaml(config))
    here = str(Path(__file__).parent)
    command = [sys.executable, "-c", PROCESS, here, str(file), str(folder), str(stop), *failing]
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            command,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ
            | address
            | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)},
        )
        for rank in range(ranks)
    ]
    errors = [process.communicate(timeout=240)[1] for process in processes]
    return [process.returncode for process in processes], errors


def outcome(folder):
    """Return all results of a run."""
    run = RunDirectory(folder)
    report = run.read_report()
    for key in ("seconds", "commit"):  # a commit may be made meanwhile
        report.pop(key)
    metrics = [{k: v for k, v in m.items() if k != "images_per_s"} for m in run.read_metrics()]
    return run.model_file.read_bytes(), metrics, report


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A run of two processes with a network that differs between ranks."""
    folder = tmp_path_factory.mktemp("pair") / "run"
    codes, errors = together(digits(network="noisy"), folder)
    assert codes == [0, 0], errors
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [100, 431])  # of 1294 images; the last batch has 94, and 1
def test_two_processes_train_the_same_network_as_one(tmp_path, batch_size):
    config = digits(network="plain", batch_size=batch_size)
    codes, errors = together(config, tmp_path / "two")
    assert codes == [0, 0], errors
    train(config, tmp_path / "one")
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for name, weights in one.items():
        torch.testing.assert_close(two[name], weights, rtol=1e-3, atol=1e-4)
    (_, m1, r1), (_, m2, r2) = outcome(tmp_path / "one"), outcome(tmp_path / "two")
    assert r2["report"]["zeros"] == r1["report"]["zeros"]
    assert r2["hardware"].pop("processes") == 2
    for a, b in zip(m1, m2, strict=True):
        assert b["train_loss"] == pytest.approx(a["train_loss"], rel=1e-4)
        assert b["val_acc"] == pytest.approx(a["val_acc"], abs=0.01)


@pytest.mark.slow
def test_the_report_of_two_processes_matches_their_stored_network(pair):
    from torch_feather.cli import main  # noqa: F401 - the extra is installed
    from torch_feather.training.data import eval_loader, load_dataset
    from torch_feather.training.evaluation import evaluate

    _, _, report = outcome(pair)
    config = digits(network="noisy")
    data = load_dataset(config.data, config.seed)
    model = Noisy(10, 1)
    RunDirectory(pair).load_model(model)
    loader = eval_loader(data, data.test, config, torch.device("cpu"), Ranks())
    loss, accuracy = evaluate(model, loader)
    assert report["test_accuracy"] == accuracy  # every image was counted once
    assert report["test_loss"] == pytest.approx(loss, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("step", [7, 30])
def test_stopped_processes_resume_bitwise_identically(pair, tmp_path, step):
    config = digits(network="noisy")
    codes, errors = together(config, tmp_path / "run", stop=step)
    assert all(codes), errors
    assert all(re.search(rf"Interrupted: stopped at step {step} of", e) for e in errors), errors
    codes, errors = together(config, tmp_path / "run")
    assert codes == [0, 0], errors
    assert outcome(tmp_path / "run") == outcome(pair)


@pytest.mark.slow
def test_a_run_resumes_with_another_number_of_processes(tmp_path):
    config = digits(network="noisy")
    together(config, tmp_path / "run", stop=20)
    results = train(config, tmp_path / "run", resume=True)
    assert results["test_accuracy"] > 0.5
    assert RunDirectory(tmp_path / "run").read_metrics()[-1]["step"] == 3 * 13


@pytest.mark.slow
def test_an_error_of_the_first_process_ends_all(tmp_path):
    config = digits(network="plain")
    train(digits(network="plain", epochs=1), tmp_path / "run")
    codes, errors = together(config, tmp_path / "run")
    assert all(codes)
    assert all("a resumed run keeps its settings; epochs was 1, not 3" in e for e in errors)


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "where"), [(1, "data"), (1, "step"), (0, "callback")])
def test_an_error_of_one_process_ends_all(tmp_path, rank, where):
    codes, errors = together(digits(), tmp_path / "run", failing=(str(rank), where))
    assert all(codes)
    others = "went away" if where == "data" else "RunError: another process of this run has ended"
    for process, message in ((rank, "went away"), (1 - rank, others)):
        # Gloo's threads may print a line after it if the other process died first.
        lines = errors[process].splitlines()
        said = [line for line in lines if not line.startswith("terminate")]
        assert message in said[-1]


def test_the_parts_of_all_ranks_are_a_partition_of_nearly_equal_sizes():
    for start, images in itertools.product((0, 5), range(12)):
        for count in (1, 2, 3, 5):
            indices = list(range(start + images))
            parts = [Ranks(r, count).part(start, start + images) for r in range(count)]
            assert [i for part in parts for i in indices[part]] == indices[start:]
            sizes = [part.stop - part.start for part in parts]
            assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("micro_batch", [100, 40, 7])
def test_a_step_in_parts_equals_the_step_of_the_whole_batch(tmp_path, micro_batch):
    config = digits(network="plain", epochs=2)
    parts = replace(config, system=replace(config.system, micro_batch=micro_batch))
    train(config, tmp_path / "whole")
    train(parts, tmp_path / "parts")
    whole, other = (load_file(tmp_path / n / "model.safetensors") for n in ("whole", "parts"))
    for name, weights in whole.items():
        torch.testing.assert_close(other[name], weights, rtol=1e-3, atol=1e-4)
