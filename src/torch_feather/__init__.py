"""Sparse training for PyTorch."""
