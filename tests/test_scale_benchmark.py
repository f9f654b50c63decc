"""The cost model of `benchmarks/scale.py` agrees with what was measured."""

import importlib
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RECORD = json.loads((ROOT / "results" / "scale.json").read_text())
MEMORY = json.loads((ROOT / "results" / "scale_memory.json").read_text())


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")


@pytest.fixture
def scale_model():
    return importlib.import_module("scale_model")


def test_every_measured_exchange_is_that_of_the_model(scale_model):
    found = []
    for row in RECORD["measured"]:
        if row["ranks"] == 1:
            assert row["exchanged"] == {"calls": 0, "bytes": 0}
            continue
        # Weights of bfloat16 always have ties; of float32, some do.
        cases = [True] if row["dtype"] == "bfloat16" else [False, True]
        modelled = [scale_model.exchanged(row["size"], row["layers"], ties=t) for t in cases]
        assert row["exchanged"] in modelled
        found.append((row["dtype"], row["exchanged"] == modelled[-1]))
    assert {("float32", True), ("float32", False), ("bfloat16", True)} == set(found)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("weights", [1e6, 1e8, 1e9, 1e10])
def test_one_more_tensor_exceeds_the_aim(scale_model, weights, dtype, ties):
    most = scale_model.most_tensors(weights, dtype, ties=ties)
    aim = scale_model.AIM[dtype]
    assert scale_model.exchanged(weights, most + 1, ties=ties)["bytes"] > aim
    assert most == 0 or scale_model.exchanged(weights, most, ties=ties)["bytes"] <= aim


def test_measured_memory_is_near_the_predicted(scale_model):
    rows = scale_model.compared([*RECORD["measured"], *MEMORY["measured"]])
    assert {row["estimated"] for row in rows} == {False, True}
    for row in rows:
        assert 0.9 < row["measured"] / row["predicted"][1] < 1.1, row


def test_a_record_of_memory_has_no_times():
    scale = importlib.import_module("scale")
    row = dict(RECORD["measured"][4], baseline_bytes=1e8, steps_bytes_per_local_weight=13.0)
    record = scale.record_of([row], "one", None, memory=True)
    assert set(record["measured"][0]) == scale.OF_MEMORY
    again = scale.record_of([row], "two", record, memory=True)
    assert again["command"] == "one\ntwo"
    assert len(again["measured"]) == 2
    assert " ~" not in scale.table_of_memory(again)


def test_the_model_can_be_evaluated_again_without_measuring():
    scale = importlib.import_module("scale")
    record = scale.record_of([], "none", {**RECORD, "model": []}, memory=False)
    assert record == RECORD
    assert scale.table(record) + "\n" == (ROOT / "results" / "scale.txt").read_text()
