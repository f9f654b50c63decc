"""Kernels that a sparse training step launches beside those of the dense step.

Counts the kernels of the profiler on a GPU, for networks of several numbers of tensors and for both
kinds of theta. Without sparse training, the same step gives the number to subtract.

    python benchmarks/launches.py --device cuda --json results/launches.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import torch_feather as feather
from torch_feather.training.provenance import provenance

STEPS = 4  # before the profiled one: memory is allocated, kernels are compiled


def kernels_of_a_step(layers: int, theta: float | None, device: torch.device) -> int:
    """Return the kernels, copies and fills of one training step.

    Args:
        layers: number of prunable weight tensors.
        theta: factor on the gradient of pruned weights; None for dense training.
        device: a GPU.
    """
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(256, 256) for _ in range(layers))).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, foreach=True)
    if theta is not None:
        feather.sparsify(model, optimizer, sparsity=0.9, total_steps=100, theta=theta)
    x = torch.randn(32, 256, device=device)

    def step() -> None:
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(STEPS):
        step()
    torch.cuda.synchronize(device)
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize(device)
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profiler.events())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda", choices=["cuda"])
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 20, 100])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all counts to FILE")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("--device cuda: no CUDA device available")
    device = torch.device(arguments.device)
    rows = []
    print(f"{'tensors':>8} {'dense':>6} {'theta 1':>8} {'theta .5':>9}   (sparse: beside dense)")
    for layers in arguments.layers:
        dense = kernels_of_a_step(layers, None, device)
        more = [kernels_of_a_step(layers, theta, device) - dense for theta in (1.0, 0.5)]
        rows.append({"tensors": layers, "dense": dense, "theta 1": more[0], "theta 0.5": more[1]})
        print(f"{layers:8} {dense:6} {more[0]:8} {more[1]:9}")
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        record = {**provenance(device), "results": rows}
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
