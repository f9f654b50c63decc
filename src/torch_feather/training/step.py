"""One training step: forward, backward, gradient clipping and optimizer.

A step never synchronizes with the device: the loss accumulates there and is read once per epoch.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from ..deprecation import renamed_names
from ..errors import ConfigurationError
from ..sparsifier import Sparsifier
from .config import Config
from .data import Batch
from .distillation import Distillation
from .distributed import Ranks
from .losses import make_loss
from .mixing import Mixing
from .optimizer import SCALE, set_learning_rate
from .precision import autocast

__getattr__ = renamed_names(__name__, {"Captured": "CudaGraphStep"})


class Step:
    """A training step. Sparsification needs no code here: it is attached to the optimizer.

    Args:
        model: the network.
        optimizer: the optimizer of its parameters.
        sparsifier: what `sparsify` returned; None for dense training.
        config: the configuration of the run.
        device: the device of the network.
        ranks: the processes that train together.
        distillation: the loss with a teacher, if there is one.
        mixing: Mixup or CutMix, if there is one.

    Attributes:
        network: the model as it is called: distributed and compiled as configured.
        loss_sum: sum of the losses of this rank's images since it was last set to 0.

    Example:
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2, bias=False))
        >>> _ = nn.init.zeros_(model[1].weight)
        >>> optimizer, config = torch.optim.SGD(model.parameters()), Config(batch_size=3)
        >>> step = Step(model, optimizer, None, config, torch.device("cpu"), Ranks())
        >>> step(Batch(torch.ones(3, 1, 2, 2), torch.tensor([0, 0, 0]), total=3), lr=0.1)
        >>> step.loss_sum / 3, model[1].weight[:, 0]
        (tensor(0.6931), tensor([ 0.0500, -0.0500], grad_fn=<SelectBackward0>))
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        sparsifier: Sparsifier | None,
        config: Config,
        device: torch.device,
        ranks: Ranks,
        distillation: Distillation | None = None,
        mixing: Mixing | None = None,
    ) -> None:
        self.model, self.optimizer, self.sparsifier = model, optimizer, sparsifier
        self.options, self.amp = config.optimizer, config.system.amp
        self.device, self.ranks = device, ranks
        self.distillation, self.mixing = distillation, mixing
        self.loss = make_loss(config)
        self.batch_size = config.batch_size
        part = ranks.part(0, config.batch_size)
        images = part.stop - part.start
        self.size = min(config.system.micro_batch or images, images)
        self.uncompiled: nn.Module = model
        if ranks.count > 1:
            self.uncompiled = DistributedDataParallel(model)
        self.network = self.uncompiled
        if config.system.compile:
            self.network = torch.compile(self.uncompiled, dynamic=False)  # type: ignore[assignment]
        self.loss_sum = torch.zeros((), device=device)
        self.cuda_graph = CudaGraphStep(self, device, ranks) if config.system.cuda_graph else None

    def __call__(self, batch: Batch, lr: float) -> None:
        """Train on this rank's part of a batch.

        Args:
            batch: the part.
            lr: the learning rate.
        """
        if self.mixing is not None:
            batch = self.mixing(batch)
        if self.cuda_graph is not None:
            self.cuda_graph(batch, lr)
            return
        set_learning_rate(self.optimizer, lr)
        self.run(batch)

    def run(self, batch: Batch) -> None:
        """Train on this rank's part of a batch at the optimizer's present learning rate.

        Methods that train with random masks may use several passes, see `Sparsifier.passes`.
        """
        fractions = [1.0] if self.sparsifier is None else self.sparsifier.passes()
        for fraction in fractions:
            self._backward(batch, fraction)
        if self.options.clip is not None:
            clipped: list[Tensor] = [*self.model.parameters()]
            if self.sparsifier is not None and self.sparsifier.clips_own_parameters:
                self.sparsifier.complete_gradients()
                clipped += self.sparsifier.parameters()
            nn.utils.clip_grad_norm_(clipped, self.options.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _backward(self, batch: Batch, weight: float) -> None:
        """Add `weight` times the gradient of the mean loss over all images of all ranks.

        The batch is processed in parts of at most `size` images, one after another.
        """
        if len(batch.y) == 0:
            self._exchange_only(batch.x)
        parts = list(zip(batch.x.split(self.size), batch.y.split(self.size), strict=True))
        parts = [(x, y) for x, y in parts if len(y)]
        for i, (x, y) in enumerate(parts):
            # The network is compiled for one shape: a smaller part would compile it again.
            whole = len(y) == self.size
            network = self.network if whole else self.uncompiled
            with self._no_exchange(i < len(parts) - 1):
                with autocast(self.device, self.amp):
                    logits = network(x)
                    loss = self.loss(logits, y)
                    if self.distillation is not None:
                        loss = self.distillation(loss, logits, x, whole)
                # DistributedDataParallel averages over the ranks; this makes it a sum.
                fraction = weight * len(y) * self.ranks.count / batch.total
                (loss if fraction == 1 else loss * fraction).backward()
            self.loss_sum += loss.detach() * (weight * len(y))

    def _exchange_only(self, empty: Tensor) -> None:
        """Exchange gradients on a rank without images; batch norms must not count the batch."""
        self.model.eval()
        self.uncompiled(empty).sum().backward()
        self.model.train()

    def _no_exchange(self, more: bool) -> AbstractContextManager[None]:
        """Skip the exchange of gradients if more parts follow: once per step is enough."""
        if more and isinstance(self.uncompiled, DistributedDataParallel):
            return self.uncompiled.no_sync()
        return nullcontext()


class CudaGraphStep:
    """A training step recorded once as a CUDA graph and replayed, without work on the host.

    Batches of another size, such as the last of an epoch, are processed without the graph.

    Args:
        step: the step to record.
        device: the device of the network.
        ranks: the processes that train together.

    Raises:
        ConfigurationError: `device` is not a CUDA device, or there are several processes.

    Example:
        >>> model = nn.Linear(4, 2)
        >>> optimizer, cpu = torch.optim.SGD(model.parameters(), lr=0.1), torch.device("cpu")
        >>> step = Step(model, optimizer, None, Config(), cpu, Ranks())
        >>> try:
        ...     CudaGraphStep(step, cpu, Ranks())
        ... except ConfigurationError as error:
        ...     print(error)
        system.cuda_graph requires a CUDA device, got cpu. Set system.cuda_graph=false.
    """

    WARM_UP = 3  # steps before the recording, in which libraries and allocators settle; they count

    def __init__(self, step: Step, device: torch.device, ranks: Ranks) -> None:
        if device.type != "cuda":
            raise ConfigurationError(
                f"system.cuda_graph requires a CUDA device, got {device}. "
                "Set system.cuda_graph=false."
            )
        if ranks.count > 1:
            raise ConfigurationError(
                f"system.cuda_graph supports one process, got {ranks.count}. "
                "Set system.cuda_graph=false, or start one process."
            )
        self.step = step
        self.rates = [torch.zeros((), device=device) for _ in step.optimizer.param_groups]
        self.left = self.WARM_UP
        self.stream = torch.cuda.Stream(device)
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, batch: Batch, lr: float) -> None:
        """Train on a batch, as `Step` does."""
        groups = self.step.optimizer.param_groups
        for rate, group in zip(self.rates, groups, strict=True):
            rate.fill_(lr * group.get(SCALE, 1.0))
            group["lr"] = rate
        if batch.total != self.step.batch_size:
            self.step.run(batch)
        elif self.left > 0:
            self.left -= 1
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                self.step.run(batch)
            torch.cuda.current_stream().wait_stream(self.stream)
        else:
            self.graph = self.graph or self._capture(batch)
            self.batch.x.copy_(batch.x)
            self.batch.y.copy_(batch.y)
            self.graph.replay()

    def _capture(self, batch: Batch) -> torch.cuda.CUDAGraph:
        """Record a step. Recording computes nothing, so no step is taken."""
        self.batch = Batch(batch.x.clone(), batch.y.clone(), batch.total)
        graph = torch.cuda.CUDAGraph()
        # thread_local: other threads, such as the one that pins memory, may use the device.
        with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
            self.step.run(self.batch)
        return graph
