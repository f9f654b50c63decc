"""Latent weights: one flat copy of all prunable weights, and their sparse image."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import devices
from ..operators import Operator
from ..selection import Cut, select, select_shards
from .shards import local, shards_of

# Weights that are looked at together when images are made on the CPU: they stay in the L2 cache.
BLOCK = 1 << 16
# And on other devices: enough to fill them, and little beside the weights of a large network.
DEVICE_BLOCK = 1 << 24


class Segment(NamedTuple):
    """The weights [start, stop) in flat order, which share one cut through their scores.

    The bounds are those of weight tensors, in the whole; the cut's `last` is an index among the
    weights that are here (see `LatentWeights`).
    """

    start: int
    stop: int
    cut: Cut
    scale: Tensor | None = None
    """Scores are |w| times this (0-dimensional; infinite: never pruned); None for |w| itself."""

    def pruned(self, magnitudes: Tensor, offset: int) -> Tensor:
        """Mask of pruned weights, given |w| of some of them; the first is number `offset` here."""
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
    """Weights of one type: their flat latent values, and where they stand among those here."""

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

    Where parameters are DTensors, the weights here are the shards of this process. They have the
    order that they have in the whole, so `flats`, `views`, `places` and all that is computed from
    them, weight by weight, are of what is here; `size`, `sizes`, `shapes` and `spans`, counts and
    thresholds are of the whole.

    Args:
        parameters: tensors on one device, each dense in memory. They are only read here.

    Attributes:
        size: number of weights; `sizes`: of each tensor, as a tensor on the device.
        shapes: of the tensors.
        spans: where each tensor stands in the flat order.
        places: where what is here of each tensor stands among the weights here.
        views: what is here of each tensor, shaped like it.
        shards: where the shards lie; None where all weights are here.
        wide, device: type of magnitudes and thresholds; where all this is.
    """

    def __init__(self, parameters: Sequence[Tensor]):
        self.shards = shards_of(parameters)
        self.shapes = [p.shape for p in parameters]
        sizes = [shape.numel() for shape in self.shapes]
        self.size = sum(sizes)
        here = [local(p).detach() for p in parameters]
        # Half precision is ranked and thresholded in float32.
        double = any(p.dtype == torch.float64 for p in parameters)
        self.wide = torch.float64 if double else torch.float32
        self.device = here[0].device
        self.sizes = torch.tensor(sizes, device=self.device)
        self.views: list[Tensor] = [torch.empty(0)] * len(parameters)
        self.spans: list[tuple[int, int]] = [(0, 0)] * len(parameters)
        self.places: list[tuple[int, int]] = [(0, 0)] * len(parameters)
        self._parts: list[_Part] = []
        self._constants: dict[Hashable, Any] = {}
        start = first = 0
        for dtype in dict.fromkeys(p.dtype for p in parameters):
            members = [i for i, p in enumerate(parameters) if p.dtype == dtype]
            flat = torch.empty(
                sum(here[i].numel() for i in members), dtype=dtype, device=self.device
            )
            part = _Part(flat, start, [])
            for i in members:
                p, stop, end = here[i], start + here[i].numel(), first + sizes[i]
                view = flat.as_strided(p.shape, p.stride(), start - part.start)
                self.places[i], self.spans[i] = (start, stop), (first, end)
                self.views[i] = view
                part.views.append(view)
                start, first = stop, end
            self._parts.append(part)
            copy_all(part.views, [here[i] for i in members])
        self._index()

    def _index(self) -> None:
        """Where each weight tensor begins or ends, in the flat order and among the weights here."""
        pairs = zip(self.spans, self.places, strict=True)
        self._here = {a: b for span, place in pairs for a, b in zip(span, place, strict=True)}

    @property
    def flats(self) -> list[Tensor]:
        """The flat latent weights, one tensor per type."""
        return [part.flat for part in self._parts]

    def constant(self, key: Hashable, make: Callable[[LatentWeights], Any]) -> Any:
        """What `make` makes of the layout (shapes, sizes, device), made once per `key`."""
        if key not in self._constants:
            self._constants[key] = make(self)
        return self._constants[key]

    def here(self, start: int, stop: int) -> tuple[int, int]:
        """Where the weights here of [start, stop) in flat order stand; bounds are of tensors."""
        return self._here[start], self._here[stop]

    def magnitudes(self, start: int = 0, stop: int | None = None) -> Tensor:
        """|w| of what is here of [start, stop) in flat order, as a new tensor of type `wide`."""
        return self._magnitudes(*self.here(start, self.size if stop is None else stop))

    def _magnitudes(self, start: int, stop: int) -> Tensor:
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
        for (start, stop), scale in zip(self.places, scales, strict=True):
            out[start:stop].mul_(scale)
        return out

    # What needs the weights of all processes

    def select(self, k: Tensor, scales: Sequence[Tensor] | None = None) -> Cut:
        """The cut that prunes exactly the k smallest |w|, or |w| times the scale of its tensor."""
        fill = self.magnitudes if scales is None else partial(self.scores, scales)
        if self.shards is None:
            return select(fill, k)
        return self._select_shards([fill()], k.unsqueeze(0), [(0, self.size)])[0]

    def select_each(self, counts: Tensor) -> list[Cut]:
        """For each weight tensor the cut that prunes its `counts` smallest |w|."""
        if self.shards is not None:
            scores = [self.magnitudes(*span) for span in self.spans]
            return self._select_shards(scores, counts, self.spans)
        cuts = []
        for (start, stop), count in zip(self.spans, counts, strict=True):
            cut = select(partial(self.magnitudes, start, stop), count)
            cuts.append(cut._replace(last=cut.last + start))
        return cuts

    def _select_shards(
        self, scores: list[Tensor], counts: Tensor, spans: Sequence[tuple[int, int]]
    ) -> list[Cut]:
        """Cuts through the scores of several spans, each of whole weight tensors."""
        assert self.shards is not None
        first = [self.here(*span)[0] for span in spans]
        for counted, (a, b), (start, stop) in zip(
            self.shards.counted, self.spans, self.places, strict=True
        ):
            if not counted:  # here, but by another process: NaN ranks above all that is pruned
                j = next(j for j, span in enumerate(spans) if span[0] <= a and b <= span[1])
                scores[j][start - first[j] : stop - first[j]] = torch.nan
        cuts = select_shards(
            scores,
            counts,
            sizes=[stop - start for start, stop in spans],
            total=self.shards.sum,
            places=partial(self._places_in, tuple(spans)),
        )
        return [cut._replace(last=cut.last + a) for cut, a in zip(cuts, first, strict=True)]

    def _places_in(self, spans: tuple[tuple[int, int], ...], index: Tensor) -> Tensor:
        """How many weights here of each span precede an index of the whole span: (spans, n)."""
        assert self.shards is not None

        def make(_: LatentWeights) -> tuple[Tensor, Tensor]:
            holders = [
                next(j for j, span in enumerate(spans) if span[0] <= a and b <= span[1])
                for a, b in self.spans
            ]
            offsets = [a - spans[j][0] for j, (a, _) in zip(holders, self.spans, strict=True)]
            return torch.tensor(holders).to(self.device), torch.tensor(offsets).to(self.device)

        holder, offset = self.constant(("places", spans), make)
        inside = (index[holder] - offset[:, None]).clamp_min(0).minimum(self.sizes[:, None])
        return torch.zeros_like(index).index_add_(0, holder, self.shards.below(inside))

    def total(self, values: Tensor) -> Tensor:
        """Of one number, or row, for each weight tensor, the sums over what is where."""
        return values if self.shards is None else self.shards.total(values)

    def common(self, value: Tensor) -> Tensor:
        """The sum of a value over all processes that hold weights."""
        return value if self.shards is None else self.shards.sum(value)

    def row_means(self, i: int, means: Tensor) -> Tensor:
        """Of means over what is here of the rows of tensor i, (rows, n), those over whole rows."""
        return means if self.shards is None else self.shards.row_means(i, means)

    def place_of(self, i: int, segments: Sequence[Segment]) -> int:
        """The number of the segment that weight tensor i is in."""
        start = self.spans[i][0]
        return next(j for j, s in enumerate(segments) if s.start <= start < s.stop)

    def segment_of(self, i: int, segments: Sequence[Segment]) -> Segment:
        """The segment that weight tensor i is in."""
        return segments[self.place_of(i, segments)]

    def pruned(self, i: int, segments: Sequence[Segment]) -> Tensor:
        """Which weights of tensor i lie below their cut, shaped and laid out like it."""
        start, stop = self.places[i]
        flat = self.segment_of(i, segments).pruned(self._magnitudes(start, stop), start)
        return flat.as_strided(self.views[i].shape, self.views[i].stride())

    def counts_pruned(self, segments: Sequence[Segment]) -> Tensor:
        """Number of pruned weights of each tensor, int64."""
        counts = [self.pruned(i, segments).sum() for i in range(len(self.views))]
        return self.total(torch.stack(counts))

    def images(
        self, segments: Sequence[Segment], operator: Operator
    ) -> tuple[list[Tensor], Tensor]:
        """The sparse images u of all parameters, and their sum.

        Returns:
            One new tensor per view, shaped and laid out like it, and the sum of all of them
            (0-dimensional): it is not finite if one of them is NaN.
        """
        images: list[Tensor] = [torch.empty(0)] * len(self.views)
        total = torch.zeros((), dtype=self.wide, device=self.device)
        if self.shards is not None and not devices.synchronizes(self.device):
            # Vector instructions round unlike those for what is left over: each tensor by itself,
            # so that copies of one on several processes have one image.
            segments = [
                self.segment_of(i, segments)._replace(start=start, stop=stop)
                for i, (start, stop) in enumerate(self.spans)
            ]
        for part in self._parts:
            out = torch.empty_like(part.flat)
            for segment in segments:
                first, end = self.here(segment.start, segment.stop)
                a, b = max(first, part.start), min(end, part.stop)
                if a < b:
                    inside = slice(a - part.start, b - part.start)
                    on_device = devices.synchronizes(self.device)
                    write = self._image_device if on_device else self._image_cpu
                    total += write(part.flat[inside], segment, operator, a, out[inside])
            for i, view in enumerate(self.views):
                if self._part_of(i) is part:
                    start = self.places[i][0] - part.start
                    images[i] = out.as_strided(view.shape, view.stride(), start)
        return images, total

    def _part_of(self, i: int) -> _Part:
        """What holds weight tensor i, which may have no weights here."""
        (start, stop), dtype = self.places[i], self.views[i].dtype
        return next(
            part
            for part in self._parts
            if part.flat.dtype == dtype and part.start <= start and stop <= part.stop
        )

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
        value, last = cut.value.item(), int(cut.last)
        out.zero_()
        # As integers: of half precision scatter_ takes as long as `out` is, not `index`.
        bits = out.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[out.element_size()])
        kept: list[np.ndarray] = []
        pending = 0
        for a in range(0, w.numel(), BLOCK):
            scores = w[a : a + BLOCK].to(self.wide).abs()
            if scale is not None:
                scores *= scale
            # No comparison holds for NaN, which is kept.
            if offset + a + scores.numel() - 1 <= last:
                pruned = scores.numpy() <= value
            elif last < offset + a:
                pruned = scores.numpy() < value
            else:
                pruned = cut.pruned(scores, offset + a).numpy()
            where = np.logical_not(pruned, out=pruned).nonzero()[0]
            where += a
            kept.append(where)
            pending += where.size
            if pending >= BLOCK or a + BLOCK >= w.numel():
                index = torch.from_numpy(np.concatenate(kept))
                image = kept_image(w[index].to(self.wide), threshold, operator, w.dtype)
                bits.scatter_(0, index, image.view(bits.dtype))
                total += image.sum(dtype=self.wide)
                kept, pending = [], 0
        return total

    def numbers(self, value: float) -> Numbers:
        """A number for each weight, of type `wide`, laid out like them."""
        size = sum(flat.numel() for flat in self.flats)
        flat = torch.full((size,), value, dtype=self.wide, device=self.device)
        places = zip(self.views, self.places, strict=True)
        return Numbers(flat, [flat.as_strided(w.shape, w.stride(), a) for w, (a, _) in places])

    def adopt(
        self, which: Sequence[int], values: Sequence[Tensor], images: Sequence[Tensor]
    ) -> None:
        """Values of these tensors that differ from their images become the latent weights.

        Accelerators are slowed by many small operations, so there neighbours are compared together;
        on a CPU the copies would take several times as long as they save.

        Args:
            which: numbers of tensors.
            values, images: of every tensor, shaped like `views`.
        """
        runs = [[i] for i in which]
        if devices.synchronizes(self.device):
            runs = self.constant(("runs", *which), lambda weights: weights._runs(which))
        for run in runs:
            held, shown = self._joined(run, values), self._joined(run, images)
            latent = self._joint(run)
            latent.copy_(torch.where(held == shown, latent, held))

    def _runs(self, which: Sequence[int]) -> list[list[int]]:
        """These tensors in groups of neighbours, of one tensor or at most `DEVICE_BLOCK` long."""
        runs: list[list[int]] = []
        end = length = 0
        for i in sorted(which, key=self.places.__getitem__):
            (start, stop), size = self.places[i], self.views[i].numel()
            alike = bool(runs) and self._part_of(i) is self._part_of(runs[-1][0])
            if not alike or start != end or length + size > DEVICE_BLOCK:
                runs.append([])
                length = 0
            runs[-1].append(i)
            end, length = stop, length + size
        return runs

    def _joint(self, run: Sequence[int]) -> Tensor:
        """The latent weights of neighbours: flat, but of a single tensor in its shape."""
        if len(run) == 1:
            return self.views[run[0]]
        part = self._part_of(run[0])
        start, stop = self.places[run[0]][0], self.places[run[-1]][1]
        return part.flat[start - part.start : stop - part.start]

    def _joined(self, run: Sequence[int], tensors: Sequence[Tensor]) -> Tensor:
        """Of tensors laid out like `views` those of neighbours, laid out like `_joint`."""
        if len(run) == 1:
            return tensors[run[0]]
        out = torch.empty_like(self._joint(run))
        first = self.places[run[0]][0]
        layout = [(self.views[i], self.places[i][0] - first) for i in run]
        copy_all(
            [out.as_strided(view.shape, view.stride(), start) for view, start in layout],
            [tensors[i] for i in run],
        )
        return out

    def zeros(self) -> Tensor:
        """Number of weights of each tensor that are exactly 0, int64; none where all of them are.

        Such a layer was not pruned: it was initialised to 0, and is yet to learn.
        """
        zeros = self.total(torch.stack([(view == 0).sum() for view in self.views]))
        return zeros.masked_fill(zeros == self.sizes, 0)

    def part(self, members: Sequence[int]) -> LatentWeights:
        """Some of the weight tensors as if they were all: the same memory, in the same order."""
        other = object.__new__(LatentWeights)
        other.__dict__.update(self.constant(("part", *members), lambda _: self._part(members)))
        other.views = [self.views[i] for i in members]
        other._parts = []
        for i, (start, _), view in zip(members, other.places, other.views, strict=True):
            (a, b), whole = self.places[i], self._part_of(i)
            flat = whole.flat[a - whole.start : b - whole.start]
            other._parts.append(_Part(flat, start, [view]))
        other._index()
        return other

    def _part(self, members: Sequence[int]) -> dict[str, Any]:
        """What of a part depends on the layout alone."""
        order, spans, places = sorted(members, key=lambda i: self.spans[i]), {}, {}
        stop = end = 0
        for i in order:
            start, stop = stop, stop + self.shapes[i].numel()
            place, end = end, end + self.views[i].numel()
            spans[i], places[i] = (start, stop), (place, end)
        return {
            "shards": self.shards and self.shards.part(members),
            "shapes": [self.shapes[i] for i in members],
            "size": stop,
            "sizes": self.sizes[torch.tensor(members, device=self.device)],
            "spans": [spans[i] for i in members],
            "places": [places[i] for i in members],
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
        for i, (start, _) in enumerate(self.places):
            part, view = other._part_of(i), self.views[i]
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
    pairs = zip(segments, first_of_cut(segments), strict=True)
    return [(segment.start, segment.stop, first) for segment, first in pairs]


def first_of_cut(segments: Sequence[Segment]) -> tuple[int, ...]:
    """For each segment the number of the first one with its cut: which of them share one."""
    first: dict[int, int] = {}
    return tuple(first.setdefault(id(segment.cut), j) for j, segment in enumerate(segments))


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
