"""Checks of the kernels of a step on a device, also on a CPU in Triton's interpreter.

`launches.py` calls them in the interpreter, `test_step_device.py` on a GPU.
"""

import itertools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple
from unittest import mock

import torch
from test_passes import OPERATORS, make_weights, same_bits
from torch import Tensor, nn

import torch_feather as feather
from torch_feather import scalars
from torch_feather.gradient_rules import StraightThrough
from torch_feather.selection.cutoff import Cutoff
from torch_feather.weights import passes, triton_passes
from torch_feather.weights.latent import LatentWeights
from torch_feather.weights.segments import Segment
from torch_feather.weights.selecting import select_weights

SHAPES = ((3,), (90, 71), (5, 7), (11, 3, 3), (1,))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class KernelDevice(NamedTuple):
    """Where the kernels run."""

    device: torch.device
    path: Callable[[], AbstractContextManager[None]] = nullcontext
    """Within it, tensors of `device` take the path of a GPU with Triton."""


def moved(weights: LatentWeights, on: KernelDevice) -> LatentWeights:
    return LatentWeights([view.to(on.device) for view in weights.views])


def copies_are_exact(on: KernelDevice) -> None:
    for dtype in (*DTYPES, torch.float64):
        ours = moved(make_weights(1, special=True, dtype=dtype, shapes=SHAPES), on)
        new = make_weights(2, special=True, dtype=dtype, shapes=SHAPES).views
        sources = [view.to(on.device) for view in new]
        written = [torch.zeros_like(view) for view in sources]
        every = range(len(new))
        with on.path():
            assert triton_passes.copy(ours, every, sources, reads=True)
            assert triton_passes.copy(ours, every, written, reads=False)
        for latent, back, one in zip(ours.views, written, new, strict=True):
            assert same_bits(latent.cpu(), one), dtype
            assert same_bits(back.cpu(), one), dtype


def modified_values_are_adopted(on: KernelDevice) -> None:
    for dtype in (*DTYPES, torch.float64):
        latent = make_weights(1, dtype=dtype, shapes=SHAPES)
        given = make_weights(2, ties=True, dtype=dtype, shapes=SHAPES).views
        held = [one.clone() for one in given]
        for one in held:
            one.view(-1)[::3] = 0.5
        held[1].view(-1)[7] = torch.nan
        ours = moved(latent, on)
        lists = [[one.to(on.device) for one in each] for each in (held, given)]
        with on.path():
            assert triton_passes.adopt(ours, range(len(given)), *lists)
        for found, old, now, before in zip(ours.views, latent.views, held, given, strict=True):
            assert same_bits(found.cpu(), torch.where(now != before, now, old)), dtype


def effective_weights_have_the_bits_of_pytorch(on: KernelDevice) -> None:
    kinds = ("normal", "ties", "special", "scaled", "tiny")
    for dtype, operator, kind in itertools.product(DTYPES, OPERATORS, kinds):
        weights = make_weights(
            1, ties=kind == "ties", special=kind == "special", dtype=dtype, shapes=SHAPES
        )
        if kind == "tiny":  # effective weights would vanish
            weights.views[1].mul_(torch.finfo(dtype).tiny)
        scale = torch.tensor(1.7) if kind == "scaled" else None
        scales = None if scale is None else [scale] * len(weights.views)
        for fraction in (0.0, 0.6):
            cutoff = select_weights(weights, torch.tensor(int(fraction * weights.size)), scales)
            expected = [torch.ones_like(v) for v in weights.views]
            passes._write_device(
                weights, [Segment(0, weights.size, cutoff, scale)], operator, expected
            )
            ours = moved(weights, on)
            found = [torch.ones_like(v) for v in ours.views]
            there = Segment(
                0, weights.size, Cutoff(*(field.to(on.device) for field in cutoff)),
                None if scale is None else scale.to(on.device),
            )  # fmt: skip
            with on.path():
                assert triton_passes.write_effective(ours, [there], operator, found)
            for a, b in zip(found, expected, strict=True):
                assert same_bits(a.cpu(), b), (dtype, operator, kind, fraction)


def gradients_have_the_bits_of_the_rule(on: KernelDevice) -> None:
    for dtype, theta in itertools.product(DTYPES, (0.0, 0.3, 0.5)):
        gradient, effective = torch.randn(2, 9001, generator=torch.Generator().manual_seed(0))
        gradient, effective = gradient.to(dtype), effective.to(dtype)
        effective[::2] = 0.0
        ruled = StraightThrough(theta)(gradient, effective, effective, torch.tensor(0.5))
        # With a cutoff at 0 only zeros are pruned, which count as kept.
        for cutoff, expected in ((0.7, ruled), (0.0, gradient)):
            arguments = (gradient, effective, torch.tensor(cutoff))
            with on.path():
                found = triton_passes.pull_back(*(a.to(on.device) for a in arguments), theta)
            assert found is not None
            assert same_bits(found.cpu() + 0.0, expected + 0.0), (dtype, theta, cutoff)


def numbers_have_the_bits_of_the_cpu(on: KernelDevice) -> None:
    steps = 37
    targets = 0.95 * (1 - (1 - torch.arange(steps + 1).double() / steps) ** 3)
    rests = 1 - targets
    zeros = torch.arange(3000) * 7  # more than one program adds at a time
    size = 10**9 + 7
    for at, begin in itertools.product((0, 1, 13, steps, steps + 5), (None, zeros)):
        step = torch.tensor(at)
        target = scalars.scheduled(step, targets, rests, begin, size)
        expected = (target, scalars.count_of(target, size), scalars.progress(step, steps))
        given = [None if t is None else t.to(on.device) for t in (step, targets, rests, begin)]
        with on.path():
            there = scalars.scheduled(*given, size)
            found = (there, scalars.count_of(there, size), scalars.progress(given[0], steps))
        for a, b in zip(found, expected, strict=True):
            assert a.dtype == b.dtype
            assert torch.equal(a.cpu(), b), (at, a, b)
    halves = torch.tensor([0.5, 1.5, 2.5, 3.5]).double() / 4  # rounded half to even
    with on.path():
        counts = [int(scalars.count_of(half.to(on.device), 4)) for half in halves]
    assert counts == [0, 2, 2, 4]


def trained(on: KernelDevice, dtype: torch.dtype, **options: Any) -> list[Tensor]:
    """Return parameters and latent weights after training with given gradients.

    The optimizer's arithmetic is exact but for one rounding, so all devices agree: its factors are
    powers of two. A network would multiply matrices, in which devices differ.
    """
    random = torch.Generator().manual_seed(0)
    model = nn.Sequential(*(nn.Linear(30 + i, 31 + i) for i in range(3))).to(dtype)
    for p in model.parameters():
        p.data.copy_(torch.randn(p.shape, generator=random))
    model.to(on.device)
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(parameters, lr=2.0**-4, momentum=0.5)
    sparsifier = feather.sparsify(model, optimizer, sparsity=0.8, total_steps=6, **options)
    for step in range(6):
        if step == 2:  # an external write
            with torch.no_grad():
                model[1].weight[3] = 0.5
        given = [torch.randn(p.shape, generator=random).to(p) for p in parameters]
        sum((p * g).sum() for p, g in zip(parameters, given, strict=True)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach().cpu() for p in [*parameters, *sparsifier.latent_weights().values()]]


ON_EVERY_DEVICE: tuple[tuple[torch.dtype, dict[str, Any]], ...] = (
    (torch.float32, {"theta": 0.5}),
    (torch.float32, {"p": 1.0}),
    (torch.float32, {"p": 2.0}),
    (torch.float32, {"p": float("inf"), "theta": 0.0}),
    (torch.float32, {"allocation": "uniform"}),
    (torch.bfloat16, {"theta": 0.3}),
    (torch.float64, {"p": float("inf")}),
)
IN_THE_INTERPRETER = ((torch.float32, {"allocation": "sigma"}),)
"""Sums over weights have another order on a GPU."""


def steps_have_the_bits_of_the_cpu(on: KernelDevice) -> None:
    cases = ON_EVERY_DEVICE + (IN_THE_INTERPRETER if on.device.type == "cpu" else ())
    for dtype, options in cases:
        on_cpu = trained(KernelDevice(torch.device("cpu")), dtype, **options)
        with on.path(), mock.patch.object(passes, "_write_device", None):
            on_device = trained(on, dtype, **options)
        for a, b in zip(on_cpu, on_device, strict=True):
            assert torch.equal(a, b), (dtype, options, (a != b).sum())


CHECKS = (
    copies_are_exact,
    modified_values_are_adopted,
    effective_weights_have_the_bits_of_pytorch,
    gradients_have_the_bits_of_the_rule,
    numbers_have_the_bits_of_the_cpu,
    steps_have_the_bits_of_the_cpu,
)

# Launches

MOST_LAUNCHES = 18
"""Of a step of `feather` in float32 or half precision, excluding the optimizer's."""


class Work(NamedTuple):
    """What torch-feather does in a step, to count its launches."""

    step: Callable[[], None]
    hook: Callable[[], None]
    """The gradient hook of one layer."""


def work_of_a_step(
    device: torch.device,
    layers: int,
    method: str = "feather",
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Work:
    """Return what a step does; two steps were taken, so that tables and workspaces are made."""
    model = nn.Sequential(*(nn.Linear(20, 20) for _ in range(layers))).to(device, dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, foreach=True)
    sparsifier = feather.sparsify(
        model, optimizer, method, sparsity=0.8, total_steps=100, **options
    )
    for _ in range(2):
        model(torch.randn(4, 20, device=device, dtype=dtype)).square().sum().backward()
        optimizer.step()
    [one] = sparsifier.step.optimizers
    hooks = list((model[0].weight._backward_hooks or {}).values())
    gradient = torch.randn(20, 20, device=device, dtype=dtype)

    def step() -> None:
        sparsifier.step.before(one, closure=False)
        sparsifier.step.after(one)

    def hook() -> None:
        for each in hooks:
            each(gradient)

    return Work(torch.no_grad()(step), torch.no_grad()(hook))


def a_step_has_few_launches(on: KernelDevice, count: Callable[[Callable[[], None]], int]) -> None:
    """Check the number of launches of `feather`, for few and many layers."""
    for dtype, p, theta in itertools.product(DTYPES, (1.0, 2.0, 3.0, float("inf")), (1.0, 0.5)):
        few, many = (work_of_a_step(on.device, n, dtype=dtype, p=p, theta=theta) for n in (2, 20))
        counts = count(few.step), count(many.step)
        assert counts[0] == counts[1] <= MOST_LAUNCHES, (dtype, p, theta, counts)
        assert count(few.hook) == (0 if theta == 1.0 else 1), (dtype, p, theta)
