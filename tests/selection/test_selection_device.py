"""What makes `select_device` fit for accelerators: fixed shapes, no host, any number of shards."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from selection_cases import MAKERS, assert_same_cut, assert_selects, make, scores_and_count
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode

from torch_feather.selection.device import TorchPasses, select_device
from torch_feather.selection.reference import select_reference


class AllReduce:
    """Sums over threads that call it in step, as ranks do."""

    def __init__(self, ranks):
        self.barrier = threading.Barrier(ranks, timeout=30)
        self.parts = {}

    def __call__(self, counts):
        self.parts[threading.get_ident()] = counts
        self.barrier.wait()
        total = torch.stack(list(self.parts.values())).sum(0)
        self.barrier.wait()
        return total


def select_sharded(shards, k):
    """The cut that each rank finds, each of which knows its own shard only."""
    offsets = [sum(s.numel() for s in shards[:rank]) for rank in range(len(shards))]
    reduce, total = AllReduce(len(shards)), sum(s.numel() for s in shards)

    def rank(shard, offset):
        return select_device(shard, k, reduce=reduce, index_offset=offset, total=total)

    with ThreadPoolExecutor(len(shards)) as pool:
        return list(pool.map(rank, shards, offsets))


@settings(max_examples=40, deadline=None)
@given(scores_and_count(), st.sampled_from([1, 3, 4]))
def test_shards_find_the_cut_of_the_whole(case, ranks):
    scores, k = case
    for cut in select_sharded(list(torch.tensor_split(scores, ranks)), torch.tensor(k)):
        assert_selects(cut, scores, k, f"{ranks} ranks")


@pytest.mark.parametrize("kind", ["normal", "bf16", "all equal"])
@pytest.mark.parametrize("sizes", [[20000], [0, 4096, 1, 15903], [4095, 4097, 11808, 0]])
def test_shards_of_any_size_share_the_tie_search(kind, sizes):
    scores = make(kind, 20000, seed=2, dtype=torch.float32)
    for k in (1, 4096, 4097, 19000, 20000):
        for cut in select_sharded(list(scores.split(sizes)), torch.tensor(k)):
            assert_selects(cut, scores, k, str(sizes))


def test_ties_far_beyond_32_bits_of_index_are_found():
    offset, scores = 2**33 + 5, torch.ones(10)
    cut = select_device(scores, torch.tensor(7), index_offset=offset)
    assert cut.last.item() == offset + 6
    assert cut.pruned(scores, offset).tolist() == [True] * 7 + [False] * 3


@pytest.mark.parametrize("k", [-5, 0])
def test_a_tensor_count_below_the_range_prunes_nothing(k):
    assert_same_cut(
        select_device(torch.ones(3), torch.tensor(k)), select_reference(torch.ones(3), 0)
    )


def test_a_tensor_count_above_the_range_prunes_all():
    assert_same_cut(
        select_device(torch.ones(3), torch.tensor(9)), select_reference(torch.ones(3), 3)
    )


def test_scores_are_not_written_to():
    scores = make("nan and infinite", 100, seed=0, dtype=torch.float32)
    before = scores.view(torch.int32).clone()
    select_device(scores, 50)
    assert torch.equal(scores.view(torch.int32), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("count", [torch.tensor, int], ids=["tensor", "int"])
def test_nothing_is_read_by_the_host(dtype, count):
    # A fake tensor has no values: reading one, or a shape that depends on one, raises.
    with FakeTensorMode():
        scores = torch.empty(10_000, dtype=dtype, device="cuda")
        k = torch.empty((), dtype=torch.int64, device="cuda") if count is torch.tensor else 17
        cut = select_device(scores, k, passes=TorchPasses)
        assert all(field.device.type == "cuda" and field.shape == () for field in cut)


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
def test_inductor_finds_the_reference_cut(dtype):
    torch._dynamo.reset()
    compiled = torch.compile(select_device, fullgraph=True, dynamic=False)
    for kind in MAKERS:
        scores = make(kind, 9001, seed=3, dtype=dtype)
        for k in (0, 1, 4097, 8550, 9001):
            assert_selects(compiled(scores, torch.tensor(k)), scores, k, kind)
