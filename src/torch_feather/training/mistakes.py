"""Where a trained network is wrong: confusion matrix, accuracy by class, and the worst images."""

from __future__ import annotations

import heapq
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import models
from ..analysis.confusion import ConfusionMatrix
from ..analysis.occlusion import occlusion
from .checkpoint import RunDirectory
from .config import Config
from .data import Dataset, EncodedImages, Images, Text, class_names, eval_loader, load_dataset
from .errors import DataError, RunError, printable
from .loop import resolve_device
from .precision import autocast

WORST = 12  # images to show


@dataclass(frozen=True)
class TrainedRun:
    """The network of a run, and its data.

    Attributes:
        config: the configuration of the run.
        data: its data set.
        model: its network, on the device.
        device: the device.

    Example:
        >>> from .data import load_dataset
        >>> data = load_dataset(Config().data, seed=0)
        >>> TrainedRun(Config(), data, nn.Flatten(), torch.device("cpu")).shown()[0]
        'validation'
    """

    config: Config
    data: Dataset
    model: nn.Module
    device: torch.device

    def shown(self) -> tuple[str, Images | EncodedImages]:
        """Return the images on which errors are looked at: validation images, if there are any.

        Raises:
            DataError: the data is a text.
        """
        part = "validation" if len(self.data.validation) else "test"
        images = getattr(self.data, part)
        if isinstance(images, Text):
            raise DataError("the run is that of a language model, but errors are shown on images.")
        return part, images


def load_trained(
    run: RunDirectory, data_path: str | None = None, device: str = "auto"
) -> TrainedRun:
    """Load the stored network of a run, and its data.

    Args:
        run: the run directory.
        data_path: the folder of the data, if it has moved.
        device: name of the device.

    Raises:
        RunError: the run has not finished, or its files cannot be read.
        DataError: the data cannot be read, or has other classes.

    Example:
        >>> import tempfile
        >>> run = RunDirectory(tempfile.mkdtemp())
        >>> run.write_config(Config(network="resnet8"))
        >>> run.save_model(models.create("resnet8", num_classes=10, in_channels=1))
        >>> len(load_trained(run, device="cpu").data.test)
        359
    """
    config = run.read_config()
    source = replace(config.data, path=data_path or config.data.path)
    data = load_dataset(replace(source, class_names=None), config.seed)
    try:
        names = class_names(source, data.class_names)
    except DataError as error:
        raise DataError(f"{run.config_file}: {error}") from None
    data = replace(data, class_names=names)
    model = models.create(config.network, data.classes, data.channels)
    run.load_model(model)
    target = resolve_device(device)
    return TrainedRun(config, data, model.to(target).eval(), target)


@dataclass(frozen=True)
class Mistake:
    """An image with a wrong answer.

    Attributes:
        image: its name.
        label: its class.
        answer: the class that the network answered.
        probability: probability of the answer.
        label_probability: probability of its class.
        pixels: the image as the network receives it, before normalization; uint8 (H, W, C).
        evidence: by how much the log-odds of the answer fall where the image is hidden, (H, W).

    Example:
        >>> pixels, evidence = np.zeros((8, 8, 1), np.uint8), np.zeros((8, 8))
        >>> mistake = Mistake("a.png", "cat", "dog", 0.9, 0.1, pixels, evidence)
        >>> entries = mistake.to_dict()
        >>> entries["class"], entries["answer"], entries["probability"]
        ('cat', 'dog', 0.9)
    """

    image: str
    label: str
    answer: str
    probability: float
    label_probability: float
    pixels: np.ndarray
    evidence: np.ndarray

    def to_dict(self) -> dict[str, Any]:
        """Return names and probabilities as plain values."""
        return {
            "image": self.image,
            "class": self.label,
            "answer": self.answer,
            "probability": self.probability,
            "class_probability": self.label_probability,
        }


@dataclass(frozen=True)
class Mistakes:
    """The errors of a network.

    Attributes:
        data: name of the data set.
        part: `validation` or `test`.
        matrix: counts by class and answer.
        worst: the images with the most probable wrong answers.
        dense: counts of the dense baseline on the same images; None without one.

    Example:
        >>> matrix = ConfusionMatrix(("cat", "dog"), np.array([[3, 1], [0, 4]]))
        >>> found = Mistakes("pets", "test", matrix, []).to_dict()
        >>> found["accuracy"], found["confusions"]
        (0.875, [{'class': 'cat', 'answer': 'dog', 'images': 1}])
    """

    data: str
    part: str
    matrix: ConfusionMatrix
    worst: list[Mistake]
    dense: ConfusionMatrix | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return all numbers as plain values."""
        rows = [
            {"class": row.name, "images": row.images, "correct": row.correct}
            for row in self.matrix.by_class()
        ]
        found: dict[str, Any] = {"accuracy": self.matrix.accuracy}
        if self.dense is not None:
            found["dense_accuracy"] = self.dense.accuracy
            for entry, row in zip(rows, self.dense.by_class(), strict=True):
                entry["dense_correct"] = row.correct
        return {
            "data": self.data,
            "part": self.part,
            "images": int(self.matrix.counts.sum()),
            **found,
            "classes": rows,
            "confusions": [
                {"class": label, "answer": answer, "images": count}
                for label, answer, count in self.matrix.confusions()
            ],
            "mistakes": [mistake.to_dict() for mistake in self.worst],
        }


def find_mistakes(
    run: RunDirectory, data_path: str | None = None, device: str = "auto", worst: int = WORST
) -> Mistakes:
    """Evaluate the network of a run on its validation images, or its test images without those.

    Args:
        run: the run directory.
        data_path: the folder of the data, if it has moved.
        device: name of the device.
        worst: number of images to return.

    Raises:
        RunError: the images have several labels, or the network has no finite logits of classes.
        FeatherError: as for `load_trained`.

    Example:
        >>> import tempfile
        >>> from . import train
        >>> config = Config(network="resnet8", sparsity=0.5, epochs=1, batch_size=512)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     results = train(config, folder)
        ...     found = find_mistakes(RunDirectory(folder), device="cpu", worst=2)
        >>> found.part, found.matrix.accuracy == results["validation_accuracy"], len(found.worst)
        ('validation', True, 2)
    """
    trained = load_trained(run, data_path, device)
    part, images = trained.shown()
    if images.labels.ndim != 1:
        raise RunError(
            f"{printable(run.path)}: its images have several labels each, for which a confusion "
            "matrix is not defined. feather evaluate gives its accuracy and loss."
        )
    labels = images.labels.cpu().numpy()
    answers, wrong = _answers(trained, images, worst)
    names = trained.data.names
    dense = None
    baseline = run.dense_baseline()
    if baseline.report_file.exists():
        other = load_trained(baseline, data_path, device)
        if other.data.names == names:
            found, _ = _answers(other, images, 0)
            dense = ConfusionMatrix.count(names, labels, found)
    matrix = ConfusionMatrix.count(names, labels, answers)
    shown = [_mistake(trained, images, *one) for one in wrong]
    return Mistakes(trained.data.name, part, matrix, shown, dense)


Wrong = tuple[float, int, int, float]  # probability, image, answer, probability of the class


@torch.no_grad()
def _answers(
    trained: TrainedRun, images: Images | EncodedImages, worst: int
) -> tuple[np.ndarray, list[Wrong]]:
    """Return the answers to all images, and the most probable wrong ones."""
    config, device, data = trained.config, trained.device, trained.data.name
    answers: list[Tensor] = []
    wrong: list[Wrong] = []
    first = 0
    for x, y in eval_loader(trained.data, images, config, device):
        with autocast(device, config.system.amp):
            logits = trained.model(x)
        if not isinstance(logits, Tensor) or logits.shape != (len(y), trained.data.classes):
            shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise RunError(
                f"network {config.network!r} returns {shape} for {len(y)} images of "
                f"{trained.data.classes} classes. A confusion matrix requires one logit per class."
            )
        logits = logits.float()
        if not logits.isfinite().all():
            raise RunError(
                f"network {config.network!r} returns infinite or NaN logits for {printable(data)}. "
                "Train it again with a smaller optimizer.lr."
            )
        probabilities = logits.softmax(1)
        found = logits.argmax(1)  # as in the evaluation, also with ties
        answers.append(found.cpu())
        own, true = (probabilities.gather(1, i[:, None])[:, 0].tolist() for i in (found, y))
        rows = zip(own, true, found.tolist(), y.tolist(), strict=True)
        new = [
            (p, first + i, answer, q) for i, (p, q, answer, label) in enumerate(rows)
            if answer != label
        ]  # fmt: skip
        wrong = heapq.nsmallest(worst, wrong + new, key=lambda one: (-one[0], one[1]))
        first += len(y)
    return torch.cat(answers).numpy(), wrong


def _mistake(
    trained: TrainedRun,
    images: Images | EncodedImages,
    probability: float,
    i: int,
    answer: int,
    label_probability: float,
) -> Mistake:
    data, index = trained.data, np.array([i])
    if isinstance(images, Images):
        pixels = images.take(index).pixels
    else:
        pixels = images.load(index, np.zeros(1, dtype=np.int64))
    x = data.normalize(trained.device)(pixels.to(trained.device))
    shown = _to_pixels(pixels[0]) if data.prepared else pixels[0].numpy()
    return Mistake(
        _name(images, i),
        data.names[int(images.labels[i])],
        data.names[answer],
        probability,
        label_probability,
        shown,
        occlusion(trained.model, x, answer).numpy(),
    )


def _to_pixels(image: Tensor) -> np.ndarray:
    """Return an image that a data set prepared, (C, H, W), in the range of pixels."""
    low, high = image.amin(), image.amax()
    scaled = (image - low) / (high - low).clamp(min=1e-12)
    return (255 * scaled).round().to(torch.uint8).permute(1, 2, 0).numpy()


def _name(images: Images | EncodedImages, i: int) -> str:
    if images.files is None:
        return f"image {i}"
    return printable(images.files.path(i))
