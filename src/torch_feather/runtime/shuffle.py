"""Channel shuffles, as in ShuffleNet, as 1×1 convolutions with one nonzero weight per channel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import Graph, Node

from .layer import Layer

aten = torch.ops.aten
RESHAPES = (aten.reshape.default, aten.view.default, aten._unsafe_view.default)
SAME = (aten.contiguous.default, aten.clone.default)


@dataclass(eq=False)
class ChannelShuffle(Layer):
    """A channel shuffle; see `torch.nn.ChannelShuffle`. Its weight has one 1 per channel.

    Args:
        parts: number of groups that are interleaved.

    Example:
        >>> layer = ChannelShuffle.create("shuffle", channels=6, parts=2)
        >>> layer.weight.argmax(1).flatten().tolist()
        [0, 3, 1, 4, 2, 5]
        >>> layer(torch.arange(6.0).view(1, 6, 1, 1)).flatten().tolist()
        [0.0, 3.0, 1.0, 4.0, 2.0, 5.0]
    """

    parts: int = 1
    pools: ClassVar[bool] = True
    adds: ClassVar[bool] = False
    __name__: ClassVar[str] = "channel_shuffle"

    @classmethod
    def create(cls, name: str, channels: int, parts: int) -> ChannelShuffle:
        """Return the layer that moves channel g · n + i to i · parts + g, for parts of n."""
        source = torch.arange(channels).view(parts, -1).t().flatten()
        weight = torch.zeros(channels, channels, 1, 1, dtype=torch.float32, device="cpu")
        weight[torch.arange(channels), source] = 1.0
        return cls(name, weight, weight.new_zeros(channels), parts=parts)

    def _combined(self, x: Tensor) -> Tensor:
        return torch.channel_shuffle(x, self.parts)


def replace_shuffles(graph: Graph) -> None:
    """Replace reshape, transpose, reshape that reorder the channels of images by one layer.

    PyTorch would move these channels out of planes, and each of the three steps would copy them. A
    sparse kernel with one weight per channel only copies them once.

    Args:
        graph: exported; it is modified.

    Example:
        >>> model = torch.nn.ChannelShuffle(2)
        >>> graph = torch.export.export(model, (torch.ones(1, 6, 2, 2),)).module().graph
        >>> replace_shuffles(graph)
        >>> [node.target.parts for node in graph.nodes if isinstance(node.target, Layer)]
        [2]
    """
    for node in list(graph.nodes):
        found = _shuffle(node)
        if found is None:
            continue
        x, parts = found
        layer = ChannelShuffle.create(node.name, int(x.meta["val"].shape[1]), parts)
        with graph.inserting_before(node):
            shuffled = graph.call_function(layer, (x,))
        shuffled.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(shuffled)
    graph.eliminate_dead_code()


def _shuffle(node: Node) -> tuple[Node, int] | None:
    """Return images and the number of groups if a node is their channel shuffle."""
    x: Any = node.args[0] if node.args else None
    if node.target in (aten.channel_shuffle.default, aten.native_channel_shuffle.default):
        groups: Any = node.args[1]
        return (x, groups) if _are_images(x) and isinstance(groups, int) else None
    if node.target not in RESHAPES or not isinstance(x, Node):
        return None
    while x.target in SAME:
        x = x.args[0]
    if not (x.target is aten.transpose.int and {d % 5 for d in x.args[1:]} == {1, 2}) and not (
        x.target is aten.permute.default and [d % 5 for d in x.args[1]] == [0, 2, 1, 3, 4]
    ):
        return None
    split = x.args[0]
    if split.target not in RESHAPES or not _are_images(split.args[0]):
        return None
    images, parts = split.args[0], split.meta["val"].shape
    before, after = (n.meta["val"].shape for n in (images, node))
    same = list(map(str, before)) == list(map(str, after))
    spread = [str(n) for n in (*parts[:1], *parts[3:])] == [
        str(n) for n in (*before[:1], *before[2:])
    ]
    is_shuffle = same and spread and len(parts) == 5 and isinstance(parts[1], int)
    return (images, int(parts[1])) if is_shuffle else None


def _are_images(node: Any) -> bool:
    value = node.meta.get("val") if isinstance(node, Node) else None
    if not isinstance(value, Tensor) or value.dim() != 4 or value.dtype != torch.float32:
        return False
    return isinstance(value.shape[1], int)
