import errno
import json
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from torch_feather.training import checkpoint
from torch_feather.training.checkpoint import RunDirectory, changed_keys, write_atomically
from torch_feather.training.config import Config, apply
from torch_feather.training.errors import CheckpointError, RunError


@pytest.fixture
def run(tmp_path):
    run = RunDirectory(tmp_path / "run")
    with run.locked():
        run.write_config(Config())
        yield run


def state(step):
    return {"step": step, "tensor": torch.full((1000,), float(step))}


def test_the_newest_checkpoint_is_loaded_and_the_previous_one_kept(run):
    assert run.load() is None
    for step in (1, 2, 3):
        run.save(state(step))
    assert run.load()["step"] == 3
    assert torch.load(run.previous, weights_only=True)["step"] == 2
    assert {p.name for p in run.last.parent.iterdir()} == {"last.pt", "previous.pt"}


def _halve(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _empty(path):
    path.write_bytes(b"")


def _noise(path):
    path.write_bytes(b"\x80\x04 not a checkpoint" * 99)


def _flip_a_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)


class Payload:
    def __reduce__(self):
        return (os.system, ("touch executed",))


def _code(path):
    torch.save({"format": 1, "step": Payload()}, path)


@pytest.mark.parametrize("damage", [_halve, _empty, _noise, _flip_a_byte, _code])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(run, damage, monkeypatch):
    monkeypatch.chdir(run.path)
    run.save(state(1))
    run.save(state(2))
    damage(run.last)
    messages = []
    assert run.load(messages.append)["step"] == 1
    assert len(messages) == 1
    assert "last.pt: damaged" in messages[0]
    assert not (run.path / "executed").exists()
    run.save(state(2))
    run.save(state(3))
    assert run.load(pytest.fail)["step"] == 3


def test_two_damaged_checkpoints_are_an_error_that_says_what_to_do(run):
    run.save(state(1))
    run.save(state(2))
    _halve(run.last)
    _halve(run.previous)
    with pytest.raises(CheckpointError, match="Start again"):
        run.load()


def test_a_checkpoint_of_another_format_is_an_error(run):
    torch.save({"format": 99}, run.path / "x")
    run.save(state(1))
    os.replace(run.path / "x", run.last)
    with pytest.raises(CheckpointError, match="format 99"):
        run.load()


@pytest.mark.parametrize("renames_done", [0, 1])
def test_a_kill_between_the_renames_loses_nothing(run, monkeypatch, renames_done):
    run.save(state(1))
    run.save(state(2))
    real, calls = os.replace, []

    def replace(source, target):
        # The first call writes new.pt, the other two rotate the checkpoints.
        if len(calls) == 1 + renames_done:
            raise SystemExit
        calls.append(target)
        real(source, target)

    monkeypatch.setattr(checkpoint.os, "replace", replace)
    with pytest.raises(SystemExit):
        run.save(state(3))
    monkeypatch.undo()
    assert run.load(pytest.fail)["step"] == 3
    run.save(state(4))
    assert run.load()["step"] == 4
    assert torch.load(run.previous, weights_only=True)["step"] in (2, 3)


def test_a_full_disk_leaves_the_old_file_and_says_so(run, monkeypatch):
    run.save(state(1))

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint.os, "fsync", full)
    with pytest.raises(RunError, match=r"new\.pt: cannot be written \(the disk is full"):
        run.save(state(2))
    monkeypatch.undo()
    assert run.load(pytest.fail)["step"] == 1
    assert {p.name for p in run.last.parent.iterdir()} == {"last.pt"}


class FullFile:
    def write(self, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    def flush(self):
        pass


def test_a_disk_that_fills_up_inside_torch_save_is_one_line(tmp_path):
    with pytest.raises(RunError, match=r"x\.pt: cannot be written \(the disk is full") as caught:
        write_atomically(tmp_path / "x.pt", lambda file: torch.save(state(1), FullFile()))
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_concurrent_writers_of_one_file_do_not_interfere(tmp_path):
    """Two threads write at once; each has its own temporary file."""
    target, inside = tmp_path / "x", threading.Barrier(2)

    def write(text):
        def both(file):
            file.write(text)
            inside.wait(5)

        write_atomically(target, both)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(write, [b"one", b"two"]))
    assert target.read_bytes() in (b"one", b"two")
    assert list(tmp_path.iterdir()) == [target]


def test_a_symbolic_link_is_kept_and_its_target_replaced(tmp_path):
    (tmp_path / "there").mkdir()
    file, link = tmp_path / "there" / "file", tmp_path / "link"
    file.write_text("old")
    link.symlink_to(file)
    write_atomically(link, lambda file: file.write(b"new"))
    assert link.is_symlink()
    assert file.read_text() == "new"
    mode = os.umask(0o077)
    os.umask(mode)
    assert file.stat().st_mode & 0o777 == 0o666 & ~mode


def test_metrics_are_lines_of_json(run):
    same = {"train_loss": 1.0, "sparsity": 0.5}
    history = [
        {"epoch": 1, "step": 3, "val_acc": None, **same},
        {"epoch": 2, "step": 6, "val_acc": 0.5, **same},
    ]
    run.write_metrics(history[:1])
    run.write_metrics(history)
    assert [json.loads(line) for line in run.metrics_file.read_text().splitlines()] == history
    assert run.read_metrics() == history


def test_a_directory_has_one_writer(run):
    with pytest.raises(RunError, match="another process"), RunDirectory(run.path).locked():
        pytest.fail("held twice")


def test_the_lock_ends_with_its_holder(tmp_path):
    for _ in range(2):
        with RunDirectory(tmp_path / "run").locked():
            pass


@pytest.mark.slow
def test_temporary_files_of_a_killed_writer_are_deleted_by_the_next_one(tmp_path):
    write = """
import os, signal, sys
from pathlib import Path
from torch_feather.training.checkpoint import write_atomically
write_atomically(Path(sys.argv[1]), lambda file: os.kill(os.getpid(), signal.SIGKILL))
"""
    run = RunDirectory(tmp_path / "run")
    with run.locked():
        run.save(state(1))
        run.write_config(Config())
    kept = set(run.path.rglob("*"))
    for target in (run.last.with_name("new.pt"), run.metrics_file):
        process = subprocess.run([sys.executable, "-c", write, str(target)], timeout=60)
        assert process.returncode == -signal.SIGKILL
    mine = run.path / "notes.tmp"
    mine.write_text("")
    assert len(set(run.path.rglob("*"))) == len(kept) + 3
    with run.locked():
        assert set(run.path.rglob("*")) == kept | {mine}
    assert run.load(pytest.fail)["step"] == 1


def test_a_system_without_kernel_locks_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "fcntl", None)  # as on Windows
    with (
        pytest.raises(RunError, match="run directories require a POSIX system") as caught,
        RunDirectory(tmp_path / "run").locked(),
    ):
        pytest.fail("held without a lock")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["checkpoints", "masks"])
def test_a_file_in_place_of_a_folder_is_named_before_training(tmp_path, name):
    (tmp_path / name).write_text("")
    with (
        pytest.raises(RunError, match=rf"{name}: is no folder\. Move it away"),
        RunDirectory(tmp_path).locked(),
    ):
        pytest.fail("began to train")
    assert (tmp_path / name).exists()


def test_a_file_in_the_way_is_named(tmp_path):
    (tmp_path / "run").write_text("")
    with (
        pytest.raises(RunError, match="cannot be used as a run directory"),
        RunDirectory(tmp_path / "run").locked(),
    ):
        pytest.fail("a file is no directory")


def test_a_run_is_never_overwritten(run):
    assert run.begin(Config(), resume=False) is None  # it has only a configuration
    run.save(state(1))
    with pytest.raises(RunError, match="already holds a run"):
        run.begin(Config(), resume=False)
    assert run.begin(Config(), resume=True)["step"] == 1


@pytest.mark.parametrize(
    ("key", "value", "may_change"),
    [
        ("epochs", 3, False),
        ("optimizer.lr", 0.2, False),
        ("options.p", 2.0, False),
        ("data.validation", 0.3, False),
        ("data.path", "moved", True),
        ("system.threads", 2, True),
    ],
)
def test_a_resumed_run_keeps_the_settings_that_determine_its_results(run, key, value, may_change):
    run.save(state(1))
    changed = apply(Config(), {key: value}, "test")
    if may_change:
        assert changed_keys(Config(), changed) == ""
        assert run.begin(changed, resume=True) is not None
    else:
        with pytest.raises(RunError, match=key):
            run.begin(changed, resume=True)


def test_a_stored_model_is_bitwise_identical(run):
    model = torch.nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    run.save_model(model)
    other = torch.nn.Conv2d(3, 4, 3)
    run.load_model(other)
    assert torch.equal(model.weight, other.weight)
    _halve(run.model_file)
    with pytest.raises(RunError, match="damaged"):
        run.load_model(other)
    with pytest.raises(RunError, match="has not finished"):
        RunDirectory(run.path.parent / "run").read_report()
