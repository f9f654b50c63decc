"""Complete training steps of networks, relative to dense ones: a part of `step_overhead.py`."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from step_turns import compare, contestants, sgd, take_turns
from torch import Tensor, nn

import torch_feather as feather

WARMUP = 2


class Network(NamedTuple):
    """A network with its input, its optimizer, repetitions, and the limits of its ratio at 95%."""

    create: Callable[[], nn.Module]
    shape: tuple[int, ...]  # of a batch
    repetitions: int
    limits: dict[str, float]
    optimizer: Callable[[Any], torch.optim.Optimizer] = sgd
    tokens: int | None = None  # number of different ones, if the input is text


class Transformer(nn.Module):
    """Six layers of 384 channels that predict the next of 256 tokens: 10 million weights."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, 384)
        layer = nn.TransformerEncoderLayer(384, 6, 1536, batch_first=True, dropout=0.0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.layers = nn.TransformerEncoder(layer, 6)
        self.head = nn.Linear(384, 256)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(self.embedding(x)).mean(1))


def mlp() -> nn.Module:
    """Return 25 million weights in two layers."""
    return nn.Sequential(nn.Flatten(), nn.Linear(3072, 6144), nn.ReLU(), nn.Linear(6144, 1024))


def named(name: str) -> Callable[[], nn.Module]:
    """Return a function that creates the network of that name."""
    return lambda: feather.models.create(name, 100)


def equal(limit: float) -> dict[str, float]:
    """Return one limit for both forms."""
    return {"plain": limit, "compiled": limit}


NETWORKS = {
    "resnet18, 64 px, batch 32": Network(
        named("timm/resnet18"), (32, 3, 64, 64), 36, {"plain": 1.12, "compiled": 1.06}
    ),
    "MLP, 25 million, batch 64": Network(mlp, (64, 3, 32, 32), 24, {}),
    "transformer, 10 million, AdamW": Network(
        Transformer, (16, 64), 16, equal(1.10), torch.optim.AdamW, tokens=256
    ),
    "resnet20, batch 128": Network(named("resnet20"), (128, 3, 32, 32), 16, equal(1.02)),
    "mobilenet_v1, batch 128": Network(named("mobilenet_v1"), (128, 3, 32, 32), 18, equal(1.03)),
    "resnet20, batch 16": Network(named("resnet20"), (16, 3, 32, 32), 50, equal(1.06)),
}


def measure_network(name: str, quick: bool, seed: int) -> dict[str, Any]:
    """Return complete training steps of a network, relative to dense ones.

    Args:
        name: one of `NETWORKS`.
        quick: take two steps with batches of two, which shows that the benchmark runs.
        seed: of weights, batches and the order of steps.
    """
    network = NETWORKS[name]
    torch.manual_seed(seed)
    random.seed(seed)
    model = network.create()
    shape = (2, *network.shape[1:]) if quick else network.shape
    x = torch.randn(shape) if network.tokens is None else torch.randint(network.tokens, shape)
    y = torch.randint(100, (len(x),))

    def step(one: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        F.cross_entropy(one(x), y).backward()
        optimizer.step()

    steps = {n: partial(step, *pair) for n, pair in contestants(model, network.optimizer).items()}
    repetitions, warmup = (2, 0) if quick else (network.repetitions, WARMUP)
    compared = compare(take_turns(steps, repetitions, seed, warmup), seed)
    for form, row in compared.items():
        row["limit"] = network.limits.get(form)
    return {"network": name, "repetitions": repetitions, "contestants": compared}
