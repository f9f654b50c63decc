"""Networks as native libraries (needs llvmlite) or C99: neither needs Python or PyTorch to run."""

from .errors import NativeExportError
from .export import c_sizes, export_c, export_native

__all__ = ["NativeExportError", "c_sizes", "export_c", "export_native"]
