"""Names and keys of version 0.1 keep working, with a DeprecationWarning."""

import importlib
import sys
import warnings

import pytest

from torch_feather.cli import main
from torch_feather.training.callbacks import Callback
from torch_feather.training.checkpoint import RunDirectory, changed_keys
from torch_feather.training.config import (
    Config,
    SystemConfig,
    apply,
    load_config,
    resolve_config,
    to_yaml,
    upgrade,
)
from torch_feather.training.loop import train

V01 = """
network: resnet8
method: asl
sparsity: 0.95
options:
  budget_weight: 10.0
  rate: 0.02
data:
  name: digits
system:
  graph: true
"""


@pytest.mark.parametrize(
    ("module", "old", "new"),
    [
        ("watch", "Watch", "callbacks.Callback"),
        ("watch", "Watches", "callbacks.Callbacks"),
        ("loggers", "observers", "loggers.logging_callbacks"),
        ("loggers", "TensorBoardWatch", "loggers.TensorBoardCallback"),
        ("loggers", "WandbWatch", "loggers.WandbCallback"),
        ("console", "ConsoleWatch", "console.ConsoleCallback"),
        ("step", "Captured", "step.CudaGraphStep"),
        ("distributed", "joined", "distributed.process_group"),
        ("checkpoint", "TWIN", "checkpoint.DENSE_BASELINE"),
        ("checkpoint", "sweep", "checkpoint.remove_temporary_files"),
    ],
)
def test_an_old_name_is_the_new_object(module, old, new):
    package = "torch_feather.training"
    target, _, name = new.partition(".")
    with pytest.warns(DeprecationWarning, match=f"{old} is deprecated. Use {package}.{new}"):
        found = getattr(importlib.import_module(f"{package}.{module}"), old)
    assert found is getattr(importlib.import_module(f"{package}.{target}"), name)


@pytest.mark.parametrize("module", ["watch", "loggers", "console", "checkpoint"])
def test_an_unknown_name_is_an_attribute_error(module):
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        importlib.import_module(f"torch_feather.training.{module}").nothing  # noqa: B018


def test_old_methods_of_a_run_directory_work(tmp_path):
    run = RunDirectory(tmp_path)
    with pytest.warns(DeprecationWarning, match="dense_baseline"):
        assert run.dense_twin().path == run.dense_baseline().path
    with pytest.warns(DeprecationWarning, match="resume_hint"):
        assert run.go_on() == run.resume_hint()


def test_train_accepts_a_watch(tmp_path):
    seen = []

    class Count(Callback):
        def step(self, images):
            seen.append(images)

    config = apply(resolve_config("digits"), {"epochs": 1, "compare_dense": False}, "test")
    with pytest.warns(DeprecationWarning, match=r"train\(watch=...\) is deprecated"):
        train(config, tmp_path / "run", watch=Count())
    assert sum(seen) == 1294


def test_a_dispensable_callback_is_optional():
    with pytest.warns(DeprecationWarning, match="optional"):

        class Old(Callback):
            dispensable = True

    assert Old.optional
    assert not Callback.optional


def test_the_old_field_of_the_system_configuration_works():
    with pytest.warns(DeprecationWarning, match="cuda_graph"):
        system = SystemConfig(graph=True)
    assert system == SystemConfig(cuda_graph=True)
    with pytest.warns(DeprecationWarning, match="cuda_graph"):
        assert system.graph is True


def test_an_old_key_given_by_the_user_is_accepted_with_a_warning(tmp_path):
    with pytest.warns(DeprecationWarning, match=r"here: system\.graph .* Use system\.cuda_graph"):
        assert apply(Config(), {"system": {"graph": True}}, "here").system.cuda_graph
    (tmp_path / "mine.yaml").write_text("system: {graph: true}\n")
    with pytest.warns(DeprecationWarning, match=r"mine\.yaml: system\.graph"):
        assert resolve_config(None, tmp_path / "mine.yaml").system.cuda_graph


def test_the_command_line_shows_the_warning(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = ["train", "--set", "system.graph=true", "--set", "system.device=cpu"]
    monkeypatch.setattr(sys, "argv", ["feather", *arguments])
    with pytest.raises(SystemExit):
        main()
    form, warning, error = capsys.readouterr().err.splitlines()
    assert "--set KEY=VALUE is deprecated" in form
    expected = "feather: warning: command line: system.graph is deprecated. Use system.cuda_graph."
    assert warning == expected
    assert error.startswith("feather: system.cuda_graph requires a CUDA device")


def test_a_stored_configuration_of_version_0_1_is_read_without_a_warning(tmp_path):
    (tmp_path / "config.yaml").write_text(V01)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = load_config(tmp_path / "config.yaml")
    assert config.system.cuda_graph
    assert config.options == {"budget_weight": 10.0, "lr_multiplier": 0.02}


def test_a_renamed_option_given_by_the_user_is_accepted_with_a_warning():
    with pytest.warns(DeprecationWarning, match=r"options\.rate .* Use options\.lr_multiplier"):
        config = apply(Config(), {"method": "asl", "options.rate": 0.5}, "here")
    assert config.options == {"lr_multiplier": 0.5}


def test_an_option_with_the_old_name_of_another_method_is_not_renamed():
    assert upgrade({"method": "own:method", "options.rate": 1}) == {
        "method": "own:method",
        "options.rate": 1,
    }


def test_a_run_resumes_if_its_configuration_lacks_an_option_with_a_default(tmp_path):
    stored = Config().written_out()
    stored.options.pop("min_density")
    (tmp_path / "config.yaml").write_text(to_yaml(stored))
    assert changed_keys(load_config(tmp_path / "config.yaml"), Config()) == ""
    other = Config(options={"min_density": 0.1})
    assert "min_density was 0.0, not 0.1" in changed_keys(stored, other)
