"""Times of kinds of layers: `compile_sparse` and PyTorch, in CPU time of one thread.

    python benchmarks/layer_kinds.py --kinds sequences upsampling volumes recurrent

Networks of one-dimensional, transposed and three-dimensional convolutions, and LSTM and GRU, with
zeros at random positions. The functions are called alternately; times are medians of a thread's CPU
time, so other load on the machine adds cache misses only. "error" is the largest difference from
PyTorch over the largest difference that the input makes, which biases alone do not change.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torch_feather as feather
from torch_feather.runtime.timing import alternate
from torch_feather.training.provenance import provenance

KINDS = ("sequences", "upsampling", "volumes", "recurrent")
Case = tuple[str, nn.Module, tuple[int, ...]]


class Causal(nn.Module):
    """A network such as WaveNet: gated, dilated, causal convolutions."""

    def __init__(self, channels: int = 128, layers: int = 8) -> None:
        super().__init__()
        self.first, self.last = nn.Conv1d(1, channels, 1), nn.Conv1d(channels, channels, 1)
        self.dilated = nn.ModuleList(
            nn.Conv1d(channels, 2 * channels, 2, dilation=2**i) for i in range(layers)
        )
        self.mixing = nn.ModuleList(nn.Conv1d(channels, channels, 1) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        x = total = self.first(x)
        for i, (dilated, mixing) in enumerate(zip(self.dilated, self.mixing, strict=True)):
            a, b = dilated(F.pad(x, (2**i, 0))).chunk(2, 1)
            y = mixing(a.tanh() * b.sigmoid())
            x, total = x + y, total + y
        return self.last(total.relu())


class Residual(nn.Module):
    """A residual network of signals, such as electrocardiograms."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(normed(12, 64, 15, 2), nn.ReLU(), nn.MaxPool1d(3, 2, 1))
        sizes = (64, 64, 128, 192, 256)
        pairs = list(pairwise(sizes))
        self.a = nn.ModuleList(nn.Sequential(normed(i, o, 7, 2), nn.ReLU()) for i, o in pairs)
        self.b = nn.ModuleList(normed(o, o, 7, 1) for _, o in pairs)
        self.short = nn.ModuleList(nn.Conv1d(i, o, 1, 2) for i, o in pairs)
        self.head = nn.Linear(256, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for a, b, short in zip(self.a, self.b, self.short, strict=True):
            x = (b(a(x)) + short(x)).relu()
        return self.head(x.mean(-1))


def normed(channels: int, out: int, kernel: int, stride: int) -> nn.Sequential:
    convolution = nn.Conv1d(channels, out, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm1d(out))


class UNet(nn.Module):
    """Four levels of two convolutions; transposed convolutions of stride 2 go up."""

    def __init__(self, kernel: int) -> None:
        super().__init__()
        sizes = (32, 64, 128, 256)
        self.down = nn.ModuleList(double(i, o) for i, o in zip((3, *sizes), sizes, strict=False))
        up = list(zip(sizes[::-1], sizes[-2::-1], strict=False))
        self.up = nn.ModuleList(
            nn.ConvTranspose2d(i, o, kernel, 2, (kernel - 2) // 2) for i, o in up
        )
        self.mix, self.head = nn.ModuleList(double(2 * o, o) for _, o in up), nn.Conv2d(32, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        kept: list[Tensor] = []
        for down in self.down:
            x = down(F.max_pool2d(x, 2) if kept else x)
            kept.append(x)
        for up, mix, skip in zip(self.up, self.mix, kept[-2::-1], strict=True):
            x = mix(torch.cat([up(x), skip], 1))
        return self.head(x)


def double(channels: int, out: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for i in (channels, out):
        conv = nn.Conv2d(i, out, 3, padding=1, bias=False)
        layers += [conv, nn.BatchNorm2d(out), nn.ReLU()]
    return nn.Sequential(*layers)


def volumes() -> nn.Sequential:
    layers: list[nn.Module] = []
    for i, o, stride in ((1, 32, 1), (32, 64, 2), (64, 64, 1), (64, 128, 2), (128, 128, 1)):
        layers += [nn.Conv3d(i, o, 3, stride, 1, bias=False), nn.BatchNorm3d(o), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(128, 10))


def cases(kinds: list[str]) -> Iterator[Case]:
    """Yield names, networks, and shapes of inputs."""
    if "sequences" in kinds:
        yield "causal network, 8 × 128 channels", Causal(), (1, 1, 1000)
        yield "1-d residual network, 64 to 256 channels", Residual(), (1, 12, 2000)
    if "upsampling" in kinds:
        for kernel in (2, 4):
            yield f"U-Net, transposed {kernel}×{kernel}", UNet(kernel), (1, 3, 128, 128)
        yield "transposed 4×4, 128 to 64", nn.ConvTranspose2d(128, 64, 4, 2, 1), (1, 128, 32, 32)
        yield "transposed 4, 128 to 64", nn.ConvTranspose1d(128, 64, 4, 2, 1), (1, 128, 1000)
    if "volumes" in kinds:
        yield "3-d network, 32 to 128 channels", volumes(), (1, 1, 16, 32, 32)
    if "recurrent" in kinds:
        for kind in (nn.LSTM, nn.GRU):
            for units in (256, 512, 1024):
                layer = kind(units, units, batch_first=True)
                yield f"{kind.__name__}, {units} units", layer, (1, 100, units)
        for batch in (8, 32):
            layer = nn.LSTM(512, 512, batch_first=True)
            yield "LSTM, 512 units", layer, (batch, 100, 512)


def sparse(model: nn.Module, sparsity: float) -> nn.Module:
    """Return a model with zeros at random positions, whose activations keep their variance.

    With PyTorch's own initial weights, it falls by a factor of 6 in each convolution with ReLU.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 2:
                nn.init.kaiming_normal_(weight, nonlinearity="relu", generator=generator)
            if weight.dim() > 1:
                weight.mul_(torch.rand(weight.shape, generator=generator) >= sparsity)
                weight.div_((1 - sparsity) ** 0.5)
    return model.eval()


def measure(case: Case, sparsity: float, rounds: int) -> dict[str, object]:
    """Return the times of one network."""
    name, model, shape = case
    model, x = sparse(model, sparsity), torch.randn(shape)
    network = feather.compile_sparse(model, x, threads=1)
    with torch.inference_mode():
        functions = (lambda: model(x)), (lambda: network(x))
        dense_ms, sparse_ms = alternate(functions, rounds, clock=time.thread_time)
        found, expected, constant = (
            y if isinstance(y, Tensor) else y[0] for y in (network(x), model(x), model(0 * x))
        )
    error = float((found - expected).abs().max() / (expected - constant).abs().max())
    return {
        "name": name, "input": shape, "sparsity": sparsity, "pytorch_ms": round(dense_ms, 3),
        "sparse_ms": round(sparse_ms, 3), "ratio": round(dense_ms / sparse_ms, 2), "error": error,
        "sparse_layers": f"{sum(t.sparse for t in network.tuning.values())}/{len(network.tuning)}",
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--sparsity", nargs="+", type=float, default=[0.9, 0.95])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", help="file of the results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for sparsity in options.sparsity:
        for case in cases(options.kinds):
            rows.append(measure(case, sparsity, options.rounds))
            print(*rows[-1].values(), sep="  ", flush=True)
    if options.json:
        with open(options.json, "w") as file:
            command = " ".join(["python benchmarks/layer_kinds.py", *sys.argv[1:]])
            facts = {"command": command, **provenance(torch.device("cpu"))}
            json.dump(facts | {"rows": rows}, file, indent=1)
            file.write("\n")


if __name__ == "__main__":
    main()
