"""Powerprop (Schwarz et al., NeurIPS 2021): the network uses w |w|^(alpha - 1)."""

from dataclasses import dataclass

from torch_feather.allocation import Global
from torch_feather.methods import Method
from torch_feather.operators import Operator
from torch_feather.schedules import Cubic


@dataclass(frozen=True)
class Powerprop(Operator):
    alpha: float = 2.0

    def __call__(self, w, tau):
        return w * w.abs() ** (self.alpha - 1)


@dataclass(frozen=True)
class PowerpropGradient:
    alpha: float = 2.0

    def __call__(self, gradient, latent, effective, progress):
        return gradient * self.alpha * latent.abs() ** (self.alpha - 1) * (effective != 0)


def powerprop(*, sparsity, alpha=2.0):
    return Method(Powerprop(alpha), PowerpropGradient(alpha), Global(), Cubic())
