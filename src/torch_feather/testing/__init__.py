"""Tests for methods: `check_method` runs every property that the package's own methods have.

from torch_feather.testing import check_method

def test_my_method():
    check_method(my_method)
"""

from .check import PROPERTIES, check_method

__all__ = ["PROPERTIES", "check_method"]
