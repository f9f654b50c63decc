"""What makes `select_device` fit for accelerators: fixed shapes, and no host."""

import pytest
import torch
from selection_cases import MAKERS, assert_same_cutoff, assert_selects, make
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode

from torch_feather.selection.device import TorchPasses, select_device
from torch_feather.selection.reference import select_reference


@pytest.mark.parametrize("k", [-5, 0])
def test_a_tensor_count_below_the_range_prunes_nothing(k):
    assert_same_cutoff(
        select_device(torch.ones(3), torch.tensor(k)), select_reference(torch.ones(3), 0)
    )


def test_a_tensor_count_above_the_range_prunes_all():
    assert_same_cutoff(
        select_device(torch.ones(3), torch.tensor(9)), select_reference(torch.ones(3), 3)
    )


def test_scores_are_not_written_to():
    scores = make("nan and infinite", 100, seed=0, dtype=torch.float32)
    before = scores.view(torch.int32).clone()
    select_device(scores, 50)
    assert torch.equal(scores.view(torch.int32), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("count", [torch.tensor, int], ids=["tensor", "int"])
def test_the_host_reads_nothing(dtype, count):
    # A fake tensor has no values: reading one, or a shape that depends on one, raises.
    with FakeTensorMode():
        scores = torch.empty(10_000, dtype=dtype, device="cuda")
        k = torch.empty((), dtype=torch.int64, device="cuda") if count is torch.tensor else 17
        cutoff = select_device(scores, k, passes=TorchPasses)
        assert all(field.device.type == "cuda" and field.shape == () for field in cutoff)


def test_one_graph_serves_every_count():
    torch._dynamo.reset()
    backend = CompileCounter()
    compiled = torch.compile(select_device, fullgraph=True, backend=backend)
    scores = make("bf16", 5000, seed=0, dtype=torch.float32)
    for k in (0, 1, 2500, 4750, 5000):
        assert_selects(compiled(scores, torch.tensor(k)), scores, k)
    assert backend.frame_count == 1


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inductor_finds_the_reference_cutoff(dtype):
    torch._dynamo.reset()
    compiled = torch.compile(select_device, fullgraph=True, dynamic=False)
    for kind in MAKERS:
        scores = make(kind, 9001, seed=3, dtype=dtype)
        for k in (0, 1, 4097, 8550, 9001):
            assert_selects(compiled(scores, torch.tensor(k)), scores, k, kind)
