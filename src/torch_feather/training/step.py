"""One training step, and ways to run it faster that train the same network.

Nothing in a step waits for the device: the loss is added up there, and read once per epoch.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from ..errors import ConfigurationError
from ..sparsifier import Sparsifier
from .config import Config
from .data import Batch
from .distillation import Distillation
from .distributed import Ranks
from .precision import autocast


class Step:
    """Forward, backward, clip, optimizer; sparsification rides on the optimizer.

    Attributes:
        network: the model as it is called, compiled where that was asked for.
        loss_sum: sum of the losses of this rank's images since it was last set to 0.
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
    ) -> None:
        self.model, self.optimizer, self.sparsifier = model, optimizer, sparsifier
        self.options, self.amp = config.optimizer, config.system.amp
        self.device, self.ranks = device, ranks
        self.distillation = distillation
        self.batch_size = config.batch_size
        part = ranks.part(0, config.batch_size)
        share = part.stop - part.start
        self.size = min(config.system.micro_batch or share, share)
        self.plain: nn.Module = model
        if ranks.count > 1:
            self.plain = DistributedDataParallel(model)
        self.network = self.plain
        if config.system.compile:
            self.network = torch.compile(self.plain, dynamic=False)  # type: ignore[assignment]
        self.loss_sum = torch.zeros((), device=device)
        self.captured = Captured(self, device, ranks) if config.system.graph else None

    def __call__(self, batch: Batch, lr: float) -> None:
        """Train on this rank's part of a batch."""
        if self.captured is not None:
            self.captured(batch, lr)
            return
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.run(batch)

    def run(self, batch: Batch) -> None:
        """The step itself, at the learning rate that the optimizer holds.

        Methods that train by random masks may take several passes, see `Sparsifier.passes`.
        """
        shares = [1.0] if self.sparsifier is None else self.sparsifier.passes()
        for share in shares:
            self._backward(batch, share)
        if self.options.clip is not None:
            clipped: list[Tensor] = [*self.model.parameters()]
            if self.sparsifier is not None and self.sparsifier.clips_own_parameters:
                self.sparsifier.complete_gradients()
                clipped += self.sparsifier.parameters()
            nn.utils.clip_grad_norm_(clipped, self.options.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _backward(self, batch: Batch, weight: float) -> None:
        """Adds up the gradients of a batch, times `weight`.

        Parts of at most `size` images go through the network one after another. The gradient is
        the mean over all images of all ranks.
        """
        if len(batch.y) == 0:
            self._exchange_only(batch.x)
        parts = list(zip(batch.x.split(self.size), batch.y.split(self.size), strict=True))
        parts = [(x, y) for x, y in parts if len(y)]
        for i, (x, y) in enumerate(parts):
            # Compiled for one shape: a smaller part would be compiled anew.
            whole = len(y) == self.size
            network = self.network if whole else self.plain
            with self._alone(i < len(parts) - 1):
                with autocast(self.device, self.amp):
                    smoothing = self.options.label_smoothing
                    logits = network(x)
                    loss = F.cross_entropy(logits, y, label_smoothing=smoothing)
                    if self.distillation is not None:
                        loss = self.distillation(loss, logits, x, whole)
                # Ranks are averaged by what wraps the network.
                share = weight * len(y) * self.ranks.count / batch.total
                (loss if share == 1 else loss * share).backward()
            self.loss_sum += loss.detach() * (weight * len(y))

    def _exchange_only(self, nothing: Tensor) -> None:
        """For a rank that no image of the batch came to; batch norms must not count it."""
        self.model.eval()
        self.plain(nothing).sum().backward()
        self.model.train()

    def _alone(self, more: bool) -> AbstractContextManager[None]:
        """Gradients are exchanged once per step, with the last part."""
        if more and isinstance(self.plain, DistributedDataParallel):
            return self.plain.no_sync()
        return nullcontext()


class Captured:
    """Whole steps, recorded once as a CUDA graph and replayed: the host only starts them.

    Steps on batches of another size, such as an epoch's last, run as they are.
    """

    WARM_UP = 3  # steps in which libraries and allocators settle; they train like all others

    def __init__(self, step: Step, device: torch.device, ranks: Ranks) -> None:
        if device.type != "cuda":
            raise ConfigurationError(
                f"system.graph needs a CUDA device, this is {device}; set it to false"
            )
        if ranks.count > 1:
            raise ConfigurationError(
                "system.graph captures the steps of one process alone; set it to false, or start "
                "one process"
            )
        self.step = step
        self.lr = torch.zeros((), device=device)
        self.left = self.WARM_UP
        self.stream = torch.cuda.Stream(device)
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, batch: Batch, lr: float) -> None:
        """Like `Step.__call__`."""
        self.lr.fill_(lr)
        for group in self.step.optimizer.param_groups:
            group["lr"] = self.lr
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
        """Record a step; nothing is computed, so no step is taken."""
        self.batch = Batch(batch.x.clone(), batch.y.clone(), batch.total)
        graph = torch.cuda.CUDAGraph()
        # Other threads, such as one that pins memory, may go on using the device.
        with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
            self.step.run(self.batch)
        return graph
