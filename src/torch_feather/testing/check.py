"""`check_method` and the properties that it checks."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attach import sparsify
from ..average import LatentAverage
from ..errors import ConfigurationError, NonFiniteWeightError, StateError
from ..methods import find_method
from ..methods.base import effective_weights
from .capture import Tape, simulated_device
from .problem import STEPS, Factory, Run, call, describe, differences, make_batch, make_network
from .processes import same_on_two_processes

Reference = Callable[[nn.Module, float, int], dict[str, Tensor]]
"""Called with the network, the sparsity and the number of steps, it trains the network on
`problem.make_batch` with SGD (lr 0.05, momentum 0.9, weight decay 1e-3) and returns the effective
weights by name."""


def check_method(
    factory: Factory | str,
    *,
    options: Mapping[str, Any] | None = None,
    reference: Reference | None = None,
    sparsity: float = 0.8,
    skip: Collection[str] = (),
) -> None:
    """Check every property of a method that `sparsify` promises its users.

    Args:
        factory: makes the method, from the keyword `sparsity` if it takes it; or a method's name.
        options: further keywords for the factory.
        reference: trains the same network in the plainest way; its effective weights must agree.
        sparsity: final fraction of zeros.
        skip: names of properties not to check, keys of `PROPERTIES`.

    Raises:
        AssertionError: lists every property that does not hold, with the reason.
        ConfigurationError: `skip` names an unknown property, or `factory` is not callable.

    Example:
        >>> check_method("gmp", skip={"two processes"})
    """
    if not isinstance(factory, str) and not callable(factory):
        raise ConfigurationError(
            f"factory must be a function that returns a method, or a name, got {factory!r:.80}."
        )
    label = factory if isinstance(factory, str) else getattr(factory, "__name__", factory)
    factory = partial(
        find_method(factory) if isinstance(factory, str) else factory, **options or {}
    )
    unknown = set(skip) - PROPERTIES.keys()
    if unknown:
        raise ConfigurationError(
            f"unknown properties in skip: {sorted(unknown)}; known: {[*PROPERTIES]}"
        )
    failures = []
    checks = {name: check for name, check in PROPERTIES.items() if name not in skip}
    for name, check in checks.items():
        try:
            check(factory, sparsity)
        except Exception as error:
            failures.append(f"{name}: {describe(error)}")
    if reference is not None:
        try:
            _agrees_with(reference, factory, sparsity)
        except Exception as error:
            failures.append(f"trajectory: {describe(error)}")
    if failures:
        raise AssertionError(f"method {label}: " + "; ".join(failures))


def _exact_count(factory: Factory, sparsity: float, levels: int | None = None) -> None:
    """The model has exactly round(s N) zeros from the target step on, where the masks say."""
    run = Run(factory, sparsity, levels=levels)
    target = round(sparsity * run.size)
    exact = run.sparsifier.step.training.method.facts.exact
    for step in range(STEPS):
        run.train(step, step + 1)
        masks, latent = run.sparsifier.masks(), run.sparsifier.latent_weights()
        masked = sum(int((~mask).sum()) for mask in masks.values())
        for name, mask in masks.items():
            written = run.model.get_parameter(name)
            assert not (written[~mask] != 0).any(), f"pruned weights of {name} are not 0"
            vanished = mask & (written == 0) & (latent[name] != 0)
            assert not vanished.any(), f"kept weights of {name} are 0"
        if run.sparsifier.at_target and exact:
            assert masked == target, f"{masked} masked weights after step {step + 1}, not {target}"
    assert run.sparsifier.at_target, "target_step lies beyond the end of training"
    run.sparsifier.finalize()
    if exact and levels is None:
        assert run.zeros() == target, f"{run.zeros()} zeros after finalize, not {target}"


def _ties(factory: Factory, sparsity: float) -> None:
    """The count is exact if many weights have the same magnitude."""
    _exact_count(factory, sparsity, levels=4)


def _same_seed(factory: Factory, sparsity: float) -> None:
    """Two runs from one seed have the same bits."""
    a, b = (Run(factory, sparsity).train(0, STEPS).content() for _ in range(2))
    assert not differences(a, b), f"two equal runs differ in {differences(a, b)[:3]}"


def _resume(factory: Factory, sparsity: float) -> None:
    """A run continued from model and optimizer state dicts has the bits of an uninterrupted one."""
    for adam in (False, True):
        whole = Run(factory, sparsity, adam=adam).train(0, STEPS).content()
        for stop in (1, STEPS // 2, STEPS - 1):
            saved = Run(factory, sparsity, adam=adam).train(0, stop).save()
            resumed = Run(factory, sparsity, adam=adam).load(saved).train(stop, STEPS)
            found = differences(whole, resumed.content())
            assert not found, f"resumed after step {stop}, these differ: {found[:3]}"


def _facts(factory: Factory, sparsity: float) -> None:
    """The facts agree with what the method does, and it has a fingerprint."""
    run = Run(factory, sparsity).train(0, 2)
    training = run.sparsifier.step.training
    method, weights, pruning = training.method, training.weights, training.pruning
    assert isinstance(method.fingerprint, str), "the fingerprint is no text"
    assert method.fingerprint, "the fingerprint is empty"
    gradients = [torch.randn_like(w) for w in weights.views]
    effective = effective_weights(method, weights, pruning)
    with torch.no_grad():
        for i, (g, u) in enumerate(zip(gradients, effective, strict=True)):
            if not method.facts.pulls_back:
                same = torch.equal(method.pull_back(weights, pruning, i, g, u), g)
                assert same, "pull_back changes gradients, but facts.pulls_back is False"
        if not method.facts.completes:
            found = method.complete(weights, pruning, gradients, effective, None)
            empty = found.terms is None and not found.own
            assert empty, "complete returns something, but facts.completes is False"
    assert set(method.facts.learned) <= method.state.keys(), "facts.learned names no state"


def _pure_update(factory: Factory, sparsity: float) -> None:
    """`update` and `write_effective` of other weights change nothing of the run."""
    a, b = Run(factory, sparsity).train(0, 4), Run(factory, sparsity).train(0, 4)
    average = LatentAverage(b.sparsifier, 0.5)
    for step in range(4, STEPS):
        a.train(step, step + 1)
        b.train(step, step + 1)
        average.update()
        average.copy_to(make_network(seed=1))
    found = differences(a.content(), b.content())
    assert not found, f"an average of the weights changes {found[:3]}"


def _moved(factory: Factory, sparsity: float) -> None:
    """A model that is cast in the middle of training is trained on, exactly sparse."""
    run = Run(factory, sparsity).train(0, 4)
    run.model.double()
    for step in range(4, STEPS):
        images, labels = make_batch(step)
        F.cross_entropy(run.model(images.double()), labels).backward()
        run.optimizer.step()
        run.optimizer.zero_grad()
    run.sparsifier.finalize()
    if run.sparsifier.step.training.method.facts.exact:
        assert run.zeros() == round(sparsity * run.size), "the count is not exact after a cast"


def _other_options_refused(factory: Factory, sparsity: float) -> None:
    """A checkpoint is refused by a run with another target."""
    saved = Run(factory, sparsity).train(0, 2).save()
    try:
        Run(factory, sparsity / 2).load(saved)
    except StateError:
        return
    raise AssertionError("a checkpoint of another sparsity was loaded")


def _mixed_precision(factory: Factory, sparsity: float) -> None:
    """With autocast and GradScaler, steps with infinite gradients do not count."""
    for fused in (False, True):  # a fused optimizer skips the step itself
        run = Run(factory, sparsity, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
        overflows = (1, 4)
        for step in range(STEPS + len(overflows)):
            before = run.sparsifier.latent_weights()
            with torch.autocast("cpu", torch.bfloat16):
                loss = run.loss(step).float()
            scaler.scale(loss * (torch.inf if step in overflows else 1.0)).backward()
            scaler.step(run.optimizer)
            scaler.update()
            run.optimizer.zero_grad()
            if step in overflows:
                changed = differences(before, run.sparsifier.latent_weights())
                assert not changed, f"a skipped step changed latent weights of {changed[:3]}"
        count = run.sparsifier.step_count
        assert count == STEPS, f"{count} steps counted, {STEPS} were taken"
        run.sparsifier.finalize()
        assert all(p.isfinite().all() for p in run.model.parameters()), "a weight is not finite"


def _accumulation(factory: Factory, sparsity: float) -> None:
    """Gradients accumulated over the parts of a batch give the step of the batch."""
    runs = [Run(factory, sparsity) for _ in range(2)]
    for run, parts in zip(runs, ([slice(None)], [slice(0, 3), slice(3, None)]), strict=True):
        run.model.eval()  # batch norm depends on the batch
        for step in range(3):
            for fraction in run.sparsifier.passes():
                for part in parts:
                    (fraction * run.loss(step, part)).backward()
            run.optimizer.step()
            run.optimizer.zero_grad()
    a, b = (run.sparsifier.latent_weights() for run in runs)
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-5, msg=f"{name} differs")


def _closures(factory: Factory, sparsity: float) -> None:
    """`step(closure)` has the bits of backward and step."""
    plain, closed = Run(factory, sparsity), Run(factory, sparsity)
    for step in range(4):
        plain.optimizer.zero_grad()
        plain.loss(step).backward()
        plain.optimizer.step()

        closed.optimizer.step(partial(_evaluate, closed, step))
    found = [k for k in differences(plain.content(), closed.content()) if "state" not in k]
    assert not found, f"with a closure these differ: {found[:3]}"


def _evaluate(run: Run, step: int) -> float:
    run.optimizer.zero_grad()
    loss = run.loss(step)
    loss.backward()
    return float(loss.detach())


def _nan(factory: Factory, sparsity: float) -> None:
    """A NaN in a latent weight raises, and is not pruned silently."""
    run = Run(factory, sparsity).train(0, 2)
    with torch.no_grad():
        run.model.get_parameter("hidden.weight")[0, 0] = torch.nan
    try:
        run.train(2, STEPS)
        run.sparsifier.finalize()
    except NonFiniteWeightError:
        return
    raise AssertionError("a NaN weight was not reported")


def _external_writes(factory: Factory, sparsity: float) -> None:
    """Evaluation with swapped weights changes nothing if they are swapped back."""
    a, b = Run(factory, sparsity).train(0, 4), Run(factory, sparsity).train(0, 4)
    kept = {name: p.detach().clone() for name, p in b.model.named_parameters()}
    with torch.no_grad():
        for parameter in b.model.parameters():
            parameter.mul_(0.5)
        for name, parameter in b.model.named_parameters():
            parameter.copy_(kept[name])
    found = differences(a.train(4, STEPS).content(), b.train(4, STEPS).content())
    assert not found, f"after a swap there and back these differ: {found[:3]}"


def _capture(factory: Factory, sparsity: float) -> None:
    """A step recorded as a CUDA graph would be, and replayed, has the bits of real steps."""
    with simulated_device():
        real, taped = (_Captured(factory, sparsity) for _ in range(2))
        real.train(0, STEPS)
        taped.train(0, 2)
        taped.feed(2)
        with Tape() as tape:
            taped.step()
        taped.train(3, STEPS, tape.replay)
        a, b = (run.sparsifier.latent_weights() for run in (real, taped))
        counts = real.sparsifier.step_count, taped.sparsifier.step_count
    found = differences(a, b)
    assert not found, f"replayed steps differ in {found[:3]}"
    assert counts[0] == counts[1], f"{counts[1]} steps counted in replays, not {counts[0]}"


class _Captured(Run):
    """Steps on static inputs with an optimizer that can be captured."""

    def __init__(self, factory: Factory, sparsity: float):
        super().__init__(factory, sparsity)
        self.sparsifier.detach()
        self.model = make_network()
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), torch.tensor(0.05), 0.9, weight_decay=1e-3, fused=True
        )
        self.sparsifier = sparsify(
            self.model, self.optimizer, call(factory, sparsity), sparsity=sparsity,
            total_steps=STEPS,
        )  # fmt: skip
        self.images, self.labels = make_batch(0)

    def feed(self, number: int) -> None:
        images, labels = make_batch(number)
        self.images.copy_(images)
        self.labels.copy_(labels)

    def step(self) -> None:
        F.cross_entropy(self.model(self.images), self.labels).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def train(  # type: ignore[override]
        self, start: int, stop: int, step: Callable[[], None] | None = None
    ) -> None:
        for number in range(start, stop):
            self.feed(number)
            (step or self.step)()


def _two_processes(factory: Factory, sparsity: float) -> None:
    """Two processes with DistributedDataParallel hold the same weights and masks."""
    same_on_two_processes(factory, sparsity)


def _agrees_with(reference: Reference, factory: Factory, sparsity: float) -> None:
    """The effective weights after training are those of the reference, to rounding."""
    run = Run(factory, sparsity).train(0, STEPS)
    run.sparsifier.finalize()
    for name, expected in reference(make_network(), sparsity, STEPS).items():
        found = run.model.get_parameter(name).detach()
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6, msg=f"{name} differs")


PROPERTIES: dict[str, Callable[[Factory, float], None]] = {
    "exact count": _exact_count,
    "ties": _ties,
    "same seed": _same_seed,
    "resume": _resume,
    "facts": _facts,
    "pure update": _pure_update,
    "cast": _moved,
    "other options": _other_options_refused,
    "mixed precision": _mixed_precision,
    "accumulation": _accumulation,
    "closures": _closures,
    "NaN": _nan,
    "external writes": _external_writes,
    "capture": _capture,
    "two processes": _two_processes,
}
