"""`method="auto"`: the rules by which it chooses a method. The first rule that applies is used.

A rule holds for what was measured, and names the file with the numbers. Where no significant
difference between methods is recorded, the choice is `feather`, the simplest and among the
cheapest. docs/choose_method.md shows the evidence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from torch import nn

from ..prunable import Prunable

AUTO = "auto"

# Kinds of networks: convolutions hold most of the prunable weights, some of these are depthwise, or
# neither.
CONVOLUTIONAL, DEPTHWISE, OTHER = "convolutional", "depthwise", "other"

# Sparsities, ends included, at which `feather-ham` is chosen. None is: its comparison with feather
# (docs/protocol.md) is not complete. When it is, write the range that it supports, and the numbers
# into the reason of the rule.
HAM_SPARSITY = (1.0, 1.0)


@dataclass(frozen=True)
class Rule:
    """A method for the situations in which it was compared.

    Attributes:
        method: its name.
        reason: why, in one sentence; each number is in `evidence`.
        evidence: the file with the numbers.
        options: options of the method.
        sparsity: lowest and highest sparsity; 1 is never reached.
        network: kind of network; None for all.
        optimizer: class of the optimizer; None for all.
        steps: least number of optimizer steps: those of the comparison.

    Example:
        >>> RULES[-1].applies(Situation(0.5, OTHER, "AdamW", 10))
        True
    """

    method: str
    reason: str
    evidence: str
    options: Mapping[str, Any] = field(default_factory=dict)
    sparsity: tuple[float, float] = (0.0, 1.0)
    network: str | None = None
    optimizer: str | None = None
    steps: int = 1

    def applies(self, situation: Situation) -> bool:
        """Return whether the rule holds for a situation."""
        low, high = self.sparsity
        return (
            low <= situation.sparsity <= high
            and self.network in (None, situation.network)
            and self.optimizer in (None, situation.optimizer)
            and self.steps <= situation.steps
        )


RULES: tuple[Rule, ...] = (
    Rule(
        sparsity=HAM_SPARSITY, network=CONVOLUTIONAL, optimizer="SGD", steps=3_910,
        method="feather-ham", options={"alpha": 40.0},
        reason="it is the method that the protocol compares with feather at high sparsity",
        evidence="results/beyond/table.md",
    ),
    Rule(
        sparsity=(0.98, 0.99), network=CONVOLUTIONAL, optimizer="SGD", steps=3_910,
        method="feather",
        reason="it is significantly above ten other published methods at 98% and 99% (ResNet-8 on "
        "cifar100, n = 3, uncorrected)",
        evidence="results/compare-small/table.md",
    ),
    Rule(
        sparsity=(0.95, 0.98), network=CONVOLUTIONAL, optimizer="SGD", steps=3_910,
        method="feather",
        reason="its mean is the highest of 14 methods at 95%, without a significant difference "
        "from hard-ste, st3-sigma and asl+ (ResNet-8 on cifar100, n = 3)",
        evidence="results/compare-small/table.md",
    ),
    Rule(
        sparsity=(0.90, 0.995), network=CONVOLUTIONAL, optimizer="SGD", steps=3_910,
        method="feather",
        reason="it is significantly above hard-ste and soft-ste at 90% and 99.5% (ResNet-8 on "
        "cifar100, n = 3)",
        evidence="results/cifar100-small/table.md",
    ),
    Rule(
        sparsity=(0.89, 0.941), network=DEPTHWISE, optimizer="SGD", steps=2_346,
        method="feather",
        reason="no significant difference from st3, gmp and str is recorded at 89% and 94.1% "
        "(MobileNetV1 on cifar100, n = 3), and its step is the cheapest of them by "
        "results/method_cost.txt",
        evidence="results/mobilenet-small/table.md",
    ),
    Rule(
        method="feather",
        reason="it is the default, since no comparison of methods is recorded for this sparsity, "
        "kind of network, optimizer and number of steps",
        evidence="results/claims.md",
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Situation:
    """What the rules depend on.

    Attributes:
        sparsity: final fraction of zeros among the prunable weights.
        network: kind of network.
        optimizer: name of the optimizer's class; of several, 'SGD and AdamW'.
        steps: optimizer steps of the whole training.

    Example:
        >>> Situation(0.9, CONVOLUTIONAL, "SGD", 100).network
        'convolutional'
    """

    sparsity: float
    network: str
    optimizer: str
    steps: int


@dataclass(frozen=True)
class Choice:
    """A method that was chosen, with its options, and why.

    Example:
        >>> print(Choice("feather-ham", {"alpha": 40.0}, "the reason", "its evidence"))
        feather-ham (alpha=40.0): the reason (its evidence)
    """

    method: str
    options: Mapping[str, Any]
    reason: str
    evidence: str

    @property
    def name(self) -> str:
        """The method with its options."""
        options = ", ".join(f"{name}={value}" for name, value in self.options.items())
        return f"{self.method} ({options})" if options else self.method

    def __str__(self) -> str:
        return f"{self.name}: {self.reason} ({self.evidence})"


def choose(situation: Situation) -> Choice:
    """Return the choice of the first rule that applies.

    Args:
        situation: what the rules depend on.

    Example:
        >>> choose(Situation(0.98, CONVOLUTIONAL, "SGD", 10_000)).evidence
        'results/compare-small/table.md'
        >>> choose(Situation(0.98, OTHER, "AdamW", 10_000)).method
        'feather'
    """
    rule = next(rule for rule in RULES if rule.applies(situation))
    return Choice(rule.method, dict(rule.options), rule.reason, rule.evidence)


def network_kind(prunable: Sequence[Prunable]) -> str:
    """Return the kind of network that prunable weights belong to.

    Args:
        prunable: the weights.

    Example:
        >>> from torch_feather.prunable import find_prunable
        >>> network_kind(find_prunable(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Linear(8, 2))))
        'convolutional'
        >>> network_kind(find_prunable(nn.Conv2d(8, 8, 3, groups=8)))
        'depthwise'
    """
    convolutions = [one for one in prunable if isinstance(one.module, nn.modules.conv._ConvNd)]
    modules = [cast(nn.modules.conv._ConvNd, one.module) for one in convolutions]
    if any(1 < module.groups == module.in_channels for module in modules):
        return DEPTHWISE
    inside, whole = (
        sum(one.parameter.numel() for one in some) for some in (convolutions, prunable)
    )
    return CONVOLUTIONAL if 2 * inside > whole else OTHER
