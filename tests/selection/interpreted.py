"""Runs the Triton kernels in Triton's interpreter, on CPU; TRITON_INTERPRET=1 must be set.

A process of its own, because Triton decides when it is imported.
"""

import torch
from hypothesis import given, settings
from selection_cases import MAKERS, assert_selects, make, scores_and_count

from torch_feather.selection import triton_kernels
from torch_feather.selection.device import select_device
from torch_feather.selection.triton_kernels import TritonPasses


@settings(max_examples=20, deadline=None, database=None)
@given(scores_and_count())
def random_cases(case: tuple[torch.Tensor, int]) -> None:
    scores, k = case
    assert_selects(select_device(scores, k, passes=TritonPasses), scores, k)


def every_kind() -> None:
    for kind in MAKERS:
        for dtype, k in ((torch.float32, 4097), (torch.float64, 8550)):
            scores = make(kind, 9001, seed=1, dtype=dtype)
            assert_selects(select_device(scores, k, passes=TritonPasses), scores, k, kind)


def loops() -> None:
    """Small blocks, so that each loop of each kernel takes several turns."""
    triton_kernels.BLOCK, triton_kernels.PROGRAMS, triton_kernels.CHUNK = 512, 3, 16
    for kind in ("normal", "few distinct"):
        scores = make(kind, 9001, seed=1, dtype=torch.float32)
        for k in (1, 4097, 9000):
            assert_selects(select_device(scores, k, passes=TritonPasses), scores, k, kind)


def ties() -> None:
    """All scores tie, or there are none."""
    scores = torch.ones(5000)
    assert_selects(select_device(scores, 4500, passes=TritonPasses), scores, 4500)
    assert select_device(scores[:0], 0, passes=TritonPasses).last.item() == -1


if __name__ == "__main__":
    for check in (random_cases, every_kind, loops, ties):
        check()
    print("checked")
