"""What a captured CUDA graph would do, without a GPU: the package's own simulation."""

from torch_feather.testing.capture import HOST_READS, Memory, Tape, reads_across, storage, tensors

__all__ = ["HOST_READS", "Memory", "Tape", "reads_across", "storage", "tensors"]
