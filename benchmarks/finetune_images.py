"""Accuracy of a sparse network that is fine-tuned on few photographs.

A network is trained on seven of the ten classes of Imagenette. Then it is fine-tuned on some images
of the three other classes, dense and sparse, and the same networks are trained from new weights.
All settings are those of the recipe `finetune`, but for the image size. Accuracy is that after the
last epoch, on all validation images of the three classes, which choose nothing.

IMAGES holds train/CLASS/*.jpg and val/CLASS/*.jpg. Run the command again to resume; completed
trainings are not repeated.

    python benchmarks/finetune_images.py IMAGES --folder RUNS --out results/finetune_images
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
from pathlib import Path
from typing import Any

import torch

from torch_feather.studies.comparison import interval
from torch_feather.studies.summary import with_deviation
from torch_feather.training import Config, resolve_config, train
from torch_feather.training.provenance import provenance

CLASSES = {
    "n02979186": "cassette player",
    "n03417042": "garbage truck",
    "n03888257": "parachute",
}
SPARSITIES = [0.0, 0.9, 0.95]
KINDS = ["fine-tuned", "new weights"]


def copy_images(images: Path, folder: Path, per_class: int) -> None:
    """Write `folder`/seven and `folder`/three, the latter with `per_class` images per class."""
    for part in ("train", "val"):
        for source in sorted((images / part).iterdir()):
            name = CLASSES.get(source.name)
            target = folder / ("three" if name else "seven") / part / (name or source.name)
            target.mkdir(parents=True, exist_ok=True)
            chosen = sorted(source.iterdir())
            for image in chosen[:per_class] if name and part == "train" else chosen:
                if not (target / image.name).exists():
                    shutil.copy(image, target / image.name)


def settings(args: argparse.Namespace, images: Path, seed: int) -> dict[str, Any]:
    return {
        "network": args.network,
        "data.path": str(images),
        "data.resolution": args.resolution,
        "system.threads": 1,
        "system.tensorboard": False,
        "compare_dense": False,
        "seed": seed,
    }


def sparse_config(
    args: argparse.Namespace, sparsity: float, start: Path | None, seed: int
) -> Config:
    """Return the configuration of one training on the three classes.

    Args:
        args: of the command line.
        sparsity: 0 for a dense network.
        start: the run whose weights the training starts from; None for new weights.
        seed: of initial weights and of the order of images.
    """
    changes = settings(args, args.folder / "three", seed) | {"evaluate_every": 20}
    changes |= {"sparsity": sparsity} if sparsity else {"method": "dense"}
    changes |= {"init": str(start)} if start else {}
    return resolve_config("finetune", overrides=changes)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    copy_images(args.images, args.folder, args.per_class)
    start = args.folder / "dense-seven"
    changes = settings(args, args.folder / "seven", 0) | {
        "method": "dense",
        "epochs": args.epochs,
        "evaluate_every": args.epochs,
    }
    first = train(resolve_config("finetune", overrides=changes), start, resume=True)
    found: dict[str, Any] = {"seven": first["test_accuracy"], "runs": []}
    for seed in range(args.seeds):
        for sparsity in SPARSITIES:
            for source in (start, None):
                kind = "fine-tuned" if source else "new weights"
                run = args.folder / f"{kind.replace(' ', '-')}-{sparsity:g}-{seed}"
                report = train(sparse_config(args, sparsity, source, seed), run, resume=True)
                row = {"start": kind, "sparsity": sparsity, "seed": seed}
                row["test_accuracy"] = report["test_accuracy"]
                found["runs"].append(row)
                print(json.dumps(row), flush=True)
                write(args, found)
    return found


def accuracies(found: dict[str, Any], start: str, sparsity: float) -> dict[int, float]:
    rows = [r for r in found["runs"] if r["start"] == start and r["sparsity"] == sparsity]
    return {row["seed"]: 100 * row["test_accuracy"] for row in rows}


def table(found: dict[str, Any]) -> list[str]:
    """Return the lines of a table of accuracies and of differences to dense fine-tuning."""
    dense = accuracies(found, "fine-tuned", 0.0)
    lines = [
        "| sparsity | fine-tuned | new weights | fine-tuned minus dense fine-tuned (95% CI) |",
        "|---|---|---|---|",
    ]
    for sparsity in SPARSITIES:
        tuned, new = (accuracies(found, s, sparsity) for s in KINDS)
        differences = [tuned[s] - dense[s] for s in tuned if s in dense] if sparsity else []
        effect = ""
        if len(differences) > 1:
            low, high = interval(differences)
            effect = f"{statistics.mean(differences):+.1f} ({low:+.1f} to {high:+.1f})"
        cells = [
            f"{sparsity:.0%}" if sparsity else "dense",
            *(with_deviation(list(x.values()), 1) if x else "" for x in (tuned, new)),
            effect,
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def write(args: argparse.Namespace, found: dict[str, Any]) -> None:
    """Write OUT.json and OUT.md with what is there."""
    record = provenance(torch.device("cpu")) | found
    args.out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    counts = sorted({len(accuracies(found, k, s)) for s in SPARSITIES for k in KINDS})
    n = " to ".join(str(count) for count in dict.fromkeys((counts[0], counts[-1])))
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    text = [
        "# Fine-tuning on few photographs",
        "",
        f"    python benchmarks/finetune_images.py IMAGES --network {args.network} "
        f"--resolution {args.resolution} --per-class {args.per_class} --epochs {args.epochs} "
        f"--seeds {args.seeds} --out results/finetune_images",
        "",
        f"- Data: Imagenette at {args.resolution}x{args.resolution} pixels. Three classes "
        f"({', '.join(CLASSES.values())}) of {args.per_class} training images each; the seven "
        "others for the initial weights.",
        f"- Network: {args.network}. Its initial weights, dense, have "
        f"{found['seven']:.1%} accuracy on the seven classes after {args.epochs} epochs.",
        "- Test accuracy in % on all validation images of the three classes after the last epoch; "
        f"mean ± standard deviation, n = {n}, one network of initial weights.",
        f"- {record['hardware'].get('cpu', '')}, one thread, {versions}, commit "
        f"{record['commit']}.",
        "",
        *table(found),
        "",
    ]
    args.out.with_suffix(".md").write_text("\n".join(text))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("images", type=Path, metavar="IMAGES")
    parser.add_argument("--folder", type=Path, default=Path("runs/finetune_images"))
    parser.add_argument("--out", type=Path, default=Path("results/finetune_images"))
    parser.add_argument("--network", default="timm/resnet10t")
    parser.add_argument("--resolution", type=int, default=48)
    parser.add_argument("--per-class", type=int, default=100)
    parser.add_argument("--epochs", type=int, default=6, help="of the initial weights")
    parser.add_argument("--seeds", type=int, default=3)
    measure(parser.parse_args())


if __name__ == "__main__":
    main()
