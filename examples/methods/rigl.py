"""RigL (Evci et al., ICML 2020): drop by magnitude, grow by gradient, at constant sparsity."""

from dataclasses import dataclass

import torch

from torch_feather.methods import BoundMethod
from torch_feather.selection import select
from torch_feather.weights.latent import write_if


@dataclass(frozen=True)
class RigL:
    every: int = 100  # steps between two changes of the mask
    fraction: float = 0.3  # of the kept weights of a layer that the first change replaces
    until: float = 0.75  # of training: later the mask is fixed

    def bind(self, context):
        return BoundRigL(context, self)


class BoundRigL(BoundMethod):
    target_step = 0

    def __init__(self, context, method):
        super().__init__(context)
        self.method = method
        self.state = {"mask": context.weights.per_weight(1.0)}
        mask = self.state["mask"].flat
        scores = torch.rand(mask.shape, generator=torch.Generator().manual_seed(0)).to(mask)
        k = torch.tensor(round(self.sparsity * mask.numel()), device=mask.device)
        mask.copy_(~select(scores.clone, k).pruned(scores))

    @property
    def fingerprint(self):
        return repr(self.method)

    def update(self, weights, step):
        return [mask > 0 for mask in self.state["mask"].rows]

    def after_step(self, weights, pruning, gradients, step, lr, taken):
        end = self.method.until * self.total_steps
        due = (step % self.method.every == 0) & (step < end) & taken
        part = self.method.fraction * (1 + torch.cos(torch.pi * step / end)) / 2
        for mask, w, kept, g in zip(
            self.state["mask"].rows, weights.views, pruning, gradients, strict=True
        ):
            if g is None:  # a layer that got no gradient
                continue
            n = torch.minimum((part * kept.sum()).long(), (~kept).sum())
            drop = smallest(torch.where(kept, w.abs(), torch.inf), n)
            grow = ~smallest(torch.where(kept, 0.0, g.abs() + 1e-30), kept.numel() - n)
            write_if(due, [mask, w], [(kept & ~drop | grow).to(mask), w.masked_fill(grow, 0.0)])


def smallest(scores, k):
    """Return the mask of the k smallest scores."""
    flat = scores.float().flatten()
    return select(flat.clone, k).pruned(flat).view(scores.shape)


def rigl(*, sparsity, every=100, fraction=0.3, until=0.75):
    return RigL(every, fraction, until)
