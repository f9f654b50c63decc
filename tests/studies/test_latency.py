"""Latency of a study's networks."""

import json

import pytest

from torch_feather.studies import STUDIES, command, execute, timings
from torch_feather.studies.runner import Outcome
from torch_feather.studies.runs import row_of
from torch_feather.training import train
from torch_feather.training.checkpoint import RunDirectory

QUICK = ["epochs=1", "batch_size=256", "system.threads=1"]


@pytest.mark.slow
def test_a_network_is_timed_again_only_if_its_weights_or_the_cpu_changed(tmp_path, monkeypatch):
    settings = dict(methods="feather", sparsity="0.9", seeds="0", settings=QUICK, out=tmp_path)
    runs = tmp_path / "runs"

    def train_all(plan, folder, **more):
        assert folder == runs
        rows = {}
        for run in plan:
            train(run.config, folder / run.name, resume=True)
            rows[run.name] = row_of(run, RunDirectory(folder / run.name))
        return Outcome(rows)

    monkeypatch.setattr(execute, "train_all", train_all)
    study = command.command(STUDIES["latency"])
    study(**settings)
    (row,) = json.loads((tmp_path / "runs.json").read_text())
    assert row["milliseconds"] > 0
    assert row["pytorch_milliseconds"] > 0
    assert (tmp_path / "milliseconds.png").exists()
    assert (tmp_path / "multiply-adds.png").exists()
    file = tmp_path / "timings" / f"{row['name']}.json"
    found = json.loads(file.read_text())
    assert found["milliseconds"] == row["milliseconds"]
    assert (tmp_path / "timings" / f"{row['name']}.tuning.json").exists()

    def no_more(*arguments, **options):
        raise AssertionError("timed again")

    monkeypatch.setattr(timings, "compile_sparse", no_more)
    study(**settings)
    assert json.loads((tmp_path / "runs.json").read_text()) == [row]
    for changed in ("weights", "cpu"):
        file.write_text(json.dumps(found | {changed: "another"}))
        with pytest.raises(AssertionError, match="timed again"):
            study(**settings)


def test_sentences_and_speed_are_in_milliseconds(row):
    rows = [
        row(method, 0.9, seed, accuracy, milliseconds=ms)
        for method, accuracy, ms in (("dense", 0.6, 1.0), ("a", 0.5, 0.25), ("b", 0.4, 0.5))
        for seed in range(3)
    ]
    answer = STUDIES["latency"].answer(rows, None)
    (sentence,) = answer.sentences
    assert "a (0.25 ms, 50.0%). Every other method is matched or exceeded" in sentence
    (table,) = answer.measured.tables
    column = table.head.index("speedup")
    assert {line[0]: line[column] for line in table.rows} == {
        "dense": "1.00×",
        "a": "4.00×",
        "b": "2.00×",
    }
    assert len(answer.measured.figures) == 2
