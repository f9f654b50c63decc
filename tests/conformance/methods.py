"""Every method with its options, and the form in which its paper writes it.

The references share nothing with the package: the selection is a stable sort, the operator is a
`torch.autograd.Function` inside the forward pass, and the leaves that the optimizer updates are
the latent weights themselves. They are slow and short on purpose.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.func import functional_call


def smallest_number(dtype: torch.dtype) -> float:
    """The smallest positive number of a type, a subnormal one."""
    return torch.finfo(dtype).tiny * torch.finfo(dtype).eps


def smallest(latents: Iterable[Tensor], k: int) -> tuple[list[Tensor], Tensor]:
    """Masks of all but the k smallest |w| of several tensors, and the threshold.

    The order is (|w|, tensor, position); NaN ranks highest. The threshold is the largest pruned
    magnitude, or one float step below it where a kept weight has the same magnitude.
    """
    latents = [w.detach() for w in latents]
    wide = torch.float64 if any(w.dtype == torch.float64 for w in latents) else torch.float32
    magnitude = torch.cat([w.abs().flatten().to(wide) for w in latents])
    order = magnitude.sort(stable=True).indices
    kept = torch.ones(magnitude.numel(), dtype=torch.bool)
    kept[order[:k]] = False
    tau = torch.zeros((), dtype=wide)
    if k > 0:
        tau = magnitude[order[k - 1]]
        if k < magnitude.numel() and magnitude[order[k]] == tau:
            tau = torch.nextafter(tau, torch.zeros_like(tau))
    pieces = kept.split([w.numel() for w in latents])
    return [m.view_as(w) for m, w in zip(pieces, latents, strict=True)], tau


class Thresholded(torch.autograd.Function):
    """u = T_p(w; tau) on kept weights, 0 elsewhere; dL/dw = dL/du, times theta where pruned."""

    @staticmethod
    def forward(ctx, w: Tensor, kept: Tensor, tau: Tensor, p: float, theta: float) -> Tensor:
        ctx.save_for_backward(kept)
        ctx.theta = theta
        wide = w.to(tau.dtype)
        if p == math.inf or tau == 0:
            image = wide
        elif p == 1:
            image = wide.sign() * (wide.abs() - tau)
        else:
            image = wide * (1 - (tau / wide.abs()) ** p).clamp(min=0) ** (1 / p)
        image = image.to(w.dtype)
        # A kept weight stays visible: its image is at least the smallest number of its type.
        least = torch.tensor(smallest_number(w.dtype), dtype=w.dtype)
        image = torch.where((image == 0) & (w != 0), torch.copysign(least, w), image)
        return torch.where(kept, image, torch.zeros_like(w))

    @staticmethod
    def backward(ctx, gradient: Tensor):
        (kept,) = ctx.saved_tensors
        return torch.where(kept, gradient, ctx.theta * gradient), None, None, None, None


class Reference:
    """The autograd form of a method on one model; subclasses say what the network sees."""

    def __init__(
        self, model: nn.Module, names: Iterable[str], *, sparsity: float, total_steps: int
    ):
        self.model = model
        parameters = dict(model.named_parameters())
        self.latent = {name: parameters[name] for name in names}
        self.size = sum(w.numel() for w in self.latent.values())
        self.target, self.total_steps, self.step_count = sparsity, total_steps, 0

    @property
    def sparsity(self) -> float:
        """Sparsity in force after `step_count` steps."""
        raise NotImplementedError

    def effective(self) -> dict[str, Tensor]:
        """What the network sees of each latent weight, differentiable with the method's rule."""
        raise NotImplementedError

    def __call__(self, *inputs: Tensor) -> Tensor:
        """The forward pass of the paper: every prunable weight goes through the operator."""
        return functional_call(self.model, self.effective(), inputs)


# Share of the target after t steps, between the bounds (begin, end).
SHARES: dict[str, Callable[[int, int, int], float]] = {
    "cubic": lambda t, a, b: 1 - (1 - min(max((t - a) / (b - a), 0), 1)) ** 3,
    "linear": lambda t, a, b: min(max((t - a) / (b - a), 0), 1),
    "constant": lambda t, a, b: 1.0,
}


class GlobalThreshold(Reference):
    """One magnitude threshold over all prunable weights, power operator, straight-through."""

    def __init__(
        self, *args, p: float = 3, theta: float | str = "auto", schedule="cubic", begin=0, end=None,
        **kwargs,
    ):  # fmt: skip
        super().__init__(*args, **kwargs)
        self.p = p
        self.theta = (0.5 if self.target > 0.95 else 1.0) if theta == "auto" else theta
        self.schedule, self.begin = schedule, begin
        self.end = self.total_steps // 2 if end is None else end

    @property
    def sparsity(self) -> float:
        t = min(self.step_count, self.total_steps)
        return self.target * SHARES[self.schedule](t, self.begin, self.end)

    def effective(self) -> dict[str, Tensor]:
        kept, tau = smallest(self.latent.values(), round(self.sparsity * self.size))
        return {
            name: Thresholded.apply(w, mask, tau, self.p, self.theta)
            for (name, w), mask in zip(self.latent.items(), kept, strict=True)
        }


@dataclass(frozen=True)
class MethodCase:
    """A method under some options, and its reference under the same meaning."""

    name: str
    method: str
    reference: type[Reference]
    sparsity: float = 0.8
    options: Mapping[str, object] = field(default_factory=dict)
    reference_options: Mapping[str, object] | None = None  # None: those of `options`
    # Whether exactly round(s N) weights are pruned at every step (learned thresholds are not).
    exact: bool = True

    def refer(self, model: nn.Module, names: Iterable[str], total_steps: int) -> Reference:
        """The reference for `model`, whose parameters become the latent weights."""
        options = self.options if self.reference_options is None else self.reference_options
        return self.reference(
            model, names, sparsity=self.sparsity, total_steps=total_steps, **options
        )


METHODS = {
    case.name: case
    for case in [
        MethodCase("feather", "feather", GlobalThreshold),
        MethodCase("feather-96%", "feather", GlobalThreshold, sparsity=0.96),
        MethodCase("feather-theta", "feather", GlobalThreshold, options={"theta": 0.3}),
        MethodCase("feather-frozen", "feather", GlobalThreshold, options={"theta": 0.0}),
        MethodCase("feather-p1.5", "feather", GlobalThreshold, options={"p": 1.5}),
        MethodCase("feather-p4", "feather", GlobalThreshold, options={"p": 4, "theta": 0.5}),
        MethodCase("feather-linear", "feather", GlobalThreshold,
                   options={"schedule": "linear", "begin": 2, "end": 7}),
        MethodCase("feather-cubic", "feather", GlobalThreshold, options={"begin": 1, "end": 4}),
        MethodCase("feather-constant", "feather", GlobalThreshold,
                   options={"schedule": "constant"}),
        MethodCase("hard-ste", "hard-ste", GlobalThreshold, reference_options={"p": math.inf}),
        MethodCase("soft-ste", "soft-ste", GlobalThreshold, reference_options={"p": 1}),
    ]
}  # fmt: skip
