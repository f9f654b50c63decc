"""Inputs of layers with stride, split into phases."""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from .layer import Layer
from .planes import PlaneLayout, Planes, split_size
from .sizes import image_shape
from .steps import Copy, Sparse, Step
from .taps import Taps


class Split:
    """Finds planes for the inputs of layers with stride, split into the phases of their taps.

    A copy splits them. If the layer before is a 1×1 convolution whose result nothing else uses, as
    in MobileNets, the input of that layer is split instead, which usually has several times fewer
    channels: a 1×1 convolution treats pixels independently, so it can compute the phases as if they
    were images.

    Args:
        planes: planes of the values so far.
        steps: steps so far; copies are appended.
        copies: planes that were copied, by source and layout.
        moves: whether the input of the layer before may be split instead.

    Example:
        >>> Split({}, [], {}).moves
        True
    """

    def __init__(
        self,
        planes: dict[Node, Planes],
        steps: list[Step],
        copies: dict[Any, Planes],
        moves: bool = True,
    ) -> None:
        self.planes, self.steps, self.copies, self.moves = planes, steps, copies, moves

    def planes_of(self, node: Node, layer: Layer, taps: Taps) -> Planes:
        """Return the planes of the input of a layer.

        Args:
            node: the input.
            layer: the layer.
            taps: its taps.
        """
        size = image_shape(node.meta["val"])[1:]
        if (before := self._pointwise(node, layer, size)) is not None:
            return self._moved(node, before, layer, taps)
        return self._copied(node, layer, taps, phases=1)

    def _pointwise(self, node: Node, layer: Layer, size: tuple[int, ...]) -> Sparse | None:
        """Return the step before if the split can take place before it."""
        if not self.moves or len(node.users) != 1 or layer.padding_value != 0.0:
            return None
        step = self.steps[-1] if self.steps else None
        if not isinstance(step, Sparse) or step.out is not self.planes.get(node):
            return None
        before = step.layer
        fits = before.weight.shape[2:] == (1, 1) and before.stride == (1, 1)
        fits = fits and before.padding == (0, 0) and before.combine == "fma"
        few = before.channels[0] <= before.channels[1] and step.residual is None
        whole = all(n % s == 0 for n, s in zip(size, layer.stride, strict=True))
        in_planes = self.planes.get(node.args[0]) is step.x  # type: ignore[arg-type]
        return step if fits and few and whole and in_planes else None

    def _moved(self, node: Node, before: Sparse, layer: Layer, taps: Taps) -> Planes:
        """Compute the layer before on the phases of its input, and return its result."""
        assert self.steps.pop() is before
        del self.planes[node]
        source, count = node.args[0], len(taps.phases)
        assert isinstance(source, Node)
        x = self._copied(source, layer, taps, phases=count)
        channels = before.layer.channels[1]
        out = Planes(PlaneLayout(0, 0), channels, x.height, x.width, (), phases=count)
        out.layout.merge(x.layout)
        self.steps.append(Sparse(before.layer, before.taps, x, out))
        return out

    def _copied(self, node: Node, layer: Layer, taps: Taps, phases: int) -> Planes:
        """Return planes into which the phases of a value were copied, as channels or as images."""
        key = (node, layer.stride, taps.phases, layer.padding_value, phases)
        if key not in self.copies:
            channels, height, width = image_shape(node.meta["val"])
            ys, xs = zip(*taps.phases, strict=True)
            out = self.copies[key] = Planes(
                PlaneLayout(0, 0),
                channels * len(taps.phases) // phases,
                split_size(height, layer.stride[0], ys),
                split_size(width, layer.stride[1], xs),
                (),
                phases=phases,
            )
            out.layout.require(out.height, out.width, 0, 0)
            value = layer.padding_value
            self.steps.append(Copy(node, out, (height, width), layer.stride, taps.phases, value))
        return self.copies[key]
