"""Overhead of `--track-masks` relative to an epoch.

Recording reads the masks from the sparsifier, packs them and writes them to disk once per epoch. It
is compared with training steps on random images; an epoch has as many steps as on CIFAR-100.

    python benchmarks/mask_tracking.py --json results/mask_tracking.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import torch_feather as feather
from torch_feather import models
from torch_feather.training.masks import record_masks
from torch_feather.training.provenance import provenance

NETWORKS = {"resnet8": 16, "resnet20": 32, "mobilenet_v1": 32, "densenet40_24": 32}  # pixels
STEPS, BATCH = 391, 128  # an epoch of 50,000 images


def median(function: Callable[[], object], repeats: int) -> float:
    """Return the median milliseconds of a call."""
    function()
    times = []
    for _ in range(repeats):
        begun = time.perf_counter()
        function()
        times.append(1000 * (time.perf_counter() - begun))
    return statistics.median(times)


def measure(network: str, pixels: int) -> dict[str, Any]:
    torch.manual_seed(0)
    model = models.create(network, 100, 3).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    sparsifier = feather.sparsify(model, optimizer, sparsity=0.98, total_steps=10)
    x, y = torch.randn(BATCH, 3, pixels, pixels), torch.randint(100, (BATCH,))

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    with tempfile.TemporaryDirectory() as folder:
        step_ms = median(step, 3)
        record_ms = median(
            lambda: record_masks(sparsifier.masks().values(), Path(folder), 1), repeats=9
        )
        written = sum(file.stat().st_size for file in Path(folder).rglob("*.npy"))
    return {
        "network": network,
        "pixels": pixels,
        "weights": sum(mask.numel() for mask in sparsifier.masks().values()),
        "bytes": written,
        "step_ms": step_ms,
        "record_ms": record_ms,
        "share_of_epoch": record_ms / (STEPS * step_ms),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = []
    print(
        f"{'network':16}{'weights':>12}{'bytes':>10}{'step, ms':>10}{'masks, ms':>11}"
        f"{'fraction':>10}"
    )
    for network in arguments.networks:
        row = measure(network, NETWORKS[network])
        rows.append(row)
        print(
            f"{network:16}{row['weights']:12,}{row['bytes']:10,}{row['step_ms']:10.0f}"
            f"{row['record_ms']:11.2f}{row['share_of_epoch']:10.4%}"
        )
    made = provenance(torch.device("cpu"))
    print(f"\n{made['hardware']}, PyTorch {made['versions']['torch']}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"rows": rows, **made}, indent=2) + "\n")


if __name__ == "__main__":
    main()
