"""Published results with their sources; none of them was measured by this project."""

from __future__ import annotations

from dataclasses import dataclass

FEATHER = "Feather, BMVC 2023"
SUPPLEMENT = "supplement of Feather, BMVC 2023"

# Table 1 of the supplement
HYPERPARAMETERS = {
    "CIFAR-100": {
        "epochs": "160",
        "batch size": "128",
        "weight decay": "0.0005",
        "optimizer": "SGD",
        "learning rate": "0.1",
        "schedule": "cosine",
        "momentum": "0.9",
        "label smoothing": "none",
    },
    "ImageNet": {
        "epochs": "100",
        "batch size": "256",
        "weight decay": "5e-05",
        "optimizer": "SGD",
        "learning rate": "0.2",
        "schedule": "cosine, warm-up",
        "momentum": "0.9",
        "label smoothing": "0.1",
    },
}


@dataclass(frozen=True)
class Point:
    """A published top-1 accuracy.

    Attributes:
        sparsity: fraction of zeros.
        accuracy: in %.
        macs: multiply-adds in millions; None if they were not stated.

    Example:
        >>> RESNET50[0].points[0]
        Point(sparsity=0.8, accuracy=76.95, macs=1215)
    """

    sparsity: float
    accuracy: float
    macs: float | None = None


@dataclass(frozen=True)
class Series:
    """The published results of one method.

    Attributes:
        title: name of the method in the publication.
        method: name of the method in torch-feather.
        source: the publication.
        points: results, one for each sparsity.

    Example:
        >>> [series.title for series in MOBILENET if len(series.points) == 2]
        ['ProbMask', 'ST-3', 'Feather-Global']
    """

    title: str
    method: str
    source: str
    points: tuple[Point, ...]


# MobileNetV1 on ImageNet, 100 epochs; all of Table 2 of the supplement
MOBILENET_DENSE = 71.95
MOBILENET = (
    Series("GMP", "gmp", SUPPLEMENT, (Point(0.89, 61.80),)),
    Series("STR", "str", SUPPLEMENT, (Point(0.89, 62.10),)),
    Series("ProbMask", "probmask", SUPPLEMENT, (Point(0.89, 65.19), Point(0.941, 60.10))),
    Series("ST-3", "st3", SUPPLEMENT, (Point(0.89, 66.67), Point(0.941, 61.19))),
    Series("Feather-Global", "feather", SUPPLEMENT, (Point(0.89, 68.13), Point(0.941, 63.63))),
)

_ST3 = "Vanderschueren and De Vleeschouwer, WACV 2023"

# ResNet-50 on ImageNet
RESNET50 = (
    Series(
        "ST-3",
        "st3",
        _ST3,
        (
            Point(0.8, 76.95, 1215),
            Point(0.9, 76.03, 764),
            Point(0.95, 74.46, 436),
            Point(0.965, 73.31, 351),
            Point(0.98, 70.46, 220),
            Point(0.99, 63.88, 120),
        ),
    ),
    Series(
        "ST-3σ",
        "st3-sigma",
        _ST3,
        (
            Point(0.8, 76.44, 739),
            Point(0.9, 75.28, 397),
            Point(0.95, 73.69, 219),
            Point(0.965, 72.62, 167),
            Point(0.98, 69.75, 116),
            Point(0.99, 63.25, 69),
        ),
    ),
    Series(
        "STR",
        "str",
        "Kusupati et al., ICML 2020",
        (
            Point(0.8127, 76.12, 705),
            Point(0.9023, 74.31, 343),
            Point(0.9515, 70.23, 162),
            Point(0.9611, 67.78, 127),
            Point(0.9805, 61.46, 73),
            Point(0.9898, 51.82, 47),
        ),
    ),
    Series("ProbMask", "probmask", "Zhou et al., CVPR 2021", (Point(0.9, 74.68),)),
    Series("Feather-Global", "feather", FEATHER, (Point(0.9, 76.93),)),
    Series(
        "Feather, FLOPs-biased",
        "feather-flops",
        f"{SUPPLEMENT}, section 6",
        (Point(0.99, 67.2, 42),),
    ),
)
