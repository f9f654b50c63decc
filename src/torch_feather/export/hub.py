"""Sparse files on the Hugging Face hub, through its own client."""

from __future__ import annotations

import json
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from .markdown import escape_markdown
from .packages import import_huggingface_hub

FILE = "model.sparse.safetensors"
SCHEME = "hf://"


def is_address(path: str | PathLike[str]) -> bool:
    """Return whether a path is an address on the hub.

    Example:
        >>> is_address("hf://USER/NAME"), is_address("model.sparse.safetensors")
        (True, False)
    """
    return isinstance(path, str) and path.startswith(SCHEME)


def download(address: str) -> Path:
    """Download a sparse file, or find it in the client's cache.

    Args:
        address: `hf://USER/NAME` or `hf://USER/NAME@REVISION`.

    Returns:
        The local file.

    Raises:
        ImportError: huggingface_hub is not installed.
    """
    repository, _, revision = address.removeprefix(SCHEME).partition("@")
    client = import_huggingface_hub()
    return Path(client.hf_hub_download(repository, FILE, revision=revision or None))


def upload(folder: Path, repository: str) -> str:
    """Upload all files of a folder.

    Args:
        folder: what to upload.
        repository: `USER/NAME`, created if it does not exist.

    Returns:
        The address of the repository.

    Raises:
        ImportError: huggingface_hub is not installed.
    """
    client = import_huggingface_hub()
    client.create_repo(repository, exist_ok=True)
    client.upload_folder(repo_id=repository, folder_path=folder)
    return SCHEME + repository


def model_card(repository: str, run: Mapping[str, Any], file: str) -> str:
    """Return README.md of a repository.

    Args:
        repository: `USER/NAME`.
        run: metadata of the sparse file: network, data, method, accuracy and counts.
        file: a line about the file and its size.

    Raises:
        ImportError: huggingface_hub is not installed.
    """
    client = import_huggingface_hub()
    name = repository.split("/")[-1]
    accuracy, sparsity = run["test_accuracy"], run["zeros"] / run["weights"]
    data = client.ModelCardData(
        library_name="torch-feather",
        tags=["sparse", "pruning", run["method"]],
        model_name=name,
        eval_results=[
            client.EvalResult(
                task_type="image-classification",
                dataset_type=run["data"],
                dataset_name=run["data"],
                metric_type="accuracy",
                metric_value=accuracy,
            )
        ],
    )
    # Reports of early versions lack these; the reader of the card has to fill them in.
    classes, channels = run.get("classes", "CLASSES"), run.get("input_shape", ["CHANNELS"])[0]
    network, method = (run[key].replace("`", "'") for key in ("network", "method"))
    return f"""---
{data.to_yaml()}
---

# {name}

`{network}`, trained on {escape_markdown(run["data"])} with torch-feather, method `{method}`.

| | |
|---|---|
| test accuracy | {100 * accuracy:.2f}% |
| sparsity | {100 * sparsity:.2f}% of {run["weights"]:,} weights are zero |
| multiply-adds (MACs) | {run["macs"]["sparse"]:,}; dense: {run["macs"]["dense"]:,} |
| file | {escape_markdown(file)} |

To use it, run `pip install 'torch-feather[files,hub]'`, then:

```python
import torch_feather as feather

model = feather.models.create({json.dumps(network)}, {classes}, {channels})
feather.load_sparse("{SCHEME}{repository}", model)
```

To repeat the training, use config.yaml of this repository:

    feather train --config config.yaml --data-path DATA
"""
