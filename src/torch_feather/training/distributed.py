"""Several processes that train one network, as `torchrun` starts them.

All ranks hold the same network and draw the same random order; each takes its part of every batch.
The first one alone writes files and speaks to the user.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .errors import RunError

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together; alone, nothing is exchanged."""

    rank: int = 0
    count: int = 1
    local: int = 0  # rank within this machine

    @property
    def first(self) -> bool:
        """Whether this process writes files."""
        return self.rank == 0

    def part(self, start: int, stop: int) -> slice:
        """This rank's part of a range; parts follow each other and differ by at most 1."""
        bounds = (start + r * (stop - start) // self.count for r in (self.rank, self.rank + 1))
        return slice(*bounds)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks, in place."""
        if self.count > 1:
            dist.all_reduce(tensor)
        return tensor

    def agree(self, *flags: bool) -> tuple[bool, ...]:
        """For each flag, whether it is set on any rank. The device is not waited for."""
        if self.count == 1:
            return flags
        votes = torch.tensor(flags, dtype=torch.uint8)
        dist.all_reduce(votes, op=dist.ReduceOp.MAX)
        return tuple(bool(vote) for vote in votes)

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, in their order."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value)
        return values

    def on_first(self, action: Callable[[], T]) -> T:
        """What `action` gives on the first rank, given to all; raises there what it raises."""
        if self.count == 1:
            return action()
        outcome: list[Any] = [None, None]
        if self.first:
            try:
                outcome[0] = action()
            except Exception as error:
                outcome[1] = error
        dist.broadcast_object_list(outcome, src=0)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    def one_after_another(self, action: Callable[[], T]) -> T:
        """What `action` gives here; all raise what it raises on any rank.

        One rank per machine goes before the others, who find what it left on disk.
        """
        result: Any = None
        for turn in (True, False):
            error = None
            if (self.local == 0) is turn:
                try:
                    result = action()
                except Exception as raised:
                    error = raised
            for first in filter(None, self.gather(error)):
                raise first
        return result

    def same_buffers(self, model: nn.Module) -> None:
        """All ranks take the first one's buffers, such as the statistics of batch norms."""
        if self.count > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, src=0)


@contextmanager
def joined() -> Iterator[Ranks]:
    """The ranks that `torchrun` started, or this process alone; may be nested.

    Raises:
        RunError: another rank has ended, which makes every exchange with it fail.
    """
    if dist.is_available() and dist.is_initialized():
        yield _ranks()
    elif int(os.environ.get("WORLD_SIZE", "1")) > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        try:
            yield _ranks()
        except RuntimeError as error:
            if "by peer" not in str(error):  # Connection closed, or reset
                raise
            raise RunError(
                "another process of this run has ended; its own message says why"
            ) from None
        # Not after an error: it would wait for ranks that are waiting for this one.
        dist.destroy_process_group()
    else:
        yield Ranks()


def _ranks() -> Ranks:
    rank = dist.get_rank()
    return Ranks(rank, dist.get_world_size(), int(os.environ.get("LOCAL_RANK", rank)))
