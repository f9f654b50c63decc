"""Images, decoded once into one uint8 tensor, and batches of them.

Small images fit in memory, so an epoch needs no worker processes: a batch is one gather that
picks the images and crops and mirrors each of them by its own random numbers, on the device that
trains. All randomness of an epoch is drawn at its beginning, on the CPU whatever device trains, so
the state of one generator and a position say everything that a resumed run has to know.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import FeatherWarning
from .config import DataConfig
from .errors import DataError

Arrays = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Images:
    """`pixels`: uint8 (N, H, W, C); `labels`: int64 (N,)."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: np.ndarray) -> Images:
        """The images at `index`, in that order."""
        chosen = torch.from_numpy(index)
        return Images(self.pixels[chosen], self.labels[chosen])


@dataclass(frozen=True)
class Dataset:
    """Three disjoint sets of images, and what a network needs to know about them."""

    name: str
    train: Images
    validation: Images  # empty where the whole training set is used
    test: Images
    classes: int
    mean: tuple[float, ...]  # per channel, of pixels scaled to [0, 1]
    std: tuple[float, ...]

    @property
    def channels(self) -> int:
        """Channels of an image."""
        return self.test.pixels.shape[-1]

    def example(self) -> Tensor:
        """One image as the network sees it: float32 (1, C, H, W)."""
        return Normalize(self, torch.device("cpu"))(self.test.pixels[:1])


@dataclass(frozen=True)
class Source:
    """How to get one data set: its two parts as (pixels, labels), and its constants."""

    read: Callable[[str | None], tuple[Arrays, Arrays]]
    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


def load_dataset(config: DataConfig, seed: int) -> Dataset:
    """Read, average down and split.

    The split into training and validation images depends on `seed` alone.

    Raises:
        DataError: files that are missing, corrupt, truncated, or not this data set.
    """
    source = SOURCES[config.name]
    train, test = (Images(*_to_tensors(part, config)) for part in source.read(config.path))
    # RandomState: NumPy promises that its streams never change
    order = np.random.RandomState(seed % 2**32).permutation(len(train))
    held_out = round(config.validation * len(train))
    if held_out == len(train):
        raise DataError(f"data.validation {config.validation} leaves no image to train on")
    return Dataset(
        config.name,
        train.take(order[held_out:]) if held_out else train,
        train.take(order[:held_out]),
        test,
        source.classes,
        source.mean,
        source.std,
    )


def _to_tensors(part: Arrays, config: DataConfig) -> tuple[Tensor, Tensor]:
    pixels, labels = part
    size = pixels.shape[1]
    if config.resolution is not None and config.resolution != size:
        factor, rest = divmod(size, config.resolution)
        if rest or factor < 1:
            raise DataError(
                f"data.resolution {config.resolution}: {config.name} has {size} pixels a side; "
                f"choose a divisor of it"
            )
        corners = [(i, j) for i in range(factor) for j in range(factor)]
        total = sum(pixels[:, i::factor, j::factor].astype(np.uint16) for i, j in corners)
        pixels = ((total + factor**2 // 2) // factor**2).astype(np.uint8)
    return torch.from_numpy(pixels), torch.from_numpy(labels)


# --- sources -----------------------------------------------------------------------------------


def _read_digits(path: str | None) -> tuple[Arrays, Arrays]:
    """1,797 scans of 8x8 pixels; a fifth, the same whatever the seed, is the test set."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise DataError(
            "the digits data needs scikit-learn: pip install 'torch-feather[train]'"
        ) from None
    bunch = load_digits()
    pixels = (bunch.images * 15).astype(np.uint8)[..., None]  # 0..16 to 0..240
    labels = bunch.target.astype(np.int64)
    order = np.random.RandomState(0).permutation(len(labels))
    cut = len(labels) // 5
    test, train = order[:cut], order[cut:]
    return (pixels[train], labels[train]), (pixels[test], labels[test])


def _cifar(name: str, label: str, classes: int) -> Callable[[str | None], tuple[Arrays, Arrays]]:
    archive = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}[name]

    def read(path: str | None) -> tuple[Arrays, Arrays]:
        if path is None:
            raise DataError(f"{name} needs --data-path: a folder with its parquet files or archive")
        folder = Path(path).expanduser()
        if not folder.is_dir():
            raise DataError(f"{folder}: no such folder; --data-path names the folder of {name}")
        if folder.name == archive:
            folder = folder.parent
        if any(folder.glob("*.parquet")):
            parts = [
                _cached(name, files, partial(_read_parquet, files, label, classes))
                for files in (_shards(folder, "train"), _shards(folder, "test"))
            ]
            return parts[0], parts[1]
        if (folder / archive).is_dir():
            return _read_archive(folder, name)
        raise DataError(
            f"{folder}: found neither train*.parquet and test*.parquet nor {archive}/; "
            f"is it the folder of {name}?"
        )

    return read


SOURCES = {
    "digits": Source(_read_digits, 10, (0.288,), (0.354,)),
    "cifar10": Source(
        _cifar("cifar10", "label", 10), 10, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
    ),
    "cifar100": Source(
        _cifar("cifar100", "fine_label", 100),
        100,
        (0.4914, 0.4822, 0.4465),
        (0.2023, 0.1994, 0.2010),
    ),
}


def _shards(folder: Path, split: str) -> list[Path]:
    files = sorted(folder.glob(f"{split}*.parquet"))
    if not files:
        raise DataError(f"{folder}: no {split}*.parquet in it")
    for file in files:
        numbered = re.search(r"-of-(\d+)\.parquet$", file.name)
        if numbered and int(numbered.group(1)) != len(files):
            raise DataError(
                f"{folder}: {len(files)} {split} file(s), but {file.name} says that there are "
                f"{int(numbered.group(1))}; fetch the missing ones"
            )
    return files


def _read_parquet(files: list[Path], label: str, classes: int) -> Arrays:
    """Columns `img` {bytes, path} and `label`, as on the Hugging Face hub."""
    try:
        import pyarrow
        import pyarrow.parquet
        from PIL import Image
    except ImportError as error:
        raise DataError(
            f"parquet files need {error.name}: pip install 'torch-feather[train]'"
        ) from None
    pixels: list[np.ndarray] = []
    labels: list[np.ndarray] = []
    for file in files:
        try:
            table = pyarrow.parquet.read_table(file)
        except (pyarrow.ArrowException, OSError) as error:
            first = str(error).strip().splitlines()[0]
            raise DataError(f"{file}: not a readable parquet file ({first})") from None
        if not {"img", label} <= set(table.column_names):
            raise DataError(
                f"{file}: expected the columns img and {label}, "
                f"found {', '.join(table.column_names)}"
            )
        for row, cell in enumerate(table.column("img")):
            try:
                image = Image.open(io.BytesIO(cell.as_py()["bytes"])).convert("RGB")
            except (OSError, ValueError, TypeError, KeyError, SyntaxError):
                raise DataError(f"{file}: the image in row {row} cannot be decoded") from None
            pixels.append(np.asarray(image))
            if pixels[-1].shape != pixels[0].shape or image.width != image.height:
                raise DataError(
                    f"{file}: the image in row {row} has {image.width}x{image.height} pixels; "
                    "all must be squares of one size"
                )
        if table.num_rows == 0:
            raise DataError(f"{file}: holds no image")
        column = table.column(label).to_numpy()
        if column.dtype.kind not in "iu" or ((column < 0) | (column >= classes)).any():
            raise DataError(f"{file}: {label} must hold whole numbers from 0 to {classes - 1}")
        labels.append(column.astype(np.int64))
    return np.stack(pixels), np.concatenate(labels)


def _read_archive(folder: Path, name: str) -> tuple[Arrays, Arrays]:
    """The authors' own archive, unpacked, read and checked (MD5) by torchvision."""
    try:
        from torchvision.datasets import CIFAR10, CIFAR100
    except ImportError:
        raise DataError(
            "the CIFAR archive needs torchvision: pip install 'torch-feather[vision]'"
        ) from None
    cls = {"cifar10": CIFAR10, "cifar100": CIFAR100}[name]
    try:
        parts = [cls(str(folder), train=train, download=False) for train in (True, False)]
    except Exception:  # it unpickles, so a damaged file may raise anything
        raise DataError(
            f"{folder}: the {name} archive is incomplete or damaged (by torchvision's checksums); "
            "unpack it anew"
        ) from None
    train, test = ((p.data, np.asarray(p.targets, dtype=np.int64)) for p in parts)
    return train, test


# --- cache of decoded images -------------------------------------------------------------------


def cache_folder() -> Path:
    """`$TORCH_FEATHER_CACHE`, else `torch-feather` in the user's cache folder."""
    if own := os.environ.get("TORCH_FEATHER_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "torch-feather"


def _cached(name: str, files: list[Path], decode: Callable[[], Arrays]) -> Arrays:
    """Decode once per version of the files (by path, size and time of change)."""
    stats = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    key = hashlib.sha256(repr((1, name, stats)).encode()).hexdigest()[:20]
    target = cache_folder() / f"{name}-{key}.npz"
    if target.exists():
        try:
            with np.load(target, allow_pickle=False) as stored:  # the zip checks its CRC
                return stored["pixels"], stored["labels"]
        except Exception:  # damaged in any way: decode anew and overwrite
            pass
    pixels, labels = decode()
    temporary = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=target.parent, delete=False) as file:
            temporary = file.name
            np.savez(file, pixels=pixels, labels=labels)
        os.replace(temporary, target)
    except OSError as error:  # only slower next time
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        message = f"decoded images not kept in {target.parent}: {error}"
        warnings.warn(message, FeatherWarning, stacklevel=2)
    return pixels, labels


# --- batches -----------------------------------------------------------------------------------


class Normalize:
    """uint8 (B, H, W, C) to float32 (B, C, H, W) of mean 0 and std 1; the layout may stay."""

    def __init__(self, data: Dataset, device: torch.device, channels_last: bool = True) -> None:
        self.channels_last = channels_last
        std = torch.tensor(data.std, device=device)
        self.scale = 1 / (255 * std)
        self.offset = -torch.tensor(data.mean, device=device) / std

    def __call__(self, pixels: Tensor) -> Tensor:
        """Map a batch."""
        images = torch.addcmul(self.offset, pixels.float(), self.scale).permute(0, 3, 1, 2)
        return images if self.channels_last else images.contiguous()


class TrainLoader:
    """Shuffled, shifted and mirrored batches, one epoch per iteration.

    Iterating after `load_state_dict` goes on in the middle of the epoch where the state was taken.
    """

    def __init__(
        self,
        data: Dataset,
        config: DataConfig,
        batch_size: int,
        seed: int,
        device: torch.device,
        channels_last: bool = True,
    ) -> None:
        self.size = data.train.pixels.shape[1]
        if config.shift >= self.size:
            raise DataError(f"data.shift {config.shift} moves all of {self.size} pixels away")
        pad = (0, 0, config.shift, config.shift, config.shift, config.shift)
        self.pixels = torch.nn.functional.pad(data.train.pixels, pad).to(device)
        self.labels = data.train.labels.to(device)
        self.normalize = Normalize(data, device, channels_last)
        self.shift, self.flip = config.shift, config.flip
        self.batch_size = batch_size
        count = len(self.labels)
        self.batches = count // batch_size if config.drop_last else -(-count // batch_size)
        if self.batches == 0:
            raise DataError(f"{count} training images fill no batch of {batch_size}")
        self.generator = torch.Generator().manual_seed(seed)
        self.epoch_start = self.generator.get_state()
        self.position = 0

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.epoch_start = self.generator.get_state()
        order, down, right, mirrored = self._draw()
        grid = torch.arange(self.size, device=order.device)
        while self.position < self.batches:
            part = slice(self.position * self.batch_size, (self.position + 1) * self.batch_size)
            index = order[part]
            rows = down[part, None] + grid
            columns = torch.where(mirrored[part, None], self.size - 1 - grid, grid)
            columns = columns + right[part, None]
            pixels = self.pixels[index[:, None, None], rows[:, :, None], columns[:, None, :]]
            self.position += 1
            yield self.normalize(pixels), self.labels[index]
        self.position = 0
        self.epoch_start = self.generator.get_state()

    def _draw(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        count = len(self.labels)

        def integers(high: int) -> Tensor:
            return torch.randint(high, (count,), generator=self.generator)

        order = torch.randperm(count, generator=self.generator)
        shifts = 2 * self.shift + 1
        down, right = integers(shifts), integers(shifts)
        mirrored = integers(2 if self.flip else 1).bool()
        device = self.labels.device
        return (
            order.to(device, non_blocking=True),
            down.to(device, non_blocking=True),
            right.to(device, non_blocking=True),
            mirrored.to(device, non_blocking=True),
        )

    def state_dict(self) -> dict[str, Any]:
        """The generator at the beginning of the current epoch, and the batches given since."""
        return {"generator": self.epoch_start, "position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken."""
        self.generator.set_state(state["generator"])
        self.epoch_start = self.generator.get_state()
        self.position = state["position"]


class EvalLoader:
    """The images of one set in order, unchanged."""

    def __init__(
        self, data: Dataset, images: Images, device: torch.device, batch_size: int = 512
    ) -> None:
        self.pixels, self.labels = images.pixels.to(device), images.labels.to(device)
        self.normalize = Normalize(data, device)
        self.batch_size = batch_size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, len(self.labels), self.batch_size):
            part = slice(start, start + self.batch_size)
            yield self.normalize(self.pixels[part]), self.labels[part]
