"""Small networks with their prunable weights counted by hand."""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLASSES = 4
BATCH = 8


@dataclass(frozen=True)
class ModelCase:
    """A network, its prunable weights (name: count) and how to draw inputs for it."""

    name: str
    build: Callable[[], nn.Module]
    prunable: Mapping[str, int]
    inputs: Callable[[torch.Generator], Tensor]

    @property
    def size(self) -> int:
        """Number of prunable weights, N."""
        return sum(self.prunable.values())

    def make(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
        """A freshly initialised network; the same seed gives the same weights."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.build().to(dtype)

    def batch(self, step: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """Inputs and labels of batch number `step`."""
        generator = torch.Generator().manual_seed(1000 + step)
        x = self.inputs(generator)
        y = torch.randint(0, CLASSES, (BATCH,), generator=generator)
        return (x.to(dtype) if x.is_floating_point() else x), y

    def weights(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The prunable parameters of `model`, in the model's order."""
        found = {n: p for n, p in model.named_parameters() if n in self.prunable}
        assert {n: p.numel() for n, p in found.items()} == dict(self.prunable)
        return found

    def zeros(self, model: nn.Module) -> int:
        """Exact zeros among the prunable weights of `model`."""
        return sum(int((p == 0).sum()) for p in self.weights(model).values())


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, CLASSES))


def frozen() -> nn.Module:
    """An MLP whose first layer does not train, and so is not prunable."""
    net = nn.Sequential(
        nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 9), nn.ReLU(), nn.Linear(9, CLASSES)
    )
    net[0].requires_grad_(False)
    return net


def convnet() -> nn.Module:
    """Plain, depthwise + dilated + circularly padded, and pointwise convolutions."""
    return nn.Sequential(
        OrderedDict(
            stem=nn.Conv2d(3, 8, 3, padding=1, bias=False),
            norm=nn.BatchNorm2d(8),
            relu=nn.ReLU(),
            depth=nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=8, padding_mode="circular"),
            point=nn.Conv2d(8, 6, 1, stride=2),
            pool=nn.AdaptiveAvgPool2d(1),
            flat=nn.Flatten(),
            head=nn.Linear(6, CLASSES),
        )
    )


class Attention(nn.Module):
    """Embedding, self-attention with its packed projection, norm, head."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, tokens):
        x = self.embedding(tokens)
        x = self.norm(x + self.attention(x, x, x, need_weights=False)[0])
        return self.head(x.mean(1))


class Tied(nn.Module):
    """One weight used by two layers."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x):
        return self.head(torch.relu(self.second(torch.relu(self.first(x)))))


class ScaledLinear(nn.Linear):
    """A subclass with a forward of its own."""

    def forward(self, x):
        return 1.5 * super().forward(x)


class StandardizedConv(nn.Conv1d):
    """A convolution that standardises its weight on the fly."""

    def forward(self, x):
        weight = self.weight - self.weight.mean(dim=(1, 2), keepdim=True)
        return F.conv1d(x, weight, self.bias, padding=1)


def subclassed() -> nn.Module:
    return nn.Sequential(
        OrderedDict(
            conv=StandardizedConv(2, 5, 3),
            relu=nn.ReLU(),
            flat=nn.Flatten(),
            head=ScaledLinear(30, CLASSES),
        )
    )


def _normal(*shape: int) -> Callable[[torch.Generator], Tensor]:
    return lambda generator: torch.randn(BATCH, *shape, generator=generator)


MODELS = {
    case.name: case
    for case in [
        ModelCase("mlp", mlp, {"0.weight": 72, "2.weight": 48}, _normal(6)),
        ModelCase("frozen", frozen, {"2.weight": 72, "4.weight": 36}, _normal(6)),
        ModelCase(
            "convnet",
            convnet,
            {"stem.weight": 216, "depth.weight": 72, "point.weight": 48, "head.weight": 24},
            _normal(3, 6, 6),
        ),
        ModelCase(
            "attention",
            Attention,
            {
                "attention.in_proj_weight": 192,
                "attention.out_proj.weight": 64,
                "head.weight": 32,
            },
            lambda generator: torch.randint(0, 11, (BATCH, 5), generator=generator),
        ),
        ModelCase("tied", Tied, {"first.weight": 36, "head.weight": 24}, _normal(6)),
        ModelCase("subclassed", subclassed, {"conv.weight": 30, "head.weight": 120}, _normal(2, 6)),
    ]
}
