"""The kernels of a step on a GPU; `test_launches.py` runs the same checks in the interpreter."""

from unittest import mock

import pytest
import torch
from device_checks import CHECKS, KernelDevice, a_step_has_few_launches
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_kernels_have_the_bits_of_the_cpu_on_a_device(check):
    check(KernelDevice(torch.device("cuda")))


def kernels(work) -> int:
    """Kernels, copies and fills that the profiler sees."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        work()
        torch.cuda.synchronize()
    return sum(event.device_type == DeviceType.CUDA for event in profiler.events())


def test_the_profiler_sees_few_launches_in_a_step():
    from torch_feather.selection import triton_kernels

    # A few weights are enough for the form of many.
    with mock.patch.object(triton_kernels, "SMALL", 100):
        a_step_has_few_launches(KernelDevice(torch.device("cuda")), kernels)
