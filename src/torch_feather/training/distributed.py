"""Data-parallel training with several processes, as `torchrun` starts them.

All ranks hold the same network and draw the same random order; each takes its part of every batch.
Only the first rank writes files and prints messages.
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

from ..deprecation import renamed_names
from .errors import RunError

T = TypeVar("T")

__getattr__ = renamed_names(__name__, {"joined": "process_group"})


@dataclass(frozen=True)
class Ranks:
    """The rank of this process and the number of processes. With one, nothing is communicated.

    Attributes:
        rank: index of this process.
        count: number of processes.
        local: rank within this machine.

    Example:
        >>> Ranks().first
        True
    """

    rank: int = 0
    count: int = 1
    local: int = 0

    @property
    def first(self) -> bool:
        """Whether this process writes files."""
        return self.rank == 0

    def part(self, start: int, stop: int) -> slice:
        """Return this rank's part of a range. The sizes of the parts differ by at most 1.

        Example:
            >>> Ranks(0, 2).part(0, 5), Ranks(1, 2).part(0, 5)
            (slice(0, 2, None), slice(2, 5, None))
        """
        bounds = (start + r * (stop - start) // self.count for r in (self.rank, self.rank + 1))
        return slice(*bounds)

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum `tensor` over all ranks in place, and return it."""
        if self.count > 1:
            dist.all_reduce(tensor)
        return tensor

    def agree(self, *flags: bool) -> tuple[bool, ...]:
        """Return for each flag whether it is set on any rank. Does not synchronize the device."""
        if self.count == 1:
            return flags
        votes = torch.tensor(flags, dtype=torch.uint8)
        dist.all_reduce(votes, op=dist.ReduceOp.MAX)
        return tuple(bool(vote) for vote in votes)

    def gather(self, value: T) -> list[T]:
        """Return the values of all ranks, ordered by rank."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value)
        return values

    def on_first(self, action: Callable[[], T]) -> T:
        """Call `action` on the first rank, and return its result on all ranks.

        An exception of `action` is raised on all ranks.
        """
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

    def local_first(self, action: Callable[[], T]) -> T:
        """Call `action` on one rank per machine, then on the others, which find its files.

        Returns:
            The result of `action` on this rank. An exception on any rank is raised on all ranks.
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

    def broadcast_buffers(self, model: nn.Module) -> None:
        """Copy the first rank's buffers, such as batch norm statistics, to all ranks."""
        if self.count > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, src=0)


@contextmanager
def process_group() -> Iterator[Ranks]:
    """Join the processes that `torchrun` started; without `torchrun`, yield a single rank.

    The context may be nested: an existing process group is used.

    Raises:
        RunError: another rank has ended, so that communication with it fails.

    Example:
        >>> with process_group() as ranks:
        ...     ranks.count
        1
    """
    if dist.is_available() and dist.is_initialized():
        yield _ranks()
    elif int(os.environ.get("WORLD_SIZE", "1")) > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        try:
            yield _ranks()
        except RuntimeError as error:
            if "by peer" not in str(error):  # "Connection closed by peer" or "reset by peer"
                raise
            raise RunError("another process of this run has ended; see its own message") from None
        # Not after an error: it would wait for ranks that wait for this one.
        dist.destroy_process_group()
    else:
        yield Ranks()


def _ranks() -> Ranks:
    rank = dist.get_rank()
    return Ranks(rank, dist.get_world_size(), int(os.environ.get("LOCAL_RANK", rank)))
