"""Networks as native libraries, C99 or web pages: none needs Python or PyTorch to run."""

from .errors import NativeExportError
from .export import c_sizes, export_c, export_native
from .web import export_web

__all__ = ["NativeExportError", "c_sizes", "export_c", "export_native", "export_web"]
