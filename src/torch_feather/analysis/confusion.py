"""Which classes a network takes for one another: counts, accuracy by class, and a figure."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from .plots import BLUE, ORANGE, panel, plain

NAMED = 30  # classes that fit beside a confusion matrix by name
COUNTED = 15  # classes whose cells have room for numbers
LONGEST = 24  # characters of a name beside the matrix


@dataclass(frozen=True)
class ClassAccuracy:
    """Accuracy on the images of one class.

    Attributes:
        name: the class.
        images: number of its images.
        correct: number of them that the network recognizes.
        confused_with: the class that it answers most often for the others; None without errors.

    Example:
        >>> ClassAccuracy("cat", 8, 6, "dog").accuracy
        0.75
    """

    name: str
    images: int
    correct: int
    confused_with: str | None = None

    @property
    def accuracy(self) -> float | None:
        """Fraction of the images that are recognized; None without images."""
        return self.correct / self.images if self.images else None


@dataclass(frozen=True)
class ConfusionMatrix:
    """Counts of images by class and answer.

    Attributes:
        names: names of the classes, in the order of their labels.
        counts: int64 (classes, classes); `counts[i, j]` images of class i were answered j.

    Example:
        >>> matrix = ConfusionMatrix.count(("cat", "dog"), np.array([0, 0, 1]), np.array([0, 1, 1]))
        >>> matrix.counts.tolist(), matrix.confusions()
        ([[1, 1], [0, 1]], [('cat', 'dog', 1)])
        >>> [row.accuracy for row in matrix.by_class()]
        [0.5, 1.0]
    """

    names: tuple[str, ...]
    counts: np.ndarray

    @classmethod
    def count(
        cls, names: Sequence[str], labels: np.ndarray, answers: np.ndarray
    ) -> ConfusionMatrix:
        """Count images.

        Args:
            names: names of the classes.
            labels: classes of the images, int64 (N,).
            answers: classes that the network answered, int64 (N,).
        """
        size = len(names)
        counts = np.bincount(labels * size + answers, minlength=size * size)
        return cls(tuple(names), counts.reshape(size, size))

    @property
    def accuracy(self) -> float:
        """Fraction of all images that are recognized."""
        return float(self.counts.trace() / self.counts.sum())

    def by_class(self) -> list[ClassAccuracy]:
        """Return the accuracy of each class, in the order of the classes."""
        found = []
        for i, (name, row) in enumerate(zip(self.names, self.counts, strict=True)):
            others = row.copy()
            others[i] = 0
            confused = self.names[int(others.argmax())] if others.any() else None
            found.append(ClassAccuracy(name, int(row.sum()), int(row[i]), confused))
        return found

    def confusions(self) -> list[tuple[str, str, int]]:
        """Return (class, answer, images) of all wrong answers, the most frequent first."""
        wrong = self.counts * ~np.eye(len(self.names), dtype=bool)
        pairs = sorted(zip(*wrong.nonzero(), strict=True), key=lambda pair: -wrong[pair])
        return [(self.names[i], self.names[j], int(wrong[i, j])) for i, j in pairs]


def plot_confusion(matrix: ConfusionMatrix) -> Figure:
    """Plot a confusion matrix. Each row is a class; its cells are shaded by their fraction of it.

    Right answers are blue, wrong ones orange. Up to 15 classes, cells show numbers of images; up to
    30, rows and columns show names.

    Args:
        matrix: the counts.

    Example:
        >>> matrix = ConfusionMatrix(("cat", "dog"), np.array([[3, 1], [0, 4]]))
        >>> [text.get_text() for text in plot_confusion(matrix).axes[0].texts]
        ['3', '1', '4']
    """
    size = len(matrix.names)
    named = size <= NAMED
    side = min(max(4.0, 2.4 + 0.34 * size), 8.0) if named else 7.0
    figure, axes = panel(side, side)
    axes.grid(False)
    # Shades are transparent, so that they suit light and dark pages.
    totals = matrix.counts.sum(1, keepdims=True).clip(1)
    alpha = np.where(matrix.counts > 0, 0.12 + 0.53 * matrix.counts / totals, 0.0)
    colours = np.empty((size, size, 4))
    colours[:, :, :3], colours[:, :, 3] = to_rgb(ORANGE), alpha
    colours[range(size), range(size), :3] = to_rgb(BLUE)
    axes.imshow(colours, interpolation="none")
    if size <= COUNTED:
        _write_counts(axes, matrix.counts)
    if named:
        names = [plain(_short(name)) for name in matrix.names]
        axes.set_xticks(range(size), names, rotation=90 if size > 4 else 0)
        axes.set_yticks(range(size), names)
        axes.tick_params(length=0)
    axes.set_xlabel("answer" if named else "answer (number of the class)")
    axes.set_ylabel("class" if named else "class (number)")
    return figure


def _write_counts(axes: Axes, counts: np.ndarray) -> None:
    for (i, j), count in np.ndenumerate(counts):
        if count:
            axes.text(j, i, f"{count:,}", ha="center", va="center", color="#000000", fontsize=9)


def _short(name: str) -> str:
    return name if len(name) <= LONGEST else name[: LONGEST - 1] + "…"


def draw(figure: Figure, file: object, format: str) -> None:
    """Save a figure whose texts are names of the user, in any script.

    Texts of an SVG stay texts, which a browser draws in its own fonts. Matplotlib's font lacks the
    letters of many scripts.

    Args:
        figure: the figure.
        file: a binary file to write to.
        format: `png` or `svg`.

    Example:
        >>> import io
        >>> file = io.BytesIO()
        >>> draw(plot_confusion(ConfusionMatrix(("猫", "犬"), np.eye(2, dtype=int))), file, "svg")
        >>> "猫" in file.getvalue().decode()
        True
    """
    import matplotlib

    settings: Any = {"svg.fonttype": "none", "svg.hashsalt": "confusion"}
    metadata = {"Date": None} if format == "svg" else None
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure.savefig(file, format=format, dpi=150, metadata=metadata)  # type: ignore[arg-type]
