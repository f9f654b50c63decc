"""The schedules, as formulas, and the integer number of pruned weights that follows."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torch_feather.errors import ConfigurationError
from torch_feather.schedules import Constant, Cubic, Linear, OneShot

from .harness import assert_exact, start

bounds = st.integers(1, 400).flatmap(
    lambda total: st.tuples(
        st.just(total), st.integers(0, total - 1).flatmap(lambda a: st.tuples(
            st.just(a), st.integers(a + 1, total))),
    )
)  # fmt: skip


@given(bounds)
def test_ramps_have_the_right_ends_and_never_fall(drawn):
    total, (begin, end) = drawn
    for schedule in (Cubic(begin, end), Linear(begin, end)):
        table = schedule.table(total)
        assert table.dtype == torch.float64
        assert table.shape == (total + 1,)
        assert (table[: begin + 1] == 0).all()
        assert (table[begin + 1 :] > 0).all()
        assert (table[end:] == 1).all()
        assert (table[begin + 1 : end] < 1).all()
        assert (table.diff() >= 0).all()


@given(bounds)
def test_ramps_are_their_formulas(drawn):
    total, (begin, end) = drawn
    for t in range(begin, end + 1):
        x = (t - begin) / (end - begin)
        assert float(Linear(begin, end).table(total)[t]) == pytest.approx(x, abs=1e-14)
        assert float(Cubic(begin, end).table(total)[t]) == pytest.approx(
            1 - (1 - x) ** 3, abs=1e-14
        )


@pytest.mark.parametrize("total", [2, 3, 10, 11, 1000])
def test_ramps_end_at_half_of_training_by_default(total):
    for schedule in (Cubic(), Linear()):
        table = schedule.table(total)
        assert table[0] == 0
        assert table[total // 2] == 1
        assert (table[: total // 2] < 1).all()


def test_the_cubic_schedule_is_that_of_the_paper():
    table = Cubic().table(8)
    expected = [0, 1 - 27 / 64, 1 - 1 / 8, 1 - 1 / 64, 1, 1, 1, 1, 1]
    assert table.tolist() == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("total", [1, 2, 7])
def test_constant_is_at_the_target_from_the_first_forward_on(total):
    assert Constant().table(total).tolist() == [1.0] * (total + 1)


@pytest.mark.parametrize("at", [0, 1, 6, 7])
def test_one_shot_prunes_at_its_step(at):
    assert OneShot(at).table(7).tolist() == [0.0] * at + [1.0] * (8 - at)


@pytest.mark.parametrize("total", [1, 2])
def test_the_default_schedule_copes_with_very_short_training(total):
    """Half of one step is none: the target is reached all the same."""
    assert Cubic().table(total)[-1] == 1


@pytest.mark.parametrize(
    "schedule",
    [Cubic(5, 5), Cubic(6, 5), Linear(5, 5), Linear(7, 2), Cubic(-1, 5), Cubic(0, 0), Cubic(8)],
    ids=str,
)
def test_a_ramp_that_ends_before_it_begins_is_an_error(schedule):
    with pytest.raises(ConfigurationError, match="begin"):
        schedule.table(10)


@pytest.mark.parametrize(
    "schedule", [Cubic(0, 11), Linear(3, 12), OneShot(11), OneShot(-1)], ids=str
)
def test_a_schedule_that_never_reaches_its_target_is_an_error(schedule):
    with pytest.raises(ConfigurationError, match="step"):
        schedule.table(10)


@pytest.mark.parametrize(
    ("sparsity", "pruned"),
    [(0.0, 0), (0.004, 0), (1 / 240, 0), (3 / 240, 2), (5 / 240, 2), (0.95, 114), (0.996, 120)],
)
def test_k_is_rounded_half_to_even(sparsity, pruned):
    """120 weights: 1/240 of them is 0.5, which rounds to 0; 3/240 is 1.5, which rounds to 2."""
    run = start("mlp", sparsity=sparsity, schedule="constant")
    assert run.zeros() == pruned
    assert_exact(run)
