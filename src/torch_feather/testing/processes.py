"""Training on two processes."""

from __future__ import annotations

import multiprocessing
import queue
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from ..attach import sparsify
from .problem import STEPS, Factory, call, make_batch, make_network

SECONDS = 120
"""Time limit of both processes."""


def same_on_two_processes(factory: Factory, sparsity: float) -> None:
    """Raise AssertionError unless two processes end with the same weights and masks.

    Args:
        factory: makes the method.
        sparsity: final fraction of zeros.

    Example:
        >>> from torch_feather.methods import gmp
        >>> same_on_two_processes(gmp, sparsity=0.8)
        >>> same_on_two_processes(lambda: gmp(sparsity=0.8, end="soon"), sparsity=0.8)
        Traceback (most recent call last):
        AssertionError: torch_feather.errors.ConfigurationError: Cubic: end is a number of ...
    """
    # Forked, so that a factory does not have to be importable by name.
    context = multiprocessing.get_context("fork")
    results: Any = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        processes = [
            context.Process(target=_train, args=(rank, store, factory, sparsity, results))
            for rank in range(2)
        ]
        for process in processes:
            process.start()
        try:
            found = [results.get(timeout=SECONDS) for _ in processes]
        except queue.Empty:
            raise AssertionError(f"a process gave no result in {SECONDS} seconds") from None
        finally:
            for process in processes:
                process.join(5)
                if process.is_alive():
                    process.kill()
    # The process that fails first closes the connection, an error of the other one.
    found.sort(key=lambda result: result[2])
    errors = [error for _, error, _ in found if error]
    assert not errors, errors[0]
    assert found[0][0] == found[1][0], "the processes end with different weights"


def _train(rank: int, store: str, factory: Factory, sparsity: float, results: Any) -> None:
    torch.set_num_threads(1)  # a forked process must not use the threads of its parent
    try:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
        model = nn.parallel.DistributedDataParallel(make_network())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        sparsifier = sparsify(
            model, optimizer, call(factory, sparsity), sparsity=sparsity, total_steps=STEPS
        )
        for step in range(STEPS):
            images, labels = make_batch(2 * step + rank)
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
            sparsifier.check_ranks()
        sparsifier.finalize()
        weights = [p.detach().numpy().tobytes() for p in model.parameters()]
        results.put((weights, "", time.monotonic()))
    except Exception:
        results.put(([], traceback.format_exc(limit=-1).splitlines()[-1], time.monotonic()))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
