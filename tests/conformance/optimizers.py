"""Optimizers that the engine must carry, each from the list of a model's parameters."""

import contextlib
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import nn
from torch.optim import Optimizer

Made = Optimizer | list[Optimizer]


@dataclass(frozen=True)
class OptimizerCase:
    """How to make an optimizer (or a sequence of them), and what is special about it."""

    name: str
    make: Callable[[list[nn.Parameter]], Made]
    needs_closure: bool = False
    # Relative deviation from the autograd form that rounding may cause within a few steps of
    # float64; float32 is allowed in proportion. Only arithmetic in bf16 needs another.
    tolerance: float = 1e-8

    def __call__(self, model: nn.Module) -> Made:
        """The optimizer over all trainable parameters of `model`."""
        with contextlib.redirect_stdout(io.StringIO()):  # some announce themselves
            return self.make([p for p in model.parameters() if p.requires_grad])


def as_list(made: Made) -> Sequence[Optimizer]:
    """One optimizer or several, as a sequence."""
    return [made] if isinstance(made, Optimizer) else made


def _decay_on_weights_only(parameters: list[nn.Parameter]) -> Optimizer:
    return torch.optim.SGD(
        [
            {"params": [p for p in parameters if p.dim() > 1], "weight_decay": 0.05},
            {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0, "lr": 0.05},
        ],
        lr=0.1,
        momentum=0.9,
    )


def _muon_and_adamw(parameters: list[nn.Parameter]) -> list[Optimizer]:
    return [
        torch.optim.Muon([p for p in parameters if p.dim() == 2], lr=0.02),
        torch.optim.AdamW([p for p in parameters if p.dim() != 2], lr=0.01),
    ]


class NestedSGD(torch.optim.SGD):
    """A subclass that calls its parent's step, which fires the step hooks twice."""

    def step(self, closure=None):
        return super().step(closure)


class ReassigningSGD(Optimizer):
    """Replaces the storage of its parameters instead of writing into it."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.data = p.data - group["lr"] * p.grad
        return loss


class Delegating(Optimizer):
    """Holds another optimizer and never calls `Optimizer.__init__`, as wrappers of DP-SGD do."""

    def __init__(self, optimizer):
        self.original = optimizer

    def __getstate__(self):
        return dict(vars(self))

    def __setstate__(self, state):
        vars(self).update(state)

    param_groups = property(lambda self: self.original.param_groups)
    state = property(lambda self: self.original.state)
    defaults = property(lambda self: self.original.defaults)

    def step(self, closure=None):
        return self.original.step(closure)

    def zero_grad(self, set_to_none=True):
        self.original.zero_grad(set_to_none)

    def state_dict(self):
        return self.original.state_dict()

    def load_state_dict(self, state):
        self.original.load_state_dict(state)


class TrustRatio(Delegating):
    """Scales gradients by the norms of the weights, as LARC does, and decays weights afterwards."""

    def step(self, closure=None):
        loss = None
        if closure is not None:
            loss = closure()
        with torch.no_grad():
            parameters = [p for group in self.param_groups for p in group["params"]]
            for p in parameters:
                if p.grad is not None:
                    p.grad.mul_(p.norm() / (p.grad.norm() + 1))
            self.original.step()
            for p in parameters:
                p.mul_(0.99)
        return loss


def _elsewhere(package: str, name: str, **options: object) -> list[OptimizerCase]:
    """The case of an optimizer of another package; none if that is missing, as on GPU hosts."""
    if find_spec(package) is None:
        return []

    def make(parameters: list[nn.Parameter]) -> Optimizer:
        return getattr(import_module(package), name)(parameters, **options)

    return [OptimizerCase(f"{name.lower()} ({package})", make)]


SGD, Adam, AdamW = torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW

OPTIMIZERS = {
    case.name: case
    for case in [
        OptimizerCase("sgd", lambda ps: SGD(ps, lr=0.1)),
        OptimizerCase("sgd-momentum", lambda ps: SGD(ps, 0.1, 0.9, weight_decay=0.05)),
        OptimizerCase("sgd-nesterov", lambda ps: SGD(ps, 0.1, 0.9, nesterov=True)),
        OptimizerCase("sgd-foreach", lambda ps: SGD(ps, 0.1, 0.9, foreach=True)),
        OptimizerCase("sgd-fused", lambda ps: SGD(ps, 0.1, 0.9, fused=True)),
        OptimizerCase("sgd-groups", _decay_on_weights_only),
        OptimizerCase("sgd-nested", lambda ps: NestedSGD(ps, 0.1, 0.9)),
        OptimizerCase("sgd-reassigning", ReassigningSGD),
        OptimizerCase("adam", lambda ps: Adam(ps, lr=0.01, amsgrad=True)),
        OptimizerCase("adam-foreach", lambda ps: Adam(ps, lr=0.01, foreach=True)),
        OptimizerCase("adam-fused", lambda ps: Adam(ps, lr=0.01, fused=True)),
        OptimizerCase("adamw", lambda ps: AdamW(ps, lr=0.01, weight_decay=0.1)),
        OptimizerCase("adamw-tensor-lr", lambda ps: AdamW(ps, torch.tensor(0.01), foreach=False)),
        OptimizerCase("adamw-foreach", lambda ps: AdamW(ps, lr=0.01, foreach=True)),
        OptimizerCase("adamw-fused", lambda ps: AdamW(ps, lr=0.01, fused=True)),
        OptimizerCase("rmsprop", lambda ps: torch.optim.RMSprop(ps, 0.01, momentum=0.9)),
        OptimizerCase("adagrad", lambda ps: torch.optim.Adagrad(ps, lr=0.05)),
        OptimizerCase("adafactor", lambda ps: torch.optim.Adafactor(ps, lr=0.01)),
        OptimizerCase(
            "lbfgs",
            lambda ps: torch.optim.LBFGS(ps, lr=0.1, max_iter=3, history_size=4),
            needs_closure=True,
        ),
        OptimizerCase("muon+adamw", _muon_and_adamw, tolerance=1e-3),
        OptimizerCase("sgd-delegating", lambda ps: Delegating(SGD(ps, 0.1, 0.9))),
        OptimizerCase("sgd-trust-ratio", lambda ps: TrustRatio(SGD(ps, 0.1, 0.9))),
        *_elsewhere("pytorch_optimizer", "Lion", lr=0.003),
        *_elsewhere("pytorch_optimizer", "Lamb", lr=0.01),
        *_elsewhere("pytorch_optimizer", "SOAP", lr=0.01),
        *_elsewhere("prodigyopt", "Prodigy", weight_decay=0.01, d0=1e-3),
    ]
}

# Those with scale handling of their own: GradScaler calls their step on skipped steps too.
FUSED = ["sgd-fused", "adam-fused", "adamw-fused"]
# A handful that between them take every path of the engine, for tests with another long axis.
SELECTED = ["sgd-momentum", "adamw-fused", "adamw-foreach", "sgd-nested", "muon+adamw"]
