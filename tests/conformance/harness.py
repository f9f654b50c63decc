"""One training loop for the engine and for the references, so that only the method differs."""

import copy
import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

import torch_feather as feather

from .methods import Reference, resolved
from .models import MODELS, ModelCase
from .optimizers import OPTIMIZERS, as_list

STEPS = 8
TOTAL = 10


@dataclass(frozen=True)
class Recipe:
    """How a loop uses its optimizer."""

    name: str = "plain"
    clip: float | None = None
    accumulate: int = 1
    autocast: bool = False
    closure: str | None = None  # "positional" or "keyword"
    scaler: bool = False
    overflows: tuple[int, ...] = ()  # steps whose gradients are infinite: GradScaler skips them
    unscale: bool = False  # before the first of the optimizers steps, as clipping has it too


RECIPES = {
    recipe.name: recipe
    for recipe in [
        Recipe(),
        Recipe("clip", clip=0.05),
        Recipe("accumulate", accumulate=3),
        Recipe("autocast", autocast=True),
        Recipe("step(closure)", closure="positional"),
        Recipe("step(closure=...)", closure="keyword"),
        Recipe("closure + clip + accumulate", 0.05, accumulate=2, closure="keyword"),
        Recipe("scaler", scaler=True, overflows=(1, 3, 4)),
        Recipe("scaler from an overflow", scaler=True, overflows=(0, 1)),
        Recipe("scaler + clip", clip=0.05, scaler=True, overflows=(2,)),
        Recipe("scaler, unscaled", scaler=True, overflows=(1,), unscale=True),
    ]
}


class Loop:
    """An ordinary training loop around `forward`."""

    def __init__(
        self,
        forward: Callable[[Tensor], Tensor],
        model: nn.Module,
        optimizers: Optimizer | Sequence[Optimizer],
        case: ModelCase,
        recipe: Recipe = RECIPES["plain"],
        dtype: torch.dtype = torch.float32,
        method: "feather.Sparsifier | Reference | None" = None,
    ):
        self.forward, self.model, self.case, self.method = forward, model, case, method
        self.optimizers = as_list(optimizers)
        self.recipe, self.dtype = recipe, dtype
        self.scaler = torch.amp.GradScaler("cpu", init_scale=16.0, enabled=recipe.scaler)

    def gradients(self, step: int) -> Tensor:
        """Fresh gradients of batch number `step` on the parameters, clipped if asked for."""
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        total = torch.zeros(())
        for part in range(self.recipe.accumulate):
            x, y = self.case.batch(step * self.recipe.accumulate + part, self.dtype)
            with torch.autocast("cpu", torch.bfloat16, enabled=self.recipe.autocast):
                logits = self.forward(x)
                logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
                loss = F.cross_entropy(logits, y) / self.recipe.accumulate
            if step in self.recipe.overflows:
                loss = loss * torch.inf
            self.scaler.scale(loss).backward()
            total += loss.detach()
        penalty = self.method.penalty() if isinstance(self.method, Reference) else None
        if penalty is not None and self.recipe.clip is None:
            self.scaler.scale(penalty).backward()
        if self.recipe.scaler and (self.recipe.unscale or self.recipe.clip is not None):
            for optimizer in self.optimizers:
                self.scaler.unscale_(optimizer)
        if self.recipe.clip is not None:
            if penalty is not None:
                penalty.backward()
            if isinstance(self.method, feather.Sparsifier):
                self.method.complete_gradients()
            extra = [] if self.method is None else self.method.parameters()
            nn.utils.clip_grad_norm_([*self.model.parameters(), *extra], self.recipe.clip)
        return total

    def step(self, step: int) -> bool:
        """One optimizer step on batch number `step`; False if the scaler skipped it."""
        if self.recipe.closure is None:
            self.gradients(step)
            taken = step not in self.recipe.overflows
            for optimizer in self.optimizers:
                # A scaler judges each optimizer by its own gradients, and those of a method's own
                # parameters may be finite: their step depends on the weights all the same.
                if taken or not self._is_inner(optimizer):
                    self.scaler.step(optimizer)
            self.scaler.update()
            return taken
        first, *others = self.optimizers

        def closure() -> Tensor:
            return self.gradients(step)

        if self.recipe.closure == "positional":
            first.step(closure)
        else:
            first.step(closure=closure)
        for optimizer in others:
            optimizer.step()
        return True

    def _is_inner(self, optimizer: Optimizer) -> bool:
        """Whether it steps a reference's own parameters."""
        learned = self.method.learned if isinstance(self.method, Reference) else []
        return any(p is q for p in optimizer.param_groups[0]["params"] for q in learned)


@dataclass
class Run:
    """A model under the engine, with what is needed to train it."""

    model: nn.Module
    optimizer: Optimizer | list[Optimizer]
    sparsifier: "feather.Sparsifier"
    loop: Loop
    case: ModelCase

    @property
    def optimizers(self) -> Sequence[Optimizer]:
        return as_list(self.optimizer)

    def train(self, start: int, stop: int) -> "Run":
        """Steps number `start` to `stop` - 1."""
        for step in range(start, stop):
            self.loop.step(step)
        return self

    def save(self) -> bytes:
        """A checkpoint of model and optimizer, and of nothing else."""
        file = io.BytesIO()
        torch.save(
            {
                "model": self.model.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            },
            file,
        )
        return file.getvalue()

    def load(self, checkpoint: bytes, order: str = "model first") -> "Run":
        """Restores a checkpoint."""
        state = read(checkpoint)
        if order == "model first":
            self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        if order != "model first":
            self.model.load_state_dict(state["model"])
        return self

    def zeros(self) -> int:
        return self.case.zeros(self.model)


def read(checkpoint: bytes) -> dict:
    """A checkpoint, loaded with weights_only."""
    return torch.load(io.BytesIO(checkpoint), weights_only=True)


def start(
    model: str = "mlp",
    optimizer: str = "sgd-momentum",
    method: str = "feather",
    *,
    recipe: Recipe = RECIPES["plain"],
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    sparsity: float = 0.8,
    total_steps: int = TOTAL,
    **options,
) -> Run:
    """A fresh model under the engine."""
    case = MODELS[model]
    net = case.make(seed, dtype)
    made = OPTIMIZERS[optimizer](net)
    if OPTIMIZERS[optimizer].needs_closure and recipe.closure is None:
        recipe = Recipe(recipe.name, recipe.clip, recipe.accumulate, closure="positional")
    sparsifier = feather.sparsify(
        net, made, method, sparsity=sparsity, total_steps=total_steps, **resolved(options, case)
    )
    return Run(net, made, sparsifier, Loop(net, net, made, case, recipe, dtype, sparsifier), case)


def snapshot(run: Run) -> dict[str, object]:
    """Copies of everything that a failed call must not change."""
    return copy.deepcopy(
        {
            "parameters": [p.detach() for p in run.model.parameters()],
            "buffers": list(run.model.buffers()),
            "latent": run.sparsifier.latent_weights(),
            "masks": run.sparsifier.masks(),
            "thresholds": run.sparsifier.thresholds(),
            "step": run.sparsifier.step_count,
            "sparsity": run.sparsifier.sparsity,
            "optimizers": [optimizer.state_dict() for optimizer in run.optimizers],
            "live": [list(optimizer.state.values()) for optimizer in run.optimizers],
            "groups": [
                [{k: v for k, v in group.items() if k != "params"} for group in o.param_groups]
                for o in run.optimizers
            ],
        }
    )


def differences(a: object, b: object, path: str = "") -> Iterator[str]:
    """The differences in bits between two nested structures."""
    if type(a) is not type(b):
        yield f"{path}: {type(a).__name__} and {type(b).__name__}"
    elif isinstance(a, Tensor):
        if a.dtype != b.dtype or a.shape != b.shape or not same_bits(a, b):
            yield f"{path}: {a} and {b}"
    elif isinstance(a, dict):
        if list(a) != list(b):
            yield f"{path}: keys {list(a)} and {list(b)}"
        else:
            for key in a:
                yield from differences(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, list | tuple):
        if len(a) != len(b):
            yield f"{path}: lengths {len(a)} and {len(b)}"
        else:
            for index, (x, y) in enumerate(zip(a, b, strict=True)):
                yield from differences(x, y, f"{path}[{index}]")
    elif a != b and not (a != a and b != b):
        yield f"{path}: {a!r} and {b!r}"


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equality in which NaN equals NaN."""
    if not a.is_floating_point():
        return torch.equal(a, b)
    return torch.equal(torch.isnan(a), torch.isnan(b)) and torch.equal(
        torch.where(torch.isnan(a), 0, a), torch.where(torch.isnan(b), 0, b)
    )


def assert_same(a: object, b: object) -> None:
    """Two nested structures hold the same bits."""
    found = list(differences(a, b))
    assert not found, "\n".join(found[:10])


def assert_exact(run: Run) -> None:
    """The model, its masks and the schedule agree on exactly round(s N) zeros."""
    expected = round(run.sparsifier.sparsity * run.case.size)
    masks = run.sparsifier.masks()
    weights = run.case.weights(run.model)
    assert sum(int((~mask).sum()) for mask in masks.values()) == expected
    assert set(masks) == set(weights)
    for name, mask in masks.items():
        assert torch.equal(weights[name] != 0, mask), name


@contextmanager
def unchanged(run: Run) -> Iterator[None]:
    """The run is unchanged after the block."""
    before = snapshot(run)
    yield
    assert_same(before, snapshot(run))
