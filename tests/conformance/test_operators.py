"""The threshold operators and gradient rules, as formulas."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

import torch_feather as feather
from torch_feather import gradient_rules as gradients
from torch_feather import operators
from torch_feather.errors import ConfigurationError

P = [1.0, 1.5, 2.0, 3.0, 4.0, 10.0]
magnitudes = st.floats(2.0**-20, 2.0**20, width=32)


def t(*values, dtype=torch.float64):
    return torch.tensor(values, dtype=dtype)


@pytest.mark.parametrize(
    ("ratio", "effective"), [(1.01, 0.31), (1.1, 0.69), (2.0, 1.91)], ids=["1.01", "1.1", "2"]
)
def test_power_3_near_its_threshold(ratio, effective):
    tau = 0.037
    value = float(feather.power_threshold(t(ratio * tau), tau))
    assert value / tau == pytest.approx(effective, abs=5e-3)


@given(w=st.floats(-1e6, 1e6), tau=st.floats(0, 1e6), p=st.sampled_from(P))
def test_power_is_the_formula_of_the_paper(w, tau, p):
    scale = max(abs(w), tau, 1e-30)  # |w|^p overflows; T_p is homogeneous
    a, b = abs(w) / scale, tau / scale
    expected = math.copysign(scale * (a**p - b**p) ** (1 / p), w) if a > b else 0.0
    # w^p - tau^p cancels near the threshold, and the root magnifies the error.
    assert_close(feather.power_threshold(t(w), tau, p), t(expected), rtol=1e-6, atol=scale * 1e-5)


@given(w=magnitudes, tau=magnitudes)
def test_p_1_is_the_soft_threshold(w, tau):
    w, tau = t(w, -w), t(tau)
    soft = w.sign() * (w.abs() - tau).clamp(min=0)
    assert torch.equal(feather.power_threshold(w, tau, 1), soft)
    if abs(w[0]) > tau:
        assert torch.equal(operators.Soft()(w, tau), soft)


@given(ratio=st.floats(1.01, 1e3), tau=magnitudes)
def test_large_p_tends_to_the_hard_threshold(ratio, tau):
    w = t(ratio * tau, -ratio * tau)
    assert_close(feather.power_threshold(w, tau, 2000.0), w, rtol=1e-6, atol=0)
    assert torch.equal(operators.Hard()(w, t(tau)), w)
    assert torch.equal(feather.power_threshold(w, tau, math.inf), w)


@given(st.lists(st.floats(0, 2.0**20), min_size=2), magnitudes, st.sampled_from(P))
def test_the_effective_weight_grows_with_the_magnitude(values, tau, p):
    effective = feather.power_threshold(t(*sorted(values)), tau, p)
    assert (effective.diff() >= 0).all()
    assert (effective >= 0).all()


@given(st.lists(st.floats(0, 2.0**20), min_size=1), magnitudes, st.sampled_from(P))
def test_the_operator_is_odd_and_shrinks(values, tau, p):
    w = t(*values)
    effective = feather.power_threshold(w, tau, p)
    assert torch.equal(feather.power_threshold(-w, tau, p), -effective)
    assert (effective.abs() <= w.abs()).all()
    assert torch.equal(effective != 0, w > tau)


@given(w=magnitudes, tau=magnitudes)
def test_the_effective_weight_grows_with_p(w, tau):
    effective = [float(feather.power_threshold(t(w), tau, p)) for p in P]
    assert all(a <= b * (1 + 1e-12) for a, b in itertools.pairwise(effective))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_threshold_0_is_the_identity(dtype):
    w = torch.randn(100).to(dtype)
    for p in P:
        assert_close(feather.power_threshold(w, 0.0, p), w, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1e-6, 1e-4, 1.0, 1e4])
def test_half_precision_is_the_rounded_float32_result(dtype, scale):
    """|w|^3 underflows in half precision: the arithmetic is float32."""
    w = (torch.linspace(-2, 2, 101) * scale).to(dtype)
    tau = torch.tensor(0.5 * scale, dtype=dtype).float()
    effective = feather.power_threshold(w, tau)
    assert effective.dtype == dtype
    assert_close(effective, feather.power_threshold(w.float(), tau).to(dtype), rtol=0, atol=0)
    assert (effective != 0).any()


@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e-13, 1e13, 1e30, 1e38])
def test_powers_neither_underflow_nor_overflow(scale):
    for p in P:
        effective = feather.power_threshold(torch.tensor([2.0, 3.0]) * scale, scale, p)
        expected = feather.power_threshold(torch.tensor([2.0, 3.0]), 1.0, p)
        assert_close(effective / scale, expected, rtol=1e-5, atol=0)


def test_the_true_derivative_is_finite_on_both_sides():
    w = torch.tensor([-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0], requires_grad=True)
    feather.power_threshold(w, 1.0).sum().backward()
    slope = 4 / 7 ** (2 / 3)  # |w|^2 (|w|^3 - 1)^(-2/3) at 2
    assert_close(w.grad, torch.tensor([slope, 0, 0, 0, 0, 0, slope]), rtol=1e-5, atol=0)


@pytest.mark.parametrize("p", [0.5, 0.0, -1.0, math.nan])
def test_p_below_1_is_an_error(p):
    with pytest.raises(ConfigurationError, match="p must"):
        operators.Power(p)
    with pytest.raises(ConfigurationError, match="p must"):
        feather.power_threshold(t(1.0), 0.5, p)


def test_a_negative_threshold_is_an_error():
    with pytest.raises(ConfigurationError, match="tau"):
        feather.power_threshold(t(1.0), -0.5)


def test_straight_through_scales_the_gradient_of_pruned_weights_alone():
    effective = torch.tensor([0.0, -1e-45, -0.0, 7.0])
    latent = torch.tensor([0.5, -0.5, -0.1, 7.5])
    g = torch.tensor([1.0, 2.0, -3.0, 4.0])
    for rule, theta in [(gradients.StraightThrough(0.25), 0.25), (gradients.Masked(), 0.0)]:
        found = rule(g, latent, effective, torch.tensor(0.5))
        assert torch.equal(found, torch.where(effective == 0, theta * g, g))
        assert not rule.is_identity


def test_plain_straight_through_is_the_identity():
    assert gradients.StraightThrough(1.0).is_identity


@pytest.mark.parametrize("theta", [-0.1, 1.1, math.nan, math.inf])
def test_theta_outside_0_to_1_is_an_error(theta):
    with pytest.raises(ConfigurationError, match="theta"):
        gradients.StraightThrough(theta)
