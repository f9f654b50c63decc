"""Runs the Triton kernels in Triton's interpreter, on CPU; TRITON_INTERPRET=1 must be set.

A process of its own, because Triton decides when it is imported.
"""

import torch
from hypothesis import given, settings
from selection_cases import MAKERS, assert_selects, make, scores_and_count

from torch_feather.selection import triton_kernels
from torch_feather.selection.device import TorchPasses, select_device
from torch_feather.selection.float_bits import FLOAT_BITS, wide
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


def many() -> None:
    """More scores than one program selects from, and blocks so small that all loops take turns."""
    triton_kernels.SMALL = 100
    every_kind()
    for blocks in ((512, 3), (256, 64)):
        triton_kernels.BLOCK, triton_kernels.PROGRAMS = blocks
        for kind in ("normal", "few distinct", "nan", "zeros", "bf16"):
            scores = make(kind, 9001, seed=1, dtype=torch.float32)
            for k in (0, 1, 4097, 9000, 9001):
                assert_selects(select_device(scores, k, passes=TritonPasses), scores, k, kind)
    random_cases()


def ties() -> None:
    """All scores tie, or there are none."""
    scores = torch.ones(5000)
    assert_selects(select_device(scores, 4500, passes=TritonPasses), scores, 4500)
    assert select_device(scores[:0], 0, passes=TritonPasses).last.item() == -1


def signed() -> None:
    """The magnitudes of signed numbers of every type."""
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        for size in (900, 9001):
            values = torch.randn(size, generator=torch.Generator().manual_seed(0)).to(dtype)
            values[:6] = torch.tensor([torch.nan, torch.inf, -torch.inf, -torch.nan, 0.0, -0.0])
            scores = values.abs().to(wide(dtype))
            for k in (1, 700, size):
                assert_selects(TritonPasses(values).cutoff(torch.tensor(k)), scores, k, str(dtype))


def digits() -> None:
    """The counts for shards are those of PyTorch."""
    for dtype in (torch.float32, torch.float64):
        scores = make("nan", 9001, seed=2, dtype=dtype)
        code = scores[5].view(FLOAT_BITS[dtype].integer).long()
        shift = sum(FLOAT_BITS[dtype].digits)
        for width in FLOAT_BITS[dtype].digits:
            shift -= width
            counts = [
                f(scores).count_digits(code, shift, width) for f in (TorchPasses, TritonPasses)
            ]
            assert torch.equal(*counts), (dtype, shift)


if __name__ == "__main__":
    for check in (random_cases, every_kind, ties, signed, digits, many, ties, signed):
        check()
    print("checked")
