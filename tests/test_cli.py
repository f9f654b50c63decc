import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import torch_feather
from torch_feather import available_methods
from torch_feather.cli import main
from torch_feather.errors import FeatherWarning
from torch_feather.recipes import available_recipes
from torch_feather.training.config import parse_assignments
from torch_feather.training.console import percent

EXAMPLES = Path(__file__).parents[1] / "examples"
QUICK = ["--epochs", "1", "--batch-size", "256", "--system.threads", "1"]


@pytest.fixture
def feather(monkeypatch, tmp_path, capsys):
    """Run the command in an empty folder; return exit code, output and errors."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_FEATHER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "120")

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["feather", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            main()
        captured = capsys.readouterr()
        return caught.value.code or 0, captured.out, captured.err

    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run with its dense baseline."""
    folder = tmp_path_factory.mktemp("cli") / "run"
    command = [sys.executable, "-m", "torch_feather.cli", "train", *QUICK, "--out", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_train_without_arguments_compares_with_dense_and_prints_its_directory(run):
    folder, output = run
    accuracy = json.loads((folder / "report.json").read_text())["test_accuracy"]
    assert re.search(rf"feather {percent(0.95)} sparse +{percent(accuracy)}", output)
    assert re.search(r"dense baseline +\d", output)
    assert re.search(r"layer3.0.conv2.weight +128x128x3x3 +147,456", output)
    assert re.search(rf"total +306,720 +291,384 +{percent(0.95)}", output)
    assert output.rstrip().endswith(str(folder))
    for name in ("curves.png", "layers.png", "operator.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")


def test_evaluate_gives_the_reported_accuracy(run, feather):
    folder, _ = run
    code, output, _ = feather("evaluate", folder, "--device", "cpu")
    accuracy = json.loads((folder / "report.json").read_text())["test_accuracy"]
    assert code == 0
    assert f"accuracy {percent(accuracy)}" in output
    assert f"{percent(0.95)} of the weights are zero" in output


def test_report_shows_the_table_and_the_file(run, feather):
    folder, _ = run
    code, output, _ = feather("report", folder)
    assert code == 0
    assert "dense baseline" in output
    code, output, _ = feather("report", folder, "--json")
    assert json.loads(output) == json.loads((folder / "report.json").read_text())


def test_bench_times_the_network_and_stores_its_tuning_results(run, feather, tmp_path):
    folder, _ = run
    tuning = tmp_path / "tuning.json"
    code, output, errors = feather("bench", folder, "--tuning", tuning, "--batch", 2)
    assert code == 0, errors
    assert re.search(r"layer3.0.conv2.weight +\d\d.\d\d ?% +\d", output)
    ratio = r"batch 2, 1 thread\(s\): PyTorch [\d.]+ ms, sparse [\d.]+ ms, [\d.]+× as fast"
    difference = re.search(ratio + "; largest difference (.+) of the largest output", output)
    assert float(difference[1]) < 1e-4
    # Stored tuning results are not measured again: the output shows the times of the file.
    times = json.loads(tuning.read_text())
    times["fc.weight"]["dense_ms"] = 123.456
    tuning.write_text(json.dumps(times))
    code, output, _ = feather("bench", folder, "--tuning", tuning)
    assert "123.456" in output
    tuning.write_text("{")
    code, _, errors = feather("bench", folder, "--tuning", tuning)
    assert code == 1
    assert f"{tuning} holds no tuning results of compile_sparse" in errors


def test_the_old_name_of_the_tuning_file_is_accepted_with_a_warning(feather):
    _, _, errors = feather("bench", "nowhere", "--choices", "tuning.json")
    warning, error = errors.splitlines()
    assert warning == "feather: warning: --choices is deprecated. Use --tuning."
    assert error == "feather: nowhere: no such run directory"


@pytest.mark.parametrize("option", ["--threads", "--batch"])
def test_a_benchmark_of_no_thread_or_image_is_a_usage_error(feather, option):
    code, _, errors = feather("bench", ".", option, "0")
    assert code == 2
    assert f"Invalid value for '{option}'" in errors


@pytest.mark.slow
def test_the_runtime_alone_serves_a_run_with_its_measured_accuracy(
    run, feather, tmp_path, monkeypatch, capsys
):
    folder, _ = run
    feather("export", folder, "--out", tmp_path / "model.safetensors")
    monkeypatch.setattr(sys, "argv", ["images.py", str(folder), "images.npz"])
    runpy.run_path(str(EXAMPLES / "images.py"), run_name="__main__")
    assert "359 images" in capsys.readouterr().out
    missing = ["yaml", "typer", "rich", "matplotlib", "sklearn", "pyarrow", "jinja2", "PIL"]
    script = f"""
import runpy, sys
sys.modules.update(dict.fromkeys({missing}))
sys.argv = ["serve.py", "model.safetensors", "images.npz", "--requests", "10"]
runpy.run_path({str(EXAMPLES / "serve.py")!r}, run_name="__main__")
"""
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    accuracy = json.loads((folder / "report.json").read_text())["test_accuracy"]
    assert done.stdout.count(f"{accuracy:.2%} accuracy on 359 images") == 2
    assert "95.00% of the weights are zero" in done.stdout


def test_methods_and_recipes_are_listed_completely(feather):
    _, output, _ = feather("methods")
    assert {line.split()[0] for line in output.splitlines() if line[:1].strip()} >= {
        *available_methods(),
        "dense",
    }
    _, output, _ = feather("recipes")
    assert [line.split()[0] for line in output.splitlines()] == list(available_recipes())


@pytest.mark.parametrize(
    "command", ["train", "evaluate", "report", "demo", "export", "bench", "methods", "recipes"]
)
def test_help_exists_for_every_command(feather, command):
    code, output, _ = feather(command, "--help")
    assert code == 0
    assert "Usage" in output
    assert ">>>" not in output  # the examples of the Python function


def test_the_version_is_that_of_the_package(feather):
    code, output, _ = feather("--version")
    assert (code, output) == (0, f"torch-feather {torch_feather.__version__}\n")


def test_help_has_examples(feather):
    _, output, _ = feather("train", "--help")
    assert "--recipe cifar100 --data-path" in output
    assert "feather train --resume --out runs/a" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate", "nowhere"], "nowhere: no such run directory"),
        (["report", "nowhere"], "nowhere: no such run directory"),
        (["report", "."], "not a run directory"),
        (["report", __file__], "test_cli.py: is a file, not a run directory"),
        (["bench", "nowhere"], "nowhere: no such run directory"),
        (["train", "--recipe", "digit"], "did you mean 'digits'"),
        (["train", "--config", "mine.yaml"], "mine.yaml: no such file"),
        (["train", "--optimizer.schedule", "cosin"], "did you mean 'cosine'"),
        (["train", "--optimizer.lr", "ten"], "optimizer.lr must be a number, got 'ten'"),
        (["train", "--sparsity", "1.5"], "sparsity must be a fraction"),
        (["train", "--epochs", "0"], "epochs must be at least 1"),
        (["train", "--method", "fether"], "did you mean 'feather'"),
        (["train", "--options.q", "2"], "no option 'q'"),
        (["train", "--network", "resnet9"], "unknown network 'resnet9'"),
        (["train", "--network", "timm/resnet9999"], "timm has no model"),
        (["train", "--network", "timm/vit_tiny_patch16_224"], "does not accept images of 1x8x8"),
        (["train", "--data", "mnist"], "'mnist'"),
        (["train", "--data", "cifar10"], "cifar10 requires --data-path"),
        (["train", "--data", "cifar100", "--data-path", "nowhere"], "no such folder"),
        (["train", "--data", "cifar100", "--data-path", "."], "found neither train"),
        (["train", "--system.device", "tpu"], "device 'tpu'"),
        (["train", "--resume", "--out", "nowhere"], "no run to resume"),
    ],
)
def test_a_mistake_is_a_one_line_error(feather, tmp_path, arguments, message):
    code, _, errors = feather(*arguments)
    assert code == 1
    assert errors.startswith("feather: ")
    assert errors.count("\n") == 1
    assert message in errors


@pytest.mark.parametrize(
    "arguments", [["train", "--epochs", "x"], ["train", "--resume"], ["trian"], ["train", "--lr"]]
)
def test_an_invalid_command_is_a_usage_error(feather, arguments):
    code, _, errors = feather(*arguments)
    assert code == 2
    assert re.search(r"mean|valid integer|requires --out", errors)
    assert "Traceback" not in errors


def test_a_run_is_neither_overwritten_nor_changed(run, feather):
    folder, _ = run
    code, _, errors = feather("train", *QUICK, "--out", folder)
    assert code == 1
    assert "already holds a run" in errors
    code, _, errors = feather("train", "--resume", "--out", folder, "--sparsity", "0.5")
    assert code == 1
    assert "sparsity was 0.95, not 0.5" in errors


@pytest.mark.slow
def test_each_run_has_its_own_directory(feather, tmp_path):
    quick = ["train", *QUICK, "--no-compare-dense", "--network", "mobilenet_v1"]
    for _ in range(2):
        code, _, errors = feather(*quick, "--method", "dense")
        assert code == 0, errors
    names = sorted(p.name for p in (tmp_path / "runs").iterdir())
    assert names == ["digits-mobilenet_v1-dense-seed0", "digits-mobilenet_v1-dense-seed0-2"]


def test_damaged_files_of_a_run_are_a_one_line_error(run, feather, tmp_path):
    folder, _ = run
    (tmp_path / "config.yaml").write_text((folder / "config.yaml").read_text())
    code, _, errors = feather("evaluate", tmp_path)
    assert code == 1
    assert "this run has not finished" in errors
    (tmp_path / "model.safetensors").write_bytes(b"\0" * 100)
    (tmp_path / "report.json").write_text("{")
    for command in ("evaluate", "report"):
        code, _, errors = feather(command, tmp_path)
        assert code == 1
        assert errors.count("\n") == 1


@pytest.mark.parametrize("missing", ["typer", "rich", "yaml"])
def test_the_message_for_a_missing_extra_says_what_to_install(missing):
    script = f"import sys; sys.modules[{missing!r}] = None; import torch_feather.cli"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 1
    assert f"needs {missing}" in done.stderr
    assert "pip install 'torch-feather[train]'" in done.stderr
    assert "Traceback" not in done.stderr


HELP = """
import sys
from contextlib import redirect_stdout
from io import StringIO
from torch_feather.cli import main, make_app
from torch_feather.studies.descriptions import DESCRIPTIONS
from typer.main import get_command

commands = [[name] for name in get_command(make_app()).commands]
commands += [["study", name] for name in DESCRIPTIONS]
for words in [[], *commands]:
    sys.argv = ["feather", *words, "--help"]
    shown = StringIO()
    try:
        with redirect_stdout(shown):
            main()
    except SystemExit as stop:
        assert not stop.code, (words, stop.code)
    assert "Usage" in shown.getvalue(), words
    heavy = ["torch", "timm", "torchvision", "sklearn", "matplotlib", "pyarrow", "safetensors"]
    heavy += ["pydantic"]  # which Typer loads to convert values
    loaded = [module for module in heavy if module in sys.modules]
    assert not loaded, (words, loaded)
print(len(commands))
"""


def test_no_help_imports_pytorch_or_training_dependencies():
    done = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 20  # 11 commands and 9 studies


def test_a_warning_names_options_in_the_form_of_the_command_line(feather):
    """What it suggests can be given to the command as it is."""
    _, _, errors = feather("train", "--sparsity", "0.9995", *QUICK, "--out", "run")
    [line] = [line for line in errors.splitlines() if "Every weight of" in line]
    arguments = dict(re.findall(r"--([\w.]+) ('[^']*'|[\d.]*\d)", line))
    assert arguments.keys() == {"exclude", "options.min_density"}
    exclude = parse_assignments([f"exclude={arguments['exclude'][1:-1]}"])["exclude"]
    assert exclude[0].endswith(".weight")
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 1000))
    torch.nn.init.constant_(model[0].weight, 1e-6)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.warns(FeatherWarning, match=r'\(exclude=\["0.weight"\]\).*min_density'):  # Python
        torch_feather.sparsify(
            model, optimizer, sparsity=0.9, total_steps=1, schedule="constant"
        )  # fmt: skip
