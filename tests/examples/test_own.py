"""Networks and data sets of one's own, trained by the command as the files say."""

import json
import shlex
import sys
from dataclasses import replace

import pytest
from example_cases import EXAMPLES

from torch_feather.cli import main
from torch_feather.training import LoggedRun

QUICK = "--epochs 1 --batch-size 64 --no-compare-dense --out {out} "
QUICK += "--system.threads 1 --system.workers 0 --system.amp false"


def commands(name):
    """The commands that the file shows, without those that need a connection."""
    lines = (EXAMPLES / f"{name}.py").read_text().splitlines()
    found = [line.strip() for line in lines if line.startswith("    feather train ")]
    return [shlex.split(line) for line in found if "USER/NAME" not in line]


def run(command, monkeypatch):
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as caught:
        main()
    assert not caught.value.code


@pytest.mark.parametrize(
    "name",
    ["own_network", "own_data", pytest.param("huggingface_data", marks=pytest.mark.apps)],
)
def test_the_command_in_the_file_trains(name, tmp_path, monkeypatch):
    if name == "huggingface_data":
        pytest.importorskip("datasets", reason="in the extra frameworks")
    monkeypatch.syspath_prepend(EXAMPLES)
    (command,) = commands(name)
    run([*command, *QUICK.format(out=tmp_path / "run").split()], monkeypatch)
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["report"]["zeros"] == round(
        report["target_sparsity"] * report["report"]["weights"]
    )
    assert name in report["network" if name == "own_network" else "data"]
    run(["feather", "evaluate", str(tmp_path / "run")], monkeypatch)


def test_the_example_of_a_logger_has_each_row_once(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    (command,) = commands("own_logger")
    quick = QUICK.format(out=tmp_path / "run").replace("--batch-size 64", "--batch-size 512")
    run([*command, *quick.split(), "--network", "own_network:small_net"], monkeypatch)
    (line,) = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    expected = {k: v for k, v in json.loads(line).items() if v is not None}
    step = expected["step"]
    from own_logger import Database

    resumed = LoggedRun(tmp_path / "run", "run", {}, step=step)
    logger = Database()
    assert logger.begin(resumed) == step
    found = logger.database.execute("SELECT name, value FROM metrics WHERE step = ?", (step,))
    assert dict(found) == expected
    logger.end(None)
    assert Database().begin(replace(resumed, step=step - 1)) == 0  # the epoch is trained again


def test_the_example_of_a_data_set_that_prepares_its_images_trains(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    command = "feather train --data own_data:prepared --network own_network:small_net --seed 1"
    run([*command.split(), *QUICK.format(out=tmp_path / "run").split()], monkeypatch)
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["preprocessing"]["prepared_by"] == "own_data:prepared"
    assert report["input_shape"] == [1, 32, 32]
