"""The reference by its definition; CPU and device selections by the reference."""

import math

import pytest
import torch
from hypothesis import given, settings
from selection_cases import MAKERS, assert_same_cutoff, assert_selects, make, scores_and_count

from torch_feather.selection import Cutoff, select
from torch_feather.selection.device import select_device
from torch_feather.selection.reference import select_reference

DTYPES = [torch.float32, torch.float64]


def select_on_cpu(scores, k):
    # `select` may overwrite what it is given, as the engine lets it.
    return select(scores.clone, torch.tensor(k))


IMPLEMENTATIONS = {
    "cpu": select_on_cpu,
    "device": select_device,
    "device, k a tensor": lambda scores, k: select_device(scores, torch.tensor(k)),
}


@pytest.mark.parametrize(
    ("scores", "k", "value", "last", "threshold"),
    [
        ([3.0, 1.0, 2.0], 0, -1.0, -1, 0.0),
        ([3.0, 1.0, 2.0], 1, 1.0, 2, 1.0),
        ([3.0, 1.0, 2.0], 3, 3.0, 2, 3.0),
        ([1.0, 2.0, 1.0, 1.0], 2, 1.0, 2, 1.0 - 2**-24),  # one tie is kept: tau steps below it
        ([1.0, 2.0, 1.0, 1.0], 3, 1.0, 3, 1.0),
        ([0.0, 0.0, 0.0], 1, 0.0, 0, 0.0),
        ([0.0, 2**-149, 2**-149], 2, 2**-149, 1, 0.0),
        ([math.inf, 1.0, math.inf], 2, math.inf, 0, torch.finfo(torch.float32).max),
        ([math.nan, 1.0, math.inf], 2, math.inf, 2, math.inf),
        ([math.nan, 1.0, math.nan], 2, math.inf, 2, math.inf),
        ([math.nan], 1, math.inf, 0, math.inf),
    ],
)
def test_cutoffs_of_small_cases(scores, k, value, last, threshold):
    scores = torch.tensor(scores)
    expected = Cutoff(torch.tensor(value), torch.tensor(last), torch.tensor(threshold))
    assert_same_cutoff(select_reference(scores, k), expected)
    assert_selects(expected, scores, k)


@settings(max_examples=300, deadline=None)
@given(scores_and_count())
def test_every_implementation_finds_the_reference_cutoff(case):
    scores, k = case
    for how, implementation in IMPLEMENTATIONS.items():
        assert_selects(implementation(scores, k), scores, k, how)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", MAKERS)
def test_every_kind_of_scores(kind, dtype):
    scores = make(kind, 9001, seed=1, dtype=dtype)  # more than two blocks of the tie search
    for k in (1, 4095, 4097, 8550, 9000, 9001):
        for how, implementation in IMPLEMENTATIONS.items():
            assert_selects(implementation(scores, k), scores, k, how)


@given(scores_and_count(max_size=300))
@settings(max_examples=50, deadline=None)
def test_kept_scores_lie_above_the_threshold_and_pruned_ones_do_not(case):
    scores, k = case
    cutoff = select_reference(scores, k)
    pruned = cutoff.pruned(scores)
    finite = ~scores.isnan()
    assert int(pruned.sum()) == min(k, int(finite.sum()))
    # Only a zero cannot lie above 0; one float step is all that the threshold may miss by.
    assert bool(
        (scores[finite & ~pruned] > cutoff.threshold)
        .logical_or(scores[finite & ~pruned] == 0)
        .all()
    )
    above = torch.nextafter(cutoff.threshold, torch.full_like(cutoff.threshold, torch.inf))
    assert bool((scores[pruned] <= above).all())


@pytest.mark.parametrize("implementation", [select_reference, select_device])
@pytest.mark.parametrize("k", [-1, 4])
def test_a_count_outside_the_scores_is_an_error(implementation, k):
    with pytest.raises(ValueError, match=r"outside 0\.\.3"):
        implementation(torch.ones(3), k)


@pytest.mark.parametrize(
    "scores",
    [torch.ones(2, 2), torch.ones(3).half(), torch.ones(6)[::2], torch.ones(3).int()],
)
def test_scores_that_have_no_code_are_an_error(scores):
    with pytest.raises(ValueError, match="flat, contiguous float32 or float64"):
        select_device(scores, 1)


@pytest.mark.parametrize("implementation", [select_reference, *IMPLEMENTATIONS.values()])
def test_no_scores_give_a_cutoff_that_prunes_nothing(implementation):
    expected = Cutoff(torch.tensor(-1.0), torch.tensor(-1), torch.tensor(0.0))
    assert_same_cutoff(implementation(torch.empty(0), 0), expected)
