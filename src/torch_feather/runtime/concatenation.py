"""Concatenation of channels without copies: its parts are computed where the result is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch.fx import Node

from .planes import Planes
from .steps import Copy, Step


class Concatenation:
    """Finds planes for concatenated channels.

    The first value that is concatenated with others gets memory to which channels can be appended.
    In a network such as DenseNet, all values of a block follow each other in one memory, and each
    concatenation is a part of it. A value that is in another place already is copied.

    Args:
        planes: planes of the values so far.
        steps: steps so far; copies are appended.
        empty: function that returns new planes for the value of a node.

    Example:
        >>> Concatenation({}, [], lambda node, linear: None).steps
        []
    """

    def __init__(
        self, planes: Mapping[Node, Planes], steps: list[Step], empty: Callable[..., Planes]
    ) -> None:
        self.planes, self.steps, self.empty = planes, steps, empty

    def planes_of(self, node: Node) -> Planes | None:
        """Return the planes of concatenated images.

        Args:
            node: a concatenation.

        Returns:
            None if the parts are no images, or if most of them are not in planes.
        """
        nodes: Any = node.args[0]
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        value = node.meta["val"]
        if value.dim() != 4 or dim not in (1, -3):
            return None
        known = [self.planes.get(n) for n in nodes]
        images = [p for p in known if p is not None and not p.linear]
        if 2 * sum(p.channels for p in images) < int(value.shape[1]):
            return None
        if any(not isinstance(n.meta["val"], Tensor) for n in nodes):
            return None
        if any(not p.layout.can_merge(images[0].layout) for p in images):
            return None
        first = known[0] if known[0] in images else None
        memory = None if first is None or first.base is None else first.root
        start = 0 if memory is None or first is None else first.start
        if memory is None or not self._fits(memory, start, known):
            memory, start = self._new(images[0]), 0
        return self._place(nodes, known, memory, start)

    def _new(self, like: Planes) -> Planes:
        """Return planes without channels; values are appended to them."""
        memory = Planes(like.layout, 0, like.height, like.width, (0, like.height, like.width))
        memory.grows = True
        return memory

    def _fits(self, memory: Planes, start: int, known: list[Planes | None]) -> bool:
        """Return whether the values are in this memory one after the other, or can be appended."""
        end = start
        for planes in known:
            is_there = planes is not None and planes.root is memory and planes.start == end
            if not is_there and (not memory.grows or end != memory.channels):
                return False
            if is_there and planes is not None:
                end += planes.channels
            else:
                return True  # it is appended, as are all after it
        return True

    def _place(
        self, nodes: list[Node], known: list[Planes | None], memory: Planes, start: int
    ) -> Planes:
        end = start
        for node, planes in zip(nodes, known, strict=True):
            if planes is not None and planes.root is memory and planes.start == end:
                end += planes.channels
                continue
            if planes is None or planes.linear or planes.base is not None or planes.grows:
                out = self.empty(node, linear=False)
                self.steps.append(Copy(node, out, (out.height, out.width)))
                planes = out
            planes.base, planes.first = memory, memory.channels
            memory.layout.merge(planes.layout)
            memory.channels += planes.channels
            end += planes.channels
        return memory.channels_from(start, end - start)
