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
from torch_feather.selection.float_bits import FLOAT_BITS
from torch_feather.selection.reference import select_reference


class Total:
    """Sums over threads that call it in step, as ranks do."""

    def __init__(self, ranks):
        self.barrier = threading.Barrier(ranks, timeout=30)
        self.parts, self.bytes = {}, 0

    def __call__(self, counts):
        self.parts[threading.get_ident()] = counts
        self.barrier.wait()
        total = torch.stack(list(self.parts.values())).sum(0, dtype=counts.dtype)
        if self.barrier.wait() == 0:
            self.bytes += counts.nbytes
        return total


def expected_bytes(scores, size, ties):
    """Return the bytes that one selection exchanges: 4 per count."""
    widths = list(FLOAT_BITS[scores.dtype].digits)
    bits = max(1, (size - 1).bit_length()) * ties
    widths += [11] * (bits // 11) + [bits % 11] * (bits % 11 > 0)
    return sum(4 << width for width in widths)


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
    sizes = max(whole.numel() for whole in wholes)
    least, most = (len(wholes) * expected_bytes(wholes[0], sizes, ties) for ties in (False, True))
    assert total.bytes in (least, most)
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


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_number_of_ranks_finds_the_same_cutoff(ranks, dtype):
    whole = torch.randn(40_000, generator=torch.Generator().manual_seed(5)).abs().to(dtype).float()
    check([whole], [36_000], [torch.arange(40_000) * ranks // 40_000], ranks)


@pytest.mark.parametrize("ties", [False, True])
def test_bytes_of_a_selection_from_a_billion_weights(ties):
    sizes, exchanged = [10**9], []

    def total(counts):
        exchanged.append(counts.nbytes)
        return counts

    scores = torch.ones(100) if ties else torch.arange(100.0)
    select_sharded(
        [scores],
        torch.tensor([70]),
        sizes=sizes,
        total=total,
        local_positions=lambda index: index.clamp(0, 100),
    )
    ordered = ties or devices.synchronizes(scores.device)  # an accelerator orders ties always
    bound = 40_000 if ordered else 33_000
    assert sum(exchanged) == expected_bytes(scores, sizes[0], ordered) <= bound


@pytest.mark.parametrize("infinite", [0, 5])
def test_fillers_are_not_counted(infinite):
    scores = torch.arange(1.0, 21.0)
    scores[20 - infinite :] = torch.inf
    seen = []

    def total(counts):
        seen.append(counts.sum().item())
        return counts

    (cutoff,) = select_sharded(
        [torch.cat([scores, torch.full((1000,), torch.nan)])],
        torch.tensor([18]),
        sizes=[20],
        total=total,
        local_positions=lambda index: index,
        fillers=[1000],
    )
    assert_same_cutoff(
        cutoff._replace(last=cutoff.last.clamp(max=19)), select_reference(scores, 18)
    )
    assert max(seen) <= 20


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
