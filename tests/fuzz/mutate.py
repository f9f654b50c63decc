"""Changes of bytes, of blocks, and of trees of plain values."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from typing import Any

Random = random.Random

# Text that means something to one of the readers.
WORDS = (
    *(b"\0", b"\xff", b"\xff\xff\xff\xff", b"\x80", b"\x00\x00\x00\x80", b"\x7f\xff\xff\xff"),
    *(
        b"-1",
        b"0",
        b"1e999",
        b"NaN",
        b"Infinity",
        b"9" * 30,
        b"\n",
        b"\r\n",
        b"'",
        b'"',
        b"{",
        b"[",
    ),
    *(b"../", b"/", b"\xed\xb2\x80", b"\xc3\x28", b"\xe2\x80\xae", b"\x1b[2J", b"null", b"true"),
)
# Values that a checked document must not be trusted with.
VALUES = (
    *(None, True, False, 0, 1, -1, 2, 7, 8, 255, 256, 65535, 65536, 2**31 - 1, 2**31, 2**32),
    *(2**53 + 1, 2**62, 2**63 - 1, 2**63, 2**64, 2**70, 10**30, -(2**63), -(2**70)),
    *(0.0, -0.0, 0.5, 1.0, 1.5, 1e-300, 1e300, 1e308, float("inf"), float("-inf"), float("nan")),
    *("", "0", "1", "-1", "a", "x" * 300, "nan", "true", "float16", "\udc80", "\x1b[2J", "a\nb"),
    *("../../etc/passwd", "/", ".", "<b>&", "weight", "é", "\u202e", "\0", "{}", "[1]", "1e9"),
    *(
        [],
        {},
        [0],
        [[]],
        {"": None},
        {"a": {}},
        [1, 2, 3],
        ["a"],
        [None],
        [2**63],
        [-1],
        [0, 2**70],
    ),
)


def mutate_bytes(rng: Random, content: bytes, others: Sequence[bytes] = (), words=WORDS) -> bytes:
    """Return changed bytes: bits, numbers, copies, cuts, words, and parts of other inputs."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 2, 3, 5, 8))):
        at = rng.randrange(len(data) + 1)
        length = min(rng.choice((1, 1, 2, 4, 8, 16, 64, 256, 512)), len(data) - at)
        match rng.randrange(10):
            case 0 | 1 if at < len(data):
                data[at] ^= 1 << rng.randrange(8)
            case 2 if at < len(data):
                data[at] = rng.choice(
                    (0, 1, 0x20, 0x30, 0x7F, 0x80, 0xFE, 0xFF, rng.randrange(256))
                )
            case 3:
                data[at : at + length] = rng.randbytes(length)
            case 4:
                del data[at : at + length]
            case 5:
                data[at:at] = data[at : at + length] * rng.choice((1, 1, 2, 10))
            case 6:
                word = rng.choice(words)
                data[at : at + (len(word) if rng.random() < 0.5 else 0)] = word
            case 7 if others:
                other = rng.choice(others)
                begin = rng.randrange(len(other) + 1)
                piece = other[begin : begin + rng.choice((8, 64, 512, 4096))]
                data[at : at + (len(piece) if rng.random() < 0.5 else 0)] = piece
            case 8 if at + 4 <= len(data):
                order = rng.choice(("little", "big"))
                number = int.from_bytes(data[at : at + 4], order) + rng.choice(
                    (-1, 1, -8, 8, 2**16)
                )
                data[at : at + 4] = (number % 2**32).to_bytes(4, order)
            case 9 if rng.random() < 0.3:
                del data[at:]
    return bytes(data[:MOST])


MOST = 2**16  # bytes of an input


def mutate_blocks(rng: Random, content: bytes, size: int, others: Sequence[bytes] = ()) -> bytes:
    """Return content in which blocks are removed, repeated, moved or taken from others."""
    blocks = [content[i : i + size] for i in range(0, len(content), size)]
    for _ in range(rng.choice((1, 1, 2, 3))):
        at = rng.randrange(len(blocks) + 1)
        length = rng.choice((1, 1, 2, 2, 3, 4))
        match rng.randrange(5):
            case 0:
                del blocks[at : at + length]
            case 1:
                blocks[at:at] = blocks[at : at + length]
            case 2 if blocks:
                to = rng.randrange(len(blocks))
                moved = blocks[at : at + length]
                del blocks[at : at + length]
                blocks[to:to] = moved
            case 3 if others:
                other = rng.choice(others)
                begin = rng.randrange(max(1, len(other) // size)) * size
                blocks[at:at] = [other[begin : begin + length * size]]
            case 4:
                blocks[at:at] = [bytes(size)] * length
    return b"".join(blocks)[:MOST]


def mutate_tree(rng: Random, tree: Any, values: Sequence[Any] = VALUES) -> Any:
    """Return a copy of nested dicts and lists in which some nodes are changed."""
    tree = [copy.deepcopy(tree)]
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        places = list(_places(tree))
        holder, key = rng.choice(places)
        old = holder[key]
        match rng.randrange(9):
            case 0 | 1 | 2:
                holder[key] = copy.deepcopy(rng.choice(values))
            case 3:
                source, other = rng.choice(places)
                holder[key] = copy.deepcopy(source[other])
            case 4 if holder is not tree:
                del holder[key]
            case 5 if isinstance(holder, dict):
                holder[_name(rng, key)] = holder.pop(key)
            case 6 if isinstance(old, dict):
                old[_name(rng, rng.choice(sorted(map(str, old)) or ["a"]))] = copy.deepcopy(
                    rng.choice(values)
                )
            case 6 if isinstance(old, list):
                old.insert(rng.randrange(len(old) + 1), copy.deepcopy(rng.choice([*values, *old])))
            case 7 if type(old) in (int, float):
                holder[key] = _number(rng, old)
            case 7 if isinstance(old, str):
                changed = mutate_bytes(rng, old.encode("utf-8", "surrogatepass"))
                holder[key] = changed.decode("utf-8", "surrogateescape")[:2000]
            case 8:
                holder[key] = [old] if rng.random() < 0.5 else {_name(rng, "a"): old}
    return tree[0]


def _places(tree: Any) -> Any:
    """Yield each node as (container, key)."""
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        for key in range(len(node)) if isinstance(node, list) else list(node):
            yield node, key
            if isinstance(node[key], dict | list):
                waiting.append(node[key])


def _name(rng: Random, key: Any) -> str:
    names = (
        "",
        "a",
        f"{key}x",
        str(key)[:-1],
        str(key).upper(),
        f"{key}.{key}",
        "\udc80",
        "x" * 99,
    )
    return rng.choice(names)


def _number(rng: Random, value: float) -> Any:
    changes = (value + 1, value - 1, -value, value * 2, value / 2, value * 1e6, str(value), [value])
    return rng.choice(changes)
