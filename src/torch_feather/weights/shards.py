"""Weights that are sharded over processes: layout, local shards, and sums over processes.

`fully_shard` (FSDP2) and `parallelize_module` (tensor parallelism) turn parameters into DTensors.
Each process holds a box of a DTensor: a range of each dimension. Only counts and sums are
communicated; weights are not.

The functions that communicate are collective. All processes must call them in the same order, also
processes whose boxes are empty.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import ConfigurationError
from .counts import count_zeros


class Box(NamedTuple):
    """The part of a tensor that a process holds: its offset and size in each dimension.

    Example:
        >>> torch.arange(6).view(2, 3)[Box((0, 1), (2, 2)).slices].tolist()
        [[1, 2], [4, 5]]
    """

    offset: tuple[int, ...]
    size: tuple[int, ...]

    @property
    def slices(self) -> tuple[slice, ...]:
        """The index that selects the box from the full tensor."""
        return tuple(slice(o, o + n) for o, n in zip(self.offset, self.size, strict=True))


def is_sharded(tensor: Any) -> bool:
    """Return whether a tensor is a DTensor.

    Example:
        >>> is_sharded(torch.ones(2))
        False
    """
    return hasattr(tensor, "to_local")


def local(tensor: Any) -> Tensor:
    """Return the local shard of a DTensor, which shares its memory; a plain tensor itself.

    Example:
        >>> w = torch.ones(2)
        >>> local(w) is w
        True
    """
    if not hasattr(tensor, "to_local"):
        return tensor
    with torch.no_grad():
        return tensor.to_local()


def local_all(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the `local` shards of tensors.

    Example:
        >>> w = nn.Parameter(torch.ones(2))
        >>> local_all([w])[0] is w
        True
    """
    # DTensors have a type of their own, also as parameters.
    plain = set(map(type, tensors)) == {nn.Parameter}
    return list(tensors) if plain else list(map(local, tensors))


def shard_like(part: Tensor, like: Any) -> Tensor:
    """Return a DTensor with the local shard `part`, sharded like `like`.

    Args:
        part: local shard.
        like: tensor that defines mesh, placements and shape; if plain, `part` itself is returned.

    Example:
        >>> part = torch.ones(2)
        >>> shard_like(part, torch.zeros(2)) is part
        True
    """
    if not is_sharded(like):
        return part
    from torch.distributed.tensor import DTensor

    mesh, placements = like.device_mesh, like.placements
    with torch.no_grad():
        return DTensor.from_local(
            part, mesh, placements, run_check=False, shape=like.shape, stride=like.stride()
        )


def local_part(value: Any, like: Any) -> Tensor:
    """Return this process's part of `value`, sharded like `like`.

    Args:
        value: full tensor, or DTensor with any placement.
        like: tensor that defines the placement; if plain, all of `value` is returned.

    Example:
        >>> local_part(torch.ones(2), torch.zeros(2))
        tensor([1., 1.])
    """
    if not is_sharded(like) and not is_sharded(value):
        return value
    with torch.no_grad():
        if not is_sharded(value):
            return value[local_box(like).slices]
        if not is_sharded(like):
            return value.full_tensor()
        return value.redistribute(like.device_mesh, like.placements).to_local()


def local_box(tensor: Any) -> Box:
    """Return the box of a tensor that this process holds; all of it for a plain tensor.

    Example:
        >>> local_box(torch.ones(2, 3))
        Box(offset=(0, 0), size=(2, 3))
    """
    if not is_sharded(tensor):
        return Box((0,) * tensor.dim(), tuple(tensor.shape))
    (chunk,) = tensor.__create_chunk_list__()
    return Box(tuple(chunk.offsets), tuple(local(tensor).shape))


@torch.no_grad()
def count_nonzero(tensor: Any) -> int:
    """Return the number of nonzero elements of a full tensor; the same on every process.

    Args:
        tensor: a plain tensor, or a DTensor, for which the call is collective.

    Example:
        >>> count_nonzero(torch.tensor([0.0, 1.0, 2.0]))
        2
    """
    part = local(tensor)
    count = part.numel() - count_zeros(part)
    if is_sharded(tensor):
        mesh = tensor.device_mesh
        count = count.to(mesh.device_type)
        for i, placement in enumerate(tensor.placements):
            if not placement.is_replicate():
                dist.all_reduce(count, group=mesh.get_group(i))
    return int(count)


def fsdp_units(model: nn.Module) -> list[Any]:
    """Return the modules that `fully_shard` was applied to.

    Example:
        >>> fsdp_units(nn.Linear(2, 2))
        []
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")  # not imported: no module can be one
    return [m for m in model.modules() if isinstance(m, fsdp.FSDPModule)] if fsdp else []


def reshard(model: nn.Module) -> None:
    """Let modules hold their sharded parameters again.

    After an evaluation, modules of `fully_shard` may hold gathered parameters instead.

    Raises:
        ConfigurationError: the model uses FullyShardedDataParallel.

    Example:
        >>> reshard(nn.Linear(2, 2))  # no effect: not sharded
    """
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        raise ConfigurationError(
            "FullyShardedDataParallel flattens the weights, so their shapes are lost. Use its "
            "successor, torch.distributed.fsdp.fully_shard."
        )
    for unit in fsdp_units(model):
        unit.reshard()


def gather(value: Any, groups: Sequence[Any]) -> list[Any]:
    """Return the values of all processes of a mesh.

    Args:
        value: this process's value; can be pickled.
        groups: one process group per dimension of the mesh. Without groups, there is one process.

    Example:
        >>> gather("value", [])
        ['value']
    """
    values = [value]
    for group in groups:
        parts: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(parts, values, group=group)
        values = [one for part in parts for one in part]
    return values


class Shards:
    """The layout of the shards of several parameters, and sums over the processes.

    If several processes hold the same box (of a replicated or plain parameter), the first of them
    counts it.

    Args:
        parameters: at least one DTensor. The largest of their meshes must contain all others.

    Attributes:
        groups: process groups of the dimensions of the largest mesh, without those of one process.
        boxes: local box of each parameter.
        counted: whether this process counts its box of each parameter.

    Raises:
        ConfigurationError: meshes that do not contain each other, or shards that do not make up a
            full parameter.

    Example:
        >>> from torch.distributed.tensor import distribute_tensor, init_device_mesh
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> w = distribute_tensor(torch.ones(2, 3), init_device_mesh("cpu", (1,)))
        >>> Shards([w]).boxes
        [Box(offset=(0, 0), size=(2, 3))]
        >>> dist.destroy_process_group()
    """

    def __init__(self, parameters: Sequence[Any]):
        meshes = [p.device_mesh for p in parameters if is_sharded(p)]
        mesh = max(meshes, key=lambda mesh: mesh.size())
        members = set(mesh.mesh.flatten().tolist())
        if any(not members.issuperset(other.mesh.flatten().tolist()) for other in meshes):
            raise ConfigurationError(
                "No mesh of the prunable weights contains all others, so there is no group of "
                "processes to count in. Shard the weights over one mesh and its submeshes."
            )
        self.groups = [group for group in mesh.get_all_groups() if group.size() > 1]
        self._device = mesh.device_type
        self.boxes = [local_box(p) for p in parameters]
        holders = sorted(gather((dist.get_rank(), self.boxes), self.groups))
        self.counted = [self._counts(i, p, holders) for i, p in enumerate(parameters)]
        # Whether rows are split over processes, by any dimension after the first.
        self._split = [
            any(boxes[i].size[1:] != tuple(p.shape[1:]) for _, boxes in holders)
            for i, p in enumerate(parameters)
        ]
        self._shapes = [p.shape for p in parameters]
        merged = [_merged(p.shape, box) for p, box in zip(parameters, self.boxes, strict=True)]
        depth = max(map(len, merged))
        # Leading dimensions of size 1 change nothing; they give all parameters the same number.
        rows = [[[math.prod(p.shape), 0, 1]] * (depth - len(m)) + m for p, m in
                zip(parameters, merged, strict=True)]  # fmt: skip
        device = local(parameters[0]).device
        self._dims = torch.tensor(rows, device=device).permute(1, 2, 0).unsqueeze(-1)
        self._is_counted = torch.tensor(self.counted, device=device)

    def _counts(
        self, i: int, parameter: Tensor, holders: Sequence[tuple[int, Sequence[Box]]]
    ) -> bool:
        """Return whether this process is the first that holds its box of parameter i."""
        first: dict[Box, int] = {}
        for rank, boxes in holders:
            first.setdefault(boxes[i], rank)
        if sum(math.prod(box.size) for box in first) != parameter.numel():
            raise ConfigurationError(
                f"The shards of a weight of shape {tuple(parameter.shape)} do not make up the "
                "whole weight: they overlap, or the processes have different models."
            )
        return first[self.boxes[i]] == dist.get_rank()

    def part(self, members: Sequence[int]) -> Shards:
        """Return the layout of some of the parameters, by position."""
        other = object.__new__(Shards)
        other.groups, other._device = self.groups, self._device
        other.boxes = [self.boxes[i] for i in members]
        other.counted = [self.counted[i] for i in members]
        other._split = [self._split[i] for i in members]
        other._shapes = [self._shapes[i] for i in members]
        index = torch.tensor(list(members), device=self._dims.device)
        other._dims, other._is_counted = self._dims[:, :, index], self._is_counted[index]
        return other

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum of a tensor over all processes; the argument may be overwritten."""
        device = values.device
        # Offloaded weights are on another device than the one on which the processes communicate.
        values = values.to(self._device)
        for group in self.groups:
            dist.all_reduce(values, group=group)
        return values.to(device)

    def total(self, values: Tensor) -> Tensor:
        """Return the sum over processes of a number, or row, per parameter.

        Each box is counted once.

        Args:
            values: of shape (parameters,) or (parameters, n), computed from the local shards.
        """
        counted = self._is_counted.view(-1, *[1] * (values.dim() - 1))
        return self.sum(torch.where(counted, values, torch.zeros_like(values)))

    def row_means(self, i: int, means: Tensor) -> Tensor:
        """Return means over the full rows of parameter i, from means over their local parts.

        A row is an entry of the first dimension.

        Args:
            i: position of the parameter.
            means: of shape (local rows, n).
        """
        if not self._split[i]:
            return means
        whole = means.new_zeros(self._shapes[i][0], means.shape[1])
        rows, length = self.boxes[i].slices[0], math.prod(self.boxes[i].size[1:])
        if self.counted[i] and length > 0:
            whole[rows] = means * (length / self._shapes[i][1:].numel())
        return self.sum(whole)[rows]

    def below(self, index: Tensor) -> Tensor:
        """Return how many local weights of each parameter precede global flat indices.

        Local and global flat order are both row-major, so a box keeps the order.

        Args:
            index: int64 of shape (parameters, n), from 0 to the number of weights.
        """
        inside = torch.ones_like(index, dtype=torch.bool)
        count, scale = torch.zeros_like(index), self._dims[:, 2].prod(0)
        for stride, low, length in self._dims:
            scale = scale // length.clamp_min(1)
            position = index.div(stride, rounding_mode="floor") - low
            count += torch.where(inside, position.clamp_min(0).minimum(length) * scale, 0)
            inside &= (position >= 0) & (position < length)
            index = index % stride
        return count

    def indices(self, i: int, start: int, stop: int) -> Tensor:
        """Return the global flat indices of local weights start to stop of parameter i.

        Returns:
            int64 of shape (stop - start,), on the CPU.
        """
        position, stride = torch.arange(start, stop), 1
        index = torch.zeros_like(position)
        dims = list(zip(self._shapes[i], *self.boxes[i], strict=True))
        for size, low, length in reversed(dims):
            index += (position % length + low) * stride
            position = position.div(length, rounding_mode="floor")
            stride *= size
        return index


def shards_of(parameters: Iterable[Tensor]) -> Shards | None:
    """Return the layout of the shards of parameters, None if all of them are plain.

    Example:
        >>> shards_of([torch.ones(2)]) is None
        True
    """
    parameters = list(parameters)
    return Shards(parameters) if any(map(is_sharded, parameters)) else None


def _merged(shape: Sequence[int], box: Box) -> list[list[int]]:
    """Return a box as few dimensions [stride, first, length], outermost first.

    A dimension that the box fills is merged with the one before it.
    """
    dims: list[list[int]] = []
    stride, full = 1, True
    for size, low, length in reversed(list(zip(shape, *box, strict=True))):
        if full and dims:
            inner = dims[0][2]
            dims[0] = [dims[0][0], low * inner, length * inner]
        else:
            dims.insert(0, [stride, low, length])
        full = full and length == size
        stride *= size
    return dims or [[1, 0, 1]]
