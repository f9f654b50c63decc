"""A checkpoint knows its images and settings: a resumed run continues right, or is refused."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from training_callbacks import StopAt

import torch_feather as feather
from torch_feather.errors import FeatherWarning
from torch_feather.training.checkpoint import RunDirectory
from torch_feather.training.config import Config, DataConfig, OptimizerConfig, SystemConfig
from torch_feather.training.data import (
    changed_data,
    data_identity,
    identity,
    identity_digest,
    load_dataset,
)
from torch_feather.training.errors import CheckpointError, Interrupted, RunError
from torch_feather.training.loop import train


class Tiny(torch.nn.Sequential):
    def __init__(self, classes, channels):
        super().__init__(
            torch.nn.Conv2d(channels, 4, 3, padding=1),
            torch.nn.AdaptiveAvgPool2d(2),
            torch.nn.Flatten(),
            torch.nn.Linear(16, classes),
        )


@pytest.fixture(autouse=True)
def tiny_network(monkeypatch, tmp_path):
    monkeypatch.setitem(feather.models._MODELS, "tiny", Tiny)
    monkeypatch.setenv("TORCH_FEATHER_CACHE", str(tmp_path / "cache"))


def write_images(folder, seed, count=10):
    random = np.random.RandomState(seed)
    for part in ("train", "val"):
        for kind in "ab":
            (folder / part / kind).mkdir(parents=True, exist_ok=True)
            for i in range(count):
                pixels = random.randint(0, 256, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / part / kind / f"{i:02}.bmp")


@pytest.fixture
def images(tmp_path):
    write_images(tmp_path / "images", 0)
    return tmp_path / "images"


@pytest.fixture(params=["memory", "stream"])
def config(request, images):
    data = DataConfig(
        "imagefolder", str(images), resolution=8, shift=1, storage=request.param, validation=0.2
    )
    return Config(
        network="tiny", data=data, epochs=3, batch_size=4, sparsity=0.5,
        optimizer=OptimizerConfig(lr=0.01),
        system=SystemConfig(device="cpu", threads=1, workers=0, tensorboard=False),
    )  # fmt: skip


def interrupted(config, folder, step=5):
    with pytest.raises(Interrupted):
        train(config, folder, callback=StopAt(step))
    return folder


def accepting(config, error):
    """Return the configuration that the message of an error asks for."""
    digest = re.search(r"--system\.accept_data (data-[0-9a-f]{12})", str(error))[1]
    return replace(config, system=replace(config.system, accept_data=digest))


def image(folder, number=3):
    return folder / "train" / "a" / f"{number:02}.bmp"


def changed_content(images):
    content = bytearray(image(images).read_bytes())
    content[-1] ^= 1  # one bit of one pixel; the size stays
    image(images).write_bytes(content)


def all_changed(images):
    write_images(images, 7)


def renamed(images):
    image(images).rename(image(images).with_name("03x.bmp"))


def exchanged(images):
    one, other = image(images), image(images, 4)
    contents = one.read_bytes(), other.read_bytes()
    one.write_bytes(contents[1])
    other.write_bytes(contents[0])


def moved_to_another_class(images):
    image(images).rename(images / "train" / "b" / "99.bmp")


CHANGES = {
    changed_content: r"(train|validation), class 'a': other contents",
    all_changed: r"train, class 'a': other contents; train, class 'b': other .*; and 3 more\.",
    renamed: r"class 'a': other names",
    exchanged: r"class 'a': other contents",
    moved_to_another_class: r"class 'a': 9 images, not 10|class '[ab]': \d images, not \d",
}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_changed_images_are_refused_and_can_be_accepted(config, images, tmp_path, change):
    run = interrupted(config, tmp_path / "run")
    checkpoint = (run / "checkpoints" / "last.pt").read_bytes()
    change(images)
    with pytest.raises(CheckpointError, match="the images have changed") as caught:
        train(config, run, resume=True)
    assert re.search(CHANGES[change], str(caught.value)), str(caught.value)
    assert (run / "checkpoints" / "last.pt").read_bytes() == checkpoint
    accepted = accepting(config, caught.value)
    with pytest.warns(FeatherWarning, match="continues on changed images: "):
        results = train(accepted, run, resume=True)
    now = identity_digest(data_identity(load_dataset(config.data, config.seed)))
    assert results["data_digest"] == now == accepted.system.accept_data


def test_the_accepted_digest_accepts_no_other_images(config, images, tmp_path):
    run = interrupted(config, tmp_path / "run")
    changed_content(images)
    with pytest.raises(CheckpointError) as caught:
        train(config, run, resume=True)
    all_changed(images)
    with pytest.raises(CheckpointError, match="the images have changed"):
        train(accepting(config, caught.value), run, resume=True)


@pytest.mark.slow
def test_restored_images_continue_bitwise_identically(config, images, tmp_path):
    train(config, tmp_path / "whole")
    run = interrupted(config, tmp_path / "run")
    all_changed(images)
    with pytest.raises(CheckpointError):
        train(config, run, resume=True)
    write_images(images, 0)
    images.rename(tmp_path / "moved")  # the path may change
    moved = replace(config, data=replace(config.data, path=str(tmp_path / "moved")))
    train(moved, run, resume=True)
    models = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "run")]
    assert models[0] == models[1]


@pytest.mark.parametrize("change", [-1, 5])
def test_another_number_of_steps_per_epoch_is_refused_whatever_is_accepted(
    config, images, tmp_path, change
):
    run = interrupted(config, tmp_path / "run")
    count = 10 + change
    write_images(images, 0, count=max(count, 10))
    for part in ("train", "val"):
        for kind in "ab":
            for i in range(count, 10):
                (images / part / kind / f"{i:02}.bmp").unlink()
    steps = -(-round(0.8 * 2 * count) // 4)
    if steps == 4:  # the last batch is smaller: the images can be accepted
        with pytest.raises(CheckpointError, match=r"class 'a': \d images, not \d") as caught:
            train(config, run, resume=True)
        with pytest.warns(FeatherWarning, match="changed images"):
            train(accepting(config, caught.value), run, resume=True)
        return
    with pytest.raises(CheckpointError, match=f"An epoch has {steps} steps now, not 4"):
        train(config, run, resume=True)


@pytest.mark.slow
def test_a_dense_baseline_of_changed_images_is_refused(config, images, tmp_path):
    train(config, tmp_path / "run")
    all_changed(images)
    both = replace(config, compare_dense=True)
    with pytest.raises(RunError, match="changed since the sparse run") as caught:
        train(both, tmp_path / "run", resume=True)
    results = train(accepting(both, caught.value), tmp_path / "run", resume=True)
    assert "dense" in results


@pytest.mark.parametrize(
    ("line", "edited", "message"),
    [
        ("batch_size: 4", "batch_size: 8", "batch_size was 4, not 8"),
        ("epochs: 3", "epochs: 4", "epochs was 3, not 4"),
        ("lr: 0.01", "lr: 0.02", "optimizer.lr was 0.01, not 0.02"),
        ("shift: 1", "shift: 2", "data.shift was 1, not 2"),
        ("sparsity: 0.5", "sparsity: 0.6", "sparsity was 0.5, not 0.6"),
    ],
)
def test_settings_edited_in_the_run_directory_are_refused(config, tmp_path, line, edited, message):
    run = RunDirectory(interrupted(config, tmp_path / "run"))
    text = run.config_file.read_text()
    assert line in text
    run.config_file.write_text(text.replace(line, edited))
    with pytest.raises(CheckpointError, match=message):
        train(run.read_config(), run.path, resume=True)


def test_a_changed_batch_size_or_recipe_is_refused(config, tmp_path):
    run = interrupted(config, tmp_path / "run")
    with pytest.raises(RunError, match="batch_size was 4, not 8"):
        train(replace(config, batch_size=8), run, resume=True)
    with pytest.raises(RunError, match="keeps its settings"):
        train(replace(Config(), data=config.data, recipe="imagenet"), run, resume=True)


def test_a_checkpoint_without_identity_is_continued_as_in_version_0_1(config, tmp_path):
    run = RunDirectory(interrupted(config, tmp_path / "run"))
    state = run.load()
    for key in ("config", "data", "batches"):
        del state[key]
    run.save(state)
    assert train(config, run.path, resume=True)["epochs"] == 3


@pytest.mark.parametrize("value", [3, "text", {"unknown": 1}, {"epochs": "many"}, {1: 2}])
def test_unreadable_settings_in_a_checkpoint_are_an_error(config, tmp_path, value):
    run = RunDirectory(interrupted(config, tmp_path / "run"))
    damaged = run.load() | {"config": value}
    run.save(damaged)
    run.save(damaged)  # otherwise the checkpoint before it is used
    with pytest.raises(CheckpointError, match="settings in the checkpoint cannot be read"):
        train(config, run.path, resume=True)


@pytest.mark.parametrize("value", [3, "text", {"train": 3}, {"train": {"a": 3}}, {"train": {1: 2}}])
def test_a_damaged_identity_of_the_images_is_an_error(config, tmp_path, value):
    run = RunDirectory(interrupted(config, tmp_path / "run"))
    damaged = run.load() | {"data": value}
    run.save(damaged)
    run.save(damaged)
    with pytest.raises(CheckpointError, match=r"is damaged|the images have changed"):
        train(config, run.path, resume=True)


def test_names_sizes_and_digests_are_in_the_checkpoint(config, tmp_path):
    run = RunDirectory(interrupted(config, tmp_path / "run"))
    entry = run.load()["data"]["test"]["b"]
    assert entry["images"] == 10
    assert entry["bytes"] == 10 * image(tmp_path / "images").stat().st_size
    assert {len(entry["names"]), len(entry["content"])} == {32}


def test_large_streamed_data_sets_are_identified_by_sizes_and_a_sample(config, images, monkeypatch):
    if config.data.storage == "memory":
        pytest.skip("all pixels are compared")
    monkeypatch.setattr(identity, "READ", 1000)  # bytes; every fourth image is read
    reads = []
    data = load_dataset(config.data, 0)
    real = type(data.train.files).read
    monkeypatch.setattr(
        type(data.train.files), "read", lambda self, i: reads.append(i) or real(self, i)
    )
    before = data_identity(data)
    assert 8 <= len(reads) <= 20
    with open(images / "val" / "a" / "05.bmp", "ab") as file:
        file.write(b"x")
    after = data_identity(load_dataset(config.data, 0))
    assert changed_data(before, after) == ["test, class 'a': other sizes and contents"]


def test_the_identity_of_data_sets_without_files():
    settings = DataConfig("digits", validation=0.1)
    one, again, other = (data_identity(load_dataset(settings, seed)) for seed in (0, 0, 1))
    assert one == again
    assert changed_data(one, one) == []
    assert sum(entry["images"] for entry in one["train"].values()) == 1294
    assert any("train" in difference for difference in changed_data(one, other))
    assert not any("test" in difference for difference in changed_data(one, other))
