"""Findings stay solved, and the fuzzing itself finds what it should."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from .__main__ import ROOT, count_findings, main, run, table
from .limits import CLEAR
from .mutate import mutate_blocks, mutate_bytes, mutate_tree
from .targets import TARGETS, make_target

pytestmark = pytest.mark.filterwarnings("ignore")  # damaged files cause many
FINDINGS = [  # the target `runs` trains a network first
    pytest.param(
        file,
        id=f"{file.parent.name}-{file.name}",
        marks=[pytest.mark.slow] if file.parent.name == "runs" else [],
    )
    for file in sorted(Path(__file__).with_name("findings").glob("*/*"))
]


@pytest.fixture(autouse=True)
def own_globals(monkeypatch):
    """Targets set global state, which other tests must not see."""
    from torch_feather import models
    from torch_feather.training import loop
    from torch_feather.training.data import images

    monkeypatch.setattr(images, "MAX_PIXELS", images.MAX_PIXELS)
    monkeypatch.setattr(loop, "_plot", loop._plot)
    monkeypatch.setattr(models, "_MODELS", dict(models._MODELS))
    monkeypatch.setenv("TORCH_FEATHER_CACHE", "")


@pytest.mark.parametrize("file", FINDINGS)
def test_a_finding_is_accepted_or_refused_by_an_error_of_the_package(file, tmp_path):
    make_target(file.parent.name, tmp_path).check(file.read_bytes())


QUICK = [name for name in TARGETS if name != "runs"]  # which trains a network first
RUNS = pytest.param("runs", marks=pytest.mark.slow)


@pytest.mark.parametrize("name", [*QUICK, RUNS])
def test_seeds_are_accepted_and_a_few_changes_of_them_find_nothing(name, tmp_path):
    target, rng = make_target(name, tmp_path), random.Random(0)
    seeds = target.seeds()
    accepted = [seed for seed in seeds if target.check(seed)]
    # Images of some modes have no defined display.
    assert len(accepted) > 0.8 * len(seeds) if name == "images" else accepted == seeds
    changed = [target.mutate(rng, rng.choice(seeds), seeds) for _ in range(60)]
    refused = sum(not target.check(content) for content in changed)
    assert refused > 5, "the changes change nothing that is checked"


def test_changes_depend_on_the_seed_alone_and_are_bounded():
    seed = bytes(range(256)) * 20
    tree = {"a": [1, 2.5, {"b": "text"}], "c": None}
    for change in (
        lambda rng: mutate_bytes(rng, seed, [seed]),
        lambda rng: mutate_blocks(rng, seed, 512, [seed]),
        lambda rng: repr(mutate_tree(rng, tree)),
    ):
        first, again = ([change(random.Random(i)) for i in range(300)] for _ in range(2))
        assert first == again
        assert len(set(first)) > 50
        assert max(map(len, first)) <= 2**16
    assert tree == {"a": [1, 2.5, {"b": "text"}], "c": None}


def once(content, tmp_path):
    file = tmp_path / "input"
    file.write_bytes(content)
    command = [sys.executable, "-m", "tests.fuzz.engine", "--once", "broken", str(file)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_an_error_that_is_not_of_the_package_is_a_finding(tmp_path):
    assert once(b"harmless", tmp_path).returncode == 0
    assert "KeyError" in once(b"...E", tmp_path).stderr


@pytest.mark.skipif(not CLEAR.exists(), reason="memory is measured on Linux")
def test_memory_of_an_input_is_bounded(tmp_path):
    assert "needed 200 MiB of memory" in once(b"M", tmp_path).stderr
    assert "MemoryError" in once(b"R", tmp_path).stderr  # that is reserved and not used


def test_time_of_an_input_is_bounded(tmp_path):
    assert "took more than 2 s of processor time" in once(b"T", tmp_path).stderr


def test_an_input_that_ends_the_process_is_a_finding(tmp_path):
    assert once(b"K", tmp_path).returncode == -9
    (tmp_path / "findings" / "broken").mkdir(parents=True)
    (tmp_path / "running").write_text("broken")
    (tmp_path / "current-broken").write_bytes(b"K")
    from .__main__ import record_death

    assert record_death(tmp_path, -9)
    assert (tmp_path / "findings" / "broken" / "ended9").read_bytes() == b"K"
    (tmp_path / "current-broken").write_bytes(b"harmless")
    assert not record_death(tmp_path, -9)  # as of a machine without memory


@pytest.mark.slow
def test_a_fault_is_found_and_its_input_shortened(tmp_path):
    """Of an input that needs three bytes in this order."""
    total = run(["broken"], tmp_path, seconds=0)
    assert total["targets"] == {}
    status = main(["--targets", "three", "--minutes", "0.5", "--folder", str(tmp_path)])
    found = list((tmp_path / "findings" / "three").glob("*.txt"))
    assert status == 1
    assert [file.with_suffix("").read_bytes() for file in found] == [b"abc"]
    assert "ValueError: found" in found[0].read_text()


@pytest.mark.slow
def test_a_run_is_continued_and_its_table_has_the_sums(tmp_path):
    first = run(["silent"], tmp_path, seconds=1.5)
    total = run(["silent"], tmp_path, seconds=1.5)
    one, both = first["targets"]["silent"], total["targets"]["silent"]
    assert both["inputs"] > one["inputs"] > 100
    assert total["processes"] == 2
    assert total["seconds"] == pytest.approx(3, abs=1.5)
    assert both["findings"] == 0
    assert f"{both['inputs']:,} inputs" in table(total)
    assert json.loads((tmp_path / "totals.json").read_text()) == total
    (tmp_path / "findings" / "silent" / "a.txt").touch()
    count_findings(total, tmp_path)
    assert both["findings"] == 1
