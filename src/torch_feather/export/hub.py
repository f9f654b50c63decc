"""Sparse files on the Hugging Face hub, through its own client."""

from __future__ import annotations

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


def _client() -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise ImportError(
            "the Hugging Face hub needs its client: pip install 'torch-feather[hub]'"
        ) from error
    return huggingface_hub
