"""Candidates, and what is computed range by range: as if all weights were read."""

import numpy as np
import pytest
import torch

from torch_feather.methods.learned.changes import sums_of_changes
from torch_feather.operators import Hard, Power
from torch_feather.selection.reference import select_reference
from torch_feather.weights import compiled
from torch_feather.weights.candidates import ROOM, TURNS, collect
from torch_feather.weights.deviations import standard_deviations
from torch_feather.weights.exchange import read_latent
from torch_feather.weights.latent import LatentWeights
from torch_feather.weights.overlaps import overlaps_of
from torch_feather.weights.passes import row_sums, write_each, write_effective
from torch_feather.weights.segments import Segment
from torch_feather.weights.selecting import select_weights
from torch_feather.weights.spans import spans
from torch_feather.weights.sums import Recorded, sum_ranges

SHAPES = (300, 500), (100, 700), (40,)


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    monkeypatch.setattr(compiled, "kernels", lambda: None)


def tensors(seed, ties=False):
    generator = torch.Generator().manual_seed(seed)
    found = [torch.randn(shape, generator=generator) for shape in SHAPES]
    return [(8 * t).round() / 8 for t in found] if ties else found


def segments_of(weights, cutoff, scales):
    pairs = zip(weights.spans, scales, strict=True)
    return [Segment(start, stop, cutoff, scale) for (start, stop), scale in pairs]


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("change", [1.0, 1.001, 0.5])
def test_scaled_selections_and_writes_from_candidates_are_those_of_all_weights(ties, change):
    """After a step in which thresholds hardly move, candidates are enough; else they are not."""
    parameters = tensors(1, ties)
    weights = LatentWeights(parameters)
    scales = [torch.tensor(x) for x in (1.0, 1.75, torch.inf)]
    k = torch.tensor(int(0.97 * weights.size))
    for step in range(2):
        if step:
            read_latent(weights, range(3), parameters)
            scales[1] = scales[1] * change
        cutoff = select_weights(weights, k, scales)
        segments = segments_of(weights, cutoff, scales)
        out = Recorded([torch.empty_like(w) for w in weights.views])
        write_effective(weights, segments, Power(3.0), out)
    scores = torch.cat([w.abs().flatten() * s for w, s in zip(weights.views, scales, strict=True)])
    expected = select_reference(scores, int(k))
    assert [float(x) for x in cutoff] == [float(x) for x in expected]
    fresh = [torch.empty_like(w) for w in weights.views]
    write_effective(LatentWeights(parameters), segments, Power(3.0), fresh)
    assert all(map(torch.equal, out, fresh))
    assert out.sums.checksums.tolist() == sum_ranges(weights, out).checksums.tolist()
    used = [
        o.candidates for own in overlaps_of(weights, list(spans(weights, segments))) for o in own
    ]
    assert any(one is not None for one in used)
    sums, expected = (row_sums(w, segments, [0, 1]) for w in (weights, LatentWeights(parameters)))
    assert all(map(torch.equal, sums, expected))


@pytest.mark.parametrize("kept", [0.01, 0.05, 0.1, 0.13, 0.3])
def test_candidates_take_little_memory(kept):
    parts = torch.randn(2 * TURNS, 65152, generator=torch.Generator().manual_seed(9)).numpy()
    bound = int(np.float32(np.quantile(np.abs(parts), 1 - kept)).view(np.int32))
    found = [collect(w, bound, bound, j)[2] for j, w in enumerate(parts)]
    assert all(one is not None for one in found) == (kept < 0.3)
    found = [one for one in found if one is not None]
    with_values = [one for one in found if one.values is not None]
    size = sum(one.at.nbytes for one in found) + sum(one.values.nbytes for one in with_values)
    assert size <= 1.02 * ROOM * parts.nbytes  # the number of candidates differs among ranges
    assert kept < 0.05 or len(with_values) < 2 * TURNS
    assert kept > 0.05 or len(with_values) > TURNS


@pytest.mark.parametrize("offset", [0.0, 100.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_deviations_are_those_of_torch(offset, dtype):
    values = [(t + offset).to(dtype) for t in tensors(2)]
    values += [torch.full((70_000,), 0.3, dtype=dtype), torch.ones(1, dtype=dtype)]
    found = standard_deviations(LatentWeights(values))
    expected = torch.stack([t.double().std() for t in values[:-1]] + [torch.zeros(()).double()])
    # The mean of equal values is rounded, so their deviation is its rounding error.
    torch.testing.assert_close(found.double(), expected, rtol=2e-6, atol=2e-8)


def test_a_deviation_of_values_that_are_not_finite_is_nan():
    values = tensors(3)[:2]
    values[1][5, 7] = torch.inf
    assert standard_deviations(LatentWeights(values)).isnan().tolist() == [False, True]


@pytest.mark.parametrize("missing", [False, True])
def test_sums_of_changes_are_those_of_their_definition(missing):
    weights = LatentWeights(tensors(4))
    effective, gradients = tensors(5), [*tensors(6)]
    if missing:  # then each tensor is summed by itself
        gradients[1] = None
    found = sums_of_changes(weights, Hard(), lambda i: torch.tensor(1.0), effective, gradients)
    triples = zip(weights.views, effective, gradients, strict=True)
    expected = [0.0 if g is None else float(((u - w).double() * g).sum()) for w, u, g in triples]
    torch.testing.assert_close(found.tolist(), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_functions_of_ranges_are_written_and_summed(dtype):
    weights = LatentWeights([t.to(dtype) for t in tensors(7)])
    masks = tensors(8)
    out = Recorded([torch.empty_like(w) for w in weights.views])
    write_each(weights, lambda w, m, u: u.copy_(w * m), out, masks)
    for u, w, m in zip(out, weights.views, masks, strict=True):
        assert torch.equal(u, (w * m).to(dtype))
    assert out.sums.checksums.tolist() == sum_ranges(weights, out).checksums.tolist()
