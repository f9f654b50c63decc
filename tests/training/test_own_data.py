"""Networks and data sets of the user: `--network module:factory`, `--data module:factory`."""

import importlib
import random
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from training_callbacks import StopAt

import torch_feather as feather
from torch_feather import models
from torch_feather.errors import ConfigurationError
from torch_feather.training.checkpoint import RunDirectory
from torch_feather.training.config import Config, DataConfig, apply
from torch_feather.training.data import (
    data_identity,
    eval_loader,
    identity_digest,
    load_dataset,
    train_loader,
)
from torch_feather.training.data.items import to_pixels
from torch_feather.training.distillation import load_teacher
from torch_feather.training.errors import CheckpointError, DataError, Interrupted, RunError
from torch_feather.training.loop import train
from torch_feather.training.network_info import NetworkInfo
from torch_feather.training.predict import load_predictor

MODULE = '''
import numpy as np, torch
from torch import nn
from torch.utils.data import Dataset, TensorDataset

def net(num_classes, in_channels):
    return nn.Sequential(nn.Conv2d(in_channels, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2),
                         nn.Flatten(), nn.Linear(32, num_classes))

def fixed(): return nn.Sequential(nn.Flatten(), nn.Linear(64, 7))
def broken(num_classes): raise KeyError("no weights")
def nothing(num_classes): return None

def pixels(count=20, start=0):
    seeds = range(start, start + count)
    noise = [np.random.RandomState(s).randint(0, 99, (8, 8), np.uint8) for s in seeds]
    return [(image + 100 * (i % 2), i % 2) for i, image in enumerate(noise)]

def grey(): return pixels(40), pixels(12, 100)
def grey_with_path(path): return pixels(int(path)), pixels(12, 100)
def three_parts(): return {"train": pixels(20), "val": pixels(6, 50), "test": pixels(8, 100)}

class Random(Dataset):
    """Tensors for the network, which the data set augments."""
    classes = ["dark", "light"]
    def __init__(self, items): self.items = items
    def __len__(self): return len(self.items)
    def __getitem__(self, i):
        image, label = self.items[i]
        noise = torch.randn(()) + np.random.rand()
        return torch.from_numpy(image).float()[None] / 99 - 1 + 0.01 * noise, label

class RandomPixels(Random):
    def __getitem__(self, i):
        image, label = self.items[i]
        return np.roll(image, np.random.randint(8)), label

class Unseeded(Random):
    rng = np.random.RandomState()
    def __getitem__(self, i):
        image, label = super().__getitem__(i)
        return image + self.rng.rand(), label

def prepared(): return Random(pixels(40)), Random(pixels(12, 100))
def random_pixels(): return RandomPixels(pixels(40)), RandomPixels(pixels(12, 100))
def unseeded(): return Unseeded(pixels(40)), Unseeded(pixels(12, 100))

def no_parts(): return None
def stream(): return iter(pixels()), pixels()
def triples(): return [(0, 1, 2)], pixels()
def text(): return [("image", 1)], pixels()
def floats_as_array(): return [(np.zeros((8, 8)), 1)], pixels()
def two_sizes_of_labels(): return [(np.zeros((8, 8), np.uint8), y) for y in (1, [0, 1])], pixels()
def negative(): return [(np.zeros((8, 8), np.uint8), i - 1) for i in range(3)], pixels()
def one_class(): return [(np.zeros((8, 8), np.uint8), 0)] * 2, [(np.zeros((8, 8), np.uint8), 0)]
def channels(): return [(np.zeros((8, 8, c), np.uint8), c % 2) for c in (1, 3)], pixels()
def fails(): raise OSError("disk is gone")
def empty(): return [], pixels()
class Failing(list):
    def __getitem__(self, i):
        if i == 3: raise KeyError("lost")
        return super().__getitem__(i)
def failing(): return Failing(pixels()), pixels()
'''  # fmt: skip


@pytest.fixture(autouse=True)
def own(tmp_path, monkeypatch):
    folder = tmp_path / "modules"
    folder.mkdir()
    (folder / "own.py").write_text(MODULE)
    monkeypatch.syspath_prepend(folder)
    yield folder / "own.py"
    sys.modules.pop("own", None)
    importlib.invalidate_caches()


def config(**changes):
    quick = {"network": "own:net", "sparsity": 0.5, "epochs": 2, "batch_size": 16,
             "data.name": "own:grey", "data.validation": 0.2, "data.shift": 1,
             "optimizer.lr": 0.01, "system.threads": 1, "system.workers": 0}  # fmt: skip
    return apply(Config(), quick | changes, "test")


def batches(settings):
    data = load_dataset(settings.data, settings.seed)
    loader = train_loader(data, settings, torch.device("cpu"))
    evaluation = eval_loader(data, data.test, settings, torch.device("cpu"))
    return [(b.x, b.y) for _ in range(2) for b in loader] + list(evaluation)


def assert_equal_batches(one, other):
    for (x, y), (u, v) in zip(one, other, strict=True):
        assert torch.equal(x, u)
        assert torch.equal(y, v)


def test_images_of_every_kind_have_the_same_pixels():
    rgb = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    grey = rgb[:, :, 0]
    expected = torch.from_numpy(rgb)
    for image in (rgb, Image.fromarray(rgb), expected.permute(2, 0, 1), rgb[:, ::-1][:, ::-1]):
        assert torch.equal(to_pixels(image, ""), expected)
    for image in (grey, grey[:, :, None], Image.fromarray(grey), torch.from_numpy(grey.copy())):
        assert torch.equal(to_pixels(image, ""), expected[:, :, :1])
    shown = to_pixels(Image.fromarray(grey), "", channels=3)  # a grey image among RGB ones
    assert torch.equal(shown, expected[:, :, :1].expand(2, 4, 3))


def test_decoded_images_take_the_settings_of_crops_and_normalization():
    given = {"data.mean": [0.2], "data.std": [0.1], "data.shift": 0, "data.flip": False}
    for storage in ("memory", "stream"):
        settings = config(**given, **{"data.storage": storage, "data.resolution": 8})
        data = load_dataset(settings.data, 0)
        pixels = torch.from_numpy(np.stack([image for image, _ in load("pixels")(12, 100)]))
        loader = eval_loader(data, data.test, settings, torch.device("cpu"))
        found = torch.cat([x for x, _ in loader])[:, 0]
        assert torch.allclose(found, (pixels / 255 - 0.2) / 0.1, atol=1e-5)
        assert data.names == ("0", "1")
        assert len(data.train) == 32  # 40 without those of validation


def load(name):
    return getattr(importlib.import_module("own"), name)


def test_a_part_for_validation_is_used_in_place_of_held_out_images():
    for fraction, expected in ((0.1, (20, 6, 8)), (0.0, (20, 0, 8))):
        data = load_dataset(DataConfig("own:three_parts", validation=fraction), seed=0)
        assert (len(data.train), len(data.validation), len(data.test)) == expected


@pytest.mark.parametrize("name", ["own:prepared", "own:random_pixels"])
def test_random_data_sets_are_reproducible_for_any_number_of_workers(name):
    one = batches(config(**{"data.name": name}))
    torch.manual_seed(7)
    random.seed(7)
    np.random.seed(7)
    assert_equal_batches(one, batches(config(**{"data.name": name, "system.workers": 2})))
    first, later = one[0][0], one[2][0]
    assert not torch.equal(first.sort(0).values, later.sort(0).values)  # other random numbers


def test_reading_a_data_set_leaves_the_random_state_of_the_program():
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    load_dataset(config(**{"data.name": "own:prepared"}).data, 0).example()
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1] == states[1]).all()
    assert random.getstate() == states[2]


@pytest.mark.parametrize("name", ["own:grey", "own:prepared"])
@pytest.mark.slow
def test_a_run_with_own_network_and_data_resumes_bitwise_identically(name, tmp_path):
    settings = config(**{"data.name": name})
    train(settings, tmp_path / "whole")
    with pytest.raises(Interrupted):
        train(settings, tmp_path / "run", callback=StopAt(3))
    train(settings, tmp_path / "run", resume=True)
    whole, resumed = (RunDirectory(tmp_path / n).model_file for n in ("whole", "run"))
    assert whole.read_bytes() == resumed.read_bytes()


@pytest.mark.parametrize("name", ["own:grey", "own:prepared"])
def test_a_run_does_not_resume_on_changed_images(name, own, tmp_path):
    settings = config(**{"data.name": name})
    with pytest.raises(Interrupted):
        train(settings, tmp_path / "run", callback=StopAt(3))
    own.write_text(own.read_text().replace("randint(0, 99", "randint(0, 98"))
    sys.modules.pop("own")
    importlib.invalidate_caches()
    with pytest.raises(CheckpointError, match=r"images have changed .* other contents"):
        train(settings, tmp_path / "run", resume=True)


def test_images_that_differ_each_time_are_marked_as_not_verified(tmp_path):
    settings = config(**{"data.name": "own:unseeded"})
    identities = [data_identity(load_dataset(settings.data, 0)) for _ in range(2)]
    assert identity_digest(identities[0]) == identity_digest(identities[1])
    assert {c["content"] for part in identities[0].values() for c in part.values()} == {
        "unverified"
    }
    with pytest.raises(Interrupted):
        train(settings, tmp_path / "run", callback=StopAt(3))
    train(settings, tmp_path / "run", resume=True)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("own:missing", "has no 'missing'"),
        ("nowhere.at_all:data", "cannot be imported"),
        ("own:no_parts", "returned a NoneType. Return the data sets"),
        ("own:stream", "train: is a list_iterator, which has no length"),
        ("own:triples", "image 0: is a tuple; expected a pair"),
        ("own:text", "image 0: is a str; expected an image of Pillow"),
        ("own:floats_as_array", r"image 0: is a ndarray of float64 \(8, 8\); expected"),
        ("own:two_sizes_of_labels", "labels have several shapes"),
        ("own:negative", "image 0: has the label -1, but labels are 0 to 1"),
        ("own:one_class", "one class"),
        ("own:channels", "image 1: has 3 channels, the first image 1"),
        ("own:fails", r"the factory failed \(OSError: disk is gone\)"),
        ("own:empty", "train: has no images"),
        ("own:failing", r"image 3: the data set fails \(KeyError: 'lost'\)"),
        ("own:grey_with_path", r"the factory failed \(TypeError"),
    ],
)
def test_a_data_set_that_cannot_be_used_is_an_error_that_names_it(name, message):
    with pytest.raises((DataError, ConfigurationError), match=message) as caught:
        load_dataset(DataConfig(name), seed=0)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_factory_gets_the_path_if_it_takes_one():
    data = load_dataset(DataConfig("own:grey_with_path", path="30", validation=0.0), seed=0)
    assert len(data.train) == 30
    with pytest.raises(DataError, match="takes no keyword path"):
        load_dataset(DataConfig("own:grey", path="30"), seed=0)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("own:fixed", r"must return logits of shape \(B, 2\).* returns \(1, 7\)"),
        ("own:broken", r"its factory failed \(KeyError: 'no weights'\)"),
        ("own:nothing", "returned NoneType. Return a torch.nn.Module"),
        ("own:nett", "did you mean 'net'"),
    ],
)
def test_a_network_that_cannot_be_used_is_an_error_that_names_it(name, message, tmp_path):
    with pytest.raises(ConfigurationError, match=message) as caught:
        train(config(network=name), tmp_path / "run")
    assert name in str(caught.value)
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_a_run_answers_unless_its_data_set_prepared_the_images(tmp_path):
    train(config(epochs=1), tmp_path / "pixels")
    answer = load_predictor(tmp_path / "pixels").predict(["x"], [np.zeros((9, 8, 3), np.uint8)])[0]
    assert set(answer.classes) == {"0", "1"}
    train(config(epochs=1, **{"data.name": "own:prepared"}), tmp_path / "prepared")
    for source in (tmp_path / "prepared", tmp_path / "prepared" / "model.safetensors"):
        with pytest.raises(RunError, match="prepared by the data set own:prepared"):
            load_predictor(source)


def test_a_file_cannot_have_code_executed_that_the_user_did_not_name(tmp_path):
    info = NetworkInfo("own:net", ("a", "b"), (1, 8, 8), (0.5,), (0.5,), 8)
    path = tmp_path / "network.safetensors"
    save_file(models.create("own:net", 2, 1).state_dict(), path, info.metadata())
    sys.modules.pop("own")
    with pytest.raises(RunError, match="names its network by code, 'own:net'"):
        load_predictor(path)
    with pytest.raises(RunError, match="names its network by code"):
        load_predictor(path, network="own:other")
    assert "own" not in sys.modules
    assert load_predictor(path, network="own:net").info == info


def test_a_sparse_file_of_an_own_network_is_a_teacher_of_the_same_network_only(tmp_path):
    path = tmp_path / "teacher.safetensors"
    state = models.create("own:net", 2, 1).state_dict()
    state["4.weight"] *= 0
    feather.save_sparse(state, path, metadata={"network": "own:net"})
    data = load_dataset(config().data, 0)
    assert load_teacher(config(**{"distillation.teacher": str(path)}), data)
    with pytest.raises(RunError, match="names its network by code"):
        load_teacher(config(network="resnet8", **{"distillation.teacher": str(path)}), data)
