"""Checks in several gloo processes on a CPU, see `checks.py`; one process resumes their run.

Starting processes takes most of the time, so all checks of one number of processes share them, and
four processes load the checkpoints of two.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checks import CHECKS, KINDS, load
from loops import STEPS, attach, network, step

HERE = Path(__file__).parent


def run(world, folder):
    """Errors in `world` processes, by check and rank."""
    names = [name for name, (worlds, _) in CHECKS.items() if world in worlds]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, HERE / "worker.py", folder, *names],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | common | {"RANK": str(rank), "WORLD_SIZE": str(world)},
        )
        for rank in range(world)
    ]
    said = [process.communicate(timeout=240)[0] for process in processes]
    failed = {}
    for rank in range(world):
        file = folder / f"{world}-{rank}.json"
        outcome = json.loads(file.read_text()) if file.exists() else {}
        for name in names:
            error, _ = outcome.get(name, ["was not reached", 0])
            if error:
                failed[name, rank] = error + said[rank][-2000:] * (not outcome)
    return failed


@pytest.mark.slow
def test_checks_in_two_and_four_processes(tmp_path):
    for world in (2, 4):
        failed = run(world, tmp_path)
        assert not failed, "\n".join(f"{name}: {error}" for name, error in failed.items())
    for kind, how in KINDS.items():
        one_process_resumes(tmp_path, kind, how)


@pytest.mark.slow
def test_checks_in_eight_processes(tmp_path):
    failed = run(8, tmp_path)
    assert not failed, "\n".join(f"{name}: {error}" for name, error in failed.items())


def one_process_resumes(folder, kind, how):
    """A checkpoint of two ranks resumes without a process group."""
    model = network(seed=1)
    optimizer, sparsifier = attach(model, **{"kind": kind if kind == "sgd" else "adamw"} | how)
    load(folder / kind, model, optimizer)
    assert sparsifier.step_count == 3
    for number in range(3, STEPS):
        step(model, optimizer, sparsifier, number)
    expected = torch.load(folder / f"{kind}.pt")
    for name, w in sparsifier.latent_weights().items():
        torch.testing.assert_close(w, expected[name], rtol=1e-9, atol=1e-11)
