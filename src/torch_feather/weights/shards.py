"""Weights that are spread over processes: what each of them holds, and sums over all.

`fully_shard` (FSDP2) and `parallelize_module` (tensor parallel) turn parameters into DTensors, of
which each process holds a box: a range of each dimension. All that has to be known in common are
counts; they are summed over the processes, and the weights stay where they are.

Every process must come through here in the same order, also one whose boxes are empty.
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


class Box(NamedTuple):
    """The part of a tensor that a process holds: where it begins, and its size."""

    offset: tuple[int, ...]
    size: tuple[int, ...]

    @property
    def slices(self) -> tuple[slice, ...]:
        """What selects it from the whole tensor."""
        return tuple(slice(o, o + n) for o, n in zip(self.offset, self.size, strict=True))


def is_sharded(tensor: Any) -> bool:
    """Whether a tensor is a DTensor, of which other processes may hold other parts."""
    return hasattr(tensor, "to_local")


def local(tensor: Any) -> Tensor:
    """What this process holds of a tensor, in its own memory; a plain tensor itself."""
    if not is_sharded(tensor):
        return tensor
    with torch.no_grad():
        return tensor.to_local()


@torch.no_grad()
def shard_like(part: Tensor, like: Any) -> Tensor:
    """`part` as the local tensor of a DTensor laid out like another; itself where that is plain."""
    if not is_sharded(like):
        return part
    from torch.distributed.tensor import DTensor

    mesh, placements = like.device_mesh, like.placements
    return DTensor.from_local(
        part, mesh, placements, run_check=False, shape=like.shape, stride=like.stride()
    )


@torch.no_grad()
def local_part(value: Any, like: Any) -> Tensor:
    """Of a whole tensor, plain or spread in any way, what this process holds of `like`."""
    if is_sharded(value):
        if is_sharded(like):
            value = value.redistribute(like.device_mesh, like.placements)
            return value.to_local()
        return value.full_tensor()
    return value[local_box(like).slices] if is_sharded(like) else value


def local_box(tensor: Any) -> Box:
    """Which part of a tensor this process holds."""
    if not is_sharded(tensor):
        return Box((0,) * tensor.dim(), tuple(tensor.shape))
    (chunk,) = tensor.__create_chunk_list__()
    return Box(tuple(chunk.offsets), tuple(local(tensor).shape))


@torch.no_grad()
def count_nonzero(tensor: Any) -> int:
    """How many elements of a tensor, spread or not, are not 0; the same on every process."""
    count = local(tensor).count_nonzero()
    if is_sharded(tensor):
        mesh = tensor.device_mesh
        count = count.to(mesh.device_type)
        for i, placement in enumerate(tensor.placements):
            if not placement.is_replicate():
                dist.all_reduce(count, group=mesh.get_group(i))
    return int(count)


def fsdp_units(model: nn.Module) -> list[Any]:
    """The modules that `fully_shard` was applied to."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # only who imported it can have used it
    return [m for m in model.modules() if isinstance(m, fsdp.FSDPModule)] if fsdp else []


def reshard(model: nn.Module) -> None:
    """Modules show their sharded parameters again; after an evaluation some show gathered ones.

    Raises:
        ConfigurationError: the model is sharded in another way, which shows none.
    """
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        raise ConfigurationError(
            "FullyShardedDataParallel flattens the weights, so that their shapes are lost. Use its "
            "successor: torch.distributed.fsdp.fully_shard."
        )
    for unit in fsdp_units(model):
        unit.reshard()


def gather(value: Any, groups: Sequence[Any]) -> list[Any]:
    """The values of all processes of groups, each of which is one dimension of a mesh."""
    values = [value]
    for group in groups:
        parts: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(parts, values, group=group)
        values = [one for part in parts for one in part]
    return values


class Shards:
    """Where the shards of several parameters lie.

    Of parameters that several processes hold (replicated ones, plain ones), the first counts.

    Args:
        parameters: some of them DTensors. All meshes must be parts of the largest of them.
    """

    def __init__(self, parameters: Sequence[Any]):
        meshes = [p.device_mesh for p in parameters if is_sharded(p)]
        mesh = max(meshes, key=lambda mesh: mesh.size())
        members = set(mesh.mesh.flatten().tolist())
        if any(not members.issuperset(other.mesh.flatten().tolist()) for other in meshes):
            raise ConfigurationError(
                "The prunable weights lie on meshes of which none contains the others, so there "
                "is no group of processes to count in. Shard them over one mesh and its submeshes."
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
        # A dimension of size 1 in front changes nothing.
        rows = [[[math.prod(p.shape), 0, 1]] * (depth - len(m)) + m for p, m in
                zip(parameters, merged, strict=True)]  # fmt: skip
        device = local(parameters[0]).device
        self._dims = torch.tensor(rows, device=device).permute(1, 2, 0).unsqueeze(-1)
        self._is_counted = torch.tensor(self.counted, device=device)

    def _counts(
        self, i: int, parameter: Tensor, holders: Sequence[tuple[int, Sequence[Box]]]
    ) -> bool:
        """Whether this process is the first that holds its box of parameter i."""
        first: dict[Box, int] = {}
        for rank, boxes in holders:
            first.setdefault(boxes[i], rank)
        if sum(math.prod(box.size) for box in first) != parameter.numel():
            raise ConfigurationError(
                f"The shards of a weight of shape {tuple(parameter.shape)} do not make up the "
                "whole of it: processes hold parts that overlap, or have different models."
            )
        return first[self.boxes[i]] == dist.get_rank()

    def part(self, members: Sequence[int]) -> Shards:
        """The shards of some of the parameters."""
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
        """The sum over all processes, perhaps in place."""
        device = values.device
        values = values.to(self._device)  # weights may be offloaded from where the processes meet
        for group in self.groups:
            dist.all_reduce(values, group=group)
        return values.to(device)

    def total(self, values: Tensor) -> Tensor:
        """The sum of one number, or row, for each parameter, every weight counted once."""
        counted = self._is_counted.view(-1, *[1] * (values.dim() - 1))
        return self.sum(torch.where(counted, values, torch.zeros_like(values)))

    def row_means(self, i: int, means: Tensor) -> Tensor:
        """Means over the rows (first dimension) of parameter i, of those over their parts here.

        Args:
            i: the parameter.
            means: of shape (rows here, n).
        """
        if not self._split[i]:
            return means
        whole = means.new_zeros(self._shapes[i][0], means.shape[1])
        rows, here = self.boxes[i].slices[0], math.prod(self.boxes[i].size[1:])
        if self.counted[i] and here > 0:
            whole[rows] = means * (here / self._shapes[i][1:].numel())
        return self.sum(whole)[rows]

    def below(self, index: Tensor) -> Tensor:
        """How many weights of each parameter that are here precede an index of the whole.

        Both orders are those of nested loops over the dimensions, so a box keeps the order.

        Args:
            index: of shape (parameters, n), from 0 to the number of weights, int64.
        """
        inside = torch.ones_like(index, dtype=torch.bool)
        count, scale = torch.zeros_like(index), self._dims[:, 2].prod(0)
        for stride, low, length in self._dims:
            scale = scale // length.clamp_min(1)
            place = index.div(stride, rounding_mode="floor") - low
            count += torch.where(inside, place.clamp_min(0).minimum(length) * scale, 0)
            inside &= (place >= 0) & (place < length)
            index = index % stride
        return count

    def indices(self, i: int, start: int, stop: int) -> Tensor:
        """The index in the whole of weights start to stop of parameter i here, int64 on the CPU."""
        place, stride = torch.arange(start, stop), 1
        index = torch.zeros_like(place)
        dims = list(zip(self._shapes[i], *self.boxes[i], strict=True))
        for size, low, length in reversed(dims):
            index += (place % length + low) * stride
            place = place.div(length, rounding_mode="floor")
            stride *= size
        return index


def shards_of(parameters: Iterable[Tensor]) -> Shards | None:
    """The shards of parameters, None where all of them are plain."""
    parameters = list(parameters)
    return Shards(parameters) if any(map(is_sharded, parameters)) else None


def _merged(shape: Sequence[int], box: Box) -> list[list[int]]:
    """The dimensions of a box as few [stride, first, length], outermost first.

    Dimensions that it fills are merged with the one before them.
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
