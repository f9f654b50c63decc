import errno
import io
import os
import stat
import tarfile
import tracemalloc
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from torch_feather.errors import FeatherWarning
from torch_feather.training.config import DataConfig
from torch_feather.training.data import (
    EncodedImages,
    EvalLoader,
    Images,
    TrainLoader,
    files,
    imagefolder,
    load_dataset,
    tar_index,
)
from torch_feather.training.data.prepare import Center
from torch_feather.training.data.regular import read_regular
from torch_feather.training.data.stream import StreamEvalLoader, StreamTrainLoader
from torch_feather.training.distributed import Ranks
from torch_feather.training.errors import DataError

CPU = torch.device("cpu")
CLASSES = ("ape", "bee", "cat")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_FEATHER_CACHE", str(tmp_path / "cache"))


def png(seed, size=(24, 24)):
    pixels = np.random.RandomState(seed).randint(0, 256, (*size, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def collection(sizes=lambda i: (24, 24)):
    """Return contents by path: 18 training and 9 evaluation images, in 3 classes."""
    return {
        f"{part}/{CLASSES[i % 3]}/{i:03}.png": png(first + i, sizes(i))
        for part, first, count in (("train", 0, 18), ("val", 100, 9))
        for i in range(count)
    }


def write_folder(folder, images):
    for name, content in images.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def write_tar(file, members):
    with tarfile.open(file, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return file


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "images", collection())


def config(path, **changes):
    return DataConfig(**({"name": "imagefolder", "path": str(path), "validation": 0.0} | changes))


def test_images_are_read_without_loss_and_labelled_by_their_sorted_classes(folder):
    data = load_dataset(config(folder, center=1.0), seed=0)
    assert (len(data.train), len(data.validation), len(data.test)) == (18, 0, 9)
    assert (data.classes, data.channels) == (3, 3)
    assert data.train.labels.tolist() == [0] * 6 + [1] * 6 + [2] * 6
    assert data.test.labels.tolist() == [0] * 3 + [1] * 3 + [2] * 3
    expected = [np.asarray(Image.open(f)) for f in sorted((folder / "train").rglob("*.png"))]
    assert np.array_equal(data.train.pixels.numpy(), np.stack(expected))
    assert data.example().shape == (1, 3, 24, 24)
    assert data.example().dtype == torch.float32


def _deeper(tmp_path):
    images = {name.replace("/0", "/images/0"): c for name, c in collection().items()}
    return write_folder(tmp_path / "deeper", images)


def _named(part):
    def write(tmp_path):
        images = {name.replace("val/", f"{part}/"): c for name, c in collection().items()}
        return write_folder(tmp_path / part, images)

    return write


def _with_other_files(tmp_path):
    others = dict.fromkeys(
        # the test images of ImageNet have no classes
        ("README", "train/notes.txt", "train/ape/._000.png", "more/x.png", "test/x.png"),
        b"",
    )
    return write_folder(tmp_path / "others", collection() | others)


def _one_tar(prefix):
    def write(tmp_path):
        names = list(collection().items())
        np.random.RandomState(0).shuffle(names)
        return write_tar(tmp_path / "one.tar", {prefix + name: c for name, c in names})

    return write


def _shards(pattern, renamed=lambda part, name: name.removeprefix(f"{part}/")):
    def write(tmp_path):
        folder = tmp_path / "shards"
        folder.mkdir()
        for part in ("train", "val"):
            images = [(n, c) for n, c in collection().items() if n.startswith(part)]
            for k in range(2):
                members = {renamed(part, name): c for name, c in images[k::2]}
                write_tar(folder / pattern.format(part=part, k=k), members)
        return folder

    return write


def _numbered_pairs(tmp_path):
    folder = tmp_path / "pairs"
    folder.mkdir()
    for part in ("train", "val"):
        members = {}
        for name, content in collection().items():
            _, kind, base = name.split("/")
            if name.startswith(part):
                # classes are sorted by number, not as text: 9 before 10
                members[base] = content
                members[base.replace(".png", ".cls")] = f"{9 + CLASSES.index(kind)}\n".encode()
                members[base.replace(".png", ".json")] = b"{}"
        write_tar(folder / f"{part}-000.tar", members)
    return folder


LAYOUTS = {
    "nested once more": _deeper,
    "validation": _named("validation"),
    "test": _named("test"),
    "with other files": _with_other_files,
    "one tar": _one_tar(""),
    "one tar with a prefix": _one_tar("./some/images/"),
    "one tar with other files": lambda tmp_path: write_tar(
        tmp_path / "more.tar", collection() | {"README": b"", "test/x.png": b"", "x.png": b""}
    ),
    "shards": _shards("{part}-{k}.tar"),
    "shards with the part inside": _shards("{part}{k}.tar", lambda part, name: f"x/{name}"),
    "numbered pairs": _numbered_pairs,
}


@pytest.mark.parametrize("storage", ["memory", "stream"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_layouts_of_the_same_images_give_the_same_batches(folder, tmp_path, layout, storage):
    expected, given = (
        load_dataset(config(path, storage=storage, resolution=24, validation=0.2), seed=1)
        for path in (folder, LAYOUTS[layout](tmp_path))
    )
    for part in ("train", "validation", "test"):
        one, other = getattr(expected, part), getattr(given, part)
        assert torch.equal(one.labels, other.labels)
        order, seeds = np.arange(len(one)), np.arange(len(one))
        if storage == "memory":
            assert torch.equal(one.pixels, other.pixels)
        else:
            assert torch.equal(one.load(order, seeds), other.load(order, seeds))


def of_stream(images):
    return images.load(np.arange(len(images)), np.zeros(len(images), dtype=np.int64))


@pytest.mark.parametrize("crop", ["shift", "resized"])
def test_both_storages_hold_the_same_images_for_evaluation(folder, crop):
    changes = {"crop": crop, "resolution": 16, "validation": 0.3, "center": 0.8}
    memory, stream = (
        load_dataset(config(folder, storage=storage, **changes), seed=3)
        for storage in ("memory", "stream")
    )
    for part in ("validation", "test"):
        kept, encoded = getattr(memory, part), getattr(stream, part)
        assert isinstance(kept, Images)
        assert isinstance(encoded, EncodedImages)
        assert torch.equal(kept.labels, encoded.labels)
        assert torch.equal(kept.pixels, of_stream(encoded))
    assert torch.equal(memory.train.labels, stream.train.labels)
    assert torch.equal(memory.example(), stream.example())
    loaders = (
        EvalLoader(memory, memory.test, CPU, batch_size=4),
        StreamEvalLoader(stream, stream.test, CPU, batch_size=4),
    )
    assert len(loaders[0]) == len(loaders[1]) == 3
    for (x, y), (a, b) in zip(*loaders, strict=True):
        assert torch.equal(x, a)
        assert torch.equal(y, b)


@pytest.mark.parametrize("storage", ["memory", "stream"])
@pytest.mark.parametrize("crop", ["shift", "resized"])
def test_validation_images_are_prepared_as_for_evaluation(folder, crop, storage):
    settings = config(folder, crop=crop, resolution=16, validation=0.5, storage=storage)
    held_out = load_dataset(settings, seed=0).validation
    pixels = held_out.pixels if storage == "memory" else of_stream(held_out)
    every = sorted((folder / "train").rglob("*.png"))
    center = Center(18 if crop == "resized" else 16, 16)  # 16 / 0.875, rounded
    known = {
        tuple(center(torch.from_numpy(np.array(Image.open(f)))).flatten().tolist()) for f in every
    }
    seen = {tuple(image.flatten().tolist()) for image in pixels}
    assert len(seen) == 9
    assert seen <= known


@pytest.mark.parametrize("storage", ["memory", "stream"])
def test_the_split_is_a_partition_that_depends_on_the_seed_alone(folder, storage):
    settings = config(folder, validation=1 / 3, storage=storage, resolution=24, center=1.0)
    whole = load_dataset(replace(settings, validation=0.0), seed=0).train
    first, again, other = (load_dataset(settings, seed) for seed in (1, 1, 2))

    def content(images):
        if storage == "memory":
            return [tuple(image.flatten().tolist()) for image in images.pixels]
        return images.files.names.tolist()

    for data in (first, other):
        parts = content(data.train) + content(data.validation)
        assert sorted(parts) == sorted(content(whole))
        assert len(data.validation) == 6
    assert content(first.validation) == content(again.validation)
    assert content(first.validation) != content(other.validation)


def mixed(folder):
    return write_folder(folder, collection(lambda i: [(24, 24), (30, 40), (50, 26)][i % 3]))


def test_auto_keeps_images_of_one_size_in_memory_if_they_fit_and_streams_others(
    tmp_path, monkeypatch, folder
):
    for crop in ("shift", "resized"):
        assert isinstance(load_dataset(config(folder, crop=crop), 0).train, Images)
    several = mixed(tmp_path / "mixed")
    data = load_dataset(config(several, crop="resized", resolution=16), 0)
    assert isinstance(data.train, EncodedImages)
    shifted = load_dataset(config(several, crop="shift", resolution=16), 0)
    assert shifted.train.pixels.shape == (18, 16, 16, 3)  # scaled to one size
    monkeypatch.setattr(imagefolder, "MEMORY", 27 * 24 * 24 * 3 - 1)
    assert isinstance(load_dataset(config(folder, crop="resized"), 0).train, EncodedImages)
    asked = load_dataset(config(folder, crop="resized", storage="memory"), 0)
    assert isinstance(asked.train, Images)


def test_the_default_resolution_is_the_stored_one_in_memory_and_224_in_a_stream(folder):
    memory, stream = (
        load_dataset(config(folder, crop="resized", storage=storage), 0)
        for storage in ("memory", "stream")
    )
    assert memory.test.pixels.shape[1:] == (24, 24, 3)
    assert stream.example().shape == (1, 3, 224, 224)


def test_images_scaled_for_shifts_are_cropped_only_along_their_longer_side(tmp_path):
    folder = mixed(tmp_path / "mixed")
    data = load_dataset(config(folder, resolution=12), 0)
    first = np.asarray(Image.open(folder / "train" / "bee" / "001.png"))
    assert torch.equal(data.train.pixels[6], Center(12, 12)(torch.from_numpy(first.copy())))


def test_images_are_decoded_once_per_version(folder, monkeypatch):
    decoded = []
    real = files.ImageFiles.decode

    def counting(self, i):
        decoded.append(self.path(i).name)
        return real(self, i)

    monkeypatch.setattr(files.ImageFiles, "decode", counting)
    settings = config(folder, validation=0.0, resolution=16)
    first = load_dataset(settings, 0)
    assert len(decoded) >= 27
    decoded.clear()
    again = load_dataset(settings, 1)
    assert len(decoded) <= 1  # decoded for its size
    assert torch.equal(first.train.pixels, again.train.pixels)
    (folder / "val" / "ape" / "000.png").write_bytes(png(999))
    changed = load_dataset(settings, 0)
    assert torch.equal(changed.train.pixels, first.train.pixels)
    assert not torch.equal(changed.test.pixels[0], first.test.pixels[0])
    other = load_dataset(replace(settings, center=0.9), 0)
    assert not torch.equal(other.test.pixels, changed.test.pixels)


def test_a_tar_file_is_searched_once_per_version(tmp_path, monkeypatch):
    file = _one_tar("")(tmp_path)
    settings = config(file, storage="stream")
    assert len(load_dataset(settings, 0).train) == 18
    with monkeypatch.context() as patch:
        patch.setattr(tar_index, "read_members", None)
        assert len(load_dataset(settings, 0).train) == 18
    write_tar(file, collection() | {"train/ape/more.png": png(500)})
    assert len(load_dataset(settings, 0).train) == 19


# --- damage ------------------------------------------------------------------------------------


def without(part):
    def remove(images):
        return {name: c for name, c in images.items() if not name.startswith(part)}

    return remove


def adding(**more):
    return lambda images: images | {n.replace("__", "/") + ".png": c for n, c in more.items()}


def test_a_zip_file_is_an_error_that_says_to_unpack_it(tmp_path):
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        archive.writestr("train/ape/1.png", png(0))
    with pytest.raises(DataError, match=r"images.zip: a zip file\. Unpack it"):
        load_dataset(config(tmp_path / "images.zip"), 0)


def test_images_to_evaluate_may_be_in_valid(tmp_path):
    images = {name.replace("val/", "valid/"): pixels for name, pixels in collection().items()}
    data = load_dataset(config(write_folder(tmp_path / "images", images)), 0)
    assert (data.classes, len(data.train), len(data.test)) == (3, 18, 9)


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_hidden_files_and_folders_are_ignored(tmp_path, kind):
    hidden = dict.fromkeys(
        ("train/.checkpoints/1.png", "train/ape/.trash/1.png", "val/bee/._001.png"), png(0)
    )
    images = collection() | hidden
    if kind == "folder":
        path = write_folder(tmp_path / "images", images)
    else:
        path = write_tar(tmp_path / "images.tar", {f"./{n}": c for n, c in images.items()})
    data = load_dataset(config(path), 0)
    assert (data.classes, len(data.train), len(data.test)) == (3, 18, 9)


@pytest.mark.parametrize("kind", ["folder", "tar"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("val"), "no images in val, valid, validation or test"),
        (without("train"), "no training images; expected a folder with train/"),
        (without("val/bee"), "train and val have different classes; only in train: bee"),
        (without("train/cat"), "train and val have different classes; only in val: cat"),
        (adding(train__eel__1=png(0)), "only in train: eel"),
        (
            adding(train__eel__1=png(0), val__fox__1=png(0)),
            "only in train: eel; only in val: fox",
        ),
        (
            adding(**{f"train__k{i}__1": png(0) for i in range(9)}),
            "only in train: k0, k1, k2, k3, k4 and 4 more",
        ),
        (adding(val__flat=png(0)), "flat.png: is neither in the folder of a class"),
        (adding(train__bee__0005=png(5)[:200]), "bee/0005.png: cannot be decoded as an image"),
        (adding(val__bee__0005=b"text"), "bee/0005.png: cannot be decoded as an image"),
        (adding(train__bee__0005=b""), "bee/0005.png: cannot be decoded as an image"),
        (adding(train__bee__0005=png(5, (24, 25))), "bee/0005.png has 25x24 pixels, but .*24x24"),
    ],
)
def test_bad_images_are_a_one_line_error_that_names_them(tmp_path, kind, change, message):
    images = change(collection())
    if kind == "folder":
        path = write_folder(tmp_path / "bad", images)
    else:
        path = write_tar(tmp_path / "bad.tar", images)
    with pytest.raises(DataError, match=message) as caught:
        load_dataset(config(path, storage="memory"), seed=0)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_missing_path_is_named(tmp_path):
    with pytest.raises(DataError, match="requires --data-path"):
        load_dataset(DataConfig(name="imagefolder"), seed=0)
    with pytest.raises(DataError, match="nowhere: no such file or folder"):
        load_dataset(config(tmp_path / "nowhere"), seed=0)


@pytest.mark.parametrize("damage", ["text", "compressed", "truncated"])
def test_a_tar_file_that_cannot_be_read_is_named(tmp_path, damage):
    file = _one_tar("")(tmp_path)
    if damage == "text":
        file.write_text("text" * 1000)
    elif damage == "compressed":
        with tarfile.open(file, "w:gz") as tar:
            tar.addfile(tarfile.TarInfo("train/ape/1.png"))
    else:
        file.write_bytes(file.read_bytes()[:-12_000])
    with pytest.raises(
        DataError, match=r"one\.tar: not a complete, uncompressed tar file"
    ) as caught:
        load_dataset(config(file), seed=0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            {"x.png": png(0), "x.cls": b"cat"},
            "x.cls: must contain the number of a class, got b'cat'",
        ),
        ({"x.png": png(0)}, "x.png: is neither in the folder of a class nor has a .cls file"),
        ({"ape/x.png": png(0)}, "different classes|some images are in the folder of a class"),
    ],
)
def test_bad_pairs_are_named(tmp_path, more, message):
    for part in ("train", "val"):
        members = {"a.png": png(1), "a.cls": b"0", **more}
        write_tar(tmp_path / f"{part}.tar", members)
    with pytest.raises(DataError, match=message):
        load_dataset(config(tmp_path), seed=0)


def test_images_that_are_not_square_need_a_resolution(tmp_path):
    folder = write_folder(tmp_path / "wide", collection(lambda i: (20, 30)))
    with pytest.raises(DataError, match=r"30x20 pixels are not square\. Set data\.resolution"):
        load_dataset(config(folder, storage="memory"), seed=0)
    data = load_dataset(config(folder, storage="memory", crop="resized", resolution=16), seed=0)
    assert data.train.pixels.shape == (18, 20, 30, 3)
    assert {batch.x.shape for batch in TrainLoader(data, config(folder, crop="resized"), 9, 0, CPU)}


def test_images_of_every_mode_are_converted_to_three_channels(tmp_path):
    images = collection()
    for name, mode in zip(images, ("L", "RGBA", "P", "1", "CMYK", "I;16"), strict=False):
        stream = io.BytesIO()
        image = Image.open(io.BytesIO(images[name])).convert("L" if mode == "I;16" else mode)
        image.convert(mode).save(stream, "TIFF")
        images[name] = stream.getvalue()
    data = load_dataset(config(write_folder(tmp_path / "kinds", images)), seed=0)
    assert data.train.pixels.shape == (18, 24, 24, 3)


def test_a_folder_is_searched_once_however_many_links_point_to_it(folder):
    for part, kind in (("train", "ape"), ("val", "bee")):
        for i in range(3):
            (folder / part / kind / f"self{i}").symlink_to(".")
            (folder / part / kind / f"up{i}").symlink_to("..")
            (folder / part / kind / f"class{i}").symlink_to(f"../{kind}")
    data = load_dataset(config(folder), 0)
    assert (data.classes, len(data.train), len(data.test)) == (3, 18, 9)


def test_a_link_to_a_folder_above_is_an_error(folder):
    (folder / "val" / "bee" / "up").symlink_to("../..")
    with pytest.raises(DataError, match="up: is a folder that val is in"):
        load_dataset(config(folder), 0)


def test_links_of_links_are_found_in_time_linear_in_the_folders(folder):
    below = folder / "train" / "ape" / "0"
    for level in range(1, 40):  # 2**39 paths
        below.mkdir()
        (below / "twice").symlink_to(str(level))
        below = below / str(level)
    below.mkdir()
    (below / "deep.png").write_bytes(png(7))
    assert len(load_dataset(config(folder), 0).train) == 19


def test_a_link_to_a_folder_elsewhere_is_followed(folder, tmp_path):
    (folder / "train" / "ape").rename(tmp_path / "elsewhere")
    (folder / "train" / "ape").symlink_to(tmp_path / "elsewhere")
    assert len(load_dataset(config(folder), 0).train) == 18


def test_one_folder_as_two_classes_is_an_error(folder):
    for part in ("train", "val"):
        (folder / part / "dog").symlink_to("cat")
    with pytest.raises(DataError, match="dog: is also the folder cat, of another class"):
        load_dataset(config(folder), 0)


@pytest.mark.parametrize("storage", ["memory", "stream"])
@pytest.mark.parametrize("special", ["fifo", "device", "socket", "broken link"])
def test_only_regular_files_are_read(folder, special, storage):
    def make(path):
        if special == "fifo":
            os.mkfifo(path)
        elif special == "socket":
            os.mknod(path, stat.S_IFSOCK | 0o600)
        else:
            path.symlink_to("/dev/zero" if special == "device" else "nowhere")

    make(folder / "train" / "ape" / "x.png")
    with pytest.raises(DataError, match=r"x\.png: is (no regular file|a broken link)\. Remove it"):
        load_dataset(config(folder, storage=storage), 0)
    (folder / "train" / "ape" / "x.png").unlink()
    data = load_dataset(config(folder, storage="stream", resolution=16), 0)
    path = data.train.files.path(0)  # replaced after it was found
    path.unlink()
    make(path)
    with pytest.raises(DataError, match=r"not a regular file|No such file|No such device"):
        data.train.load(np.zeros(1, int), np.zeros(1, int))


def test_a_link_to_itself_is_a_broken_link(folder):
    (folder / "train" / "ape" / "x").symlink_to("x")
    assert len(load_dataset(config(folder), 0).train) == 18
    (folder / "train" / "ape" / "x.png").symlink_to("x.png")
    with pytest.raises(DataError, match=r"x\.png: is a broken link"):
        load_dataset(config(folder), 0)


def test_a_folder_that_cannot_be_read_is_an_error(folder, monkeypatch):
    real = os.scandir

    def scandir(path):
        if str(path).endswith("bee"):
            raise PermissionError(errno.EACCES, "Permission denied")
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(DataError, match=r"bee: cannot be read \(Permission denied\)"):
        load_dataset(config(folder), 0)


def test_reading_a_file_takes_memory_in_proportion_to_the_file(tmp_path):
    (tmp_path / "small").write_bytes(b"123")
    tracemalloc.start()
    try:
        assert read_regular(tmp_path / "small") == b"123"
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_the_size_of_a_file_is_bounded(folder):
    os.truncate(folder / "train" / "ape" / "000.png", 2**30 + 1)
    with pytest.raises(DataError, match=r"000\.png: has 1,073,741,825 bytes, but at most"):
        load_dataset(config(folder), 0)


@pytest.mark.parametrize("storage", ["memory", "stream"])
def test_a_long_image_that_would_take_gigabytes_when_scaled_is_an_error(folder, storage):
    (folder / "val" / "bee" / "001.png").write_bytes(png(0, (1, 60_000)))
    settings = config(folder, storage=storage, resolution=224)
    with pytest.raises(DataError, match=r"001\.png: 60000x1 pixels, with a shorter side of 224"):
        of_stream(load_dataset(settings, 0).test)


def test_two_spellings_of_one_class_are_an_error(folder):
    for part in ("train", "val"):
        for name in ("caf\u00e9", "cafe\u0301"):
            write_folder(folder, {f"{part}/{name}/1.png": png(1)})
    with pytest.raises(DataError, match="two spellings of the same class"):
        load_dataset(config(folder), 0)


def test_images_of_other_formats_are_named(folder):
    (folder / "train" / "ape" / "x.gif").write_bytes(b"")
    (folder / "train" / "ape" / "y.avif").write_bytes(b"")
    with pytest.warns(FeatherWarning, match=r"[xy]\.(gif|avif) and 1 more: images of this format"):
        assert len(load_dataset(config(folder), 0).train) == 18


def test_names_with_control_characters_are_escaped_in_messages(folder):
    write_folder(folder, {"train/ape/a\n\x1b[31m\udcff.png": b"no image"})
    with pytest.raises(DataError, match=r"a\\n\\x1b\[31m\\udcff\.png: cannot be decoded") as caught:
        load_dataset(config(folder), 0)
    assert str(caught.value).isprintable()


# --- batches of both storages ------------------------------------------------------------------


def loader(data, settings, storage, seed=3, **arguments):
    kind = TrainLoader if storage == "memory" else StreamTrainLoader
    return kind(data, settings, 5, seed, CPU, **arguments)


@pytest.fixture(params=["memory", "stream"])
def storage(request):
    return request.param


@pytest.fixture(params=["shift", "resized"])
def settings(request, folder, storage):
    return config(folder, crop=request.param, resolution=16, storage=storage)


def equal(one, other):
    return torch.equal(one.x, other.x) and torch.equal(one.y, other.y) and one.total == other.total


def test_an_epoch_gives_every_image_once_and_epochs_differ(settings, storage):
    data = load_dataset(settings, 0)
    batches = loader(data, settings, storage)
    assert len(batches) == 4
    first, second = list(batches), list(batches)
    for epoch in (first, second):
        assert [batch.total for batch in epoch] == [5, 5, 5, 3]
        assert torch.cat([b.y for b in epoch]).bincount().tolist() == [6, 6, 6]
        assert all(batch.x.shape[1:] == (3, 16, 16) for batch in epoch)
    assert not equal(first[0], second[0])
    other = list(loader(data, settings, storage, seed=4))
    assert not equal(first[0], other[0])
    assert all(map(equal, first, loader(data, settings, storage)))


@pytest.mark.parametrize("ranks", [2, 3, 7])
def test_ranks_together_give_the_batches_of_one_process(settings, storage, ranks):
    data = load_dataset(settings, 0)
    alone = loader(data, settings, storage)
    together = [loader(data, settings, storage, ranks=Ranks(r, ranks)) for r in range(ranks)]
    for _ in range(2):
        for whole, *parts in zip(alone, *together, strict=True):
            assert torch.equal(torch.cat([part.x for part in parts]), whole.x)
            assert torch.equal(torch.cat([part.y for part in parts]), whole.y)
            assert {part.total for part in parts} == {whole.total} == {len(whole.y)}
            assert all(part.x.shape[1:] == whole.x.shape[1:] for part in parts)


@pytest.mark.parametrize("position", [0, 2, 4])
def test_a_resumed_epoch_is_bitwise_identical(settings, storage, position):
    data = load_dataset(settings, 0)
    reference, interrupted = (loader(data, settings, storage) for _ in range(2))
    expected = [*reference, *reference]
    batches = iter(interrupted)
    for _ in range(position):
        next(batches)
    resumed = loader(data, settings, storage, seed=99)
    resumed.load_state_dict(interrupted.state_dict())
    got = [*resumed, *resumed]
    assert len(got) == len(expected) - position
    assert all(map(equal, got, expected[position:]))


def test_an_epoch_that_was_left_is_resumed(settings, storage):
    data = load_dataset(settings, 0)
    expected = list(loader(data, settings, storage))
    batches = loader(data, settings, storage)
    left = iter(batches)
    assert all(map(equal, [next(left), next(left), *batches], expected))
    assert all(not equal(a, b) for a, b in zip(batches, expected, strict=True))  # the next epoch


def test_a_loader_does_not_use_the_global_random_state(settings, storage):
    data = load_dataset(settings, 0)
    batches = loader(data, settings, storage)
    before = torch.get_rng_state()
    list(batches)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_smaller_last_batch_is_omitted_if_requested(settings, storage):
    settings = replace(settings, drop_last=True)
    batches = loader(load_dataset(settings, 0), settings, storage)
    assert [batch.total for batch in batches] == [5, 5, 5]
    assert len(batches) == 3


def test_a_shift_beyond_the_image_is_an_error(folder, storage):
    settings = config(folder, shift=16, resolution=16, storage=storage)
    with pytest.raises(DataError, match="shift"):
        loader(load_dataset(settings, 0), settings, storage)


def test_crops_of_images_in_memory_are_parts_of_their_own_image(folder):
    settings = config(folder, crop="resized", resolution=16, storage="memory")
    data = load_dataset(settings, 0)
    flat = replace(
        data,
        train=Images(
            data.train.pixels * 0 + torch.arange(18)[:, None, None, None].byte(), torch.arange(18)
        ),
        mean=(0.0,) * 3,
        std=(1 / 255,) * 3,
    )
    for batch in loader(flat, settings, "memory"):
        assert torch.equal(batch.x.mean((1, 2, 3)).round().long(), batch.y)


@pytest.mark.gpu
@pytest.mark.parametrize("crop", ["shift", "resized"])
def test_batches_are_made_without_synchronizing_the_device(folder, crop):
    settings = config(folder, crop=crop, resolution=16, storage="memory")
    data = load_dataset(settings, 0)
    here = TrainLoader(data, settings, 5, 3, CPU)
    there = TrainLoader(data, settings, 5, 3, torch.device("cuda"))
    batches = iter(there)
    given = [next(batches)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        given += batches
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for batch, expected in zip(given, here, strict=True):
        assert torch.equal(batch.y.cpu(), expected.y)
        assert (batch.x.cpu() - expected.x).abs().max() <= 1.01 / (255 * min(data.std))
