"""Sparse files on the Hugging Face hub, through its own client."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeGuard

from ..errors import ConfigurationError
from .markdown import escape_markdown
from .packages import import_huggingface_hub

FILE = "model.sparse.safetensors"
SCHEME = "hf://"
MOST_CLASSES = 20  # in a model card


def is_address(path: object) -> TypeGuard[str]:
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
        ConfigurationError: the address is invalid, or the hub has no such file.
        ImportError: huggingface_hub is not installed.
        OSError: the hub cannot be reached.

    Example:
        >>> download("hf://one/two/three")
        Traceback (most recent call last):
        torch_feather.errors.ConfigurationError: hf://one/two/three: ...
    """
    repository, _, revision = address.removeprefix(SCHEME).partition("@")
    client = import_huggingface_hub()
    with _client_errors(address):
        return Path(client.hf_hub_download(repository, FILE, revision=revision or None))


@contextmanager
def _client_errors(address: str) -> Iterator[None]:
    """Convert the client's errors about an address into ConfigurationError."""
    try:
        yield
    except Exception as error:
        # The client's errors about connections are an OSError, with a status if the hub answered.
        answered = getattr(error, "response", None) is not None
        if isinstance(error, OSError) and not answered:
            raise
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigurationError(
            f"{address}: {first} Pass hf://USER/NAME or hf://USER/NAME@REVISION of a repository "
            f"with the file {FILE}; private ones require 'hf auth login'."
        ) from error


def upload(folder: Path, repository: str) -> str:
    """Upload all files of a folder.

    Args:
        folder: what to upload.
        repository: `USER/NAME`, created if it does not exist.

    Returns:
        The address of the repository.

    Raises:
        ConfigurationError: the name is invalid, or the hub refuses the upload.
        ImportError: huggingface_hub is not installed.
        OSError: the hub cannot be reached.

    Example:
        >>> upload(Path("folder"), "one/two/three")
        Traceback (most recent call last):
        torch_feather.errors.ConfigurationError: hf://one/two/three: ...
    """
    client = import_huggingface_hub()
    with _client_errors(SCHEME + repository):
        client.create_repo(repository, exist_ok=True)
        client.upload_folder(repo_id=repository, folder_path=folder)
    return SCHEME + repository


# long: most of it is the text of the card
def model_card(
    repository: str, run: Mapping[str, Any], file: str, layers: Sequence[Mapping[str, Any]] = ()
) -> str:
    """Return README.md of a repository.

    Args:
        repository: `USER/NAME`.
        run: metadata of the sparse file: network, data, method, accuracy and counts.
        file: a line about the file and its size.
        layers: name, shape, weights and zeros of each layer, as in report.json.

    Raises:
        ImportError: huggingface_hub is not installed.

    Example:
        >>> run = {"network": "resnet8", "data": "digits", "classes": 10, "input_shape": [1, 8, 8]}
        >>> run |= {"method": "feather", "test_accuracy": 0.9, "zeros": 19, "weights": 20}
        >>> run |= {"macs": {"dense": 40, "sparse": 2}}
        >>> print(model_card("USER/NAME", run, "60 bytes").split("|---|---|")[1][:51])
        <BLANKLINE>
        | test accuracy | 90.00% |
        | sparsity | 95.00% of
    """
    client = import_huggingface_hub()
    name = repository.split("/")[-1]
    accuracy, sparsity = run["test_accuracy"], run["zeros"] / run["weights"]
    several, shape = run.get("multi_label") is True, run.get("input_shape")
    is_text = shape is not None and len(shape) == 1
    task = "text-generation" if is_text else "image-classification"
    data = client.ModelCardData(
        library_name="torch-feather",
        pipeline_tag=task,
        tags=["sparse", "pruning", run["method"]],
        model_name=name,
        eval_results=[
            client.EvalResult(
                task_type=task,
                dataset_type=run["data"],
                dataset_name=run["data"],
                metric_type="mAP" if several else "accuracy",
                metric_value=accuracy,
            )
        ],
    )
    # Reports of early versions lack these; the reader of the card has to fill them in.
    classes, channels = run.get("classes", "CLASSES"), shape[0] if shape else "CHANNELS"
    channels = 1 if is_text else channels
    network, method = (run[key].replace("`", "'") for key in ("network", "method"))
    return f"""---
{data.to_yaml()}
---

# {name}

`{network}`, trained on {escape_markdown(run["data"])} with torch-feather, method `{method}`.

| | |
|---|---|
| test {"mAP" if several else "accuracy"} | {100 * accuracy:.2f}% |
| sparsity | {100 * sparsity:.2f}% of {run["weights"]:,} weights are zero |
| multiply-adds (MACs) | {run["macs"]["sparse"]:,}; dense: {run["macs"]["dense"]:,} |
| file | {escape_markdown(file)} |
{_classes(run)}
## Use

Run `pip install 'torch-feather[files,hub]'`, then:

```python
import torch_feather as feather

model = feather.models.create({json.dumps(network)}, {classes}, {channels})
feather.load_sparse("{SCHEME}{repository}", model)
```

The model has plain PyTorch layers; pruned weights are zeros. To repeat the training, use
config.yaml of this repository:

    feather train --config config.yaml --data-path DATA
{_layers(layers)}"""


def _classes(run: Mapping[str, Any]) -> str:
    """Return a line with the names of the classes, in the order of the outputs."""
    names = run.get("class_names")
    if not names:
        return ""
    shown = ", ".join(escape_markdown(str(name)) for name in names[:MOST_CLASSES])
    more = f" and {len(names) - MOST_CLASSES} more" if len(names) > MOST_CLASSES else ""
    return f"\nClasses, in the order of the outputs: {shown}{more}.\n"


def _layers(layers: Sequence[Mapping[str, Any]]) -> str:
    """Return a section with a table of the layers."""
    if not layers:
        return ""
    lines = ["", "## Sparsity of each layer", "", "| layer | shape | weights | zeros | sparsity |"]
    lines.append("|---|---|---|---|---|")
    for layer in layers:
        shape = "x".join(str(size) for size in layer["shape"])
        share = 100 * layer["zeros"] / max(layer["weights"], 1)
        counts = f"{layer['weights']:,} | {layer['zeros']:,} | {share:.2f}%"
        lines.append(f"| {escape_markdown(layer['name'])} | {shape} | {counts} |")
    return "\n".join(lines) + "\n"
