"""Selection over shards finds the global cutoff, for any shards and device."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from selection_cases import MAKERS, assert_same_cutoff, make, scores_and_count

from torch_feather import devices
from torch_feather.selection import select_sharded
from torch_feather.selection.reference import select_reference


class Total:
    """Sums over threads that call it in step, as ranks do."""

    def __init__(self, ranks):
        self.barrier = threading.Barrier(ranks, timeout=30)
        self.parts, self.exchanged = {}, 0

    def __call__(self, counts):
        self.parts[threading.get_ident()] = counts
        self.exchanged = max(self.exchanged, counts.numel())
        self.barrier.wait()
        total = torch.stack(list(self.parts.values())).sum(0)
        self.barrier.wait()
        return total


def check(wholes, counts, holder, ranks):
    """Every rank finds the reference cutoffs; `holder[j][i]` is the rank of score i of cutoff j."""
    total = Total(ranks)

    def rank(r):
        mine = [h == r for h in holder]
        before = [torch.nn.functional.pad(m.cumsum(0), (1, 0)) for m in mine]

        def positions(index):
            pairs = zip(before, index, strict=True)
            return torch.stack([b[i.clamp(max=len(b) - 1)] for b, i in pairs])

        scores = [whole[m] for whole, m in zip(wholes, mine, strict=True)]
        sizes = [whole.numel() for whole in wholes]
        cutoffs = select_sharded(
            scores, torch.tensor(counts), sizes=sizes, total=total, local_positions=positions
        )
        return [
            (cutoff, cutoff.pruned(s), m)
            for cutoff, s, m in zip(cutoffs, scores, mine, strict=True)
        ]

    with ThreadPoolExecutor(ranks) as pool:
        found = list(pool.map(rank, range(ranks)))
    assert total.exchanged <= 2048 * len(wholes)
    for j, (whole, k) in enumerate(zip(wholes, counts, strict=True)):
        expected = select_reference(whole, k)
        pruned = torch.zeros(whole.numel(), dtype=torch.bool)
        for cutoff, part, mine in (cutoffs[j] for cutoffs in found):
            assert_same_cutoff(cutoff._replace(last=expected.last), expected)
            pruned[mine] = part
        assert torch.equal(pruned, expected.pruned(whole))


@pytest.fixture(params=["cpu", "device"], autouse=True, scope="module")
def way(request):
    """The path of an accelerator is tested on the CPU too."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "device":
            patch.setattr(devices, "synchronizes", lambda device: True)
        yield


@settings(max_examples=40, deadline=None)
@given(scores_and_count(), st.integers(1, 4), st.booleans(), st.integers(0, 99))
def test_shards_find_the_global_cutoff(case, ranks, mixed, seed):
    scores, k = case
    holder = torch.randint(ranks, scores.shape, generator=torch.Generator().manual_seed(seed))
    check([scores], [k], [holder if mixed else holder.sort().values], ranks)


@pytest.mark.parametrize("kind", MAKERS)
def test_several_selections_share_their_communication(kind):
    sizes = [20_000, 1, 4097, 300]
    wholes = [make(kind, n, seed=j, dtype=torch.float32) for j, n in enumerate(sizes)]
    holder = [torch.arange(n) * 3 // max(n, 4) for n in sizes]
    for fraction in (0.0, 0.3, 0.95, 1.0):
        check(wholes, [round(fraction * n) for n in sizes], holder, 3)


def test_ties_far_beyond_32_bits_of_index_are_found():
    first = 2**37 + 5
    (cutoff,) = select_sharded(
        [torch.ones(10)],
        torch.tensor([7]),
        sizes=[first + 10],
        total=lambda counts: counts,
        local_positions=lambda index: (index - first).clamp(0, 10),
    )
    assert cutoff.last.item() == 6
