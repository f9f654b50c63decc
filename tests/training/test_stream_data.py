import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from torch_feather.training.config import Config, DataConfig, SystemConfig
from torch_feather.training.data import eval_loader, load_dataset, loaders, train_loader
from torch_feather.training.distributed import Ranks
from torch_feather.training.errors import DataError

CPU = torch.device("cpu")
TRAIN, TEST = 24, 10


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_FEATHER_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path):
    random = np.random.RandomState(0)
    for part, count in (("train", TRAIN), ("val", TEST)):
        for i in range(count):
            path = tmp_path / "images" / part / "ab"[i % 2] / f"{i:03}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            size = random.randint(20, 40, 2)
            Image.fromarray(random.randint(0, 256, (*size, 3), dtype=np.uint8)).save(path)
    return tmp_path / "images"


def settings(folder, workers=0, **changes):
    options = {"validation": 0.0, "resolution": 16, "crop": "resized"} | changes
    data = DataConfig(name="imagefolder", path=str(folder), storage="stream", **options)
    return Config(batch_size=5, data=data, system=SystemConfig(workers=workers))


def training(folder, workers=0, ranks=None, **changes):
    config = settings(folder, workers, **changes)
    return train_loader(load_dataset(config.data, 0), config, CPU, ranks)


def equal(one, other):
    return torch.equal(one.x, other.x) and torch.equal(one.y, other.y) and one.total == other.total


def test_batches_are_bitwise_identical_for_any_number_of_workers(folder):
    alone = training(folder)
    expected = [*alone, *alone]
    for workers in (1, 2):
        batches = training(folder, workers)
        given = [*batches, *batches]
        assert len(given) == len(expected) == 10
        assert all(map(equal, given, expected))


def test_batches_decoded_ahead_do_not_count(folder):
    expected = list(training(folder))
    ahead = training(folder, workers=2)
    batches = iter(ahead)
    given = [next(batches), next(batches)]
    state = ahead.state_dict()
    assert state["position"] == 2
    resumed = training(folder, workers=1)
    resumed.load_state_dict(state)
    assert all(map(equal, [*given, *resumed], expected))
    # The same loader, whose workers are busy with batches that are not needed any more.
    batches.close()
    ahead.load_state_dict(state)
    again = list(ahead)
    assert len(again) == len(expected) - 2
    assert all(map(equal, again, expected[2:]))


def test_ranks_with_workers_give_the_batches_of_one_process(folder):
    parts = [training(folder, 1, Ranks(rank, 2)) for rank in range(2)]
    for whole, *own in zip(training(folder), *parts, strict=True):
        assert torch.equal(torch.cat([part.x for part in own]), whole.x)
        assert torch.equal(torch.cat([part.y for part in own]), whole.y)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("ranks", [1, 3])
def test_every_image_is_evaluated_once(folder, workers, ranks):
    config = settings(folder, workers)
    data = load_dataset(config.data, 0)
    batches = [
        batch
        for rank in range(ranks)
        for batch in eval_loader(data, data.test, config, CPU, Ranks(rank, ranks))
    ]
    index = np.arange(TEST)
    expected = data.test.load(index, index).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(v)[:, None, None] for v in (data.mean, data.std))
    torch.testing.assert_close(torch.cat([x for x, _ in batches]), (expected - mean) / std)
    assert torch.equal(torch.cat([y for _, y in batches]), data.test.labels)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_image_is_a_one_line_error_that_names_it(folder, workers):
    damaged = folder / "train" / "b" / "007.png"
    batches = training(folder, workers)
    damaged.write_bytes(damaged.read_bytes()[:100])
    for _ in range(2):  # the second attempt too
        with pytest.raises(DataError, match=r"b/007\.png: cannot be decoded") as caught:
            list(batches)
        assert "\n" not in str(caught.value)
    damaged.unlink()
    with pytest.raises(DataError, match=r"b/007\.png: cannot be decoded .*No such file"):
        list(batches)


@pytest.mark.slow
@pytest.mark.parametrize("request_to_stop", [signal.SIGINT, signal.SIGTERM])
def test_workers_ignore_signals_to_stop(folder, request_to_stop):
    expected = list(training(folder))
    ahead = training(folder, workers=2)
    batches = iter(ahead)
    given = [next(batches), next(batches)]  # both workers have begun
    for worker in multiprocessing.active_children():
        os.kill(worker.pid, request_to_stop)
    assert all(map(equal, [*given, *batches], expected))


def test_a_worker_that_dies_is_a_one_line_error(folder):
    ahead = training(folder, workers=1)
    batches = iter(ahead)
    next(batches)
    for worker in multiprocessing.active_children():
        os.kill(worker.pid, signal.SIGKILL)
        worker.join()
    with pytest.raises(DataError, match=r"decodes images has ended.*fewer system\.workers") as it:
        list(batches)
    assert "\n" not in str(it.value)


def test_an_image_that_cannot_be_decoded_ends_the_workers(folder):
    (folder / "train" / "b" / "001.png").write_bytes(b"no image")
    batches = training(folder, workers=2)
    with pytest.raises(DataError, match=r"train/b/001\.png"):
        list(batches)
    assert not multiprocessing.active_children()


@pytest.mark.slow
def test_a_process_ends_after_an_error_during_training_although_it_has_workers(folder):
    """Workers leave the first SIGTERM, which Python sends them when it ends, to this process."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[2]); from test_stream_data import *; "
        "batches = iter(training(Path(sys.argv[1]), workers=2)); next(batches); "
        "raise ValueError('the loss')"
    )
    command = [sys.executable, "-c", code, str(folder), str(Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "ValueError: the loss" in done.stderr


def test_workers_share_the_cores_of_a_machine(monkeypatch):
    for cores, processes, expected in ((2, 1, 2), (64, 1, 8), (64, 16, 4), (1, 4, 1)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, n=cores: set(range(n)))
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
        assert loaders.workers(SystemConfig()) == expected
    assert loaders.workers(SystemConfig(workers=3)) == 3


@pytest.mark.gpu
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_on_a_gpu_equal_those_on_the_cpu(folder, workers):
    config = settings(folder, workers)
    data = load_dataset(config.data, 0)
    there = train_loader(data, config, torch.device("cuda"))
    for batch, expected in zip(there, train_loader(data, config, CPU), strict=True):
        assert batch.x.is_cuda
        assert torch.equal(batch.y.cpu(), expected.y)
        torch.testing.assert_close(batch.x.cpu(), expected.x)
