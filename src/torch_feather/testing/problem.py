"""A small training problem: the same network and batches for every property."""

from __future__ import annotations

import inspect
import io
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attach import sparsify
from ..methods import AnyMethod
from ..sparsifier import Sparsifier

Factory = Callable[..., AnyMethod]
"""Called with the keyword `sparsity`, if it takes it; returns an object with `bind(context)`."""

STEPS = 12


class Network(nn.Module):
    """A convolution with batch norm and two linear layers, with 618 prunable weights.

    Example:
        >>> images, labels = make_batch(0)
        >>> Network()(images).shape
        torch.Size([8, 10])
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.hidden = nn.Linear(24, 15)
        self.out = nn.Linear(15, 10, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits of shape (batch, 10) for images of shape (batch, 2, 4, 4)."""
        x = F.avg_pool2d(F.relu(self.norm(self.conv(x))), 2)
        return self.out(F.relu(self.hidden(x.flatten(1))))


def make_network(seed: int = 0, levels: int | None = None) -> Network:
    """Return the network with seeded weights.

    Args:
        seed: seed of the weights.
        levels: round weights to this many values per unit, so that many of them tie.

    Example:
        >>> sorted(set(make_network(levels=4).out.weight.abs().flatten().tolist()))
        [0.0, 0.25]
    """
    torch.manual_seed(seed)
    network = Network()
    if levels is not None:
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.copy_((parameter * levels).round() / levels)
    return network


def make_batch(step: int, size: int = 8) -> tuple[Tensor, Tensor]:
    """Return the images and labels of a step.

    Args:
        step: number of the step, the seed of the batch.
        size: number of images.

    Returns:
        Images of shape (size, 2, 4, 4), and int64 labels of shape (size,).

    Example:
        >>> images, labels = make_batch(0)
        >>> images.shape, labels.shape
        (torch.Size([8, 2, 4, 4]), torch.Size([8]))
    """
    generator = torch.Generator().manual_seed(1000 + step)
    images = torch.randn(size, 2, 4, 4, generator=generator)
    return images, torch.randint(10, (size,), generator=generator)


@dataclass
class Run:
    """The network in training.

    Attributes:
        factory: makes the method.
        sparsity: final fraction of zeros.
        total_steps: optimizer steps of the whole training.
        adam: train with AdamW instead of SGD with momentum.
        levels: see `make_network`.
        fused: use the fused form of SGD.

    Example:
        >>> from torch_feather.methods import gmp
        >>> run = Run(gmp, sparsity=0.5).train(0, STEPS)
        >>> run.size, run.zeros()
        (618, 309)
    """

    factory: Factory
    sparsity: float = 0.8
    total_steps: int = STEPS
    adam: bool = False
    levels: int | None = None
    fused: bool = False
    model: nn.Module = field(init=False)
    optimizer: torch.optim.Optimizer = field(init=False)
    sparsifier: Sparsifier = field(init=False)

    def __post_init__(self) -> None:
        self.model = make_network(levels=self.levels)
        parameters = self.model.parameters()
        if self.adam:
            self.optimizer = torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.01)
        else:
            self.optimizer = torch.optim.SGD(
                parameters, lr=0.05, momentum=0.9, weight_decay=1e-3, fused=self.fused
            )
        self.sparsifier = sparsify(
            self.model,
            self.optimizer,
            call(self.factory, self.sparsity),
            sparsity=self.sparsity,
            total_steps=self.total_steps,
        )

    def loss(self, step: int, part: slice = slice(None)) -> Tensor:
        """Return the loss of a batch, or of a part of it in proportion to its size."""
        images, labels = make_batch(step)
        loss = F.cross_entropy(self.model(images[part]), labels[part])
        return loss * (len(labels[part]) / len(labels))

    def train(self, start: int, stop: int) -> Run:
        """Take steps number `start` to `stop` - 1."""
        for step in range(start, stop):
            for fraction in self.sparsifier.passes():
                (fraction * self.loss(step)).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        return self

    def save(self) -> bytes:
        """Return a checkpoint of model and optimizer, and of nothing else."""
        file = io.BytesIO()
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        torch.save(state, file)
        return file.getvalue()

    def load(self, checkpoint: bytes) -> Run:
        """Restore a checkpoint."""
        state = torch.load(io.BytesIO(checkpoint), weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        return self

    def content(self) -> dict[str, Tensor]:
        """Return everything that must be equal for two runs to be equal, as tensors."""
        found = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        for name, value in self.sparsifier.latent_weights().items():
            found[f"latent.{name}"] = value
        for name, value in self.sparsifier.masks().items():
            found[f"mask.{name}"] = value
        for name, state in self.sparsifier.state_dict().items():
            found |= {f"state.{name}.{key}": value for key, value in state.items()}
        for i, state in self.optimizer.state_dict()["state"].items():
            tensors = {k: v for k, v in state.items() if isinstance(v, Tensor)}
            found |= {f"optimizer.{i}.{key}": value for key, value in tensors.items()}
        return {name: value.detach().clone() for name, value in found.items()}

    def zeros(self) -> int:
        """Return the number of zeros among the prunable weights of the model."""
        names = self.sparsifier.masks()
        return sum(int((self.model.get_parameter(name) == 0).sum()) for name in names)

    @property
    def size(self) -> int:
        """Number of prunable weights."""
        return sum(mask.numel() for mask in self.sparsifier.masks().values())


def call(factory: Factory, sparsity: float) -> AnyMethod:
    """Return the method that a factory makes for a sparsity.

    Args:
        factory: makes the method.
        sparsity: final fraction of zeros; passed on if the factory takes it.

    Example:
        >>> from torch_feather.methods import spartan
        >>> call(spartan, 0.9) == spartan(sparsity=0.9)
        True
    """
    parameters = inspect.signature(factory).parameters.values()
    takes = any(p.name == "sparsity" or p.kind is p.VAR_KEYWORD for p in parameters)
    return factory(sparsity=sparsity) if takes else factory()


def differences(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    """Return the names of tensors that differ in any bit; NaN equals NaN.

    Args:
        a: tensors by name.
        b: tensors by name; names that only one of the two has differ.

    Example:
        >>> one, nan = torch.ones(1), torch.full((1,), torch.nan)
        >>> differences({"x": one, "y": nan}, {"x": -one, "y": nan})
        ['x']
    """
    return [*(a.keys() ^ b.keys()), *(k for k in a.keys() & b.keys() if not _same(a[k], b[k]))]


def _same(a: Tensor, b: Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    return torch.equal(a.nan_to_num(math.pi), b.nan_to_num(math.pi))


def describe(value: Any) -> str:
    """Return the first line of a value's text.

    Args:
        value: such as an exception; its type is named if its text is empty.

    Example:
        >>> describe(ValueError("first line\\nsecond line")), describe(ValueError())
        ('first line', 'ValueError')
    """
    return str(value).splitlines()[0] if str(value) else type(value).__name__
