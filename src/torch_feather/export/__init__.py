"""File formats of networks: sparse files, ONNX, and the Hugging Face hub."""

from .manifest import Entry
from .onnx import export_onnx
from .reader import SparseFile, load_sparse
from .writer import save_sparse

__all__ = ["Entry", "SparseFile", "export_onnx", "load_sparse", "save_sparse"]
