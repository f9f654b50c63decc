"""`feather train --method auto`: the choice, its record, and runs that resume."""

import json
import sys

import pytest
import torch
from training_callbacks import StopAt

from torch_feather.cli import main
from torch_feather.errors import ConfigurationError
from torch_feather.methods import choice
from torch_feather.methods.choice import CONVOLUTIONAL, DEPTHWISE, OTHER, Situation, choose
from torch_feather.studies.options import options_of
from torch_feather.training import Config, automatic, train
from torch_feather.training.automatic import choose_settings
from torch_feather.training.callbacks import Callback
from torch_feather.training.config import AUTO, apply, load_config, resolve_config
from torch_feather.training.errors import Interrupted, RunError

CPU = torch.device("cpu")


def tiny(**changes):
    settings = {"network": "resnet8", "epochs": 2, "batch_size": 432, "compare_dense": False}
    return resolve_config("digits", overrides=settings | {"method": "auto"} | changes)


def first_rule(monkeypatch, method, **options):
    rule = choice.Rule(method, "of a test", "results/claims.md", options)
    monkeypatch.setattr(choice, "RULES", (rule, *choice.RULES))


class Messages(Callback):
    def __init__(self):
        self.texts = []

    def message(self, text):
        self.texts.append(text)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, Situation(0.95, CONVOLUTIONAL, "SGD", 6)),  # of 1294 images, 432 at a time
        ({"data.drop_last": True}, Situation(0.95, CONVOLUTIONAL, "SGD", 4)),
        ({"network": "mobilenet_v1", "sparsity": 0.9}, Situation(0.9, DEPTHWISE, "SGD", 6)),
        ({"include": ["fc.*"]}, Situation(0.95, OTHER, "SGD", 6)),
        ({"optimizer.name": "adamw"}, Situation(0.95, CONVOLUTIONAL, "AdamW", 6)),
        ({"optimizer.name": "torch.optim:Adam"}, Situation(0.95, CONVOLUTIONAL, "Adam", 6)),
    ],
)
def test_the_situation_is_that_of_the_configuration(monkeypatch, changes, expected):
    seen = []
    monkeypatch.setattr(automatic, "choose", lambda one: seen.append(one) or choose(one))
    found = choose_settings(tiny(**changes), CPU)
    assert seen == [expected]
    assert (found.method, found.options) == ("feather", {})


def test_the_situation_is_that_of_the_training(monkeypatch, tmp_path):
    """The trainer chooses before it creates the network; `sparsify` would choose the same."""
    seen = []
    monkeypatch.setattr(automatic, "choose", lambda one: seen.append(one) or choose(one))
    train(tiny(epochs=1), tmp_path / "run")
    assert seen[0].steps == json.loads((tmp_path / "run/metrics.jsonl").read_text())["step"]
    assert seen[0].steps == 3


def needs_values(num_classes):
    layer = torch.nn.Linear(64, num_classes)
    if not float(layer.weight.detach().square().sum()):
        raise RuntimeError("has no weights")
    return torch.nn.Sequential(torch.nn.Flatten(), layer)


def test_a_network_that_reads_values_when_it_is_created_is_looked_at(monkeypatch):
    seen = []
    monkeypatch.setattr(automatic, "choose", lambda one: seen.append(one) or choose(one))
    choose_settings(tiny(network=f"{__name__}:needs_values"), CPU)
    assert seen[0].network == OTHER


def test_a_choice_of_settings_comes_before_that_of_the_method(monkeypatch):
    seen = []
    monkeypatch.setattr(automatic, "choose", lambda one: seen.append(one) or choose(one))
    config = tiny(**{"automatic": ["batch_size", "optimizer.name"], "network": "vit_small"})
    found = choose_settings(config, CPU)
    assert (seen[0].optimizer, seen[0].network) == ("AdamW", OTHER)
    assert seen[0].steps == 2 * -(-1294 // found.batch_size)


def test_the_choice_is_told_and_recorded(tmp_path):
    messages, run = Messages(), tmp_path / "run"
    results = train(tiny(), run, callback=messages)
    expected = choose(Situation(0.95, CONVOLUTIONAL, "SGD", 6))
    assert messages.texts == [f"method auto chose {expected}"]
    stored = load_config(run / "config.yaml")
    assert (stored.method, stored.options["p"]) == ("feather", 3.0)
    assert stored.method_reason == results["method_reason"] == messages.texts[0]
    assert results["method"] == json.loads((run / "report.json").read_text())["method"] == "feather"


@pytest.mark.parametrize("again", ["auto", "stored"])
@pytest.mark.parametrize("lost", ["nothing", "config.yaml"])
def test_a_resumed_run_keeps_its_method(monkeypatch, tmp_path, again, lost):
    """Though the rules choose another one now."""
    with monkeypatch.context() as patch:
        first_rule(patch, "feather-ham", alpha=40.0)
        expected = train(tiny(), tmp_path / "whole")
        with pytest.raises(Interrupted):
            train(tiny(), tmp_path / "run", callback=StopAt(4))
    stored = load_config(tmp_path / "run/config.yaml")
    assert (stored.method, stored.options["alpha"]) == ("feather-ham", 40.0)
    if lost == "config.yaml":
        (tmp_path / "run/config.yaml").unlink()
    results = train(tiny() if again == "auto" else stored, tmp_path / "run", resume=True)
    assert (results["method"], results["method_reason"]) == ("feather-ham", stored.method_reason)
    assert load_config(tmp_path / "run/config.yaml").options["alpha"] == 40.0
    files = [tmp_path / name / "model.safetensors" for name in ("whole", "run")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert results["test_loss"] == expected["test_loss"]


def test_a_run_of_a_named_method_is_not_resumed_with_another_one(tmp_path):
    with pytest.raises(Interrupted):
        train(tiny(method="gmp"), tmp_path / "run", callback=StopAt(4))
    with pytest.raises(RunError, match="method was 'gmp', not 'feather'"):
        train(tiny(), tmp_path / "run", resume=True)


def test_later_settings_replace_a_choice():
    chosen = choose_settings(tiny(), CPU)
    assert chosen.method_reason is not None
    assert apply(chosen, {"epochs": 3}, "test").method_reason == chosen.method_reason
    for changes in ({"method": "gmp"}, {"options.p": 2}):
        assert apply(chosen, changes, "test").method_reason is None
    again = apply(apply(chosen, {"options.p": 2}, "test"), {"method": "auto"}, "test")
    assert (again.method, again.options) == (AUTO, {})
    assert chosen.dense().method_reason is None


def test_options_belong_to_a_method_that_is_named(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("method: auto\noptions: {p: 2}\n")
    with pytest.raises(ConfigurationError, match=r"mine.yaml: method auto .* got p\. Name the"):
        resolve_config("digits", file)
    file.write_text("method: auto\n")
    assert resolve_config("digits", file).method == AUTO == choice.AUTO
    with pytest.raises(ConfigurationError, match="unknown key 'methods'"):
        apply(Config(), {"methods": "auto"}, "test")
    with pytest.raises(ConfigurationError, match="'auto' is no method"):  # in a study
        options_of("auto")


@pytest.fixture
def feather(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["feather", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            main()
        captured = capsys.readouterr()
        return caught.value.code or 0, captured.out, captured.err

    return run


def test_the_command_line_chooses_and_says_so(feather):
    short = ["--network", "resnet8", "--epochs", 1, "--batch-size", 512, "--no-compare-dense"]
    code, output, errors = feather("train", "--method", "auto", *short)
    assert code == 0
    assert "auto" not in errors  # the line is part of the output, not a warning
    assert output.startswith("method auto chose feather: ")
    assert "runs/digits-resnet8-feather-95-seed0" in output
    code, output, _ = feather("train", "--method", "auto", "--print-config")
    assert "method: auto\n" in output
    code, _, errors = feather("train", "--method", "auto", "--options.p", "2")
    assert code == 1
    assert len(errors.splitlines()) == 1
    assert "chooses the options too" in errors
    _, output, _ = feather("methods")
    assert any(line.split()[:1] == ["auto"] for line in output.splitlines())
