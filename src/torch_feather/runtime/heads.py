"""Heads of attention in views of tokens, and the arguments of attention."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Node

from .dimensions import CHANNEL, Dimensions
from .planes import Planes, Size


class Heads(NamedTuple):
    """Channels of tokens as heads.

    Attributes:
        planes: all heads, one after the other.
        heads: number of heads.
        tokens: number of tokens of a sequence.
        sequences: number of sequences, which depends on the batch size.

    Example:
        >>> from torch_feather.runtime.planes import PlaneLayout
        >>> x = Planes(PlaneLayout(1, 9), 8, 1, 9, (9, 8), linear=True, tokens=((0, 1), (9, 0)))
        >>> Heads(x, 2, 9, sequences=(0, 1)).heads
        2
    """

    planes: Planes
    heads: int
    tokens: int
    sequences: Size


def heads_of(x: Dimensions) -> tuple[int, int, int] | None:
    """Return the numbers of heads, sequences, and tokens; None if they are not in this order.

    Three dimensions have the heads within the first one, more have them third to last.

    Args:
        x: dimensions (..., token, channel of a head).

    Example:
        >>> heads_of(Dimensions.strided((2, 3, 9, 4), (9, 4 * CHANNEL, 1, CHANNEL)))
        (3, 2, 9)
    """
    rank = len(x.parts)
    if rank < 3:
        return None
    tokens, depth = x.shape[-2:]
    if rank == 3:
        parts = x.merged(0)
        has_heads = bool(parts) and parts[-1][1] == depth * CHANNEL
        heads, parts = (parts[-1:], parts[:-1]) if has_heads else ([], parts)
    else:
        heads, parts = x.merged(rank - 3), x.merged(*range(rank - 3))
    number = math.prod(size for size, _ in heads)
    count = math.prod(size for size, _ in parts)
    expected = [(number, depth * CHANNEL)], [(count, tokens)], [(tokens, 1)], [(depth, CHANNEL)]
    given = heads, parts, x.merged(rank - 2), x.merged(rank - 1)
    if any(a != [p for p in b if p[0] > 1] for a, b in zip(given, expected, strict=True)):
        return None
    return number, count, tokens


def is_periodic(mask: Tensor, scores: Sequence[Any]) -> bool:
    """Return whether a mask of some sequences is that of all others in turn.

    Args:
        mask: can be broadcast to the scores.
        scores: sizes of the scores.

    Example:
        >>> is_periodic(torch.ones(4, 1, 9, 9), (2, 4, 3, 9, 9))
        True
    """
    sequences = [str(n) for n in scores[:-3]]
    sizes = [str(n) for n in mask.shape[:-3]][-len(sequences) :] if sequences else []
    has_begun = False
    for size, whole in zip(sizes, sequences[len(sequences) - len(sizes) :], strict=True):
        if size == "1" and whole != "1" and has_begun:
            return False
        has_begun = has_begun or size != "1"
    return True


def arguments_of(node: Node) -> tuple[Node | None, bool, Any] | None:
    """Return mask, whether attention is causal, and scale; None if something is not supported.

    Args:
        node: of `scaled_dot_product_attention`.

    Example:
        >>> from torch.fx import Graph
        >>> graph = Graph()
        >>> q = graph.placeholder("q")
        >>> attention = torch.ops.aten.scaled_dot_product_attention.default
        >>> arguments_of(graph.call_function(attention, (q, q, q), {"scale": 0.5}))
        (None, False, 0.5)
    """
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    given = dict(zip(names, node.args, strict=False)) | node.kwargs
    mask, is_causal, scale = given.get("attn_mask"), given.get("is_causal"), given.get("scale")
    if given.get("dropout_p") or given.get("enable_gqa") or isinstance(scale, Node):
        return None
    if mask is not None:
        value = mask.meta["val"] if isinstance(mask, Node) else None
        if is_causal or not isinstance(value, Tensor):
            return None
        if value.dtype not in (torch.bool, torch.float32):
            return None
    return mask, bool(is_causal), scale  # type: ignore[return-value]
