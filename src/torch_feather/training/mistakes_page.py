"""The page of a network's errors, and its images."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np

from ..analysis.confusion import NAMED, ConfusionMatrix, draw, plot_confusion
from ..analysis.pages import inline_svgs, render_page
from ..analysis.plots import adapt_colours
from .checkpoint import RunDirectory
from .console import percent
from .errors import printable
from .mistakes import Mistake, Mistakes
from .writing import write_atomically

LARGEST = 20  # rows of the table of confusions
SMALL = 96  # pixels: smaller images are enlarged with visible pixels
SIDE = 224  # pixels of an image on the page, at most
HEAT = np.array([213.0, 94.0, 0.0])  # orange


def write_mistakes(run: RunDirectory, found: Mistakes) -> list[Path]:
    """Write `errors.html` and `confusion.png` into a run directory.

    Args:
        run: the run directory.
        found: its errors.

    Returns:
        The files.

    Raises:
        RunError: a file cannot be written.
        ImportError: a package of the extra `train` is missing.

    Example:
        >>> import tempfile
        >>> run = RunDirectory(tempfile.mkdtemp())
        >>> matrix = ConfusionMatrix(("<cat>", "dog"), np.array([[3, 1], [0, 4]]))
        >>> page, figure = write_mistakes(run, Mistakes("pets", "test", matrix, []))
        >>> "&lt;cat&gt;" in page.read_text(), figure.name
        (True, 'confusion.png')
    """
    page, figure = run.path / "errors.html", run.path / "confusion.png"
    html = mistakes_page(found, run.path).encode()
    png = png_of_matrix(found.matrix)
    write_atomically(page, lambda file: file.write(html))
    write_atomically(figure, lambda file: file.write(png))
    return [page, figure]


def mistakes_page(found: Mistakes, run: Path) -> str:
    """Return the page: it needs no other file and no network.

    Args:
        found: the errors of a network.
        run: its run directory.

    Example:
        >>> matrix = ConfusionMatrix(("cat", "dog"), np.array([[3, 1], [0, 4]]))
        >>> page = mistakes_page(Mistakes("pets", "test", matrix, []), Path("runs/a"))
        >>> "87.50" in page, "<link" in page
        (True, False)
    """
    file = io.BytesIO()
    draw(plot_confusion(found.matrix), file, "svg")
    svgs = {"confusion": adapt_colours(file.getvalue().decode())}
    pairs = found.matrix.confusions()
    totals = {row.name: row.images for row in found.matrix.by_class()}
    confusions = [
        (label, answer, f"{count:,}", percent(count / totals[label]))
        for label, answer, count in pairs[:LARGEST]
    ]
    classes = class_rows(found)
    numbered = len(classes) > NAMED  # the axes of the figure then show numbers
    if numbered:
        classes = [(str(i), *row) for i, row in enumerate(classes)]
    return render_page(
        __package__,
        "errors.html.jinja",
        run=printable(run),
        found=found,
        images=int(found.matrix.counts.sum()),
        accuracy=percent(found.matrix.accuracy),
        dense=None if found.dense is None else percent(found.dense.accuracy),
        confusion=inline_svgs(svgs)["confusion"],
        confusions=confusions,
        left_out=len(pairs) - len(confusions),
        classes=classes,
        numbered=numbered,
        worst=[_shown(mistake) for mistake in found.worst],
    )


def class_rows(found: Mistakes) -> list[tuple[str, ...]]:
    """Return class, images, accuracy, that of the dense baseline, and the most frequent error.

    Args:
        found: the errors of a network.

    Example:
        >>> matrix = ConfusionMatrix(("cat", "dog"), np.array([[3, 1], [0, 4]]))
        >>> class_rows(Mistakes("pets", "test", matrix, []))[0]
        ('cat', '4', '75.00...', 'dog')
    """
    rows = found.matrix.by_class()
    dense = [()] * len(rows) if found.dense is None else [(r,) for r in found.dense.by_class()]
    return [
        (
            row.name,
            f"{row.images:,}",
            *("" if one.accuracy is None else percent(one.accuracy) for one in (row, *other)),
            row.confused_with or "",
        )
        for row, other in zip(rows, dense, strict=True)
    ]


def png_of_matrix(matrix: ConfusionMatrix) -> bytes:
    """Return the figure of a confusion matrix as a PNG file.

    Args:
        matrix: the counts.

    Example:
        >>> png_of_matrix(ConfusionMatrix(("cat", "dog"), np.array([[3, 1], [0, 4]])))[1:4]
        b'PNG'
    """
    file = io.BytesIO()
    draw(plot_confusion(matrix), file, "png")
    return file.getvalue()


def _shown(mistake: Mistake) -> dict[str, Any]:
    pixels = np.repeat(mistake.pixels, 3, 2) if mistake.pixels.shape[2] == 1 else mistake.pixels
    return {
        **{"image": mistake.image, "label": mistake.label, "answer": mistake.answer},
        "probability": percent(mistake.probability),
        "label_probability": percent(mistake.label_probability),
        "picture": _data_url(pixels),
        "heat": _data_url(heat_map(pixels, mistake.evidence)),
        "small": max(pixels.shape[:2]) <= SMALL,
        "any_evidence": bool((mistake.evidence > 0).any()),
    }


def heat_map(pixels: np.ndarray, evidence: np.ndarray) -> np.ndarray:
    """Return an image in gray, orange where it speaks for the answer.

    Args:
        pixels: uint8 (H, W, 3).
        evidence: (H, W); positive where the image speaks for the answer.

    Example:
        >>> white = np.full((1, 2, 3), 255, np.uint8)
        >>> heat_map(white, np.array([[0.0, 2.0]])).tolist()
        [[[255, 255, 255], [223, 134, 63]]]
    """
    gray = pixels.astype(np.float64) @ np.array([0.299, 0.587, 0.114])
    most = evidence.max()
    strength = 0.75 * np.clip(evidence, 0, None) / (most if most > 0 else 1.0)
    mixed = gray[:, :, None] * (1 - strength[:, :, None]) + HEAT * strength[:, :, None]
    return mixed.astype(np.uint8)


def _data_url(pixels: np.ndarray) -> str:
    from PIL import Image

    image = Image.fromarray(pixels)
    image.thumbnail((SIDE, SIDE))
    file = io.BytesIO()
    image.save(file, format="PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
