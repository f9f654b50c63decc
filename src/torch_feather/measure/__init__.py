"""Measuring a sparse model: multiply-adds, zeros per layer, batch-norm statistics."""

from .batchnorm import recalibrate_batchnorm
from .flops import count_flops
from .report import report, sparsity

__all__ = ["count_flops", "recalibrate_batchnorm", "report", "sparsity"]
