"""Classes and probabilities of images, by the network of a run or of an exported file."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import models
from ..errors import ConfigurationError, FeatherError, install_hint
from .data import Normalize
from .data.files import SUFFIXES
from .data.images import decode_image
from .data.prepare import Center
from .data.regular import read_regular
from .errors import DataError, RunError, printable
from .network_info import NetworkInfo, check_trusted, read_network_info
from .weights import read_weights

BATCH = 32  # images in memory at a time


@dataclass(frozen=True)
class Prediction:
    """The most probable classes of an image.

    Attributes:
        image: name of the image.
        classes: names of the classes, the most probable first.
        probabilities: their probabilities.
        error: why the image could not be used; None if it could.
        multi_label: whether an image may have several classes. Those above 0.5 are its `labels`.

    Example:
        >>> Prediction("a.jpg", ("cat", "dog"), (0.9, 0.1)).to_dict()["predictions"][0]
        {'class': 'cat', 'probability': 0.9}
    """

    image: str
    classes: tuple[str, ...] = ()
    probabilities: tuple[float, ...] = ()
    error: str | None = None
    multi_label: bool = False

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the classes with a probability above 0.5, if an image may have several."""
        pairs = zip(self.classes, self.probabilities, strict=True)
        return tuple(name for name, value in pairs if self.multi_label and value > 0.5)

    def to_dict(self) -> dict[str, Any]:
        """Return the prediction as plain values."""
        if self.error is not None:
            return {"image": self.image, "error": self.error}
        pairs = zip(self.classes, self.probabilities, strict=True)
        found = [{"class": name, "probability": value} for name, value in pairs]
        labels = {"labels": list(self.labels)} if self.multi_label else {}
        return {"image": self.image, **labels, "predictions": found}


class Predictor:
    """A trained network that answers with names of classes.

    Args:
        network: maps images, float32 (B, C, H, W), to logits (B, classes).
        info: names of the classes, and preparation of images.

    Example:
        >>> info = NetworkInfo("example", ("dark", "light"), (1, 2, 2), (0.5,), (0.5,), 2)
        >>> network = nn.Sequential(nn.Flatten(), nn.Linear(4, 2, bias=False))
        >>> with torch.no_grad():
        ...     _ = network[1].weight.copy_(torch.tensor([[-1.0] * 4, [1.0] * 4]))
        >>> white = np.full((4, 6, 3), 255, np.uint8)
        >>> Predictor(network, info).predict(["white"], [white], top=1)[0].classes
        ('light',)
    """

    def __init__(self, network: Callable[[Tensor], Tensor], info: NetworkInfo) -> None:
        self.network, self.info = network, info
        self.normalize = Normalize(info.mean, info.std, channels_last=False)
        self.crop = Center(info.side, info.input_shape[1])

    def prepare(self, pixels: np.ndarray) -> Tensor:
        """Return an image as the network receives it in evaluation.

        Args:
            pixels: uint8 (H, W, 3).

        Returns:
            float32 (1, C, H, W).

        Raises:
            DataError: the image is so long that the scaled one is too large.
        """
        image = self.crop(torch.from_numpy(pixels))
        if self.info.input_shape[0] == 1:
            image = image.float().mean(2, keepdim=True).round()
        return self.normalize(image[None])

    @torch.no_grad()
    def predict(
        self, names: list[str], images: list[np.ndarray], top: int | None = None
    ) -> list[Prediction]:
        """Return the predictions of decoded images.

        Args:
            names: their names.
            images: their pixels, uint8 (H, W, 3).
            top: number of classes to name; None: 5, or all if an image may have several.
        """
        logits = self.network(torch.cat([self.prepare(image) for image in images])).float()
        probabilities = logits.sigmoid() if self.info.multi_label else logits.softmax(1)
        several, classes = self.info.multi_label, self.info.class_names
        found = probabilities.topk(min(top or (len(classes) if several else 5), len(classes)))
        return [
            Prediction(name, tuple(classes[i] for i in labels), tuple(values), multi_label=several)
            for name, labels, values in zip(
                names, found.indices.tolist(), found.values.tolist(), strict=True
            )
        ]

    def predict_files(self, files: list[Path], top: int | None = None) -> Iterator[Prediction]:
        """Yield the predictions of image files, in order.

        A file that is no readable image yields a `Prediction` with an error.

        Args:
            files: the files.
            top: as for `predict`.
        """
        for start in range(0, len(files), BATCH):
            part = files[start : start + BATCH]
            found: dict[Path, Prediction] = {}
            usable: list[Path] = []
            images: list[np.ndarray] = []
            for file in part:
                try:
                    image = decode_image(read_regular(file))
                    self.prepare(image)
                except (ValueError, OSError, DataError) as error:
                    reason = getattr(error, "strerror", None) or str(error)
                    found[file] = Prediction(printable(file), error=printable(reason))
                else:
                    usable.append(file)
                    images.append(image)
            if usable:
                answers = self.predict([printable(file) for file in usable], images, top)
                found |= dict(zip(usable, answers, strict=True))
            yield from (found[file] for file in part)


def load_predictor(
    source: Path | str, *, compiled: bool = False, threads: int = 1, network: str | None = None
) -> Predictor:
    """Load the network of a run directory, a sparse or dense file, or an ONNX file.

    Args:
        source: a completed run, or a file of `feather export`.
        compiled: whether `compile_sparse` compiles the network, for batches of one image.
        threads: threads of a compiled network.
        network: a network `package.module:factory` that a file may name; other files of networks of
            your own are an error, because they would be executed.

    Raises:
        RunError: the source cannot be read, or does not hold names of classes and shape of images.
        FeatherError: the network cannot be compiled.
        ImportError: a package is missing; the message names the extra.

    Example:
        >>> import tempfile
        >>> from safetensors.torch import save_file
        >>> info = NetworkInfo("resnet8", ("cat", "dog"), (3, 32, 32), (0.5,) * 3, (0.2,) * 3, 32)
        >>> path = Path(tempfile.mkdtemp()) / "model.safetensors"
        >>> save_file(models.create("resnet8", 2).state_dict(), path, info.metadata())
        >>> predictor = load_predictor(path)
        >>> len(predictor.predict(["a"], [np.zeros((40, 50, 3), np.uint8)])[0].classes)
        2
    """
    path = Path(source)
    info = _usable_info(path)
    if path.suffix == ".onnx":
        if compiled:
            raise ConfigurationError("an ONNX file cannot be compiled. Use a run or a sparse file.")
        return Predictor(_onnx_session(path), info)
    check_trusted(info.network, path, network)
    weights = read_weights(path)
    classes, channels = len(info.class_names), info.input_shape[0]
    try:
        with torch.device("meta"):  # before a network is created that only the file names
            weights.check(models.create(info.network, classes, channels))
    except (NotImplementedError, RuntimeError) as error:  # a few cannot be on meta
        if isinstance(error, FeatherError):
            raise
    model: nn.Module = weights.fill(models.create(info.network, classes, channels)).eval()
    if not compiled:
        return Predictor(model, info)
    from ..runtime import compile_sparse

    return Predictor(
        compile_sparse(model, torch.zeros(1, *info.input_shape), threads=threads), info
    )


def _usable_info(path: Path) -> NetworkInfo:
    """Return the facts by which images can be prepared and answers named."""
    if not os.path.exists(path):
        raise RunError(f"{printable(path)}: no such run directory or file")
    info = read_network_info(path)
    if info is None:
        raise RunError(
            f"{printable(path)}: does not hold names of classes and shape of images. Use a run "
            "directory, or a file that feather export wrote."
        )
    if len(info.input_shape) == 1:
        raise RunError(f"{printable(path)}: is a language model, but this command reads images.")
    if info.prepared_by is not None:
        raise RunError(
            f"{printable(path)}: its images were prepared by the data set "
            f"{printable(info.prepared_by)}, which this command cannot repeat. Let the data set "
            "return images of Pillow or uint8, or call the network on tensors of your own."
        )
    return info


def _onnx_session(path: Path) -> Callable[[Tensor], Tensor]:
    try:
        import onnxruntime
    except ImportError as error:
        raise ImportError(f"ONNX files require onnxruntime. {install_hint('onnx')}") from error
    try:
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    except Exception as error:  # of a damaged file
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise RunError(f"{printable(path)}: cannot be read as ONNX ({first})") from None
    name = session.get_inputs()[0].name
    return lambda x: torch.from_numpy(session.run(None, {name: x.contiguous().numpy()})[0])


def image_files(path: Path) -> list[Path]:
    """Return the images of a path: the file itself, or all images in a folder and its subfolders.

    Args:
        path: a file or folder. Hidden files are left out.

    Raises:
        DataError: the path does not exist, or the folder has no images.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> (folder / "b.JPG").touch(), (folder / "a.png").touch(), (folder / "notes.txt").touch()
        (None, None, None)
        >>> [file.name for file in image_files(folder)]
        ['a.png', 'b.JPG']
    """
    if not os.path.exists(path):
        raise DataError(f"{printable(path)}: no such image or folder")
    if not path.is_dir():
        return [path]
    found = [
        file
        for file in sorted(path.rglob("*"))
        if file.name.lower().endswith(SUFFIXES)
        and not any(part.startswith(".") for part in file.relative_to(path).parts)
    ]
    if not found:
        raise DataError(f"{printable(path)}: has no images ({', '.join(SUFFIXES)})")
    return found
