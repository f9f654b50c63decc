"""Networks as libraries that need neither Python nor PyTorch (needs llvmlite to export)."""

from .errors import NativeExportError
from .export import export_native

__all__ = ["NativeExportError", "export_native"]
