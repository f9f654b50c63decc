"""A search for settings: it resumes, keeps to validation images, and names wrong settings."""

import json

import pytest
from typer.testing import CliRunner

from torch_feather.cli import make_app
from torch_feather.errors import ConfigurationError
from torch_feather.training import load_config, resolve_config, tuning
from torch_feather.training.errors import RunError, TrainingDiverged
from torch_feather.training.tuning import Range, parse_space, tune

pytest.importorskip("optuna")


@pytest.fixture
def trained(monkeypatch):
    """Training runs that take no time: the accuracy is highest at lr 0.2."""
    seen = []

    def train(config, folder, *, resume):
        seen.append((config, folder, resume))
        lr = config.optimizer.lr
        if lr > 0.9:
            raise TrainingDiverged(0.0, 1, config)
        return {"validation_accuracy": 1 - abs(lr - 0.2)}

    monkeypatch.setattr(tuning, "train", train)
    return seen


def config(**changes):
    return resolve_config("digits", None, {"epochs": 1, **changes})


def values(trials):
    return {trial.number: (trial.values, trial.accuracy) for trial in trials}


def test_a_search_in_parts_takes_the_trials_of_one_search(trained, tmp_path):
    whole = tune(config(), tmp_path / "whole", trials=14)
    for count in (3, 11, 14):
        parts = tune(config(), tmp_path / "parts", trials=count)
        assert len(parts) == count
    assert values(parts) == values(whole)
    assert len(trained) == 2 * 14


def test_an_interrupted_trial_is_resumed_with_its_values(trained, tmp_path, monkeypatch):
    real = tuning.train

    def interrupted(*args, **kwargs):
        real(*args, **kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr(tuning, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tune(config(), tmp_path, trials=2)
    monkeypatch.setattr(tuning, "train", real)
    tune(config(), tmp_path, trials=2)
    (first, folder, resumed), (again, same_folder, resumes), _ = trained
    assert first == again
    assert folder == same_folder
    assert resumed
    assert resumes


def test_the_best_settings_are_a_configuration_to_train(trained, tmp_path):
    found = tune(config(sparsity=0.9), tmp_path, trials=5, space={"optimizer.lr": [0.1, 0.2, 1.0]})
    best = load_config(tmp_path / "best.yaml")
    assert best.optimizer.lr == found[0].values["optimizer.lr"]
    assert best.sparsity == 0.9
    rows = json.loads((tmp_path / "trials.json").read_text())
    assert [row["validation_accuracy"] for row in rows] == [one.accuracy for one in found]


def test_a_diverged_trial_is_the_last_and_the_search_continues(trained, tmp_path):
    found = tune(config(), tmp_path, trials=8, space={"optimizer.lr": [0.1, 1.0]})
    assert len(found) == 8
    assert {one.values["optimizer.lr"] for one in found if one.accuracy is None} == {1.0}
    assert found[0].accuracy == pytest.approx(0.9)
    assert found[-1].accuracy is None


def test_other_settings_in_the_same_folder_are_an_error(trained, tmp_path):
    tune(config(), tmp_path, trials=1)
    with pytest.raises(RunError, match="search with other settings"):
        tune(config(sparsity=0.5), tmp_path, trials=2)
    with pytest.raises(RunError, match="search with other settings"):
        tune(config(), tmp_path, trials=2, space={"optimizer.lr": Range(0.1, 0.2)})
    tune(config(**{"system.threads": 1}), tmp_path, trials=2)  # may change


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optimizer.lr", "write KEY=LOW:HIGH"),
        ("optimizer.lr=1:0.1", "smaller limit first"),
        ("optimizer.lr=0:1:log", "above 0"),
        ("optimizer.rl=0.1:1", "optimizer.lr"),
        ("optimizer.lr=-1:1", "must be positive"),
    ],
)
def test_wrong_spaces_are_errors_before_the_first_trial(text, message, trained, tmp_path):
    with pytest.raises(ConfigurationError, match=message):
        tune(config(), tmp_path / "new", space=parse_space([text]))
    assert not (tmp_path / "new").exists()
    assert trained == []


def test_a_search_by_test_images_is_an_error(trained, tmp_path):
    with pytest.raises(ConfigurationError, match=r"Set data\.validation above 0"):
        tune(config(**{"data.validation": 0}), tmp_path)


def test_the_command_searches_and_resumes(trained, tmp_path):
    options = ["--set", "epochs=1", "--search", "optimizer.lr=0.1,0.2", "--out", str(tmp_path)]
    for trials in ("2", "3"):
        result = CliRunner().invoke(make_app(), ["tune", "--trials", trials, *options])
        assert result.exit_code == 0, result.output
    assert "trial 2: " in result.output
    assert "trial 0: " not in result.output  # it ended the first time
    assert str(tmp_path / "best.yaml") in result.output
    assert [config.epochs for config, *_ in trained] == [1, 1, 1]
    result = CliRunner().invoke(make_app(), ["tune", "--trials", "3", "--json", *options])
    found = json.loads(result.stdout)
    assert found["best"] == str(tmp_path / "best.yaml")
    assert sorted(one["trial"] for one in found["trials"]) == [0, 1, 2]
    scores = [one["accuracy"] for one in found["trials"]]
    assert scores == sorted(scores, reverse=True)
    assert all(one["settings"]["optimizer.lr"] in (0.1, 0.2) for one in found["trials"])
