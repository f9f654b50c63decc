"""Steps of an accelerator in Triton's interpreter, on CPU; TRITON_INTERPRET=1 must be set.

A process of its own, because Triton decides when it is imported.
"""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch
from test_passes import OPERATORS, make_weights, same_bits
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import torch_feather as feather
from torch_feather import devices, launching
from torch_feather.operators import Hard
from torch_feather.selection import triton_kernels
from torch_feather.weights import passes, triton_passes
from torch_feather.weights.exchange import write_latent
from torch_feather.weights.latent import LatentWeights
from torch_feather.weights.segments import Segment
from torch_feather.weights.selecting import select_each, select_weights

SHAPES = ((3,), (90, 71), (5, 7), (11, 3, 3), (1,))
HOST_READS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero")
launch = launching.launch


class Launches(TorchDispatchMode):
    """Counts launches: of Triton, and one per dispatched operator that computes.

    An operator over a list counts once per tensor. Nothing is launched by views and allocations.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        assert not any(read in name for read in HOST_READS), f"the host reads: {name}"
        if not func.is_view and "empty" not in name:
            self.names += [name] * (len(args[0]) if "foreach" in name else 1)
        return func(*args, **(kwargs or {}))

    def launch(self, kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
        self.names.append(kernel.fn.__name__)
        with _disable_current_modes():
            launch(kernel, programs, *arguments, **constants)


@contextmanager
def triton_on_a_cpu() -> Iterator[None]:
    """Within it, CPU tensors take the path of a GPU with Triton."""
    with (
        mock.patch.object(devices, "synchronizes", return_value=True),
        mock.patch.object(launching, "uses_triton", return_value=True),
        mock.patch.object(torch.cuda, "is_current_stream_capturing", return_value=True),
    ):
        yield


def trained(layers: int, steps: int, dtype: torch.dtype, **options: Any) -> list[Tensor]:
    """Return parameters and latent weights after training."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(30 + i, 31 + i) for i in range(layers))).to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    sparsifier = feather.sparsify(model, optimizer, sparsity=0.8, total_steps=steps, **options)
    for step in range(steps):
        if step == 2:  # an external write
            with torch.no_grad():
                model[1].weight[3] = 0.5
        model(torch.randn(8, 30, dtype=dtype)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    ends = [p.detach().clone() for p in model.parameters()]
    return [*ends, *sparsifier.latent_weights().values()]


def steps_have_the_bits_of_the_cpu() -> None:
    for dtype, options in (
        (torch.float32, {"theta": 0.5}),
        (torch.float32, {"p": 1.0}),
        (torch.float32, {"p": 2.0}),
        (torch.float32, {"p": float("inf"), "theta": 0.0}),
        (torch.float32, {"allocation": "uniform"}),
        (torch.float32, {"allocation": "sigma"}),
        (torch.bfloat16, {"theta": 0.3}),
        (torch.float64, {"p": float("inf")}),
    ):
        on_cpu = trained(3, 6, dtype, **options)
        with triton_on_a_cpu(), mock.patch.object(passes, "_write_device", None):
            on_device = trained(3, 6, dtype, **options)
        for a, b in zip(on_cpu, on_device, strict=True):
            assert torch.equal(a, b), (dtype, options, (a != b).sum())


def effective_weights_have_the_bits_of_pytorch() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        kinds = ("normal", "ties", "special", "scaled", "tiny")
        for operator, kind in itertools.product(OPERATORS, kinds):
            weights = make_weights(
                1, ties=kind == "ties", special=kind == "special", dtype=dtype, shapes=SHAPES
            )
            if kind == "tiny":  # effective weights would vanish
                weights.views[1].mul_(torch.finfo(dtype).tiny)
            scale = torch.tensor(1.7) if kind == "scaled" else None
            scales = None if scale is None else [scale] * len(weights.views)
            for fraction in (0.0, 0.6):
                k = torch.tensor(int(fraction * weights.size))
                segment = Segment(0, weights.size, select_weights(weights, k, scales), scale)
                found, expected = [[torch.ones_like(v) for v in weights.views] for _ in range(2)]
                with triton_on_a_cpu():
                    assert triton_passes.write_effective(weights, [segment], operator, found)
                passes._write_device(weights, [segment], operator, expected)
                for a, b in zip(found, expected, strict=True):
                    assert same_bits(a, b), (dtype, operator, kind, fraction)


def one_launch_serves_many_cutoffs() -> None:
    weights = make_weights(2)
    counts = weights.sizes // 2
    cutoffs = select_each(weights, counts)
    segments = [Segment(a, b, one) for (a, b), one in zip(weights.spans, cutoffs, strict=True)]
    out = [torch.ones_like(view) for view in weights.views]
    launched: list[str] = []

    def note(kernel: Any, *arguments: Any, **constants: Any) -> None:
        launched.append(kernel.fn.__name__)
        launch(kernel, *arguments, **constants)

    with triton_on_a_cpu(), mock.patch.object(launching, "launch", note):
        assert triton_passes.write_effective(weights, segments, Hard(), out)
    assert launched == ["write_ranges"]
    assert [int((u == 0).sum()) for u in out] == counts.tolist()


def other_layouts_take_the_form_of_pytorch() -> None:
    weights = LatentWeights([torch.randn(4, 6), torch.randn(3)])
    transposed = [torch.ones(6, 4).t(), torch.ones(3)]
    narrow = [torch.ones(4, 6).half(), torch.ones(3)]
    with triton_on_a_cpu():
        for tensors in (transposed, narrow):
            assert not triton_passes.copy(weights, [0, 1], tensors, reads=True)
            write_latent(weights, [0, 1], tensors)
            for one, view in zip(tensors, weights.views, strict=True):
                assert torch.equal(one, view.to(one.dtype))
    empty = LatentWeights([torch.randn(0, 3), torch.randn(2, 2).bfloat16(), torch.randn(3)])
    copies = [torch.zeros_like(view) for view in empty.views]
    with triton_on_a_cpu():
        assert triton_passes.copy(empty, [0, 1, 2], copies, reads=False)
    assert all(map(torch.equal, copies, empty.views))


def launches_of_a_step(layers: int, **options: Any) -> tuple[list[str], list[str]]:
    """Return the launches of a step beside the optimizer's, and of the gradient hook of a layer."""
    model = nn.Sequential(*(nn.Linear(20, 20) for _ in range(layers)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, foreach=True)
    sparsifier = feather.sparsify(model, optimizer, sparsity=0.8, total_steps=100, **options)
    for _ in range(2):  # tables and workspaces are made
        model(torch.randn(4, 20)).square().sum().backward()
        optimizer.step()
    [one] = sparsifier.step.optimizers
    hooks = list((model[0].weight._backward_hooks or {}).values())
    gradient = torch.randn(20, 20)

    def counted(work: Callable[[], object]) -> list[str]:
        count = Launches()
        with torch.no_grad(), count, mock.patch.object(launching, "launch", count.launch):
            work()
        return count.names

    step = counted(lambda: sparsifier.step.before(one, closure=False))
    step += counted(lambda: sparsifier.step.after(one))
    return step, counted(lambda: [hook(gradient) for hook in hooks])


def a_step_has_few_launches() -> None:
    # A few weights are enough for the form of many.
    with triton_on_a_cpu(), mock.patch.object(triton_kernels, "SMALL", 100):
        for p, theta in itertools.product((1.0, 2.0, 3.0, float("inf")), (1.0, 0.5)):
            few, hook = launches_of_a_step(2, p=p, theta=theta)
            many, _ = launches_of_a_step(20, p=p, theta=theta)
            assert few == many, (few, many)
            assert len(few) <= 18, few
            assert len(hook) == (0 if theta == 1.0 else 1), hook


def selections_per_layer_have_launches_of_their_own() -> None:
    """With one cutoff per layer, launches grow with the layers; at most 18 is for `global`."""
    with triton_on_a_cpu(), mock.patch.object(triton_kernels, "SMALL", 100):
        for options in ({"allocation": "uniform"}, {"allocation": "erk"}):
            few, many = (len(launches_of_a_step(n, **options)[0]) for n in (2, 20))
            assert many > few > 0


def a_selection_has_few_launches() -> None:
    most = {torch.float32: 4, torch.bfloat16: 4, torch.float64: 7}
    for dtype, size in itertools.product(most, (10**4, 10**5, 10**6)):
        weights = LatentWeights([torch.ones(size, dtype=dtype)])
        for first in (True, False):  # the first makes the memory of the counts
            count, note = Launches(), mock.Mock()  # kernels are counted and not run
            with triton_on_a_cpu(), count, mock.patch.object(launching, "launch", note):
                select_weights(weights, torch.tensor(size // 2))
            launches = len(count.names) + note.call_count
            assert first or 1 < launches <= most[dtype], (dtype, size, launches)


if __name__ == "__main__":
    np.seterr(all="ignore")
    for check in (
        a_step_has_few_launches,
        selections_per_layer_have_launches_of_their_own,
        a_selection_has_few_launches,
        steps_have_the_bits_of_the_cpu,
        effective_weights_have_the_bits_of_pytorch,
        one_launch_serves_many_cutoffs,
        other_layouts_take_the_form_of_pytorch,
    ):
        check()
    print("checked")
