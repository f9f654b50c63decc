"""`--init`: training from the weights of another run or of a file."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from test_distributed import NETWORKS
from training_callbacks import StopAt

import torch_feather as feather
from torch_feather import models
from torch_feather.cli import main
from torch_feather.errors import ConfigurationError
from torch_feather.training.checkpoint import RunDirectory
from torch_feather.training.config import apply, resolve_config
from torch_feather.training.data import load_dataset
from torch_feather.training.errors import Interrupted, RunError
from torch_feather.training.export_run import export_run, run_metadata
from torch_feather.training.loop import train
from torch_feather.training.task import Task

CPU = torch.device("cpu")


@pytest.fixture(autouse=True, scope="module")
def networks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models._MODELS, "plain", NETWORKS["plain"])
        yield


def digits(**changes):
    usual = {"network": "plain", "epochs": 2, "batch_size": 256, "compare_dense": False,
             "sparsity": 0.9, "system.threads": 1}  # fmt: skip
    return apply(resolve_config("digits"), usual | changes, "test")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run at 90% sparsity."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    train(digits(), folder)
    return folder


@pytest.mark.parametrize("source", ["run", "sparse", "safetensors"])
def test_a_run_starts_from_the_given_weights_and_their_sparsity(trained, tmp_path, source):
    path = trained
    if source != "run":
        path = export_run(RunDirectory(trained), source, tmp_path / "file.safetensors")
    config = digits(init=str(path), sparsity=0.95, seed=5)
    task = Task(config, load_dataset(config.data, config.seed), CPU)
    stored = load_file(RunDirectory(trained).model_file)
    assert all(
        torch.equal(tensor, stored[name]) for name, tensor in task.model.state_dict().items()
    )
    assert task.sparsifier.sparsity == feather.sparsity(task.model) > 0.899


def test_a_run_resumes_without_the_file_of_its_initial_weights(trained, tmp_path):
    start = tmp_path / "start"
    shutil.copytree(trained, start)
    config = digits(init=str(start), sparsity=0.95)
    train(config, tmp_path / "whole")

    with pytest.raises(Interrupted):
        train(config, tmp_path / "run", callback=StopAt(3))
    shutil.rmtree(start)
    train(config, tmp_path / "run", resume=True)
    for folder in ("whole", "run"):
        run = RunDirectory(tmp_path / folder)
        sparse = [line["sparsity"] for line in run.read_metrics()]
        assert sparse == sorted(sparse)
        assert sparse[0] > 0.9
    files = [RunDirectory(tmp_path / f).model_file.read_bytes() for f in ("whole", "run")]
    assert files[0] == files[1]
    assert run_metadata(RunDirectory(tmp_path / "run"))["config"]["init"] == "start"


def test_another_network_or_a_missing_file_is_an_error_that_says_why(trained, tmp_path):
    data = load_dataset(digits().data, 0)
    with pytest.raises(ConfigurationError, match=r"do not fit ResNet: .*"):
        Task(digits(network="resnet8", init=str(trained)), data, CPU)
    with pytest.raises(RunError, match="no such run directory or file"):
        Task(digits(init=str(tmp_path / "nowhere")), data, CPU)


def test_the_command_line_accepts_initial_weights(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(trained.parent)
    out = tmp_path / "out"
    arguments = ["train", "--network", "plain", "--init", trained.name, "--epochs", "1",
                 "--no-compare-dense", "--out", str(out)]  # fmt: skip
    monkeypatch.setattr("sys.argv", ["feather", *arguments])
    with pytest.raises(SystemExit) as done:
        main()
    assert not done.value.code
    assert RunDirectory(out).read_config().init == str(trained)
    assert json.loads(RunDirectory(out).report_file.read_text())["target_sparsity"] == 0.95
