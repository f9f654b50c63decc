"""What leaves the library: sparse files, ONNX, the Hugging Face hub."""

from .sparse_file import Entry, SparseFile, load_sparse, save_sparse

__all__ = ["Entry", "SparseFile", "load_sparse", "save_sparse"]
