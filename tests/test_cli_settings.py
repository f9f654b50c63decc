"""Settings as options of the command line, and the forms of its output."""

import json
import os
import re
import subprocess
import sys

import pytest
import yaml

from torch_feather.cli import main
from torch_feather.cli.settings import as_text, settings_help
from torch_feather.recipes import available_recipes, recipe_values
from torch_feather.training.config import flatten, known_keys, resolve_config, to_dict

SMALL = ["--network", "resnet8", "--epochs", "1", "--batch-size", "512", "--no-compare-dense"]
SMALL += ["--system.threads", "1"]


@pytest.fixture
def feather(monkeypatch, tmp_path, capsys):
    """Run the command in an empty folder; return exit code, output and errors."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_FEATHER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["feather", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            main()
        captured = capsys.readouterr()
        return caught.value.code or 0, captured.out, captured.err

    return run


def printed(feather, *arguments):
    code, output, errors = feather("train", *arguments, "--print-config")
    assert code == 0, errors
    assert errors == ""
    return flatten(yaml.safe_load(output))


@pytest.mark.parametrize("key", ["compare_dense", "track_masks"])
def test_a_flag_takes_a_value_as_other_settings_do(feather, key):
    name = key.replace("_", "-")
    for words, value in [
        ([f"--{name}"], True),
        ([f"--{key}"], True),
        ([f"--no-{name}"], False),
        ([f"--{key}", "false"], False),
        ([f"--{name}", "True"], True),
        ([f"--{key}=false"], False),
        ([f"--{name}", "--no-" + name], False),
        ([f"--{name}", "--seed", "3"], True),
    ]:
        assert printed(feather, *words)[key] is value
    code, _, errors = feather("train", f"--{key}=maybe")
    assert code == 2
    assert f"--{key} must be true or false, got 'maybe'" in " ".join(errors.split())
    _, _, errors = feather("train", "--set", f"{key}=false", "--print-config")
    assert f"Use --KEY VALUE, such as --no-{name}." in errors


def test_every_setting_can_be_given_as_an_option(feather):
    # --options.NAME, --recipe; the reason is written by the choice of a method.
    others = {"options", "recipe", "method_reason"}
    assert settings_help().keys() == {key for key, _ in known_keys()} - others
    _, output, _ = feather("train", "--help")
    for key in settings_help():
        option = "--" + key.replace("data.name", "data").replace("data.path", "data-path")
        assert re.search(rf"{option.replace('_', '[_-]')}\b", output) or key in (
            "batch_size", "track_masks", "compare_dense", "distillation.teacher",
        ), option  # fmt: skip


def test_options_are_typed_like_the_settings_of_a_file(feather):
    given = ["--optimizer.lr", "5e-2", "--optimizer.clip=null", "--data.flip", "true"]
    given += ["--exclude", "[conv1.weight, '*.fc']", "--batch_size", "32", "--options.p", "2"]
    given += ["--optimizer.weight-decay", "0.1", "--include", "*.weight", "--options.pattern=2:4"]
    found = printed(feather, *given)
    assert (found["optimizer.lr"], found["optimizer.clip"], found["data.flip"]) == (
        0.05,
        None,
        True,
    )
    assert (found["exclude"], found["include"]) == (["conv1.weight", "*.fc"], ["*.weight"])
    assert (found["batch_size"], found["optimizer.weight_decay"]) == (32, 0.1)
    assert (found["options.p"], found["options.pattern"]) == (2, "2:4")


def test_files_are_laid_over_the_recipe_in_their_order_and_options_over_all(feather, tmp_path):
    (tmp_path / "a.yaml").write_text("epochs: 3\nseed: 3\noptimizer: {lr: 0.3}\n")
    (tmp_path / "b.yaml").write_text("seed: 4\noptimizer: {momentum: 0.4}\n")
    files = ["--recipe", "cifar100", "--config", "a.yaml", "--config", "b.yaml"]
    found = printed(feather, *files, "--epochs", "5")
    expected = {"recipe": "cifar100", "epochs": 5, "seed": 4, "optimizer.lr": 0.3}
    expected |= {"optimizer.momentum": 0.4, "data.name": "cifar100"}
    assert {key: found[key] for key in expected} == expected


def test_what_print_config_prints_is_a_configuration_file(feather, tmp_path):
    _, output, _ = feather("train", "--recipe", "imagenet", "--seed", "7", "--print-config")
    (tmp_path / "all.yaml").write_text(output)
    assert resolve_config(None, [tmp_path / "all.yaml"]) == resolve_config(
        "imagenet", None, {"seed": 7}
    )
    assert [*tmp_path.iterdir()] == [tmp_path / "all.yaml"]


@pytest.mark.parametrize("recipe", ["cifar100", "imagenet", "finetune"])
def test_the_help_shows_the_values_in_force_for_the_recipe(feather, recipe):
    code, output, errors = feather("train", "--recipe", recipe, "--help")
    assert code == 0, errors
    text = " ".join(re.sub(r"[│\n]", " ", output).split())
    config = resolve_config(recipe)
    values = flatten(to_dict(config)) | dict.fromkeys(
        config.automatic or (), "chosen when the training starts"
    )
    for key in (
        "epochs",
        "optimizer.lr",
        "optimizer.weight_decay",
        "data.resolution",
        "system.amp",
    ):
        entry = text[re.search(rf"--{key} ", text).start() :]
        assert re.search(r"\[default: ([^\]]*)\]", entry)[1] == as_text(values[key])


@pytest.mark.parametrize("name", sorted(available_recipes()))
def test_a_recipe_prints_its_values(feather, name):
    _, output, _ = feather("recipes", name)
    assert yaml.safe_load(output) == recipe_values(name)
    _, output, _ = feather("recipes", name, "--json")
    assert json.loads(output) == recipe_values(name)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--optimzer.lr", "1"], "--optimizer.lr"),
        (["train", "--lr", "1"], "Perhaps you meant --optimizer.lr"),
        (["train", "--optimiser.momentum=0.9"], "--optimizer.momentum"),
        (["train", "--data.pth", "x"], "--data.path"),
        (["train", "--epoch", "1"], "--epochs"),
        (["trian"], "train"),
        (["recipes", "cifar-10"], "did you mean 'cifar10'"),
        (["train", "--optimizer.name", "adam"], "did you mean 'adamw'"),
        (["train", "--loss", "cross_entropy"], "did you mean 'cross-entropy'"),
        (["train", "--options.thta", "1", *SMALL], "did you mean 'theta'"),
    ],
)
def test_a_misspelling_is_answered_with_the_near_name(feather, arguments, message):
    code, _, errors = feather(*arguments)
    assert code in (1, 2)
    assert message in " ".join(re.sub(r"[│\n]", " ", errors).split())


def test_the_old_form_of_settings_works_with_a_warning(feather):
    found, errors = feather("train", "--set", "optimizer.lr=0.05", "--print-config")[1:]
    assert yaml.safe_load(found)["optimizer"]["lr"] == 0.05
    assert errors == (
        "feather: warning: --set KEY=VALUE is deprecated. Use --KEY VALUE, such as "
        "--optimizer.lr 0.05.\n"
    )
    code, _, errors = feather("train", "--set", "optimizer.lr")
    assert (code, "write key=value" in errors) == (1, True)


def test_a_value_on_the_command_line_has_the_limits_of_a_file(feather):
    for value in ("[&a 1, *a]", "!!set {a}", "[" * 1000):
        code, _, errors = feather("train", "--automatic", value)
        assert code == 1
        assert errors.startswith("feather: command line: ")
        assert errors.count("\n") == 1


def test_quiet_and_json_print_one_thing_alone(feather, tmp_path):
    code, output, errors = feather("train", *SMALL, "--quiet", "--out", "a")
    assert (code, output) == (0, "a\n"), errors
    code, output, _ = feather("train", *SMALL, "--json", "--out", "b")
    results = json.loads(output)
    assert results.pop("run") == "b"
    assert results == json.loads((tmp_path / "b" / "report.json").read_text())
    report = json.loads(feather("evaluate", "b", "--json", "--device", "cpu")[1])
    assert report["accuracy"] == results["test_accuracy"]
    assert report.keys() == {"run", "data", "images", "accuracy", "loss", "sparsity", "macs"}
    exported = json.loads(feather("export", "b", "--json")[1])
    assert exported["bytes"] == (tmp_path / exported["file"]).stat().st_size
    assert json.loads(feather("methods", "--json")[1])["gmp"]["options"]["every"] == 1
    assert json.loads(feather("recipes", "--json")[1]) == available_recipes()


@pytest.mark.parametrize(
    "arguments",
    [
        ["--network", "resnet9"],
        ["--options.q", "2"],
        ["--optimizer.arguments", "{beta: 1}"],
        ["--loss", "binary"],
        ["--optimizer.layers", "{nothing.*: {lr: 2}}"],
        ["--method", "nowhere:method"],
        ["--system.device", "tpu"],
        ["--optimizer.warmup_epochs", "9"],
    ],
    ids=lambda arguments: arguments[0].lstrip("-"),
)
def test_a_run_that_is_refused_leaves_no_folder(feather, tmp_path, arguments):
    code, _, errors = feather("train", *SMALL, *arguments)
    assert code == 1, errors
    assert not (tmp_path / "runs").exists()
    feather("train", *SMALL, *arguments, "--out", "own")
    assert not (tmp_path / "own").exists()


@pytest.mark.parametrize(
    "command",
    [["--help"], ["train", "--help"], ["evaluate", "--help"], ["--version"], ["recipes", "digits"],
     ["train", "--print-config"]],
    ids=" ".join,
)  # fmt: skip
def test_what_needs_no_network_does_not_import_pytorch(command):
    """Which is most of the time that a command takes to start."""
    script = f"""
import sys
sys.argv = ["feather", *{command}]
from torch_feather.cli import main
try:
    main()
finally:
    print(*sorted({{"torch", "numpy"}} & sys.modules.keys()), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stderr.strip() == ""


def test_a_folder_without_its_option_is_named_with_it(feather, tmp_path):
    (tmp_path / "my photos").mkdir()
    code, _, errors = feather("train", "my photos")
    assert code == 2
    assert "--data imagefolder --data-path 'my photos'" in errors


def test_a_shell_completes_settings():
    words = {"COMP_WORDS": "feather train --optimizer.la", "COMP_CWORD": "2"}
    environment = os.environ | words | {"_FEATHER_COMPLETE": "complete_bash"}
    script = "import sys; sys.argv = ['feather']; from torch_feather.cli import main; main()"
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert set(done.stdout.split()) == {"--optimizer.layers", "--optimizer.label_smoothing",
                                        "--optimizer.layer_decay"}  # fmt: skip
