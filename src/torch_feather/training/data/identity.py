"""The identity of a data set: names, sizes and digests of its images, which checkpoints hold."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from ..errors import printable
from .dataset import Dataset, EncodedImages, Images, Text
from .files import ImageFiles
from .items import Items

# Bytes of encoded images to read per part. Of larger parts, every n-th image is read.
READ = 64 * 2**20
MOST_ITEMS = 1024  # to read of a part of a data set of the user
UNVERIFIED = "unverified"  # content of images that differ each time they are read
PARTS = ("train", "validation", "test")


def data_identity(data: Dataset) -> dict[str, Any]:
    """Return what identifies the images of a data set, by part and class.

    Args:
        data: the data set.

    Returns:
        A dict of plain values. For each part and class: number of images, digest of their names,
        bytes and digest of their content. The content is the pixels of images in memory, and the
        encoded bytes of others: of all, or of every n-th if a part has more than 64 MiB. Names are
        only known of image folders and tar files. Of a data set of the user that is not in memory,
        every n-th image is read, about 1,024 of a part; if these differ each time although random
        numbers are seeded, their content cannot be verified.

    Raises:
        DataError: a file cannot be read.

    Example:
        >>> import torch
        >>> images = Images(torch.zeros(2, 4, 4, 3, dtype=torch.uint8), torch.tensor([0, 1]))
        >>> data = Dataset("example", images, images, images, 2, (0.5,) * 3, (0.5,) * 3)
        >>> data_identity(data)["train"]["0"]["images"]
        1
    """
    return {part: _by_class(getattr(data, part), data.classes) for part in PARTS}


def identity_digest(identity: Mapping[str, Any]) -> str:
    """Return a short digest of an identity, to name it on the command line.

    Example:
        >>> identity_digest({"train": {}})
        'data-c38e3a5f72d6'
    """
    text = json.dumps(identity, sort_keys=True)
    return f"data-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def changed_data(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return the differences of two identities, one per class of a part; empty if they are equal.

    Example:
        >>> one = {"images": 2, "names": "a", "bytes": 9, "content": "b"}
        >>> changed_data({"train": {"cat": one}}, {"train": {"cat": one | {"images": 3}}})
        ["train, class 'cat': 3 images, not 2"]
    """
    found = []
    for part in PARTS:
        before, after = old.get(part, {}), new.get(part, {})
        for kind in sorted(before.keys() | after.keys()):
            if before.get(kind) != after.get(kind):
                where = f"{part}, class '{printable(kind)}'"
                found.append(f"{where}: {_difference(before.get(kind), after.get(kind))}")
    return found


def _difference(old: Mapping[str, Any] | None, new: Mapping[str, Any] | None) -> str:
    if old is None or new is None:
        return "is new" if old is None else "is missing"
    if old.get("images") != new.get("images"):
        return f"{new.get('images')} images, not {old.get('images')}"
    keys = {"names": "names", "bytes": "sizes", "content": "contents"}
    return "other " + " and ".join(
        text for key, text in keys.items() if old.get(key) != new.get(key)
    )


def _by_class(images: Images | EncodedImages | Text, classes: int) -> dict[str, Any]:
    """Return the identities of the classes of a part. Their images are in the order of training."""
    if isinstance(images, Text):
        content = hashlib.sha256(images.ids.numpy().tobytes()).hexdigest()[:32]
        size = len(images.ids)
        return {"all": {"images": len(images), "names": None, "bytes": size, "content": content}}
    labels: Tensor = images.labels
    if labels.ndim == 2:  # several labels per image
        return _all(images)
    order = np.argsort(labels.numpy(), kind="stable")
    bounds = np.searchsorted(labels.numpy()[order], np.arange(classes + 1))
    source = images.files
    files = source if isinstance(source, ImageFiles) else None
    sizes = None if files is None else files.sizes()
    step = 1
    if isinstance(images, EncodedImages) and sizes is not None and len(sizes):
        step = -(-int(sizes.sum()) // READ) or 1
    elif isinstance(source, Items):
        step = -(-len(source) // MOST_ITEMS) or 1
    found = {}
    for label in range(classes):
        index = order[bounds[label] : bounds[label + 1]]
        if len(index) == 0:
            continue
        name = source.classes[label] if source is not None and source.classes else str(label)
        found[name] = {
            "images": len(index),
            "names": None if files is None else _names(files, index),
            "bytes": None if sizes is None else int(sizes[index].sum()),
            "content": _content(images, index, sizes, step),
        }
    return found


def _all(images: Images | EncodedImages) -> dict[str, Any]:
    """Return the identity of images with several labels each, as one class."""
    index = np.arange(len(images))
    if len(index) == 0:
        return {}
    files = images.files if isinstance(images.files, ImageFiles) else None
    step = 1 if isinstance(images, Images) else -(-len(index) // MOST_ITEMS)
    content = _content(images, index, None, step)
    labels = hashlib.sha256(images.labels.numpy().tobytes()).hexdigest()[:32]
    names = None if files is None else _names(files, index)
    return {
        "all": {"images": len(index), "names": names, "bytes": None, "content": content + labels}
    }


def _names(files: ImageFiles, index: np.ndarray) -> str:
    digest = hashlib.sha256()
    for i in index.tolist():
        digest.update(files.names[i] + b"\0")
    return digest.hexdigest()[:32]


def _content(
    images: Images | EncodedImages, index: np.ndarray, sizes: np.ndarray | None, step: int
) -> str:
    digest = hashlib.sha256() if sizes is None else hashlib.sha256(sizes[index].tobytes())
    if isinstance(images, Images):
        for i in index.tolist():
            digest.update(images.pixels[i].numpy().tobytes())
    else:
        if isinstance(images.files, Items) and not images.files.is_verifiable():
            return UNVERIFIED
        for i in index.tolist()[::step]:
            digest.update(images.files.read(i))
    # The order of the images of all classes decides which of them are in a batch.
    return hashlib.sha256(digest.digest() + index.tobytes()).hexdigest()[:32]
