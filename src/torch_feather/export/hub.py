"""Sparse files on the Hugging Face hub, through its own client."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

FILE = "model.sparse.safetensors"
SCHEME = "hf://"


def is_address(path: str | PathLike[str]) -> bool:
    """Whether it is `hf://USER/NAME`, not a file here."""
    return isinstance(path, str) and path.startswith(SCHEME)


def download(address: str) -> Path:
    """The sparse file of `hf://USER/NAME` or `hf://USER/NAME@REVISION`, from the client's cache."""
    repository, _, revision = address.removeprefix(SCHEME).partition("@")
    return Path(_client().hf_hub_download(repository, FILE, revision=revision or None))


def upload(folder: Path, repository: str) -> str:
    """Put all files of `folder` there, into a repository that is made if need be; its address."""
    hub = _client()
    hub.create_repo(repository, exist_ok=True)
    hub.upload_folder(repo_id=repository, folder_path=folder)
    return SCHEME + repository


def model_card(repository: str, run: Mapping[str, Any], file: str) -> str:
    """README.md of a repository.

    Args:
        repository: `USER/NAME`.
        run: what `export.run.about` tells of it.
        file: a line about the file and its size.
    """
    hub = _client()
    name = repository.split("/")[-1]
    accuracy, sparsity = run["test_accuracy"], run["zeros"] / run["weights"]
    data = hub.ModelCardData(
        library_name="torch-feather",
        tags=["sparse", "pruning", run["method"]],
        model_name=name,
        eval_results=[
            hub.EvalResult(
                task_type="image-classification",
                dataset_type=run["data"],
                dataset_name=run["data"],
                metric_type="accuracy",
                metric_value=accuracy,
            )
        ],
    )
    # What report.json of an older version does not tell is left to the reader.
    classes, channels = run.get("classes", "CLASSES"), run.get("input_shape", ["CHANNELS"])[0]
    return f"""---
{data.to_yaml()}
---

# {name}

`{run["network"]}`, trained sparse on {run["data"]} with the method `{run["method"]}` of
torch-feather.

| | |
|---|---|
| test accuracy | {100 * accuracy:.2f} % |
| weights that are zero | {100 * sparsity:.2f} % of {run["weights"]:,} |
| multiply-adds | {run["macs"]["sparse"]:,} of {run["macs"]["dense"]:,} |
| file | {file} |

Use it, with `pip install 'torch-feather[files,hub]'`:

```python
import torch_feather as feather

model = feather.models.create("{run["network"]}", {classes}, {channels})
feather.load_sparse("{SCHEME}{repository}", model)
```

Train it again, with this repository's config.yaml:

    feather train --config config.yaml --data-path DATA
"""


def _client() -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise ImportError(
            "the Hugging Face hub needs its client: pip install 'torch-feather[hub]'"
        ) from error
    return huggingface_hub
