"""Looking at a model: the per-layer report and its sparsity."""

from .report import LayerReport, Report, report, sparsity

__all__ = ["LayerReport", "Report", "report", "sparsity"]
