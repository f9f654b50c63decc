import io
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from torch_feather.errors import FeatherWarning
from torch_feather.training.config import DataConfig
from torch_feather.training.data import EvalLoader, TrainLoader, cache_folder, load_dataset
from torch_feather.training.data import cifar as cifar_files
from torch_feather.training.distributed import Ranks
from torch_feather.training.errors import DataError

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_FEATHER_CACHE", str(tmp_path / "cache"))


def random_images(count, seed, size=32):
    return np.random.RandomState(seed).randint(0, 256, (count, size, size, 3), dtype=np.uint8)


def encode(pixels):
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return {"bytes": stream.getvalue(), "path": None}


def write_parquet(file, pixels, labels, column="fine_label"):
    table = pyarrow.table({"img": [encode(p) for p in pixels], column: labels})
    pyarrow.parquet.write_table(table, file)


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "cifar100"
    folder.mkdir()
    train = random_images(30, 0)
    for i in range(3):
        part = slice(10 * i, 10 * i + 10)
        write_parquet(
            folder / f"train-0000{i}-of-00003.parquet", train[part], list(range(30))[part]
        )
    write_parquet(folder / "test-00000-of-00001.parquet", random_images(7, 1), list(range(7)))
    return folder


def cifar(folder, **changes):
    return DataConfig(name="cifar100", path=str(folder), validation=0.0, **changes)


def identity(images):
    return {bytes(p.numpy().tobytes()) for p in images.pixels}


def test_parquet_shards_are_read_in_order_and_without_loss(folder):
    for _ in range(2):  # decoded, then from the cache
        data = load_dataset(cifar(folder), seed=0)
        assert np.array_equal(data.train.pixels.numpy(), random_images(30, 0))
        assert data.train.labels.tolist() == list(range(30))
        assert np.array_equal(data.test.pixels.numpy(), random_images(7, 1))
        assert len(data.validation) == 0
        assert data.classes == 100
    assert len(list(cache_folder().glob("*.npz"))) == 2


def test_a_changed_file_is_decoded_again(folder):
    load_dataset(cifar(folder), seed=0)
    write_parquet(folder / "test-00000-of-00001.parquet", random_images(8, 2), list(range(8)))
    assert len(load_dataset(cifar(folder), seed=0).test) == 8


def test_a_damaged_cache_is_replaced(folder):
    load_dataset(cifar(folder), seed=0)
    for file in cache_folder().glob("*.npz"):
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2])
    assert np.array_equal(load_dataset(cifar(folder), 0).test.pixels.numpy(), random_images(7, 1))
    assert all(f.stat().st_size > 7 * 32 * 32 * 3 for f in cache_folder().glob("*.npz"))


def test_a_cache_that_cannot_be_written_costs_only_time(folder, monkeypatch):
    (folder / "file").write_text("")
    monkeypatch.setenv("TORCH_FEATHER_CACHE", str(folder / "file" / "below"))
    with pytest.warns(FeatherWarning, match="cannot be cached"):
        assert len(load_dataset(cifar(folder), seed=0).test) == 7


def test_lower_resolution_is_the_rounded_mean_of_blocks(folder):
    data = load_dataset(cifar(folder, resolution=16), seed=0)
    exact = random_images(7, 1).reshape(7, 16, 2, 16, 2, 3).mean(axis=(2, 4))
    assert np.abs(data.test.pixels.numpy() - exact).max() <= 0.5
    with pytest.raises(DataError, match="divisor"):
        load_dataset(cifar(folder, resolution=15), seed=0)


def test_official_archive_is_read_and_checked(tmp_path, monkeypatch):
    import hashlib
    import pickle

    import torchvision

    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    lists = {}
    for name, count in (("train", 9), ("test", 4)):
        pixels = random_images(count, len(name)).transpose(0, 3, 1, 2).reshape(count, -1)
        content = pickle.dumps({"data": pixels, "fine_labels": list(range(count))})
        (folder / name).write_bytes(content)
        lists[f"{name}_list"] = [[name, hashlib.md5(content).hexdigest()]]
    meta = pickle.dumps({"fine_label_names": [str(i) for i in range(100)]})
    (folder / "meta").write_bytes(meta)
    cls = torchvision.datasets.CIFAR100
    for key, value in lists.items():
        monkeypatch.setattr(cls, key, value)
    monkeypatch.setattr(cls, "meta", {**cls.meta, "md5": hashlib.md5(meta).hexdigest()})
    for path in (tmp_path, folder):
        data = load_dataset(cifar(path), seed=0)
        assert np.array_equal(data.train.pixels.numpy(), random_images(9, 5))
        assert data.test.labels.tolist() == [0, 1, 2, 3]
    (folder / "test").write_bytes(b"damaged")
    with pytest.raises(DataError, match="incomplete or damaged"):
        load_dataset(cifar(tmp_path), seed=0)


def _truncate(folder):
    file = folder / "train-00001-of-00003.parquet"
    file.write_bytes(file.read_bytes()[:-200])


def _undecodable(folder):
    cells = [encode(p) for p in random_images(3, 3)]
    cells[1]["bytes"] = cells[1]["bytes"][:100]
    table = pyarrow.table({"img": cells, "fine_label": [0, 1, 2]})
    pyarrow.parquet.write_table(table, folder / "test-00000-of-00001.parquet")


def _remove(pattern):
    def remove(folder):
        for file in folder.glob(pattern):
            file.unlink()

    return remove


def _test_file(*arguments, **options):
    def write(folder):
        write_parquet(folder / "test-00000-of-00001.parquet", *arguments, **options)

    return write


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_truncate, "train-00001-of-00003.parquet: not a readable parquet file"),
        (_undecodable, "test-00000-of-00001.parquet: the image in row 1 cannot be decoded"),
        (
            _remove("train-00001*"),
            "has 2 of 3 train files, according to .*Download the missing files",
        ),
        (_remove("test*"), "has no test.*parquet"),
        (_remove("*"), "found neither train"),
        (_test_file(random_images(2, 0), [0, 100]), "integers from 0 to 99"),
        (_test_file(random_images(2, 0), [0.0, 1.0]), "integers from 0 to 99"),
        (
            _test_file(random_images(2, 0), [0, 1], column="label"),
            "expected the columns img and fine_l",
        ),
        (_test_file(random_images(2, 0, size=31)[:, :30], [0, 1]), "row 0 has 31x30 pixels"),
        (_test_file([], []), "has no images"),
    ],
)
def test_bad_files_are_a_one_line_error_that_names_them(folder, damage, message):
    damage(folder)
    with pytest.raises(DataError, match=message) as caught:
        load_dataset(cifar(folder), seed=0)
    assert "\n" not in str(caught.value)


def test_a_decompression_bomb_in_a_parquet_file_is_an_error(folder):
    stream = io.BytesIO()
    Image.new("1", (20000, 20000)).save(stream, "PNG")
    table = pyarrow.table({"img": [{"bytes": stream.getvalue(), "path": ""}], "fine_label": [0]})
    pyarrow.parquet.write_table(table, folder / "test-00000-of-00001.parquet")
    with pytest.raises(DataError, match=r"test-00000.*row 0 cannot be decoded"):
        load_dataset(cifar(folder), seed=0)


def test_rows_that_repeat_one_large_image_take_bounded_memory(folder, monkeypatch):
    cell = encode(random_images(1, 0)[0])
    table = pyarrow.table({"img": [cell] * 5000, "fine_label": [1] * 5000})
    file = folder / "test-00000-of-00001.parquet"
    pyarrow.parquet.write_table(table, file)  # stores the image once
    assert file.stat().st_size < 50_000
    monkeypatch.setattr(cifar_files, "MEMORY", 1000 * 32 * 32 * 3)
    with pytest.raises(DataError, match=r"row 1000 is more than the .* bytes of pixels allowed"):
        load_dataset(cifar(folder), seed=0)


def _without_bytes(folder):
    table = pyarrow.table({"img": [{"bytes": None, "path": "x"}], "fine_label": [0]})
    pyarrow.parquet.write_table(table, folder / "test-00000-of-00001.parquet")


def _without_label(folder):
    image = encode(random_images(1, 0)[0])
    table = pyarrow.table({"img": [image, image], "fine_label": [0, None]})
    pyarrow.parquet.write_table(table, folder / "test-00000-of-00001.parquet")


def _texts(folder):
    table = pyarrow.table({"img": ["x", "y"], "fine_label": [0, 1]})
    pyarrow.parquet.write_table(table, folder / "test-00000-of-00001.parquet")


def _fifo(folder):
    (folder / "test-00000-of-00001.parquet").unlink()
    os.mkfifo(folder / "test-00000-of-00001.parquet")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_without_bytes, "row 0 has no image"),
        (_without_label, "row 1 has no label"),
        (_texts, "not a readable parquet file|has no image"),
        (_fifo, "not a regular file"),
    ],
)
def test_unusual_parquet_files_are_a_one_line_error(folder, damage, message):
    damage(folder)
    with pytest.raises(DataError, match=message) as caught:
        load_dataset(cifar(folder), seed=0)
    assert "test-00000-of-00001.parquet" in str(caught.value)
    assert str(caught.value).isprintable()


def damaged_files(whole):
    """Yield files cut at, and with a byte changed at, many offsets."""
    for position in range(0, len(whole), 13):
        yield whole[:position]
        changed = bytearray(whole)
        changed[position] ^= 1 << position % 8
        yield bytes(changed)


@pytest.mark.parametrize("compression", ["none", "snappy", "zstd"])
def test_a_damaged_parquet_file_gives_the_right_images_or_an_error(folder, compression):
    file = folder / "test-00000-of-00001.parquet"
    pixels = random_images(3, 1, size=4)
    table = pyarrow.table({"img": [encode(p) for p in pixels], "fine_label": [3, 1, 2]})
    pyarrow.parquet.write_table(
        table, file, compression=compression, write_page_checksum=True, store_schema=False
    )
    messages = []
    for content in damaged_files(file.read_bytes()):
        file.write_bytes(content)
        try:
            arrays = cifar_files._read_parquet([file], "fine_label", 100)
        except DataError as error:
            messages.append(str(error))
        else:
            assert np.array_equal(arrays["pixels"], pixels)
            assert arrays["labels"].tolist() == [3, 1, 2]
    assert len(messages) > 50
    assert all(file.name in message and message.isprintable() for message in messages)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        load_dataset(cifar(tmp_path / "nowhere"), seed=0)
    with pytest.raises(DataError, match="requires --data-path"):
        load_dataset(DataConfig(name="cifar10"), seed=0)


def test_the_split_depends_on_the_seed_and_is_a_partition():
    whole = load_dataset(DataConfig(validation=0.0), seed=0)
    first, again, other = (load_dataset(DataConfig(validation=0.2), seed=s) for s in (1, 1, 2))
    for data in (first, other):
        assert len(data.train) + len(data.validation) == len(whole.train)
        assert len(data.validation) == round(0.2 * len(whole.train))
        together = torch.cat([data.train.pixels, data.validation.pixels]).flatten(1)
        assert torch.equal(
            together.long().sum(0), whole.train.pixels.flatten(1).long().sum(0)
        )  # the same images, each exactly once
        assert torch.equal(
            data.test.pixels, whole.test.pixels
        )  # the test set does not depend on the seed
    assert torch.equal(first.validation.pixels, again.validation.pixels)
    assert not torch.equal(first.validation.pixels, other.validation.pixels)
    assert not identity(whole.test) & identity(first.validation)


def loader(config, seed=0, batch_size=100, data=None):
    return TrainLoader(data or load_dataset(config, 0), config, batch_size, seed, CPU)


def test_an_epoch_without_augmentation_gives_every_image_once():
    config = DataConfig(shift=0, flip=False)
    data = load_dataset(config, 0)
    batches = list(loader(config, data=data))
    images = torch.cat([batch.x for batch in batches])
    expected = torch.cat([x for x, _ in EvalLoader(data, data.train, CPU)])
    assert len(images) == len(data.train)
    assert not torch.equal(images, expected)  # shuffled
    assert torch.equal(images.sort(0).values, expected.sort(0).values)
    assert expected.mean().abs() < 0.02
    assert (expected.std() - 1).abs() < 0.02


def test_every_augmented_image_is_a_shift_and_mirror_of_its_own(folder):
    config = cifar(folder, shift=2)
    data = load_dataset(config, 0)
    epoch = loader(config, batch_size=7, data=data)
    grey = epoch.normalize(torch.zeros(1, 1, 1, 3, dtype=torch.uint8))
    seen = set()
    for x, y, _ in epoch:
        for image, label in zip(x, y.tolist(), strict=True):  # labels are the indices of the images
            plain = epoch.normalize(data.train.pixels[label : label + 1])
            padded = torch.empty(1, 3, 36, 36).copy_(grey.expand(1, 3, 36, 36))
            padded[:, :, 2:-2, 2:-2] = plain
            matches = [
                (down, right, mirrored)
                for down in range(5)
                for right in range(5)
                for mirrored in (False, True)
                for crop in [padded[0, :, down : down + 32, right : right + 32]]
                if torch.equal(image, crop.flip(-1) if mirrored else crop)
            ]
            assert len(matches) == 1
            seen |= set(matches)
    assert len({m[:2] for m in seen}) > 10
    assert {m[2] for m in seen} == {False, True}


@pytest.mark.parametrize("ranks", [2, 3, 150])
def test_the_ranks_together_train_on_the_batches_of_one_process(ranks):
    config = DataConfig(shift=1)
    data = load_dataset(config, 0)
    alone = TrainLoader(data, config, 100, 3, CPU)
    together = [TrainLoader(data, config, 100, 3, CPU, ranks=Ranks(r, ranks)) for r in range(ranks)]
    for _ in range(2):
        for whole, *parts in zip(alone, *together, strict=True):
            assert torch.equal(torch.cat([part.x for part in parts]), whole.x)
            assert torch.equal(torch.cat([part.y for part in parts]), whole.y)
            assert {part.total for part in parts} == {whole.total} == {len(whole.y)}
            sizes = [len(part.x) for part in parts]
            assert max(sizes) - min(sizes) <= 1
            assert all(part.x.shape[1:] == whole.x.shape[1:] for part in parts)  # empty parts too
    assert {str(one.state_dict()) for one in together} == {str(alone.state_dict())}


@pytest.mark.parametrize("ranks", [1, 2, 3, 400])
def test_the_ranks_together_evaluate_every_image_once(ranks):
    data = load_dataset(DataConfig(), 0)
    batches = [
        batch
        for rank in range(ranks)
        for batch in EvalLoader(data, data.test, CPU, batch_size=100, ranks=Ranks(rank, ranks))
    ]
    whole = next(iter(EvalLoader(data, data.test, CPU)))
    assert torch.equal(torch.cat([x for x, _ in batches]), whole[0])
    assert torch.equal(torch.cat([y for _, y in batches]), whole[1])


@pytest.mark.parametrize("position", [0, 3, 13])
def test_a_loader_resumes_within_an_epoch_bitwise_identically(position):
    config = DataConfig(shift=1)
    reference, interrupted = loader(config, seed=3), loader(config, seed=3)
    expected = [*reference, *reference]
    batches = iter(interrupted)
    for _ in range(position):
        next(batches)
    state = interrupted.state_dict()
    resumed = loader(config, seed=99)
    resumed.load_state_dict(state)
    got = [*resumed, *resumed]
    assert len(got) == len(expected) - position
    for batch, other in zip(got, expected[position:], strict=True):
        assert torch.equal(batch.x, other.x)
        assert torch.equal(batch.y, other.y)
        assert batch.total == other.total


@pytest.mark.parametrize("crop", ["shift", "resized"])
def test_the_random_numbers_of_an_epoch_do_not_depend_on_the_device(crop):
    config = DataConfig(shift=1, crop=crop)
    data = load_dataset(config, 0)
    here = TrainLoader(data, config, 100, 3, CPU)
    # This device has no data, so loading a batch cannot synchronize with it.
    there = TrainLoader(data, config, 100, 3, torch.device("meta"))
    for _ in range(2):
        assert [b.x.shape for b in there] == [b.x.shape for b in here]
        assert torch.equal(there.state_dict()["generator"], here.state_dict()["generator"])


@pytest.mark.gpu
@pytest.mark.parametrize("devices", [("cpu", "cuda"), ("cuda", "cpu"), ("cuda", "cuda")])
def test_a_loader_resumes_on_another_device(devices):
    config = DataConfig(shift=1)
    data = load_dataset(config, 0)
    first, second = (TrainLoader(data, config, 100, 3, torch.device(d)) for d in devices)
    batches = iter(first)
    for _ in range(5):
        next(batches)
    second.load_state_dict(first.state_dict())
    expected = [*loader(config, seed=3, data=data)][5:]
    for batch, other in zip(second, expected, strict=True):
        assert torch.equal(batch.y.cpu(), other.y)
        torch.testing.assert_close(batch.x.cpu(), other.x)


def test_small_images_can_be_cropped_and_scaled(folder):
    config = cifar(folder, crop="resized", smallest_crop=0.3)
    data = load_dataset(config, 0)
    for batch in loader(config, batch_size=10, data=data):
        assert batch.x.shape == (10, 3, 32, 32)
        plain = loader(config, data=data).normalize(
            data.train.pixels[batch.y]
        )  # labels are indices
        assert (
            (batch.x - plain).abs().amax((1, 2, 3)) > 0
        ).sum() > 5  # most boxes are not the whole image
        assert (batch.x.mean((2, 3)) - plain.mean((2, 3))).abs().max() < 0.5


def test_drop_last_omits_the_smaller_batch():
    config = DataConfig(shift=0)
    sizes = [len(batch.y) for batch in loader(config, batch_size=100)]
    whole = [b.total for b in loader(replace(config, drop_last=True), batch_size=100)]
    assert set(whole) == {100}
    assert sizes[:-1] == whole
    with pytest.raises(DataError, match="do not fill a batch"):
        loader(replace(config, drop_last=True), batch_size=10**6)


def test_a_shift_beyond_the_image_is_an_error():
    with pytest.raises(DataError, match="shift"):
        loader(DataConfig(shift=8))


def test_the_cache_folder_follows_the_environment(monkeypatch):
    monkeypatch.delenv("TORCH_FEATHER_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_folder() == Path("/somewhere/torch-feather")
