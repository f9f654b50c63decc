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
from device_checks import CHECKS, KernelDevice, a_step_has_few_launches, work_of_a_step
from test_passes import make_weights
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from torch_feather import devices, launching
from torch_feather.gradient_rules import Linear
from torch_feather.operators import Hard
from torch_feather.selection import triton_kernels
from torch_feather.weights import triton_passes
from torch_feather.weights.exchange import write_latent
from torch_feather.weights.latent import LatentWeights
from torch_feather.weights.segments import Segment
from torch_feather.weights.selecting import select_each, select_weights

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


INTERPRETER = KernelDevice(torch.device("cpu"), triton_on_a_cpu)


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


def launches_of(work: Callable[[], None]) -> list[str]:
    count = Launches()
    with count, mock.patch.object(launching, "launch", count.launch):
        work()
    return count.names


def counted(*arguments: Any, **options: Any) -> tuple[int, int, int]:
    """Return the launches of a step with 2 and 20 layers, and those of a gradient hook."""
    few, many = (work_of_a_step(INTERPRETER.device, n, *arguments, **options) for n in (2, 20))
    return len(launches_of(few.step)), len(launches_of(many.step)), len(launches_of(few.hook))


def steps_have_few_launches() -> None:
    # A few weights are enough for the form of many.
    with triton_on_a_cpu(), mock.patch.object(triton_kernels, "SMALL", 100):
        a_step_has_few_launches(INTERPRETER, lambda work: len(launches_of(work)))


def exceptions_have_more_launches() -> None:
    """Print what the page of results says about types, exponents and schedules of theta."""
    scheduled = {"theta": Linear(1.0, 0.0)}
    with triton_on_a_cpu(), mock.patch.object(triton_kernels, "SMALL", 100):
        for method, dtype, options, expected in (
            ("feather", torch.float32, {}, (15, 15, 0)),
            ("feather", torch.float32, {"theta": 0.5}, (15, 15, 1)),
            ("feather", torch.float32, scheduled, (15, 15, 10)),
            ("feather", torch.float64, {"p": 1.0}, (18, 18, 0)),
            ("feather", torch.float64, {"p": float("inf")}, (18, 18, 0)),
            ("feather", torch.float64, {"p": 2.0}, (68, 104, 0)),
            ("feather", torch.float64, {"p": 3.0}, (70, 106, 0)),
            ("feather", torch.float64, {"theta": 0.5}, (70, 106, 7)),
            ("feather", torch.float32, {"p": 2.5}, (73, 109, 0)),
            ("feather-ham", torch.float32, {}, (25, 43, 0)),
        ):
            found = counted(method, dtype, **options)
            print(
                f"{method}, {dtype}, {options}: 2 layers {found[0]}, 20 {found[1]}, hook {found[2]}"
            )
            assert found == expected


def selections_per_layer_have_launches_of_their_own() -> None:
    """With one cutoff per layer, launches grow with the layers; at most 18 is for `global`."""
    with triton_on_a_cpu(), mock.patch.object(triton_kernels, "SMALL", 100):
        for allocation in ("uniform", "erk"):
            few, many, _ = counted(allocation=allocation)
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
        steps_have_few_launches,
        exceptions_have_more_launches,
        selections_per_layer_have_launches_of_their_own,
        a_selection_has_few_launches,
        one_launch_serves_many_cutoffs,
        other_layouts_take_the_form_of_pytorch,
    ):
        check()
    for shared in CHECKS:
        shared(INTERPRETER)
    print("checked")
