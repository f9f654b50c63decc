"""Optional packages, imported when they are needed."""

from __future__ import annotations

from typing import Any

from ..errors import install_hint


def import_safetensors() -> Any:
    """Return the package safetensors.

    Raises:
        ImportError: it is not installed; the message says how to install it.

    Example:
        >>> import_safetensors().__name__
        'safetensors'
    """
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(f"Sparse files require safetensors. {install_hint('files')}") from error
    return safetensors


def import_huggingface_hub() -> Any:
    """Return the package huggingface_hub.

    Raises:
        ImportError: it is not installed; the message says how to install it.

    Example:
        >>> import_huggingface_hub().__name__
        'huggingface_hub'
    """
    try:
        import huggingface_hub
    except ImportError as error:
        raise ImportError(
            f"The Hugging Face hub requires its client. {install_hint('hub')}"
        ) from error
    return huggingface_hub
