"""A data set of Hugging Face `datasets` for `feather train`.

    feather train --data huggingface_data:from_hub --data-path USER/NAME --network timm/resnet18
    feather train --data huggingface_data:digits --network resnet8

A `DatasetDict` can be returned as it is: its rows have the columns `image` (or `img`) and `label`,
and the names of the classes are those of its features.
"""

from pathlib import Path

import datasets
import numpy as np
from sklearn.datasets import load_digits


def from_hub(path: str) -> datasets.DatasetDict:
    """Return a data set of the hub, or one that `save_to_disk` stored in a folder.

    Args:
        path: the value of `--data-path`.
    """
    if Path(path).is_dir():
        return datasets.load_from_disk(path)
    return datasets.load_dataset(path)


def digits() -> datasets.DatasetDict:
    """Return scikit-learn's digits as a data set of Hugging Face. Nothing is downloaded."""
    found = load_digits()
    columns = {"image": (found.images * 15.9375).astype(np.uint8), "label": found.target}
    features = datasets.Features(
        {
            "image": datasets.Image(mode="L"),
            "label": datasets.ClassLabel(names=[f"digit {i}" for i in range(10)]),
        }
    )
    rows = datasets.Dataset.from_dict({k: list(v) for k, v in columns.items()}, features=features)
    return rows.train_test_split(0.2, seed=0)
