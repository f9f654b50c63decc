"""The latent weights: one flat copy of all prunable weights per type, and views of it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import devices
from ..selection.cpu import Collected
from ..threads import for_each
from .candidates import Candidates
from .counts import count_zeros
from .shards import local, shards_of

# Weights per block on a CPU: a block stays in the L2 cache.
BLOCK = 1 << 16
# Weights per block on other devices: enough to fill them, and few compared with a large network.
DEVICE_BLOCK = 1 << 24
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class PerTensor(NamedTuple):
    """Numbers that belong to weight tensors: `rows[i]` is a view of `flat` and belongs to tensor i.

    With one number per weight, rows have the shapes of the weight tensors; with one number per
    tensor, they are 0-dimensional.

    Example:
        >>> thresholds = PerTensor.of(torch.tensor([0.5, 1.0]))
        >>> thresholds.rows[1], thresholds.per_weight
        (tensor(1.), False)
    """

    flat: Tensor
    rows: list[Tensor]

    @property
    def per_weight(self) -> bool:
        """Whether there is a number for each weight, rather than one per weight tensor."""
        return bool(self.rows) and self.rows[0].dim() > 0

    def clone(self) -> PerTensor:
        """Return a copy in new memory."""
        flat = self.flat.clone()
        start = self.flat.storage_offset()
        rows = [flat.as_strided(r.shape, r.stride(), r.storage_offset() - start) for r in self.rows]
        return PerTensor(flat, rows)

    @classmethod
    def of(cls, flat: Tensor) -> PerTensor:
        """Return one number per weight tensor, given as a tensor of shape (tensors,)."""
        return cls(flat, list(flat.unbind()))


@dataclass
class Part:
    """Weights of one type: their flat latent values, and their start among the local weights.

    Example:
        >>> weights = LatentWeights([torch.ones(2), torch.ones(3, dtype=torch.bfloat16)])
        >>> [(part.flat.dtype, part.start, part.stop) for part in weights.parts]
        [(torch.float32, 0, 2), (torch.bfloat16, 2, 5)]
    """

    flat: Tensor
    start: int
    views: list[Tensor]

    @property
    def stop(self) -> int:
        """End of the range among the local weights."""
        return self.start + self.flat.numel()


class LatentWeights:
    """The dense weights w of parameters that hold effective weights u.

    The flat order is: parameters grouped by type, in the order given, each in the order of its
    memory. It decides which of several tied weights are pruned.

    If parameters are DTensors, the weights are the local shards of this process, in global order.
    Then `flats`, `views`, `local_spans` and everything computed per weight are local; `size`,
    `sizes`, `shapes`, `spans`, counts and thresholds are global.

    Args:
        parameters: tensors on one device, each dense in memory. They are only read.

    Attributes:
        size: number of weights. `sizes`: of each tensor, int64 of shape (tensors,) on the device.
        shapes: shapes of the tensors.
        spans: range of each tensor in the flat order.
        local_spans: range of each tensor's local shard among the local weights.
        views: local shard of each tensor, in its shape.
        parts: the weights of each type.
        shards: layout of the shards; None if all weights are local.
        wide: type of magnitudes and thresholds: float64 if a parameter is, else float32.
        device: device of the weights.
        collected: what the next selection from a range of local weights needs, by the range, if a
            copy has collected it.
        candidates: weights that may be kept, by range, if a copy has found them.
        candidate_versions: versions of `flats` at that time.

    Example:
        >>> weights = LatentWeights([torch.tensor([[1.0, -2.0]]), torch.tensor([3.0])])
        >>> weights.size, weights.spans
        (3, [(0, 2), (2, 3)])
        >>> weights.magnitudes().tolist()
        [1.0, 2.0, 3.0]
    """

    def __init__(self, parameters: Sequence[Tensor]):
        self.shards = shards_of(parameters)
        self.shapes = [p.shape for p in parameters]
        sizes = [shape.numel() for shape in self.shapes]
        self.size = sum(sizes)
        held = [local(p).detach() for p in parameters]
        # Half precision is ranked and thresholded in float32.
        double = any(p.dtype == torch.float64 for p in parameters)
        self.wide = torch.float64 if double else torch.float32
        self.device = held[0].device
        self.sizes = torch.tensor(sizes, device=self.device)
        self.views: list[Tensor] = [torch.empty(0)] * len(parameters)
        self.spans: list[tuple[int, int]] = [(0, 0)] * len(parameters)
        self.local_spans: list[tuple[int, int]] = [(0, 0)] * len(parameters)
        self.parts: list[Part] = []
        self.collected: dict[tuple[int, int], Collected] = {}
        self.candidates: dict[int, Candidates] = {}
        self.candidate_versions: list[int] = []
        self._constants: dict[Hashable, Any] = {}
        start = first = 0
        for dtype in dict.fromkeys(p.dtype for p in parameters):
            members = [i for i, p in enumerate(parameters) if p.dtype == dtype]
            flat = torch.empty(
                sum(held[i].numel() for i in members), dtype=dtype, device=self.device
            )
            part = Part(flat, start, [])
            for i in members:
                p, stop, end = held[i], start + held[i].numel(), first + sizes[i]
                view = flat.as_strided(p.shape, p.stride(), start - part.start)
                self.local_spans[i], self.spans[i] = (start, stop), (first, end)
                self.views[i] = view
                part.views.append(view)
                start, first = stop, end
            self.parts.append(part)
            copy_all(part.views, [held[i] for i in members])
        self._index()

    def _index(self) -> None:
        """Map the bounds of each weight tensor to bounds among the local weights."""
        pairs = zip(self.spans, self.local_spans, strict=True)
        self._bounds = {a: b for span, own in pairs for a, b in zip(span, own, strict=True)}

    @property
    def flats(self) -> list[Tensor]:
        """The flat latent weights, one tensor per type."""
        return [part.flat for part in self.parts]

    def constant(self, key: Hashable, make: Callable[[LatentWeights], Any]) -> Any:
        """Return `make(self)`, computed once per `key`.

        Args:
            key: identifies the constant.
            make: computes it from the layout alone (shapes, sizes, device).
        """
        if key not in self._constants:
            self._constants[key] = make(self)
        return self._constants[key]

    def local_range(self, start: int, stop: int) -> tuple[int, int]:
        """Return the local range of the global range [start, stop).

        Both bounds must be bounds of weight tensors.
        """
        return self._bounds[start], self._bounds[stop]

    def magnitudes(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Return |w| of the local weights of [start, stop), a new flat tensor of type `wide`."""
        return self.local_magnitudes(*self.local_range(start, self.size if stop is None else stop))

    def local_magnitudes(self, start: int, stop: int) -> Tensor:
        """Return |w| of the local weights start to stop, a new flat tensor of type `wide`."""
        out = torch.empty(stop - start, dtype=self.wide, device=self.device)
        for part in self.parts:
            a, b = max(start, part.start), min(stop, part.stop)
            if a < b:
                source = part.flat[a - part.start : b - part.start]
                target = out[a - start : b - start]
                if source.dtype == out.dtype:
                    torch.abs(source, out=target)
                else:
                    target.copy_(source).abs_()
        return out

    def total(self, values: Tensor) -> Tensor:
        """Return global sums of local values, one value or row per weight tensor."""
        return values if self.shards is None else self.shards.total(values)

    def common(self, value: Tensor) -> Tensor:
        """Return the sum of a value over all processes that hold weights."""
        return value if self.shards is None else self.shards.sum(value)

    def row_means(self, i: int, means: Tensor) -> Tensor:
        """Return means over the full rows of tensor i, from means over their local parts.

        Args:
            i: position of the weight tensor.
            means: of shape (local rows, n).
        """
        return means if self.shards is None else self.shards.row_means(i, means)

    def per_weight(self, value: float | None, dtype: torch.dtype | None = None) -> PerTensor:
        """Return `value` for each local weight, in type `wide` and the layout of the weights.

        Args:
            value: the number; None to leave the memory uninitialized.
            dtype: another type.
        """
        size = sum(flat.numel() for flat in self.flats)
        flat = devices.empty(size, dtype or self.wide, self.device)
        if value is not None:
            flat.fill_(value)
        spans = zip(self.views, self.local_spans, strict=True)
        return PerTensor(flat, [flat.as_strided(w.shape, w.stride(), a) for w, (a, _) in spans])

    def zeros(self) -> Tensor:
        """Return the number of exact zeros of each tensor, int64; 0 for tensors that are all zero.

        A tensor that is all zero was not pruned: it was initialized to 0 and is still to learn.
        """
        zeros = self.total(torch.stack([count_zeros(view) for view in self.views]))
        return zeros.masked_fill(zeros == self.sizes, 0)

    def part_of(self, i: int) -> Part:
        """Return the part that holds weight tensor i, which may have no local weights."""
        (start, stop), dtype = self.local_spans[i], self.views[i].dtype
        return next(
            part
            for part in self.parts
            if part.flat.dtype == dtype and part.start <= start and stop <= part.stop
        )

    def subset(self, members: Sequence[int]) -> LatentWeights:
        """Return some of the weight tensors as if they were all: the same memory and order."""
        other = object.__new__(LatentWeights)
        other.__dict__.update(self.constant(("subset", *members), lambda _: self._subset(members)))
        other.views = [self.views[i] for i in members]
        other.parts = []
        for i, (start, _), view in zip(members, other.local_spans, other.views, strict=True):
            (a, b), whole = self.local_spans[i], self.part_of(i)
            flat = whole.flat[a - whole.start : b - whole.start]
            other.parts.append(Part(flat, start, [view]))
        other._index()
        return other

    def _subset(self, members: Sequence[int]) -> dict[str, Any]:
        """Return the attributes of a subset that depend on the layout alone."""
        order, spans, local_spans = sorted(members, key=lambda i: self.spans[i]), {}, {}
        stop = end = 0
        for i in order:
            start, stop = stop, stop + self.shapes[i].numel()
            first, end = end, end + self.views[i].numel()
            spans[i], local_spans[i] = (start, stop), (first, end)
        return {
            "shards": self.shards and self.shards.part(members),
            "shapes": [self.shapes[i] for i in members],
            "size": stop,
            "sizes": self.sizes[torch.tensor(members, device=self.device)],
            "spans": [spans[i] for i in members],
            "local_spans": [local_spans[i] for i in members],
            "wide": self.wide,
            "device": self.device,
            "collected": {},
            "candidates": {},
            "candidate_versions": [],
            "_constants": {},
        }

    def like(self, values: Sequence[Tensor]) -> LatentWeights:
        """Return latent weights in the same layout, with the flat `values` in place of `flats`."""
        other = object.__new__(LatentWeights)
        own = {"views": list(self.views), "parts": [], "collected": {}, "candidates": {}}
        other.__dict__.update(self.__dict__, **own)
        for part, flat in zip(self.parts, values, strict=True):
            other.parts.append(Part(flat, part.start, []))
        for i, (start, _) in enumerate(self.local_spans):
            part, view = other.part_of(i), self.views[i]
            other.views[i] = part.flat.as_strided(view.shape, view.stride(), start - part.start)
            part.views.append(other.views[i])
        return other


def blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield tensors block by block in the order of memory, so that results stay in the cache.

    On a CPU, operations on large tensors allocate memory for each result. On blocks, an allocator
    reuses it. Small tensors, tensors of several layouts and those on other devices are one block.

    Args:
        tensors: tensors of one shape; the first is dense in memory.

    Example:
        >>> w = torch.ones(3, BLOCK)
        >>> [block.numel() == BLOCK for block, _ in blocks(w, 2 * w)]
        [True, True, True]
    """
    first, size = tensors[0], tensors[0].numel()
    small = devices.synchronizes(first.device) or size <= BLOCK
    if small or not all(same_layout(first, t) for t in tensors):
        yield tensors
        return
    starts = [t.storage_offset() for t in tensors]
    for a in range(0, size, BLOCK):
        shape = (min(BLOCK, size - a),)
        yield tuple(t.as_strided(shape, (1,), b + a) for t, b in zip(tensors, starts, strict=True))


def sum_blocks(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """Return the sum of a function of each of the `blocks`, computed by several threads on a CPU.

    Example:
        >>> sum_blocks(lambda w: w.square().sum(), torch.ones(2, BLOCK))
        tensor(131072.)
    """
    sums = for_each(lambda block: function(*block), list(blocks(*tensors)))
    return sums[0] if len(sums) == 1 else torch.stack(sums).sum(0)


def same_layout(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors have one shape, and their elements one order in memory.

    Example:
        >>> same_layout(torch.ones(2, 1), torch.ones(1, 2).t()), same_layout(*torch.ones(2, 2, 3))
        (True, True)
    """
    if not a.layout == b.layout == torch.strided or a.shape != b.shape:
        return False
    strides = zip(a.stride(), b.stride(), a.shape, strict=True)
    return all(x == y for x, y, n in strides if n > 1)


def flat_of(tensor: Tensor) -> Tensor:
    """Return a dense tensor in the order of its memory, flat.

    Example:
        >>> flat_of(torch.tensor([[1.0, 2.0]]).t()).tolist()
        [1.0, 2.0]
    """
    return tensor.detach().as_strided((tensor.numel(),), (1,))


def flat_bits(tensor: Tensor) -> np.ndarray:
    """Return the memory of a dense tensor as flat integers of its width.

    Example:
        >>> flat_bits(torch.tensor([[1.0, 0.0]])).tolist()
        [1065353216, 0]
    """
    return flat_of(tensor).view(INTEGERS[tensor.element_size()]).numpy()


def copy_all(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy each source into its target, in place.

    Args:
        targets: tensors to write.
        sources: as many tensors, of the same shapes.

    Example:
        >>> target = torch.zeros(2)
        >>> copy_all([target], [torch.ones(2)])
        >>> target
        tensor([1., 1.])
    """
    if targets:
        torch._foreach_copy_(list(targets), list(sources))


def write_if(taken: bool | Tensor, targets: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Copy values into targets if `taken`, which may be known to the device alone.

    Args:
        taken: True, False or a 0-dimensional bool tensor.
        targets: tensors to write.
        values: as many tensors, of the same shapes.

    Example:
        >>> target = torch.zeros(2)
        >>> write_if(torch.tensor(False), [target], [torch.ones(2)])
        >>> target
        tensor([0., 0.])
    """
    if taken is False:
        return
    for target, value in zip(targets, values, strict=True):
        target.copy_(value if taken is True else torch.where(taken, value, target))
