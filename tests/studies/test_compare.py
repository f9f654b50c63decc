"""Grids of runs, and the comparison of methods."""

import json
import os
import signal
import statistics
import subprocess
import sys
import time

import pytest

from torch_feather.errors import ConfigurationError
from torch_feather.studies import compare
from torch_feather.studies.grid import Run, train_all
from torch_feather.training.config import apply, resolve_config

SMALL = {
    "epochs": 1,
    "batch_size": 256,
    "compare_dense": False,
    "system.threads": 1,
    "system.tensorboard": False,
}


def small(**changes):
    return apply(resolve_config("digits"), SMALL | changes, "test")


def test_the_dense_network_is_trained_once_per_seed_whatever_the_sparsities():
    runs = compare.plan(small(), ["dense", "feather"], [0.5, 0.9], [0, 1])
    names = [run.name for run in runs]
    assert names == [
        "dense-0", "feather-0.5-0", "feather-0.9-0", "dense-1", "feather-0.5-1", "feather-0.9-1"
    ]  # fmt: skip
    assert [run.config.sparsity for run in runs[:3]] == [0.0, 0.5, 0.9]


def test_an_option_goes_to_the_methods_that_have_it():
    with_p = small(options={"p": 2.0})
    runs = compare.plan(with_p, ["dense", "feather", "gmp"], [0.5], [0])
    assert [run.config.options for run in runs] == [{}, {"p": 2.0}, {}]
    with pytest.raises(ConfigurationError, match="None of dense, gmp has an option 'p'"):
        compare.plan(with_p, ["dense", "gmp"], [0.5], [0])


def test_a_grid_trains_what_is_missing_and_nothing_twice(tmp_path):
    runs = compare.plan(small(), ["feather"], [0.5, 0.9], [0])
    first = train_all(runs[:1], tmp_path)
    model = tmp_path / "feather-0.5-0" / "model.safetensors"
    written = model.stat().st_mtime_ns
    both = train_all(runs, tmp_path)
    assert model.stat().st_mtime_ns == written
    assert both.rows["feather-0.5-0"] == first.rows["feather-0.5-0"]
    assert list(both.rows) == ["feather-0.5-0", "feather-0.9-0"]
    assert both.rows["feather-0.9-0"]["zeros"] == round(0.9 * 306720)


def test_a_run_that_fails_stops_no_other_and_says_why(tmp_path):
    diverging = small(**{"optimizer.lr": 1e20, "optimizer.clip": None})
    outcome = train_all([Run("bad", diverging), Run("good", small())], tmp_path)
    assert list(outcome.rows) == ["good"]
    assert "are NaN" in outcome.failed["bad"]


def test_after_its_time_a_grid_starts_nothing_but_knows_what_is_done(tmp_path):
    train_all([Run("a", small())], tmp_path)
    outcome = train_all([Run("a", small()), Run("b", small())], tmp_path, minutes=0)
    assert list(outcome.rows) == ["a"]
    assert outcome.waiting == ["b"]
    assert not (tmp_path / "b").exists()


def row(method, sparsity, seed, accuracy):
    return {
        "method": method,
        "sparsity": sparsity,
        "own_sparsity": None,
        "seed": seed,
        "test_accuracy": accuracy,
        "zeros": round(1000 * sparsity),
        "weights": 1000,
        "macs": 5e6,
        "epochs": 3,
        "network": "net",
        "data": "images",
        "curve": {"train_loss": [2.0, 1.0 - accuracy]},
        "commit": "0123456789abc",
        "versions": {"torch": "2"},
        "hardware": {"cpu": "a cpu", "threads": 1},
    }


ROWS = [
    row("dense", 0.0, 0, 0.5),
    row("weak", 0.9, 0, 0.2),
    row("weak", 0.9, 1, 0.3),
    row("strong", 0.9, 0, 0.4),
    row("strong", 0.98, 0, 0.3),
]


def test_the_table_has_means_spreads_and_counts_best_first():
    lines = compare.table(ROWS, "the command").splitlines()
    assert lines[2].startswith("| dense |  | 50.00 | 1 | 0 / 1,000 |")
    assert lines[3].startswith("| strong | 90 % | 40.00 | 1 |")
    deviation = statistics.stdev([20.0, 30.0])
    assert lines[4].startswith(f"| weak | 90 % | 25.00 ± {deviation:.2f} | 2 | 900 / 1,000 |")
    assert "    the command" in lines


def test_the_plot_shows_every_run_in_the_panel_of_its_sparsity():
    panels = compare.plot(ROWS).axes
    assert [axes.get_title() for axes in panels] == ["90 % sparse", "98 % sparse"]
    dots = [
        sorted(x for line in axes.lines if line.get_marker() == "o" for x in line.get_xdata())
        for axes in panels
    ]
    assert dots == [[20.0, 30.0, 40.0], [30.0]]
    assert [tick.get_text() for tick in panels[0].get_yticklabels()] == [
        "weak  (n=2)",
        "strong  (n=1)",
    ]


def test_the_curves_are_means_over_seeds():
    accuracy, loss = compare.curves(ROWS).axes
    lines = {line.get_label(): list(line.get_ydata()) for line in loss.lines}
    assert lines == {"strong": [2.0, 0.7]}  # at the highest sparsity
    heights = {tuple(bar.lines[0].get_ydata()) for bar in accuracy.containers}
    assert heights == {(40.0, 30.0), (25.0,)}


STUDY = [
    *("study", "compare", "--methods", "dense,feather", "--sparsity", "0.9", "--seeds", "0"),
    *(word for key, value in SMALL.items() for word in ("--set", f"{key}={value}")),
    *("--set", "system.checkpoint_steps=5", "--set", "epochs=20"),
]


@pytest.mark.parametrize(
    "how",
    [
        pytest.param(signal.SIGINT, id="ctrl-c"),
        pytest.param(signal.SIGKILL, id="killed", marks=pytest.mark.slow),
    ],
)
def test_a_study_that_was_ended_goes_on(tmp_path, how):
    command = [sys.executable, "-m", "torch_feather.cli", *STUDY, "--out", str(tmp_path)]
    process = subprocess.Popen(
        command, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    begun = tmp_path / "runs" / "dense-0" / "checkpoints" / "last.pt"
    limit = time.monotonic() + 120
    while not begun.exists() and process.poll() is None and time.monotonic() < limit:
        time.sleep(0.05)
    os.killpg(process.pid, how)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "Traceback" not in errors
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "runs.json").read_text())
    assert [r["method"] for r in rows] == ["dense", "feather"]
    assert [r["curve"]["epoch"][-1] for r in rows] == [20, 20]
    assert (tmp_path / "compare.svg").stat().st_size > 1000
    assert "| feather | 90 % |" in (tmp_path / "table.md").read_text()
