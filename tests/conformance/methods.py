"""Every method with its options, and the form in which its paper writes it.

The references share nothing with the package: the selection is a stable sort, the operator is a
`torch.autograd.Function` inside the forward pass, and the leaves that the optimizer updates are
the latent weights themselves. They are slow and short on purpose.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import Optimizer

from torch_feather.allocation import FlopsBiased
from torch_feather.methods import Method

from .models import ModelCase


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
        # A kept weight is never 0: it is at least the smallest number of its type.
        least = torch.tensor(smallest_number(w.dtype), dtype=w.dtype)
        image = torch.where((image == 0) & (w != 0), torch.copysign(least, w), image)
        return torch.where(kept, image, torch.zeros_like(w))

    @staticmethod
    def backward(ctx, gradient: Tensor):
        (kept,) = ctx.saved_tensors
        return torch.where(kept, gradient, ctx.theta * gradient), None, None, None, None


class Reference:
    """The autograd form of a method on one model; subclasses define the effective weights.

    A method with parameters of its own lists them in `learned`; `penalty` is its term in the loss,
    and `inner_optimizer` steps them.
    """

    def __init__(
        self, model: nn.Module, names: Iterable[str], *, sparsity: float, total_steps: int
    ):
        self.model = model
        parameters = dict(model.named_parameters())
        self.latent = {name: parameters[name] for name in names}
        self.size = sum(w.numel() for w in self.latent.values())
        self.target, self.total_steps, self.step_count = sparsity, total_steps, 0
        self.learned: list[nn.Parameter] = []
        self.rates: dict[int, float] = {}  # learning rates of the latent weights, by id

    @property
    def sparsity(self) -> float:
        """Sparsity in force after `step_count` steps."""
        raise NotImplementedError

    def effective(self) -> dict[str, Tensor]:
        """The effective weights, differentiable with the method's rule."""
        raise NotImplementedError

    def parameters(self) -> list[nn.Parameter]:
        """The method's own parameters."""
        return self.learned

    def penalty(self) -> Tensor | None:
        """The method's term in the loss, added once per step."""
        return None

    def inner_optimizer(self, lr: float) -> Optimizer:
        """The optimizer of the method's own parameters, given the learning rate of the weights."""
        raise NotImplementedError

    def advance(self) -> None:
        """The weights, and the method's own parameters, have been stepped."""
        self.step_count += 1

    def __call__(self, *inputs: Tensor) -> Tensor:
        """The forward pass of the paper: every prunable weight goes through the operator."""
        return functional_call(self.model, self.effective(), inputs)


# Share of the target after t steps, between the bounds (begin, end).
FRACTIONS: dict[str, Callable[[int, int, int], float]] = {
    "cubic": lambda t, a, b: 1 - (1 - min(max((t - a) / (b - a), 0), 1)) ** 3,
    "linear": lambda t, a, b: min(max((t - a) / (b - a), 0), 1),
    "constant": lambda t, a, b: 1.0,
    "one-shot": lambda t, a, b: float(t >= a),
}


def fraction_after(step: int, total: int, schedule: str, begin: int, end: int | None) -> float:
    """Fraction of the target after `step` of `total` steps; `end` defaults to half of them."""
    return FRACTIONS[schedule](min(step, total), begin, total // 2 if end is None else end)


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
        return self.target * FRACTIONS[self.schedule](t, self.begin, self.end)

    def scale(self, name: str) -> float:
        """Factor on the magnitudes of a tensor in the ranking."""
        return 1.0

    def effective(self) -> dict[str, Tensor]:
        scores = [w * self.scale(name) for name, w in self.latent.items()]
        kept, tau = smallest(scores, round(self.sparsity * self.size))
        return {
            name: Thresholded.apply(w, mask, tau / self.scale(name), self.p, self.theta)
            for (name, w), mask in zip(self.latent.items(), kept, strict=True)
        }


class Multiplied(GlobalThreshold):
    """After each step, each weight is multiplied by an exponential of its gradient."""

    def __init__(self, *args, alpha: float, beta: float, **kwargs):
        super().__init__(*args, **kwargs)
        self.alpha, self.beta = alpha, beta

    def advance(self) -> None:
        super().advance()
        for w in self.latent.values():
            if w.grad is not None:
                lr = float(self.rates[id(w)])
                exponent = -lr * (self.alpha * w.grad * w.detach().sign() + self.beta)
                w.data *= torch.exp(exponent.clamp(-5, 5))


class BiasedThreshold(GlobalThreshold):
    """Magnitudes are divided by a power of the cost of their weights."""

    def __init__(self, *args, costs: Mapping[str, float], gamma: float, **kwargs):
        super().__init__(*args, **kwargs)
        self.costs, self.gamma = costs, gamma

    def scale(self, name: str) -> float:
        logs = [math.log(self.costs[n]) for n in self.latent]
        return math.exp(-self.gamma * (math.log(self.costs[name]) - sum(logs) / len(logs)))


class LayerThreshold(GlobalThreshold):
    """A threshold for each layer; `amounts` has the unrounded number of weights that each loses."""

    def amounts(self) -> list[float]:
        raise NotImplementedError

    def counts(self) -> list[int]:
        """Whole numbers whose running sums are those of the amounts, rounded."""
        amounts = self.amounts()
        running = [sum(amounts[: i + 1]) for i in range(len(amounts))]
        reached = [0, *map(round, running[:-1]), round(self.sparsity * self.size)]
        return [b - a for a, b in pairwise(reached)]

    def effective(self) -> dict[str, Tensor]:
        found = {}
        for (name, w), count in zip(self.latent.items(), self.counts(), strict=True):
            (kept,), tau = smallest([w], count)
            found[name] = Thresholded.apply(w, kept, tau, self.p, self.theta)
        return found


class UniformThreshold(LayerThreshold):
    """All layers equally sparse; the first convolution may stay dense."""

    def __init__(self, *args, dense_first: bool = True, every: int = 1, **kwargs):
        super().__init__(*args, **kwargs)
        self.every = every
        self.sizes = [w.numel() for w in self.latent.values()]
        first = next((i for i, w in enumerate(self.latent.values()) if w.dim() > 2), None)
        if dense_first and first is not None:
            self.sizes[first] = 0

    @property
    def sparsity(self) -> float:
        t = min(self.step_count, self.total_steps)
        fraction = FRACTIONS[self.schedule](t, self.begin, self.end)
        if fraction < 1:  # reaches the target on time
            t -= (t - self.begin) % self.every if t > self.begin else 0
            fraction = FRACTIONS[self.schedule](t, self.begin, self.end)
        return self.target * fraction

    def amounts(self) -> list[float]:
        return [n * (self.sparsity * self.size / sum(self.sizes)) for n in self.sizes]


class ERKThreshold(LayerThreshold):
    """Densities in proportion to (sum of dimensions) / (product), none above 1."""

    def amounts(self) -> list[float]:
        shapes = [w.shape for w in self.latent.values()]
        dense: set[int] = set()
        while True:  # as published: layers whose density exceeds 1 become dense, one by one
            kept = (1 - self.sparsity) * self.size - sum(shapes[i].numel() for i in dense)
            rest = [i for i in range(len(shapes)) if i not in dense]
            factor = kept / sum(sum(shapes[i]) for i in rest) if rest else 0.0
            fractions = {i: factor * sum(shapes[i]) / shapes[i].numel() for i in rest}
            over = [i for i in rest if fractions[i] > 1 + 1e-12]
            if not over:
                break
            dense |= {max(over, key=fractions.get)}
        return [(1 - fractions.get(i, 1.0)) * s.numel() for i, s in enumerate(shapes)]


class RescaledThreshold(GlobalThreshold):
    """ST-3: soft threshold, kept weights scaled up per output channel, straight-through."""

    def __init__(self, *args, sigma: bool = False, **kwargs):
        super().__init__(*args, p=1, theta=1.0, **kwargs)
        self.sigma = sigma

    def scale(self, name: str) -> float:
        return math.sqrt(sum(self.latent[name].shape)) if self.sigma else 1.0

    def effective(self) -> dict[str, Tensor]:
        found = {}
        for name, u in super().effective().items():
            w = self.latent[name].detach()
            others = list(range(1, w.dim()))
            kept = torch.where(u != 0, w.abs(), 0.0).mean(others, keepdim=True)
            r = (kept + 1e-6) / (w.abs().mean(others, keepdim=True) + 1e-6)
            found[name] = u + (u * (1.01 / (r + 0.01)) - u).detach()
        return found


class SoftMask(Reference):
    """Spartan: weights times a soft top-k mask, differentiated by autograd, under a hard cutoff.

    `hard` decides which weights are kept, and by which scores. Layers have budgets of their own if
    it has a threshold for each layer.
    """

    def __init__(
        self, *args, hard: type[GlobalThreshold] = GlobalThreshold, beta=20.0, end=None,
        freeze=None, hard_options=None, **kwargs,
    ):  # fmt: skip
        super().__init__(*args, **kwargs)
        self.beta, total = beta, self.total_steps
        self.end = total // 5 if end is None else end
        self.freeze = total - total // 5 if freeze is None else freeze
        self.hard = hard(
            *args, p=math.inf, schedule="linear", end=self.end, **(hard_options or {}), **kwargs
        )
        self.frozen: dict[str, Tensor] | None = None

    @property
    def sparsity(self) -> float:
        return self.hard.sparsity

    def advance(self) -> None:
        super().advance()
        self.hard.step_count = self.step_count
        if self.step_count == self.freeze:
            kept = self.hard.effective()
            self.frozen = {
                name: torch.where(kept[name] != 0, m, 0.0).detach()
                for name, m in self.masks().items()
            }

    def masks(self) -> dict[str, Tensor]:
        """The soft masks before the hard cutoff, differentiable."""
        kept = {name: u.detach() != 0 for name, u in self.hard.effective().items()}
        layered = isinstance(self.hard, LayerThreshold)
        groups = [[name] for name in kept] if layered else [list(kept)]
        return {n: m for group in groups for n, m in self.soft(group, kept).items()}

    def soft(self, names: list[str], kept: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """sigmoid(beta v / c + mu), with mu by bisection and one step of Newton for autograd."""
        beta = 1 + (self.beta - 1) * min(self.step_count / self.freeze, 1)
        parts = [self.latent[n].flatten().double() for n in names]
        pairs = zip(names, parts, strict=True)
        scale = torch.cat([torch.full_like(w, self.hard.scale(n)) for n, w in pairs])
        x = beta * torch.cat(parts).abs() * scale
        keep = torch.cat([kept[n].flatten() for n in names])
        budget = (keep / scale).sum()
        if keep.all() or not keep.any():
            m = keep.double()
        else:
            low, high = -x.detach().max() - 60, -x.detach().min() + 60
            for _ in range(200):
                mu = (low + high) / 2
                below = (torch.sigmoid(x.detach() + mu) / scale).sum() < budget
                low, high = (mu, high) if below else (low, mu)
            m = torch.sigmoid(x.detach() + mu)
            slope = (m * (1 - m) / scale).sum()
            mu = mu - ((torch.sigmoid(x + mu) / scale).sum() - budget) / slope
            m = torch.sigmoid(x + mu)
        pieces = m.split([w.numel() for w in parts])
        return {n: piece.view_as(self.latent[n]) for n, piece in zip(names, pieces, strict=True)}

    def effective(self) -> dict[str, Tensor]:
        if self.frozen is not None:
            return {n: (w * self.frozen[n]).to(w.dtype) for n, w in self.latent.items()}
        kept, found = self.hard.effective(), {}
        for name, m in self.masks().items():
            u = (self.latent[name] * m).to(m.dtype)
            u = u + (torch.where(kept[name] != 0, u, 0.0) - u).detach()
            found[name] = u.to(self.latent[name].dtype)
        return found


class LearnedThreshold(Reference):
    """Thresholds from parameters; from step `target_step` on the count is made exact by |w| / tau.

    As plain autograd of u = tau T(w / tau). Straight-through, the gradient of T(x) is 1 or theta;
    tau x is w, so that u = f w + tau (T(x) - f x) with a constant x.
    """

    def __init__(
        self, *args, start: float, lr_multiplier: float, momentum: float,
        decay: float = 0.0, dense_below: int = 1000, **kwargs,
    ):  # fmt: skip
        super().__init__(*args, **kwargs)
        self.target_step = self.total_steps
        self.dense = {name for name, w in self.latent.items() if w.numel() < dense_below}
        [r] = {w.dtype for w in self.wide().values()}
        self.learned = [nn.Parameter(torch.full((len(self.latent),), start, dtype=r))]
        self.lr_multiplier, self.momentum, self.decay = lr_multiplier, momentum, decay

    def inner_optimizer(self, lr: float) -> Optimizer:
        return torch.optim.SGD(
            self.learned, self.lr_multiplier * lr, self.momentum, weight_decay=self.decay
        )

    def wide(self) -> dict[str, Tensor]:
        """The weights in the type that they are ranked and thresholded in."""
        return {
            name: w.to(torch.promote_types(torch.float32, w.dtype))
            for name, w in self.latent.items()
        }

    def tau(self, r: Tensor, w: Tensor) -> Tensor:
        """The threshold of one layer, differentiable in r."""
        raise NotImplementedError

    def effective_at(self, w: Tensor, tau: Tensor, at: Tensor, kept: Tensor) -> Tensor:
        """u at the threshold `at` times tau, with the gradients of the method's rule."""
        raise NotImplementedError

    def effective(self) -> dict[str, Tensor]:
        [r], latent = self.learned, self.wide()
        tau = {name: self.tau(r[i], w) for i, (name, w) in enumerate(latent.items())}
        pruned = [name for name in latent if name not in self.dense]
        kept = {name: latent[name].abs() * (1 / tau[name]) > 1 for name in pruned}
        at = torch.ones((), dtype=r.dtype)
        if self.step_count >= self.target_step:
            scores = [latent[name] * (1 / tau[name]) for name in pruned]
            masks, at = smallest(scores, round(self.target * self.size))
            kept = dict(zip(pruned, masks, strict=True))
        found = {
            name: self.effective_at(w, tau[name], at, kept[name]) if name in kept else w
            for name, w in latent.items()
        }
        return {name: u.to(self.latent[name].dtype) for name, u in found.items()}

    @property
    def sparsity(self) -> float:
        return sum(int((u == 0).sum()) for u in self.effective().values()) / self.size


class ASL(LearnedThreshold):
    """Hard threshold at r standard deviations; a penalty on the density of normal weights."""

    def __init__(
        self, *args, sparsity: float, lr_multiplier=0.01, momentum=0.9, budget_weight=10.0, **kwargs
    ):
        start = math.sqrt(2) * torch.tensor(0.6 * sparsity, dtype=torch.float64).erfinv().item()
        super().__init__(
            *args,
            sparsity=sparsity,
            start=start,
            lr_multiplier=lr_multiplier,
            momentum=momentum,
            **kwargs,
        )
        self.budget_weight = budget_weight
        self.target_step = math.ceil(0.9 * self.total_steps)

    def tau(self, r: Tensor, w: Tensor) -> Tensor:
        return r.clamp(0, 5) * w.detach().std() + 1e-6

    def effective_at(self, w: Tensor, tau: Tensor, at: Tensor, kept: Tensor) -> Tensor:
        x = (w / tau).detach()
        u = w + tau * (torch.where(kept, x, 0.0) - x)
        return torch.where(kept, u, u - u.detach())  # without a rest from rounding

    def penalty(self) -> Tensor:
        [r] = self.learned
        sizes = {n: w.numel() for n, w in self.latent.items() if n not in self.dense}
        density = 0.0
        for i, name in enumerate(self.latent):
            if name in sizes:
                fraction = 1 - torch.erf(r[i] / math.sqrt(2))
                density = density + fraction * sizes[name] / sum(sizes.values())
        return self.budget_weight * (density - (1 - self.target)) ** 2


class ASLPlus(ASL):
    """ASL with a budget that is measured and that rises; each layer has a model for its slope."""

    def __init__(
        self, *args, lr_multiplier=0.01, momentum=0.9, budget_weight=30.0, schedule="cubic",
        begin=0, end=None, **kwargs,
    ):  # fmt: skip
        super().__init__(
            *args,
            lr_multiplier=lr_multiplier,
            momentum=momentum,
            budget_weight=budget_weight,
            **kwargs,
        )
        self.schedule = schedule, begin, end
        while fraction_after(self.target_step, self.total_steps, *self.schedule) < 1:
            self.target_step += 1
        with torch.no_grad():
            self.learned[0].zero_()

    def penalty(self) -> Tensor:
        [r] = self.learned
        density = 0.0
        for i, (name, w) in enumerate(self.wide().items()):
            kept = torch.tensor(w.numel() / self.size, dtype=r.dtype)
            if name not in self.dense:
                w = w.detach()
                kept = (w.abs() > self.tau(r[i], w)).sum().to(r.dtype) / self.size
                if w.abs().mean() / w.std() < math.sqrt(math.pi / (2 * math.e)):
                    fraction = torch.exp(-math.sqrt(2) * r[i])
                else:
                    fraction = torch.erfc(r[i] / math.sqrt(2))
                kept = kept * fraction / fraction.detach()
            density = density + kept
        fraction = fraction_after(self.step_count, self.total_steps, *self.schedule)
        return self.budget_weight * torch.log(density / (1 - fraction * self.target)) ** 2

    @torch.no_grad()
    def advance(self) -> None:
        super().advance()
        self.learned[0].clamp_(0, 5)


class FeatherASLPlus(ASLPlus):
    """Feather's operator and gradient rule, straight through on w / tau."""

    def __init__(self, *args, p=3, theta: float, **kwargs):
        super().__init__(*args, **kwargs)
        self.p, self.theta = p, theta

    def effective_at(self, w: Tensor, tau: Tensor, at: Tensor, kept: Tensor) -> Tensor:
        x, f = (w / tau).detach(), kept + self.theta * ~kept
        u = f * w + tau * (Thresholded.apply(x, kept, at, self.p, self.theta) - f * x)
        return torch.where(kept, u, u - u.detach())


class STR(LearnedThreshold):
    """u = sign(w) relu(|w| - sigmoid(s)), differentiated by autograd."""

    def __init__(self, *args, s_init=-100.0, lr_multiplier=1.0, momentum=0.9, decay=0.0, **kwargs):
        super().__init__(
            *args,
            start=s_init,
            lr_multiplier=lr_multiplier,
            momentum=momentum,
            decay=decay,
            dense_below=0,
            **kwargs,
        )

    def tau(self, s: Tensor, w: Tensor) -> Tensor:
        return s.sigmoid()

    def effective_at(self, w: Tensor, tau: Tensor, at: Tensor, kept: Tensor) -> Tensor:
        return torch.where(kept, w.sign() * (w.abs() - at * tau).relu(), 0.0)


class ControlledSTR(STR):
    """After every step a factor on all sigmoid(s) puts the scheduled number of weights below."""

    def __init__(self, *args, schedule="cubic", begin=0, end=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.schedule = schedule, begin, end

    @torch.no_grad()
    def advance(self) -> None:
        super().advance()
        [s] = self.learned
        fraction = fraction_after(self.step_count, self.total_steps, *self.schedule)
        k = round(fraction * self.target * self.size)
        if k > 0:
            tau, latent = s.double().sigmoid(), self.wide().values()
            scores = [w.abs().double() / tau[i] for i, w in enumerate(latent)]
            ordered = torch.cat([score.flatten() for score in scores]).sort().values
            eps = torch.finfo(s.dtype).eps  # a sigmoid comes no nearer to 1
            s.copy_((ordered[k - 1] * tau * (1 + 32 * eps)).clamp(max=1 - eps).logit())


class ProbMask(Reference):
    """Soft masks drawn from learned probabilities; the most probable ones in the last phase."""

    def __init__(
        self, *args, lr=0.006, epochs=300, finetune=1 / 16, passes=1, seed=0, **kwargs
    ):  # fmt: skip
        super().__init__(*args, **kwargs)
        self.lr, self.epochs, self.seed, self.draw = lr, epochs, seed, 0
        self.target_step = self.total_steps - round(finetune * self.total_steps)
        self.learned = [
            nn.Parameter(torch.ones(w.shape, dtype=torch.promote_types(w.dtype, torch.float32)))
            for w in self.latent.values()
        ]

    @property
    def epoch(self) -> int:
        return min(self.step_count, self.target_step) * self.epochs // self.target_step

    @property
    def budget(self) -> float:
        """Weights that may be kept."""
        begin, end = math.floor(0.16 * self.epochs), math.floor(0.6 * self.epochs)
        final = self.size - round(self.target * self.size)
        fraction = min(max((self.epoch - begin) / (end - begin), 0), 1)
        return final + (self.size - final) * (1 - fraction) ** 3

    def noise(self, draws: int) -> list[Tensor]:
        """Uniform numbers: those of SplitMix64 from position draws * N on, in Python's integers."""
        bits = [splitmix64(self.seed, draws * self.size + i) >> 41 for i in range(self.size)]
        flat = (torch.tensor(bits, dtype=torch.float64) + 0.5) / 2**23
        pieces = flat.split([p.numel() for p in self.learned])
        return [u.view_as(p) for u, p in zip(pieces, self.learned, strict=True)]

    def masks(self) -> list[Tensor]:
        if self.step_count >= self.target_step:
            # By probability, then by lots: a stable sort leaves the order of the first one.
            lots, p = (torch.cat([x.detach().flatten().double() for x in one])
                       for one in (self.noise(-1), self.learned))  # fmt: skip
            order = lots.argsort(stable=True)
            order = order[p[order].argsort(stable=True)]
            kept = torch.ones(self.size, dtype=torch.bool)
            kept[order[: round(self.target * self.size)]] = False
            pieces = kept.split([p.numel() for p in self.learned])
            return [m.view_as(p) + 0 * p for m, p in zip(pieces, self.learned, strict=True)]
        masks, e = [], self.epoch
        sharpness = 1 / (0.97 * (1 - e / self.epochs) + 0.03)
        for probability, u in zip(
            self.learned, self.noise(self.step_count + self.draw), strict=True
        ):
            inside = probability.detach().clamp(2**-21, 1 - 2**-21)
            p = probability + (inside - probability).detach()  # the clamp is passed straight
            logit = p.log() - (1 - p).log() + (u.log() - (1 - u).log()).to(p.dtype)
            masks.append(torch.sigmoid(sharpness * logit))
        return masks

    def effective(self) -> dict[str, Tensor]:
        pairs = zip(self.latent.items(), self.masks(), strict=True)
        return {name: (w * mask).to(w.dtype) for (name, w), mask in pairs}

    @property
    def sparsity(self) -> float:
        return sum(int((u == 0).sum()) for u in self.effective().values()) / self.size

    def inner_optimizer(self, lr: float) -> Optimizer:
        return ProjectedAdam(self)


class ProjectedAdam(torch.optim.Adam):
    """Adam on probabilities, then the nearest point within the budget."""

    def __init__(self, reference: ProbMask):
        super().__init__(reference.learned, lr=reference.lr)
        self.reference = reference

    @torch.no_grad()
    def step(self, closure=None):
        reference = self.reference
        if reference.step_count >= reference.target_step:
            return
        cosine = math.cos(math.pi * reference.epoch / reference.epochs)
        self.param_groups[0]["lr"] = reference.lr * (1 + cosine) / 2
        super().step(closure)
        flat = torch.cat([p.flatten() for p in reference.learned])
        projected = project(flat, reference.budget).split([p.numel() for p in reference.learned])
        for p, value in zip(reference.learned, projected, strict=True):
            p.copy_(value.view_as(p))


def project(x: Tensor, budget: float) -> Tensor:
    """clamp(x - v, 0, 1) with the least v >= 0 that leaves a sum within the budget.

    The sum is linear between the values at which an entry begins or ends to change.
    """
    x, dtype = x.double(), x.dtype
    bends = torch.cat([x, x - 1, torch.zeros(1)]).clamp(min=0).unique()
    sums = torch.stack([(x - v).clamp(0, 1).sum() for v in bends])
    i = int((sums > budget).sum())
    v = bends[0]
    if i > 0:
        fraction = (sums[i - 1] - budget) / (sums[i - 1] - sums[i])
        v = bends[i - 1] + fraction * (bends[i] - bends[i - 1])
    return (x - v).clamp(0, 1).to(dtype)


def splitmix64(seed: int, position: int) -> int:
    """Number `position` of a seed's sequence, as its authors write it."""
    z = (seed + (position + 1) * 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


@dataclass(frozen=True)
class MethodCase:
    """A method under some options, and its reference under the same meaning."""

    name: str
    method: str | Method
    reference: type[Reference]
    sparsity: float = 0.8
    # A function is called with the model's case.
    options: Mapping[str, object] = field(default_factory=dict)
    reference_options: Mapping[str, object] | None = None  # None: those of `options`
    # Whether exactly round(s N) weights are pruned at every step (learned thresholds are not).
    exact: bool = True
    # As for `OptimizerCase`: a gradient may depend on u - w, which cancels for large w.
    tolerance: float = 1e-8

    def refer(self, model: nn.Module, case: ModelCase, total_steps: int) -> Reference:
        """The reference for `model`, whose parameters become the latent weights."""
        options = self.options if self.reference_options is None else self.reference_options
        return self.reference(
            model, case.prunable, sparsity=self.sparsity, total_steps=total_steps,
            **resolved(options, case),
        )  # fmt: skip


def resolved(options: Mapping[str, object], case: ModelCase) -> dict[str, object]:
    """Options for one model: functions among them are called."""
    return {name: v(case) if callable(v) else v for name, v in options.items()}


def some_costs(case: ModelCase) -> dict[str, float]:
    return {name: 1.5 ** (i + 1) for i, name in enumerate(case.prunable)}


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
        MethodCase("gmp", "gmp", UniformThreshold, sparsity=0.35,
                   reference_options={"p": math.inf, "theta": 0.0}),
        MethodCase("gmp-stem", "gmp", UniformThreshold,
                   options={"allocation": "uniform", "every": 3, "begin": 1, "end": 7},
                   reference_options={"dense_first": False, "every": 3, "begin": 1, "end": 7,
                                      "p": math.inf, "theta": 0.0}),
        MethodCase("feather-gmp", "feather-gmp", UniformThreshold, sparsity=0.35,
                   options={"theta": 0.3}),
        MethodCase("feather-uniform", "feather", UniformThreshold,
                   options={"allocation": "uniform"}, reference_options={"dense_first": False}),
        MethodCase("feather-erk", "feather", ERKThreshold, sparsity=0.7,
                   options={"allocation": "erk"}, reference_options={}),
        MethodCase("feather-flops", "feather-flops", BiasedThreshold,
                   options={"costs": some_costs, "gamma": 0.7}),
        MethodCase("feather-ham", "feather-ham", Multiplied,
                   options={"alpha": 3.0, "beta": 0.05, "theta": 0.3}),
        MethodCase("st3", "st3", RescaledThreshold),
        MethodCase("st3-sigma", "st3-sigma", RescaledThreshold, reference_options={"sigma": True}),
        MethodCase("probmask", "probmask", ProbMask, exact=False),
        MethodCase("probmask-fast", "probmask", ProbMask, exact=False, sparsity=0.55,
                   options={"lr": 0.1, "epochs": 12, "finetune": 0.3}),
        MethodCase("spartan", "spartan", SoftMask),
        MethodCase("spartan-frozen", "spartan", SoftMask, sparsity=0.6,
                   options={"beta": 50.0, "end": 3, "freeze": 5}),
        MethodCase("spartan-uniform", "spartan", SoftMask, options={"allocation": "uniform"},
                   reference_options={"hard": lambda _: UniformThreshold,
                                      "hard_options": {"dense_first": False}}),
        MethodCase("spartan-erk", "spartan", SoftMask, options={"allocation": "erk"},
                   reference_options={"hard": lambda _: ERKThreshold}),
        MethodCase("spartan-flops", "spartan", SoftMask,
                   options={"allocation": lambda c: FlopsBiased(1.0, costs=some_costs(c))},
                   reference_options={
                       "hard": lambda _: BiasedThreshold,
                       "hard_options": lambda c: {"gamma": 1.0, "costs": some_costs(c)}}),
        MethodCase("asl", "asl", ASL, exact=False, options={"dense_below": 0}),
        MethodCase("asl-fast", "asl", ASL, exact=False, sparsity=0.5,
                   options={"dense_below": 25, "lr_multiplier": 0.5, "momentum": 0.5,
                            "budget_weight": 2.0}),
        MethodCase("asl+", "asl+", ASLPlus, exact=False,
                   options={"dense_below": 0, "budget_weight": 2.0}),
        MethodCase("asl+-fast", "asl+", ASLPlus, exact=False, sparsity=0.5,
                   options={"dense_below": 25, "lr_multiplier": 0.1, "momentum": 0.5,
                            "budget_weight": 1.0, "schedule": "linear", "begin": 1, "end": 10}),
        MethodCase("feather-asl+", "feather-asl+", FeatherASLPlus, exact=False, tolerance=1e-6,
                   options={"dense_below": 0, "theta": 0.3, "lr_multiplier": 0.05,
                            "budget_weight": 2.0}),
        MethodCase("str", "str", ControlledSTR, exact=False,
                   options={"schedule": "linear", "begin": 1, "end": 10}),
        MethodCase("str-published", "str", STR, exact=False, sparsity=0.5,
                   options={"decay": 0.3, "s_init": -5.0, "momentum": 0.875}),
    ]
}  # fmt: skip
