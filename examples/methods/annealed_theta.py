"""Feather with a theta that falls from 1 to 0 over training."""

from torch_feather.gradient_rules import Linear
from torch_feather.methods import feather


def annealed_theta(*, sparsity):
    return feather(sparsity=sparsity, theta=Linear(1.0, 0.0))
