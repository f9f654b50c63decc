"""The methods that a study explores: their trajectories, and every property of a method."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call

from torch_feather import methods
from torch_feather.errors import ConfigurationError
from torch_feather.methods.candidates import feather_ham, feather_phases, feather_sensitivity
from torch_feather.methods.candidates.phases import Phases
from torch_feather.schedules import Cubic
from torch_feather.testing import PROPERTIES, check_method
from torch_feather.testing.problem import make_batch

from .methods import Thresholded, smallest

FACTORIES = [feather_ham, feather_phases, feather_sensitivity]


class Plain:
    """Feather by autograd; subclasses change the ranking, the fraction or the latent weights."""

    def __init__(self, network, sparsity, total_steps):
        self.network, self.sparsity, self.total = network, sparsity, total_steps
        self.names = [n for n, p in network.named_parameters() if p.dim() > 1]
        self.latent = {n: network.get_parameter(n) for n in self.names}
        self.size = sum(w.numel() for w in self.latent.values())

    def fraction(self, step):
        return 1 - (1 - min(step / (self.total // 2), 1)) ** 3

    def scale(self, name):
        return 1.0

    def changed(self, w, gradient):
        return w

    def effective(self, step):
        scores = [w * self.scale(name) for name, w in self.latent.items()]
        kept, tau = smallest(scores, round(self.fraction(step) * self.sparsity * self.size))
        return {
            name: Thresholded.apply(w, mask, tau / self.scale(name), 3.0, 1.0)
            for (name, w), mask in zip(self.latent.items(), kept, strict=True)
        }

    def train(self):
        sgd = torch.optim.SGD(self.network.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
        for step in range(self.total):
            images, labels = make_batch(step)
            logits = functional_call(self.network, self.effective(step), (images,))
            sgd.zero_grad()
            F.cross_entropy(logits, labels).backward()
            sgd.step()
            with torch.no_grad():
                for w in self.latent.values():
                    w.copy_(self.changed(w, w.grad))
        return {name: u.detach() for name, u in self.effective(self.total).items()}


class PlainPhases(Plain):
    def fraction(self, step):
        if step < 3:  # of 12 steps
            return 1 - (1 - step / 3) ** 3
        if step >= 9:
            return 1.0
        within = (step - 3) % 3 / 3
        return 1 - 0.1 * (1 - within) ** 3


class PlainSensitivity(Plain):
    def __init__(self, *args):
        super().__init__(*args)
        self.squares = {}

    def scale(self, name):
        if not self.squares:
            return 1.0
        logs = {n: math.log(s) / 2 for n, s in self.squares.items()}
        return math.exp(0.5 * (logs[name] - sum(logs.values()) / len(logs)))

    def changed(self, w, gradient):
        (name,) = (n for n, latent in self.latent.items() if latent is w)
        new = float(gradient.double().square().mean())
        old = self.squares.get(name, new)
        self.new = {**getattr(self, "new", {}), name: 0.99 * old + 0.01 * new}
        if len(self.new) == len(self.latent):  # all layers at once
            self.squares, self.new = self.new, {}
        return w


@pytest.mark.parametrize(
    ("factory", "plain"),
    [(feather_phases, PlainPhases), (feather_sensitivity, PlainSensitivity)],
)
def test_a_candidate_equals_its_autograd_form(factory, plain):
    def reference(network, sparsity, total_steps):
        return plain(network, sparsity, total_steps).train()

    check_method(factory, reference=reference, skip=PROPERTIES)


@pytest.mark.slow
@pytest.mark.parametrize("factory", FACTORIES)
def test_every_candidate_has_every_property(factory):
    check_method(factory)


@pytest.mark.parametrize("options", [{}, {"alpha": 2, "beta": 0.1, "theta": 0.75, "p": 2.0}])
def test_the_candidate_ham_is_feather_ham(options):
    """`test_trajectory.py` compares `feather-ham` with its autograd form."""
    assert feather_ham(sparsity=0.99, **options) == methods.feather_ham(sparsity=0.99, **options)


@pytest.mark.parametrize("end", [0.3, 0.75])
def test_the_rise_of_the_candidate_ham_ends_after_a_fraction_of_training(end):
    found = feather_ham(sparsity=0.99, end=end).schedule.table(100)
    assert torch.equal(found, Cubic(0, round(100 * end)).table(100))


@pytest.mark.parametrize("steps", [1, 2, 7, 100, 3910])
def test_phases_begin_at_their_low_and_end_at_the_target(steps):
    table = Phases(end=0.25, count=3, low=0.4, last=0.8).table(steps)
    assert table.shape == (steps + 1,)
    assert table[-1] == 1
    if steps >= 100:
        assert (table[round(0.8 * steps) :] == 1).all()
        rise = round(0.25 * steps)
        assert torch.equal(table[:rise], Cubic(0, rise).table(steps)[:rise])
        assert int((table[rise:] == 0.4).sum()) == 3
        assert table[rise:].min() == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("factory", "options"),
    [
        (feather_ham, {"alpha": -1.0}),
        (feather_ham, {"beta": math.nan}),
        (feather_phases, {"end": 0.8}),
        (feather_phases, {"low": 1.5}),
        (feather_sensitivity, {"gamma": 3.0}),
        (feather_sensitivity, {"decay": 1.0}),
    ],
)
def test_invalid_options_are_errors(factory, options):
    with pytest.raises(ConfigurationError):
        factory(sparsity=0.9, **options)
