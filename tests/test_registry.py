"""Methods of other people: by registration, entry point and import path."""

from importlib.metadata import EntryPoint

import pytest
import torch
from torch import nn

import torch_feather as feather
from torch_feather import ConfigurationError, errors, methods
from torch_feather.gradient_rules import Cosine, Linear, StraightThrough
from torch_feather.methods import build_method, find_method, method_options, registry


def train(method, steps=4, **options):
    model = nn.Linear(10, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier = feather.sparsify(
        model, optimizer, method, sparsity=0.5, total_steps=steps, **options
    )
    for _ in range(steps):
        model(torch.randn(4, 10)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return sparsifier.finalize()


@pytest.fixture
def own(monkeypatch):
    """A registry that a test may change."""
    monkeypatch.setattr(registry, "METHODS", dict(registry.METHODS))


def test_a_registered_method_is_found_by_name(own):
    feather.register_method(
        "mine", lambda *, sparsity, p=2.0: methods.feather(sparsity=sparsity, p=p)
    )
    assert "mine" in feather.available_methods()
    assert method_options("mine") == {"p": 2.0}
    assert int((train("mine", p=4.0).weight == 0).sum()) == 50


@pytest.mark.parametrize("name", ["feather", "a:b", "", None, "a b", "a\n", "\x1b[1m"])
def test_a_name_that_cannot_be_registered_is_an_error(own, name):
    with pytest.raises(ConfigurationError):
        feather.register_method(name, lambda: None)


def positional(p, /):
    return methods.feather(sparsity=0.5, p=p)


def failing():
    raise KeyError("lost")


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (lambda *, sparsity, p: methods.feather(sparsity=sparsity, p=p), "requires p="),
        (positional, "takes p by position only"),
        (failing, r"raises KeyError \('lost'\)"),
        (lambda **options: methods.gmp(q=1, **options), "raises TypeError"),
        (dict, "is no factory"),
        (lambda *, sparsity, count=2: methods.feather(sparsity=sparsity), "argument of sparsify"),
    ],
)
def test_a_factory_that_cannot_be_called_is_an_error_that_says_why(own, factory, message):
    feather.register_method("mine", factory)
    with pytest.raises(ConfigurationError, match=message):
        train("mine")


def test_a_required_option_is_named_in_the_form_of_the_command_line(own):
    feather.register_method("mine", lambda *, sparsity, p: methods.feather(sparsity=sparsity, p=p))
    errors.name_command_line_options(True)
    try:
        with pytest.raises(ConfigurationError, match=r"requires --options\.p"):
            train("mine")
    finally:
        errors.name_command_line_options(False)


def test_a_factory_must_be_callable(own):
    with pytest.raises(ConfigurationError, match="callable"):
        feather.register_method("mine", 3)


def test_an_entry_point_is_a_method(monkeypatch):
    point = EntryPoint("theirs", "torch_feather.methods:gmp", registry.ENTRY_POINTS)
    monkeypatch.setattr(registry, "entry_points", lambda group: [point])
    assert "theirs" in feather.available_methods()
    assert method_options("theirs") == method_options("gmp")
    assert int((train("theirs").weight == 0).sum()) == 50


def test_a_method_is_found_by_import_path():
    assert find_method("torch_feather.methods:gmp") is methods.gmp
    assert int((train("torch_feather.methods:gmp", every=2).weight == 0).sum()) == 50


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nowhere.at_all:method", "cannot be imported"),
        ("torch_feather.methods:nothing", "has no 'nothing'"),
        ("torch_feather.methods:METHODS", "not callable"),
        ("fether", "feather"),
        ("mine", "import that module"),
    ],
)
def test_a_method_that_is_not_there_is_an_error_that_says_what_to_import(name, words):
    with pytest.raises(ConfigurationError, match=words):
        train(name)


def test_a_factory_that_returns_no_method_is_an_error(own):
    feather.register_method("mine", lambda: 3)
    with pytest.raises(ConfigurationError, match="bind"):
        train("mine")


@pytest.mark.parametrize(("name", "new"), [("str", "lr_multiplier"), ("probmask", "lr")])
def test_an_option_of_version_0_1_works_with_a_warning(name, new):
    with pytest.warns(DeprecationWarning, match=new):
        old = build_method(name, sparsity=0.9, rate=0.25)
    assert old == build_method(name, sparsity=0.9, **{new: 0.25})


# --- theta over time ------------------------------------------------------------------------


def test_theta_follows_its_schedule():
    rule, u = StraightThrough(theta=Linear(1.0, 0.0)), torch.tensor([0.0, 2.0])
    g = torch.tensor([3.0, 3.0])
    for progress in (0.0, 0.25, 1.0):
        expected = torch.tensor([3.0 * (1 - progress), 3.0])
        torch.testing.assert_close(rule(g, u, u, torch.tensor(progress)), expected)


@pytest.mark.parametrize("theta", [Linear(1.0, 0.0), "linear(1, 0)"])
def test_theta_over_time_is_between_its_ends(theta):
    """Between the trajectories of theta = 1 and theta = 0, and equal to neither."""
    weights = []
    for value in (1.0, theta, 0.0):
        torch.manual_seed(0)
        weights.append(train("feather", steps=20, theta=value, schedule="constant").weight)
    assert not torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[2], weights[1])


def test_theta_as_text_is_the_schedule():
    assert build_method(
        "feather", sparsity=0.9, theta="cosine(1, 0.5)"
    ).gradient == StraightThrough(Cosine(1.0, 0.5))
    assert build_method("feather", sparsity=0.9, theta="0.25").gradient == StraightThrough(0.25)


@pytest.mark.parametrize("theta", ["linear(1)", "steps(1, 0)", "linear(a, b)", "much"])
def test_other_text_for_theta_is_an_error(theta):
    with pytest.raises(ConfigurationError, match="linear"):
        build_method("feather", sparsity=0.9, theta=theta)


@pytest.mark.parametrize("theta", [Linear(2.0, 0.0), Linear(1.0, -0.5), 1.5, -0.1])
def test_theta_outside_of_0_to_1_is_an_error(theta):
    with pytest.raises(ConfigurationError, match="theta"):
        build_method("feather", sparsity=0.9, theta=theta)
