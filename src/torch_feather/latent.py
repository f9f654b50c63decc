"""Latent weights: one flat copy of all prunable weights, and their sparse image."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import host
from .operators import Operator
from .selection import Cut

# Weights that are looked at together when images are made on the CPU: they stay in the L2 cache.
BLOCK = 1 << 16
# And on other devices: enough to fill them, and little beside the weights of a large network.
DEVICE_BLOCK = 1 << 24


class Segment(NamedTuple):
    """The weights [start, stop) in flat order, which share one cut through their scores."""

    start: int
    stop: int
    cut: Cut
    scale: Tensor | None = None
    """Scores are |w| times this (0-dimensional; infinite: never pruned); None for |w| itself."""

    def pruned(self, magnitudes: Tensor, offset: int) -> Tensor:
        """Mask of pruned weights, given |w| of some of them, the first at flat index `offset`."""
        scores = magnitudes if self.scale is None else magnitudes * self.scale
        return self.cut.pruned(scores, offset)

    @property
    def threshold(self) -> Tensor:
        """tau as a magnitude: kept weights are larger, in spite of rounding."""
        if self.scale is None:
            return self.cut.threshold
        tau = self.cut.threshold / self.scale
        above = tau * self.scale > self.cut.threshold
        return torch.where(above, torch.nextafter(tau, torch.zeros_like(tau)), tau)


class Numbers(NamedTuple):
    """A number for each weight: in the flat order, and views shaped like the weight tensors."""

    flat: Tensor
    views: list[Tensor]


@dataclass
class _Part:
    """Weights of one type: their flat latent values, and where they stand in the flat order."""

    flat: Tensor
    start: int
    views: list[Tensor]

    @property
    def stop(self) -> int:
        return self.start + self.flat.numel()


class LatentWeights:
    """The dense weights w behind parameters that hold their sparse image u.

    The flat order is: parameters grouped by type, in the order given, each in the order of its
    memory. It decides which of several tied weights are pruned.

    Args:
        parameters: tensors on one device, each dense in memory. They are only read here.
    """

    def __init__(self, parameters: Sequence[Tensor]):
        self.size = sum(p.numel() for p in parameters)
        # Half precision is ranked and thresholded in float32.
        double = any(p.dtype == torch.float64 for p in parameters)
        self.wide = torch.float64 if double else torch.float32
        self.device = parameters[0].device
        self.sizes = torch.tensor([p.numel() for p in parameters], device=self.device)
        self.views: list[Tensor] = [torch.empty(0)] * len(parameters)
        self.spans: list[tuple[int, int]] = [(0, 0)] * len(parameters)
        self._parts: list[_Part] = []
        self._constants: dict[Hashable, Any] = {}
        self.shapes = [p.shape for p in parameters]
        start = 0
        for dtype in dict.fromkeys(p.dtype for p in parameters):
            members = [i for i, p in enumerate(parameters) if p.dtype == dtype]
            flat = torch.empty(
                sum(parameters[i].numel() for i in members), dtype=dtype, device=self.device
            )
            part = _Part(flat, start, [])
            for i in members:
                p, stop = parameters[i], start + parameters[i].numel()
                view = flat.as_strided(p.shape, p.stride(), start - part.start)
                self.spans[i], self.views[i] = (start, stop), view
                part.views.append(view)
                start = stop
            self._parts.append(part)
            copy_all(part.views, [parameters[i].detach() for i in members])

    @property
    def flats(self) -> list[Tensor]:
        """The flat latent weights, one tensor per type."""
        return [part.flat for part in self._parts]

    def constant(self, key: Hashable, make: Callable[[LatentWeights], Any]) -> Any:
        """What `make` makes of the layout (shapes, sizes, device), made once per `key`."""
        if key not in self._constants:
            self._constants[key] = make(self)
        return self._constants[key]

    def magnitudes(self, start: int = 0, stop: int | None = None) -> Tensor:
        """|w| of [start, stop) in flat order as a new float32 (or float64) tensor."""
        stop = self.size if stop is None else stop
        out = torch.empty(stop - start, dtype=self.wide, device=self.device)
        for part in self._parts:
            a, b = max(start, part.start), min(stop, part.stop)
            if a < b:
                source, target = (
                    part.flat[a - part.start : b - part.start],
                    out[a - start : b - start],
                )
                if source.dtype == out.dtype:
                    torch.abs(source, out=target)
                else:
                    target.copy_(source).abs_()
        return out

    def scores(self, scales: Sequence[Tensor]) -> Tensor:
        """|w| times the scale of its tensor (0-dimensional each), flat."""
        out = self.magnitudes()
        for (start, stop), scale in zip(self.spans, scales, strict=True):
            out[start:stop].mul_(scale)
        return out

    def segment_of(self, i: int, segments: Sequence[Segment]) -> Segment:
        """The segment that weight tensor i is in."""
        start = self.spans[i][0]
        return next(s for s in segments if s.start <= start < s.stop)

    def pruned(self, i: int, segments: Sequence[Segment]) -> Tensor:
        """Which weights of tensor i lie below their cut, shaped and laid out like it."""
        start, stop = self.spans[i]
        flat = self.segment_of(i, segments).pruned(self.magnitudes(start, stop), start)
        return flat.as_strided(self.views[i].shape, self.views[i].stride())

    def counts_pruned(self, segments: Sequence[Segment]) -> Tensor:
        """Number of pruned weights of each tensor, int64."""
        return torch.stack([self.pruned(i, segments).sum() for i in range(len(self.views))])

    def images(
        self, segments: Sequence[Segment], operator: Operator
    ) -> tuple[list[Tensor], Tensor]:
        """The sparse images u of all parameters, and their sum.

        Returns:
            One new tensor per parameter, shaped and laid out like it, and the sum of all of them
            (0-dimensional): it is not finite if one of them is NaN.
        """
        images: list[Tensor] = [torch.empty(0)] * len(self.views)
        total = torch.zeros((), dtype=self.wide, device=self.device)
        for part in self._parts:
            out = torch.empty_like(part.flat)
            for segment in segments:
                a, b = max(segment.start, part.start), min(segment.stop, part.stop)
                if a < b:
                    inside = slice(a - part.start, b - part.start)
                    on_device = host.waits_for(self.device)
                    write = self._image_device if on_device else self._image_cpu
                    total += write(part.flat[inside], segment, operator, a, out[inside])
            for i, (start, stop) in enumerate(self.spans):
                if part.start <= start and stop <= part.stop:
                    view = self.views[i]
                    images[i] = out.as_strided(view.shape, view.stride(), start - part.start)
        return images, total

    def _image_device(
        self, w: Tensor, segment: Segment, operator: Operator, offset: int, out: Tensor
    ) -> Tensor:
        threshold = segment.threshold
        for a in range(0, w.numel(), DEVICE_BLOCK):
            wide = w[a : a + DEVICE_BLOCK].to(self.wide)
            image = kept_image(wide, threshold, operator, w.dtype)
            pruned = segment.pruned(wide.abs(), offset + a)
            out[a : a + DEVICE_BLOCK] = image.masked_fill(pruned, 0.0)
        return out.sum(dtype=self.wide)

    def _image_cpu(
        self, w: Tensor, segment: Segment, operator: Operator, offset: int, out: Tensor
    ) -> Tensor:
        """Compares block by block in the cache, and thresholds the kept weights alone."""
        cut, threshold, scale = segment.cut, segment.threshold, segment.scale
        if cut.value < 0:
            out.copy_(w)
            return out.sum(dtype=self.wide)
        total = torch.zeros((), dtype=self.wide)
        value = cut.value.item()
        all_ties_pruned = int(cut.last) >= offset + w.numel() - 1
        out.zero_()
        kept: list[np.ndarray] = []
        pending = 0
        for a in range(0, w.numel(), BLOCK):
            scores = w[a : a + BLOCK].to(self.wide).abs()
            if scale is not None:
                scores *= scale
            if all_ties_pruned:
                pruned = scores.numpy() <= value  # not so for NaN, which is kept
            else:
                pruned = cut.pruned(scores, offset + a).numpy()
            where = np.logical_not(pruned, out=pruned).nonzero()[0]
            where += a
            kept.append(where)
            pending += where.size
            if pending >= BLOCK or a + BLOCK >= w.numel():
                index = torch.from_numpy(np.concatenate(kept))
                image = kept_image(w[index].to(self.wide), threshold, operator, w.dtype)
                out.scatter_(0, index, image)
                total += image.sum(dtype=self.wide)
                kept, pending = [], 0
        return total

    def numbers(self, value: float) -> Numbers:
        """A number for each weight, of type `wide`, laid out like them."""
        flat = torch.full((self.size,), value, dtype=self.wide, device=self.device)
        places = zip(self.views, self.spans, strict=True)
        return Numbers(flat, [flat.as_strided(w.shape, w.stride(), a) for w, (a, _) in places])

    def zeros(self) -> Tensor:
        """Number of weights of each tensor that are exactly 0, int64."""
        none = torch.zeros((), dtype=self.wide, device=self.device)
        last = torch.full((), self.size, device=self.device)
        return self.counts_pruned([Segment(0, self.size, Cut(none, last, none))])

    def part(self, members: Sequence[int]) -> LatentWeights:
        """Some of the weight tensors as if they were all: the same memory, in the same order."""
        other = object.__new__(LatentWeights)
        other.__dict__.update(self.constant(("part", *members), lambda _: self._part(members)))
        other.views = [self.views[i] for i in members]
        other._parts = []
        for i, (start, _), view in zip(members, other.spans, other.views, strict=True):
            a, b = self.spans[i]
            whole = next(p for p in self._parts if p.start <= a and b <= p.stop)
            flat = whole.flat[a - whole.start : b - whole.start]
            other._parts.append(_Part(flat, start, [view]))
        return other

    def _part(self, members: Sequence[int]) -> dict[str, Any]:
        """What of a part depends on the layout alone."""
        spans, stop = {}, 0
        for i in sorted(members, key=lambda i: self.spans[i]):
            start, stop = stop, stop + self.shapes[i].numel()
            spans[i] = (start, stop)
        return {
            "shapes": [self.shapes[i] for i in members],
            "size": stop,
            "sizes": self.sizes[torch.tensor(members, device=self.device)],
            "spans": [spans[i] for i in members],
            "wide": self.wide,
            "device": self.device,
            "_constants": {},
        }

    def like(self, values: Sequence[Tensor]) -> LatentWeights:
        """Latent weights laid out like these, with the flat `values` in place of `flats`."""
        other = object.__new__(LatentWeights)
        other.__dict__.update(self.__dict__, views=list(self.views), _parts=[])
        for part, flat in zip(self._parts, values, strict=True):
            other._parts.append(_Part(flat, part.start, []))
        for i, (start, stop) in enumerate(self.spans):
            part = next(p for p in other._parts if p.start <= start and stop <= p.stop)
            view = self.views[i]
            other.views[i] = part.flat.as_strided(view.shape, view.stride(), start - part.start)
            part.views.append(other.views[i])
        return other


def renew(old: Sequence[Segment], new: list[Segment]) -> list[Segment]:
    """The segments `new` in the memory of `old` where they are as many; else `new` itself.

    What the next step reads then lies where it did: a captured step may be replayed.
    """
    if _outline(old) != _outline(new):
        return new
    copy_all([t for s in old for t in _tensors(s)], [t for s in new for t in _tensors(s)])
    return list(old)


def _outline(segments: Sequence[Segment]) -> list[tuple[int, int, int]]:
    """Where segments lie, and which of them share a cut."""
    first: dict[int, int] = {}
    return [(s.start, s.stop, first.setdefault(id(s.cut), j)) for j, s in enumerate(segments)]


def _tensors(segment: Segment) -> list[Tensor]:
    return [*segment.cut, *([] if segment.scale is None else [segment.scale])]


def copy_all(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copies each source into its target, in place."""
    if targets:
        torch._foreach_copy_(list(targets), list(sources))


def kept_image(w: Tensor, tau: Tensor, operator: Operator, dtype: torch.dtype) -> Tensor:
    """Effective values of kept weights `w`, of type `dtype`, none of them 0 unless w itself is."""
    if operator.is_identity:
        return w.to(dtype)
    return visible(operator(w, tau).to(dtype), w)


def visible(image: Tensor, w: Tensor) -> Tensor:
    """The image, with the smallest number of its type where it is 0 and w is not."""
    info = torch.finfo(image.dtype)
    least = image.new_full((), info.smallest_normal * info.eps)
    vanished = (image == 0) & (w != 0)
    return torch.where(vanished, least.copysign(w.to(image.dtype)), image)


# A prime, so that hardly any exchange of whole rows or channels keeps words in their columns.
_COLUMNS = 509
_FACTORS = np.random.default_rng(0).integers(-(2**63), 2**63 - 1, _COLUMNS) | 1


def checksum(tensor: Tensor) -> int:
    """A number that changes when a value of `tensor` does, or when values change places.

    The memory, as rows of 64-bit words, is summed by column, and the columns with odd factors,
    modulo 2^64, as a signed integer. So any change of one value shows, and others almost surely;
    what cannot show is an exchange of values 509 words apart. The tensor must be dense in memory,
    on any device.
    """
    flat = tensor.detach().as_strided((tensor.numel(),), (1,)).cpu()
    data = flat.view(torch.uint8).numpy()
    words = data[: data.size // 8 * 8].view(np.int64)
    if tensor.element_size() == 8:
        # Signs would be the topmost bits, of which an even number cancels: spread them.
        words = words ^ (words.view(np.uint64) >> 1).view(np.int64)
    rows = words.size // _COLUMNS
    columns = np.add.reduce(words[: rows * _COLUMNS].reshape(rows, _COLUMNS), axis=0)
    columns[: words.size - rows * _COLUMNS] += words[rows * _COLUMNS :]
    rest = int.from_bytes(data[words.size * 8 :].tobytes(), "little")
    total = (int(np.dot(columns, _FACTORS)) + rest * int(_FACTORS[-1])) % 2**64
    return total - 2**64 if total >= 2**63 else total
