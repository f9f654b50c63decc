"""`check_method` accepts every method of the package and the examples, and finds broken ones."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from torch_feather import available_methods
from torch_feather.methods import BoundMethod, Facts, feather
from torch_feather.methods.magnitude import MagnitudePruning, Method
from torch_feather.testing import PROPERTIES, check_method

EXAMPLES = Path(__file__).parents[1] / "examples" / "methods"
OPTIONS = {
    "feather-flops": {"example_input": torch.randn(1, 2, 4, 4)},
    "asl": {"dense_below": 0},
    "asl+": {"dense_below": 0},
    "feather-asl+": {"dense_below": 0},
}


@pytest.mark.filterwarnings("ignore::torch_feather.FeatherWarning")
@pytest.mark.parametrize("name", available_methods())
def test_every_method_has_every_property(name):
    check_method(name, options=OPTIONS.get(name))


@pytest.mark.filterwarnings("ignore::torch_feather.FeatherWarning")
@pytest.mark.parametrize(
    ("file", "options"), [("powerprop", {}), ("annealed_theta", {}), ("rigl", {"every": 3})]
)
def test_every_example_has_every_property(file, options, monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    sys.modules.pop(file, None)
    check_method(getattr(__import__(file), file), options=options)


def gradual(cls):
    """A factory of a method whose bound form is `cls`."""

    class Broken(Method):
        def bind(self, context):
            return cls(context, self)

    def factory(*, sparsity):
        parts = feather(sparsity=sparsity, theta=1.0)
        return Broken(parts.operator, parts.gradient, parts.allocation, parts.schedule)

    return factory


class OneTooMany(MagnitudePruning):
    """Prunes one weight more than the target."""

    def pruned(self, weights, pruning, i):
        mask = super().pruned(weights, pruning, i).clone()
        if i == 0:
            mask.view(-1)[int((~mask).view(-1).nonzero()[0])] = True
        return mask


class Forgetful(MagnitudePruning):
    """Decides by a number that no checkpoint holds."""

    calls = 0

    def after_step(self, weights, *args):
        super().after_step(weights, *args)
        self.calls += 1
        weights.views[0].mul_(1 - 0.01 * self.calls)


class HostRead(MagnitudePruning):
    """Reads the step on the host."""

    def update(self, weights, step):
        assert int(step) >= 0
        return super().update(weights, step)


class Unseeded(MagnitudePruning):
    """Draws random numbers without a seed in its state."""

    def after_step(self, weights, *args):
        super().after_step(weights, *args)
        weights.views[0].add_(0.01 * torch.randn_like(weights.views[0]))


@pytest.mark.filterwarnings("ignore::torch_feather.FeatherWarning")
@pytest.mark.parametrize(
    ("cls", "name"),
    [
        (OneTooMany, "exact count"),
        (OneTooMany, "ties"),
        (Forgetful, "resume"),
        (HostRead, "capture"),
        (Unseeded, "resume"),
    ],
)
def test_a_broken_method_fails_its_property(cls, name):
    with pytest.raises(AssertionError, match=f"(: |; ){name}: "):
        check_method(gradual(cls), skip=PROPERTIES.keys() - {name})


def test_masks_alone_make_a_method():
    class Half(BoundMethod):
        facts = Facts(exact=False)
        target_step = 0
        fingerprint = "half"

        def update(self, weights, step):
            return [~(w.abs() <= w.abs().nanmedian()) for w in weights.views]  # keeps NaN

    class Description:
        def bind(self, context):
            return Half(context)

    check_method(Description, skip={"two processes", "other options"})


def test_a_reference_must_agree():
    def reference(model, sparsity, steps):
        return {name: p.detach() for name, p in model.named_parameters() if p.dim() > 1}

    with pytest.raises(AssertionError, match="trajectory: "):
        check_method("feather", reference=reference, skip=PROPERTIES)


def test_an_unknown_property_is_an_error():
    with pytest.raises(ValueError, match="speed"):
        check_method("feather", skip={"speed"})


def test_facts_can_be_replaced_by_subclasses():
    assert replace(Facts(), exact=False) == Facts(exact=False)
