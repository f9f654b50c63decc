"""Table 2 of the supplement: MobileNetV1 at 89 and 94.1 %."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..analysis.plots import GREY, panel
from ..training.config import Config
from . import compare
from .figures import below, looks
from .grid import Row, Run
from .published import MOBILENET, MOBILENET_DENSE, SUPPLEMENT
from .spread import accuracy_table, against, percent
from .study import Answer, Choices, Part, Picture, Study, Table


def plan(config: Config, choices: Choices) -> list[Run]:
    """Each method on MobileNetV1, of ImageNet's or of CIFAR's layout."""
    large = config.data.name == "imagefolder"
    network = "timm/mobilenetv1_100" if large else "mobilenet_v1"
    return compare.plan(replace(config, network=network), choices)


def answer(rows: Sequence[Row], config: Config) -> Answer:
    """Ours; apart from it, the published table."""
    sentences, differences = against(rows, compare.first_and_others(rows))
    pictures = compare.accuracy_pictures(rows)
    return Answer(sentences, Part(pictures, [accuracy_table(rows), *differences]), published(rows))


def published(ours: Sequence[Row]) -> Part:
    """Table 2 as it stands, drawn and written."""
    figure, axes = panel(5.2, 4.2)
    places = (0.89, 0.941)
    best_first = MOBILENET[::-1]
    for series, style in zip(best_first, looks(best_first, ours), strict=True):
        at = [places.index(point.sparsity) for point in series.points]
        axes.plot(at, [p.accuracy for p in series.points], label=series.method, **style)
    axes.axhline(MOBILENET_DENSE, color=GREY, linestyle=(0, (6, 3)), linewidth=1, label="dense")
    axes.set_xticks(range(2), [percent(s) for s in places])
    axes.set_xlim(-0.5, 1.5)
    axes.set(xlabel="weights that are zero", ylabel="top-1 accuracy on ImageNet, %")
    below(axes)
    rows = [["dense", f"{MOBILENET_DENSE:.2f}", ""]]
    for series in MOBILENET:
        found = {point.sparsity: f"{point.accuracy:.2f}" for point in series.points}
        rows.append([series.method, *(found.get(place, "–") for place in places)])
    return Part(
        [Picture("published", figure, "Published: MobileNetV1 on ImageNet, 100 epochs.")],
        [
            Table(
                f"Top-1 accuracy on ImageNet, %: Table 2, {SUPPLEMENT}",
                ["", "89 %", "94.1 %"],
                rows,
            )
        ],
    )


MOBILENET_STUDY = Study(
    name="mobilenet",
    question="Which method keeps MobileNetV1, a network with little to spare, most accurate?",
    reading="Every method prunes the same network on the same budget. What the paper reports on "
    "ImageNet stands apart: other images, other numbers, the same order if the claim holds here.",
    source="Table 2 of the supplement",
    plan=plan,
    answer=answer,
    methods="dense,feather,gmp:allocation=uniform-dense-depthwise,str,probmask,st3",
    sparsities="0.89,0.941",
    small={"epochs": 8},
    decides=("network",),
    small_sparsities="0.89,0.941",
)
