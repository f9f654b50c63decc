"""The engine: sparse training as a transformation of the optimizer.

The optimizer trains dense latent weights w; the network only ever sees their sparse image
u = R(w). Between optimizer steps the parameters hold u, during a step they hold w:

    forward, backward         parameters hold u; gradients dL/du are pulled back as they arrive
    optimizer.step, before    what needs all gradients at once is added; parameters become w
    optimizer.step            any optimizer updates w
    optimizer.step, after     the schedule advances, thresholds move, parameters become u = R(w)

What R is, the method says (`reparametrization.py`). Nothing in the model changes: the exchange
happens in the optimizer's public step hooks, in place, and the latent weights travel in the
optimizer's own state dict.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from numbers import Integral
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from . import devices
from .engine.binding import bind, check_storage
from .engine.checkpoint import FORMAT, Header, digest, from_bytes, to_bytes
from .engine.external_writes import Watch
from .engine.gradients import Arrivals
from .engine.health import Health
from .engine.hooks import Attachment
from .engine.loss_scale import unscale_others
from .engine.step_in_backward import Round, half_done, in_backward, incomplete
from .errors import ConfigurationError, StateError, some, warn
from .finetune import ZeroKeeper
from .measure.report import Report, report
from .methods import AnyMethod, build_method
from .methods.base import Rate, Setting
from .methods.own_parameters import no_rate
from .prunable import Filters, find_prunable, list_filters, unwrap
from .targets import Sparsity, Target, check_share
from .weights.checksum import checksum_of
from .weights.latent import LatentWeights, copy_all
from .weights.ranks import check_ranks
from .weights.shards import fsdp_units, is_sharded, local, part_of, reshard, spread_like

ONE_PROCESS = (
    "This method needs whole weight tensors in one process, but here they are sharded over "
    "several. "
    "What works on shards: feather, feather-gmp, feather-flops, hard-ste, soft-ste, gmp, st3 and "
    "st3-sigma, without patterns (these two not for transposed convolutions and Conv1D, of which "
    "shards have parts of all output channels); asl, asl+, feather-asl+ and str. All others work "
    "with DistributedDataParallel."
)


def sparsify(
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer],
    method: str | AnyMethod = "feather",
    *,
    sparsity: Sparsity,
    total_steps: int,
    include: Filters = None,
    exclude: Filters = None,
    count: str = "prunable",
    **options: Any,
) -> Sparsifier:
    """Attaches sparse training to an optimizer. The training loop stays as it is.

    Args:
        model: the network; none of its modules or keys change.
        optimizer: the optimizer that trains it, or several of which each holds a part, in the
            order in which they step (the schedule advances when the last of them has stepped).
        method: a name from `available_methods()`, or a `Method` or `LearnedMethod`.
        sparsity: final share of zeros among the prunable weights, in [0, 1); or one for each
            group of them, by a filter as `include` takes it: ``{"*.attn.*": 0.9, "*": 0.95}``. The
            first that matches a weight counts, and each group is met exactly.
        total_steps: optimizer steps of the whole training. The schedule stays at its end beyond.
        include, exclude: which weights take part, see `prunable.find_prunable`.
        count: what one `sparsity` is a share of: 'prunable' weights, or 'all' parameters of the
            model (zeros are still among the prunable ones; `Sparsifier.target` is their share).
        **options: of the method, see `methods.method_options(name)`.

    Returns:
        The `Sparsifier`. From now on, outside `optimizer.step`, the model is the sparse model:
        what is evaluated, saved or copied has exact zeros. Saving `model.state_dict()` and
        `optimizer.state_dict()` is enough to resume exactly.

    Raises:
        ConfigurationError: what was asked for cannot be; the message says why and what to do.
    """
    if not isinstance(sparsity, Mapping):
        sparsity = check_share(sparsity)
    if not isinstance(total_steps, Integral) or isinstance(total_steps, bool) or total_steps < 1:
        raise ConfigurationError(
            "total_steps is the number of optimizer steps of the whole training (epochs times "
            f"steps per epoch), an integer >= 1; got {total_steps!r}."
        )
    if options and not isinstance(method, str):
        raise ConfigurationError(
            f"Options ({', '.join(options)}) belong to methods given by name; set them on the "
            "Method object."
        )
    if isinstance(model, nn.Module):
        reshard(model)
    include, exclude = list_filters(include), list_filters(exclude)
    prunable = find_prunable(model, include, exclude, frozen=False)
    target = Target.of(model, prunable, sparsity, count)
    if isinstance(method, str):
        method = build_method(method, sparsity=target.asked, **options)
    method, share = target.given_to(method)
    return Sparsifier(model, optimizer, method, share, int(total_steps), include, exclude)


class Sparsifier:
    """Keeps a model sparse while an optimizer trains it; made by `sparsify`.

    Attributes:
        model: the model, as it was given.
        method: what was asked for, such as operator, gradient rule, allocation and schedule.
        reparametrization: the method at work.
        target: final share of zeros among the prunable weights.
        total_steps: optimizer steps of the whole training.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer],
        method: AnyMethod,
        sparsity: float,
        total_steps: int,
        include: Filters = None,
        exclude: Filters = None,
    ):
        self.model = model
        self.method = method
        self.target = sparsity
        self.total_steps = total_steps
        self.include, self.exclude = include, exclude
        prunable = find_prunable(model, include, exclude, frozen=False)
        self.slots, optimizers = bind(model, prunable, optimizer)
        self.weights = LatentWeights([slot.parameter for slot in self.slots])
        names = [slot.name for slot in self.slots]
        self._health = Health(names, total_steps)
        self._health.raise_if_nan(self.weights, self._here())
        self.reparametrization = method.attach(
            Setting(model, names, self.weights, sparsity, total_steps)
        )
        self._refuse_shards()
        self._optimizers = optimizers
        if self.reparametrization.follows_rate and self._rate() is None:
            raise no_rate()
        self._layout = [_layout(slot.parameter) for slot in self.slots]
        # All that changes with time is on the device: only there a skipped step is known, and
        # nothing here makes the host wait for it.
        self._step = torch.zeros((), dtype=torch.int64, device=self.weights.device)
        self._identity = digest(self.reparametrization.identity)
        self._arrivals = Arrivals()
        self._own_sparsity, self._reached = 0.0, False  # when it ended
        self._sum = torch.zeros(())  # of all effective weights: not finite if one is NaN
        self._watch = Watch()
        self._strict = True
        self._attached = True
        self.round = Round([slot.optimizer for slot in self.slots])
        self._keeper: ZeroKeeper | None = None
        self._stepped = False  # since it was made

        self._pull_backs: list[Any] = []
        self._pull_back()
        self._attachments = [
            Attachment(
                self,
                one,
                [i for i, slot in enumerate(self.slots) if slot.optimizer == o],
                last=o == len(optimizers) - 1,
            )
            for o, one in enumerate(optimizers)
        ]
        self._materialize()
        try:
            for attachment in self._attachments:
                attachment.adopt_loaded_state()
        except StateError:
            self.detach()
            raise
        if self.reparametrization.arrival == 0:
            self._health.inspect(self.weights, self._here(), self.reparametrization)

    # Where it stands

    @property
    def step_count(self) -> int:
        """Optimizer steps taken so far; skipped ones do not count."""
        return int(self._step)

    @property
    def sparsity(self) -> float:
        """Share of the prunable weights that is pruned now."""
        if self._attached:
            self.sync()
            counts = self.reparametrization.counts_pruned(self.weights)
        else:
            zeros = [(slot.local == 0).sum() for slot in self.slots]
            counts = self.weights.total(torch.stack(zeros))
        return int(counts.sum()) / self.weights.size

    @property
    def at_target(self) -> bool:
        """Whether the network is as sparse now as it will be in the end, exactly.

        What comes earlier is denser and flatters the method: no checkpoint of before competes for
        being the best.
        """
        return self.reparametrization.reached(self.step_count) if self._attached else self._reached

    @property
    def own_sparsity(self) -> float:
        """Share of the prunable weights that the method prunes by itself.

        Methods that learn their thresholds reach no target exactly: in the end their count is made
        exact, and this is what there would be without it. For all others it is `sparsity`.
        """
        if not self._attached:
            return self._own_sparsity
        self.sync()
        return int(self.reparametrization.own_counts_pruned(self.weights).sum()) / self.weights.size

    def thresholds(self) -> dict[str, Tensor]:
        """The threshold tau that each weight tensor meets now, by name; 0-dimensional."""
        self.sync()
        return {
            slot.name: self.reparametrization.threshold(self.weights, i).clone()
            for i, slot in enumerate(self.slots)
        }

    def masks(self) -> dict[str, Tensor]:
        """Which weights are kept (True), by name; shaped, and sharded, like the weights."""
        if not self._attached:
            kept = [slot.local.detach() != 0 for slot in self.slots]
        else:
            self.sync()
            kept = [~self.reparametrization.pruned(self.weights, i) for i in self._every]
        return self._by_name(kept)

    def latent_weights(self) -> dict[str, Tensor]:
        """Copies of the dense weights that the optimizer trains, by name."""
        self.require_attached()
        self.sync()
        return self._by_name([view.clone() for view in self.weights.views])

    def _by_name(self, parts: Sequence[Tensor]) -> dict[str, Tensor]:
        """What is here of each weight tensor, as tensors sharded like the weights."""
        return {
            slot.name: spread_like(part, slot.parameter)
            for slot, part in zip(self.slots, parts, strict=True)
        }

    @property
    def _every(self) -> range:
        return range(len(self.slots))

    @torch.no_grad()
    def check_ranks(self) -> None:
        """Raises unless all processes that hold a weight hold it alike, bit by bit.

        That is, with DistributedDataParallel the masks and latent weights of all processes; of
        sharded weights those that are held more than once. What is exchanged are checksums. All
        processes must call it, every hundred steps for example.

        Raises:
            StateError: names the weights and the ranks that differ from the first; on all ranks.
        """
        self.sync()
        check_ranks(self.model, self.slots, self.weights, self._step)

    # Parameters of the method itself

    def parameters(self) -> list[Tensor]:
        """Parameters of the method itself, such as learned thresholds; most methods have none.

        They are stepped after the optimizer, and need no place in it. To clip gradients over them
        too, call `complete_gradients()` first.
        """
        return self.reparametrization.parameters() if self._attached else []

    @property
    def clips_own_parameters(self) -> bool:
        """Whether the method's own parameters belong in the clipped gradient norm."""
        return self.reparametrization.clips_own

    @torch.no_grad()
    def complete_gradients(self) -> None:
        """Adds to the gradients what needs all of them at once; `optimizer.step` does it else.

        Then `parameters()` have their `.grad`, penalties included, and the gradients of the model
        hold what a method shares among its weights. To be called after the last backward pass of
        a step, before clipping; with a `GradScaler` after `scaler.unscale_(optimizer)`, of several
        optimizers each. Without new gradients it does nothing, nor after `finalize`. Most methods
        have nothing to complete.
        """
        if self._attached and self._is_due():
            self._complete(None)

    def passes(self, count: int | None = None) -> Iterator[float]:
        """Forward and backward passes that share one step; gradients add up over them.

            for share in sparsifier.passes():
                (share * loss(model(x), y)).backward()
            optimizer.step()

        A method that trains by random masks draws one for each pass. The loop goes around all
        backward passes of a step, those of several parts of a batch within it.

        Args:
            count: how many; None is what the method wants: its option `passes`, or 1.

        Yields:
            1 / count, the share of a pass in the loss.
        """
        count = self.reparametrization.passes if count is None else count
        if self._attached:
            self.reparametrization.forget_gradients()
        for number in range(count):
            if number > 0 and self._attached:
                self._enter_pass()
            yield 1 / count
            if count > 1 and self._attached:
                self._leave_pass()

    def report(self, example_input: Any = None) -> Report:
        """Zeros, sparsity and threshold per layer; multiply-adds too where an input is given."""
        self.sync()
        names = {slot.name for slot in self.slots}
        found = report(
            self.model,
            include=lambda _, name: name in names,
            example_input=example_input,
            thresholds={name: float(tau) for name, tau in self.thresholds().items()},
        )
        return replace(found, own_sparsity=self.own_sparsity)

    # Leaving

    def finalize(self, *, force: bool = False, keep_masks: bool = False) -> nn.Module:
        """Ends sparse training: plain modules, plain keys, exact zeros, no hooks.

        A model of the target's sparsity that was written from outside, such as the best checkpoint
        that a framework loads after training, stays as it was written.

        Args:
            force: end although the target is not reached yet.
            keep_masks: training goes on, and every further step leaves pruned weights at 0
                (momentum would revive them) until `detach()`. After a restart of that phase,
                `keep_zeros(model, optimizer)` takes over.

        Raises:
            StateError: the target is not reached, or not exactly.
            NonFiniteWeightError: weights, or thresholds, are NaN.
        """
        self.require_attached()
        if not self.at_target and not force:
            raise StateError(
                f"After {self.step_count} of {self.total_steps} steps the sparsity is "
                f"{self.sparsity:.4f}, not yet {self.target}. Train on, or take the model as it "
                "is: finalize(force=True)."
            )
        found = self._found()
        self._own_sparsity, self._reached = self.own_sparsity, self.at_target
        self._show(found)
        self._health.inspect(self.weights, self._here(), self.reparametrization)
        if self._reached and self.reparametrization.exact and not force:
            self._check_count()
        if self._reached and (excess := self.reparametrization.excess(self.weights)):
            warn(f"The network has its sparsity, but {excess}")
        self._release()
        if keep_masks:
            self._keeper = ZeroKeeper([slot.parameter for slot in self.slots], self._optimizers)
        return self.model

    def detach(self) -> nn.Module:
        """Removes all hooks; the model keeps the dense latent weights.

        After `finalize(keep_masks=True)` it only ends the keeping: the model stays sparse.
        """
        if self._keeper is not None:
            self._keeper.remove()
            self._keeper = None
            return self.model
        self.require_attached()
        self.sync()
        self._show(self.weights.views)
        self._release()
        return self.model

    def reset_latents(self) -> None:
        """The latent weights restart from what the parameters hold now, zeros included."""
        self.require_attached()
        self._rebind()
        self.capture(self._every)
        self._materialize()

    # Saving and loading

    def state_dict(self) -> dict[str, Any]:
        """Latent weights and position. Not needed where the optimizer's state dict is saved."""
        self.sync()
        return {slot.name: self.export(i) for i, slot in enumerate(self.slots)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over a `state_dict()`; raises StateError where it does not fit."""
        self.require_attached()
        found = {i: state[s.name] for i, s in enumerate(self.slots) if s.name in state}
        known = {slot.name for slot in self.slots}
        foreign = [name for name in state if name not in known]
        every = range(len(self.slots))
        self.load(self.check_loaded(found, every, foreign), every)

    @contextmanager
    def relaxed_loading(self) -> Iterator[None]:
        """Within it, loading accepts states of other methods, targets and lengths of training.

        Latent weights of fitting shape are taken over, and the step; where a state has none, the
        latent weights restart from what the parameters hold.
        """
        before, self._strict = self._strict, False
        try:
            yield
        finally:
            self._strict = before

    def header(self, i: int | None, image: int = 0) -> Header:
        """What a checkpoint says of weight i; None is a parameter that takes no part."""
        shape = 0 if i is None else digest(str(tuple(self.slots[i].parameter.shape)))
        target = round(self.target * 1e12)
        return Header(
            FORMAT, self.step_count, self.total_steps, target, self._identity, shape, image
        )

    def export(self, i: int | None) -> dict[str, Tensor]:
        """What travels of weight i in checkpoints, in copies: latent weights, header, state."""
        if i is None:
            return {"latent": torch.zeros(()), "header": self.header(None).tensor()}
        slot = self.slots[i]
        header = self.header(i, checksum_of(self.weights, i, slot.local))
        state = {name: to_bytes(e[i]) for name, e in self.reparametrization.state.items()}
        latent = spread_like(self.weights.views[i].clone(), slot.parameter)
        return {"latent": latent, "header": header.tensor(), **state}

    def check_loaded(
        self,
        found: dict[int, dict[str, Tensor]],
        wanted: Iterable[int],
        foreign: Sequence[str] = (),
        how: str = "",
    ) -> dict[int, tuple[Header, dict[str, Tensor]]]:
        """What of a loaded state can be taken over; raises StateError unless loading is relaxed.

        Args:
            found: what `export` gave, by weight.
            wanted: the weights that it should have.
            foreign: what took part when it was saved and does not now.
            how: the way around a refusal, for the message.
        """
        how = how or (
            " To take over what fits on purpose: with sparsifier.relaxed_loading(): "
            "optimizer.load_state_dict(state)."
        )
        if foreign and self._strict:
            raise StateError(f"The state has latent weights of {some(foreign)}, not ours." + how)
        fitting = {}
        for i in wanted:
            name, shape = self.slots[i].name, self.slots[i].parameter.shape
            if not found.get(i, {}).keys() >= {"latent", "header"}:
                if self._strict:
                    raise StateError(
                        f"The state has no latent weights for {name}: it was saved without this "
                        "sparsifier, before sparsify was called, or by something that keeps only "
                        "the optimizer's own entries (such as a flattened distributed state)." + how
                    )
                continue
            entries = {"latent": found[i]["latent"]}
            latent, saved = entries["latent"], Header.read(found[i]["header"])
            if saved is None:
                raise StateError(f"The state's header for {name} is not readable: it is damaged.")
            differences = saved.differences(self.header(i))
            if latent.shape != shape:
                differences.append(
                    f"its latent weights have shape {tuple(latent.shape)}, the parameter "
                    f"{tuple(shape)}"
                )
            for key, state in self.reparametrization.state.items():
                value = from_bytes(found[i].get(key), state[i])
                if value is not None:
                    entries[key] = value
                else:
                    differences.append(f"it has no {key}, or one of another size")
            if differences and self._strict:
                raise StateError(
                    f"The state does not belong to this sparsifier ({name}): "
                    f"{'; '.join(differences)}." + how
                )
            if latent.shape == shape:
                fitting[i] = (saved, entries)
        return fitting

    @torch.no_grad()
    def load(
        self, checked: dict[int, tuple[Header, dict[str, Tensor]]], wanted: Iterable[int]
    ) -> None:
        """Takes over checked latent weights, states and the step; the rest of `wanted` restarts."""
        loaded = dict(self._watch.loaded)
        if self.round.is_open:
            self.recover()
        self._absorb_writes()
        for i in wanted:
            if i not in checked:
                self.weights.views[i].copy_(self.slots[i].local)
        for i, (header, entries) in checked.items():
            self._step.fill_(header.step)
            loaded[i] = header.image
            self.weights.views[i].copy_(part_of(entries.pop("latent"), self.slots[i].parameter))
            for key, value in entries.items():
                self.reparametrization.state[key][i].copy_(value)
        self.reparametrization.forget_gradients()
        self._materialize()
        self._watch.loaded = loaded

    # What attachments call during a step

    def before_step(self, indices: Sequence[int]) -> None:
        """Parameters become latent."""
        self._refuse_sparse_start()
        self._absorb_writes()
        self.show_latent(indices)

    def enter_round(self, attachment: Attachment) -> None:
        """One of several optimizers is about to step within a backward pass."""
        if self.round.has(self._attachments.index(attachment)):
            self._refuse_half_a_step()
        self._absorb_writes()

    def leave_round(self, attachment: Attachment) -> None:
        """It has stepped."""
        if self.round.add(self._attachments.index(attachment)):
            self.after_step(True)

    @torch.no_grad()
    def complete_at_step(self, optimizer: Optimizer) -> None:
        """Completes the gradients of all, unless that was done; this optimizer steps first."""
        if self._is_due():
            numbers = {slot.optimizer for slot in self.slots}
            every = [self._optimizers[number] for number in numbers]
            unscale_others(optimizer, [one for one in every if one is not optimizer])
            # A fused optimizer under GradScaler divides by the scale itself.
            self._complete(getattr(optimizer, "grad_scale", None))

    @torch.no_grad()
    def after_step(self, taken: bool | Tensor) -> None:
        """The schedule advances if the step was taken, and parameters become sparse.

        `taken` is True, or a tensor where only the device knows, of the last optimizer alone.
        """
        self._step += taken
        if taken is not False:
            self.reparametrization.advance(self.weights, self._step, self._rate(), taken)
            self.reparametrization.forget_gradients()
            if self.reparametrization.completes:
                self._arrivals.spend([slot.parameter for slot in self.slots])
        self._watch.loaded = {}
        self._materialize()
        self._stepped = True
        self._health.look(self.weights, self._here(), self.reparametrization, self._step, self._sum)

    @torch.no_grad()
    def capture(self, indices: Sequence[int]) -> None:
        """The latent weights become what the parameters hold."""
        copy_all([self.weights.views[i] for i in indices], [self.slots[i].local for i in indices])

    @torch.no_grad()
    def show_latent(self, indices: Sequence[int]) -> None:
        """The parameters hold the latent weights."""
        copy_all([self.slots[i].local for i in indices], [self.weights.views[i] for i in indices])

    def show_image(self) -> None:
        """The parameters hold the sparse image of the latent weights."""
        self._materialize()

    @torch.no_grad()
    def recover(self) -> None:
        """The parameters hold the image again, after what may have failed on this process alone.

        So nothing is exchanged, as the others may never answer: on shards the thresholds remain
        what they are until all processes look next.
        """
        self.round.abandon()
        if self.weights.shards is None:
            self._materialize()
            return
        images, self._sum = self.reparametrization.images(self.weights)
        self._show(images)
        self._watch.doubt()

    # The step itself

    @torch.no_grad()
    def _materialize(self) -> None:
        """Parameters become u = R(w) at the present step."""
        self.reparametrization.refresh(self.weights, self._step)
        images, self._sum = self.reparametrization.images(self.weights)
        self._show(images)

    def image_of(self, weights: LatentWeights) -> list[Tensor]:
        """The image R of other latent weights, laid out like `self.weights`, at this step."""
        return self.reparametrization.images_of(weights, self._step)

    def _is_due(self) -> bool:
        if not self.reparametrization.completes:
            return False
        self._rebind()  # gradients may have come to parameters that replaced ours
        return self._arrivals.are_due([slot.parameter for slot in self.slots])

    def _complete(self, scale: Tensor | None) -> None:
        self._absorb_writes()
        parameters = [slot.parameter for slot in self.slots]
        self.reparametrization.complete(self.weights, parameters, scale)
        self._arrivals.complete()

    @torch.no_grad()
    def _enter_pass(self) -> None:
        self._absorb_writes()
        parameters = [slot.parameter for slot in self.slots]
        self.reparametrization.enter_pass(self.weights, parameters, self._step)
        images, self._sum = self.reparametrization.images(self.weights)
        self._show(images)

    @torch.no_grad()
    def _leave_pass(self) -> None:
        parameters = [slot.parameter for slot in self.slots]
        self.reparametrization.leave_pass(self.weights, parameters)

    def _rate(self) -> Rate:
        """The learning rate of the first prunable weight, now."""
        slot = self.slots[0]
        return self._optimizers[slot.optimizer].param_groups[slot.group].get("lr")

    @torch.no_grad()
    def _show(self, images: Sequence[Tensor]) -> None:
        here = self._here()
        copy_all(here, images)
        self._watch.note(self.weights, here)

    def _here(self) -> list[Tensor]:
        """What this process holds of the parameters."""
        return [slot.local for slot in self.slots]

    def _pull_back(self) -> None:
        """Gradients dL/du are pulled back to dL/dw by hooks, none where nothing is to do."""
        for handle in self._pull_backs:
            handle.remove()
        method = self.reparametrization
        self._pull_backs = []
        if not method.pulls_back and not method.completes:
            return
        for i, holder in self._leaves():
            # A layer that is frozen for now has its hook when its gradients come again.
            trains = holder.requires_grad
            holder.requires_grad_(True)
            self._pull_backs.append(holder.register_hook(self._hook(i, holder)))
            holder.requires_grad_(trains)

    def _leaves(self) -> Iterator[tuple[int, Tensor]]:
        """What autograd sees of each prunable weight.

        `fully_shard` gathers the parameters of a unit into others, which take part in the network;
        no hook of its sharded parameters is ever called.
        """
        gathered: dict[int, Tensor] = {}
        for unit in fsdp_units(self.model):
            unit.unshard()
            for i, slot in enumerate(self.slots):
                seen = slot.module._parameters.get(slot.attribute)
                if seen is not None and seen is not slot.parameter:
                    gathered[i] = seen
            unit.reshard()
        for i, slot in enumerate(self.slots):
            yield i, gathered.get(i, slot.parameter)

    def _hook(self, i: int, holder: Tensor) -> Callable[[Tensor], Tensor]:
        """Takes the gradient of `holder`, which holds u, back to w."""

        def pull_back(gradient: Tensor) -> Tensor:
            if self._arrivals.note():
                self.reparametrization.forget_gradients()
            part, image = part_of(gradient, holder), local(holder).detach()
            pulled = self.reparametrization.pull_back(self.weights, i, part, image)
            return spread_like(pulled, holder)

        return pull_back

    def _refuse_half_a_step(self) -> None:
        missing = self.round.missing()
        self.recover()
        raise incomplete(some([slot.name for slot in self.slots if slot.optimizer in missing]))

    def _refuse_shards(self) -> None:
        if self.weights.shards is not None and not self.reparametrization.on_shards:
            raise ConfigurationError(ONE_PROCESS)

    # What others did to the parameters

    def sync(self) -> None:
        """Outside of a step: latent weights and image follow what was written from outside."""
        if self.round.is_open:
            if in_backward():
                raise half_done()
            self._refuse_half_a_step()
        in_step = any(attachment.in_step for attachment in self._attachments)
        if self._attached and not in_step and self._absorb_writes():
            self._materialize()

    @torch.no_grad()
    def _absorb_writes(self) -> bool:
        """Where a parameter no longer holds its image, the written value becomes its latent one."""
        if self.round.is_open:
            return False  # nor do they hold the image of the latent weights
        self._rebind()
        here = self._here()
        written = self._watch.suspects(self.weights, here)
        if not written:
            return False
        images, _ = self.reparametrization.images(self.weights)
        self.weights.adopt(written, here, images)
        return True

    def _refuse_sparse_start(self) -> None:
        """Raises where another process's sparse weights came in place of ours at the start.

        Its latent weights did not come with them, so ours would go on with its zeros.
        """
        alone = not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1
        if self._stepped or alone or self.weights.shards is not None:
            return
        if devices.synchronizes(self.weights.device) and torch.cuda.is_current_stream_capturing():
            return
        pruned = [self.reparametrization.pruned(self.weights, i) for i in self._every]
        zeros = [slot.parameter.detach() == 0 for slot in self.slots]
        counts = [sum(int(mask.sum()) for mask in masks) for masks in (pruned, zeros)]
        if 0 < counts[0] == counts[1] and not all(map(torch.equal, pruned, zeros)):
            raise StateError(
                "Between sparsify and the first step the sparse weights of another process were "
                "written over ours, as DistributedDataParallel does when it wraps a model: its "
                "latent weights did not come along. Wrap the model first, then call sparsify. "
                "If these weights were loaded on purpose: call sparsifier.reset_latents() then."
            )

    @torch.no_grad()
    def _rebind(self) -> None:
        """Follows parameters that were replaced, moved or cast since the last look."""
        current = [self._attachments[s.optimizer].parameter_at(s) for s in self.slots]
        lost = self._lost(current)
        if lost and fsdp_units(self.model):
            # In their places may be what `fully_shard` gathered, also after an evaluation.
            if not in_backward():
                reshard(self.model)
            lost = [] if in_backward() else self._lost(current)
        if lost:
            raise StateError(
                f"The model's {lost[0]} is no longer the parameter that the optimizer trains, as "
                "after load_state_dict(assign=True). Load with assign=False, or make optimizer and "
                "sparsifier anew."
            )
        layout = [_layout(parameter) for parameter in current]
        same = all(s.parameter is p for s, p in zip(self.slots, current, strict=True))
        if same and layout == self._layout:
            return
        before = self.weights
        images, _ = self.reparametrization.images(before)
        check_storage([s.name for s in self.slots], current)
        if before.shards is not None and not all(
            is_sharded(p) and local(p).shape == old.shape
            for p, old in zip(current, before.views, strict=True)
        ):
            raise StateError(
                "The shards of the model changed after sparsify. Make optimizer and sparsifier "
                "anew, and take over their state dicts by torch.distributed.checkpoint."
            )
        for i, (slot, parameter) in enumerate(zip(self.slots, current, strict=True)):
            replaced, slot.parameter = slot.parameter is not parameter, parameter
            if replaced and parameter.grad is not None and self._pull_backs:
                # It came without our hook.
                parameter.grad = self._hook(i, parameter)(parameter.grad)
        self.weights, self._layout = LatentWeights(current), layout
        self._refuse_shards()
        whole = before.shards is None  # then `fully_shard` may have come since
        for p, image, old, new in zip(
            current, images, before.views, self.weights.views, strict=True
        ):
            if whole:
                image, old = part_of(image, p), part_of(old, p)
            here = local(p)
            new.copy_(torch.where(here == image.to(here), old.to(here), here))
        self.reparametrization.move(self.weights)
        self._step = self._step.to(self.weights.device)
        self._pull_back()
        self._materialize()

    def _lost(self, current: Sequence[Tensor]) -> list[str]:
        """Weights whose parameter the model does not hold any more."""
        return [
            slot.name
            for slot, parameter in zip(self.slots, current, strict=True)
            if _lookup(self.model, slot.name) is not parameter
            and not any(parameter is other for other in self.model.parameters())
        ]

    # Leaving, inside

    @torch.no_grad()
    def _found(self) -> list[Tensor]:
        """What the parameters hold, where that is as sparse as it should be; else the image."""
        # Before anything else: they may have been moved or cast too, which follows them.
        here = [self._attachments[slot.optimizer].parameter_at(slot) for slot in self.slots]
        found = [local(parameter).detach().clone() for parameter in here]
        self.sync()
        images = [slot.local.detach().clone() for slot in self.slots]
        written, left = (
            int(self.weights.total(torch.stack([(part == 0).sum() for part in parts])).sum())
            for parts in (found, images)
        )
        due = int(self.reparametrization.counts_pruned(self.weights).sum())
        if written == due and self._admits(found):
            return found
        if written != left or written == due:
            places = "in other places" if written == due else f"not {due}"
            warn(
                f"Before finalize the model was written in from outside, with {written} zeros, "
                f"{places}, so it was pruned anew, with latent weights of before. If all of "
                "it was written, such as a checkpoint from before the target, call "
                "sparsifier.reset_latents() first: then it is pruned by itself."
            )
        return images

    def _check_count(self) -> None:
        pruned = int(self.reparametrization.counts_pruned(self.weights).sum())
        wanted = round(self.target * self.weights.size)
        if pruned != wanted:
            raise StateError(
                f"Sparsity {self.target} means {wanted} zeros among {self.weights.size} weights, "
                f"but the method left {pruned}. Take the model as it is: finalize(force=True)."
            )

    def _admits(self, parts: Sequence[Tensor]) -> bool:
        """Whether these, of what is here, have their zeros where the method may put them."""
        other = self.weights.like([flat.clone() for flat in self.weights.flats])
        copy_all(other.views, parts)
        return self.reparametrization.admits(other, self._step)

    def _release(self) -> None:
        for handle in self._pull_backs:
            handle.remove()
        for attachment in self._attachments:
            attachment.release()
        self._attached = False

    def require_attached(self) -> None:
        """Raises StateError after `finalize` or `detach`."""
        if not self._attached:
            raise StateError("This sparsifier was finalized or detached: make a new one.")


def _lookup(model: nn.Module, name: str) -> Tensor | None:
    """The parameter called `name` now, None where there is none."""
    module = unwrap(model)
    *path, attribute = name.split(".")
    for part in path:
        child = module._modules.get(part)
        if child is None:
            return None
        compiled = child._modules.get("_orig_mod")
        module = child if compiled is None else compiled
    return module._parameters.get(attribute)


def _layout(parameter: Tensor) -> tuple[Any, ...]:
    here = local(parameter)
    return parameter.dtype, here.device, parameter.shape, here.shape, here.stride()
