"""Everything that wants a GPU, in one go: tests, speed, and the full recipe; and a short table.

    python benchmarks/gpu_round.py --data-path FOLDER [--peer OFFICIAL] [--out results/gpu]
    python benchmarks/gpu_round.py --data-path FOLDER --parts accuracy --minutes 8 --share \
        --methods feather,st3 --sparsity 0.98

The round is made for 15 to 25 minutes on one large GPU. Each part runs in its own process under its
own time limit and leaves its output in `--out` as it goes, so that a round that is cut off keeps
what it has; `accuracy`, the 160-epoch recipe of CIFAR-100, goes on where it was when called again.
All other options go to it, which is `feather study compare`.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

BENCHMARKS = Path(__file__).parent
DRIVER = "/usr/local/nvidia/bin"  # where containers have the tools of the driver
FASTEST = ["system.amp=true", "system.compile=true", "system.graph=true"]


def parts(args: argparse.Namespace, study: list[str]) -> dict[str, tuple[float, list[str]]]:
    """Minutes and command line of each; `study` is added to that of the accuracy."""
    peer = ["--peer", args.peer] if args.peer else []
    data = ["--data-path", args.data_path] if args.data_path else []
    cuda = ["--device", "cuda"]

    def script(name: str) -> str:
        return str(BENCHMARKS / f"{name}.py")

    def record(name: str) -> list[str]:
        return ["--json", str(args.out / f"{name}.json")]

    return {
        "tests": (
            2,
            ["-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", "-n", "6", "--durations", "5",
             "--continue-on-collection-errors", str(BENCHMARKS.parent / "tests")],
        ),
        "selection": (1, [script("selection"), *cuda, *record("selection")]),
        "step_overhead": (
            2,
            [script("step_overhead"), *cuda, *peer, "--suite", *record("step_overhead")],
        ),
        "resnet50": (
            2,
            [script("step_overhead"), *cuda, "--network", "timm/resnet50", "--batch", "256",
             "--size", "224", "--amp", "--channels-last", *record("resnet50")],
        ),
        "train_speed": (
            3,
            [script("train_speed"), *data, *cuda, *peer, "--workers", "8", "--steps", "50",
             "--rounds", "3", "--pause", "0.1", "--switches", "none", "graph", "amp+graph",
             "amp+compile+graph", "--jobs", "1", "6", "12", *record("train_speed")],
        ),
        "accuracy": (
            args.minutes,
            ["-m", "torch_feather.cli", "study", "compare", "--recipe", "cifar100", *data,
             "--methods", "dense,feather,hard-ste,soft-ste",
             "--sparsity", "0.9,0.95,0.98,0.99,0.995", "--seeds", "0,1,2",
             *(word for setting in FASTEST for word in ("--set", setting)),
             "--jobs", str(args.jobs), "--minutes", str(0.7 * args.minutes),
             "--runs", str(args.runs), "--out", str(args.out / "cifar100"), *study],
        ),
    }  # fmt: skip


def run(command: list[str], output: Path, minutes: float) -> int | str:
    """Its exit status; it and all that it started are ended after `minutes`."""
    with output.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, *command],
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            return process.wait(60 * minutes)
        except subprocess.TimeoutExpired:
            for ending in (signal.SIGTERM, signal.SIGKILL):  # trainings save on the first
                os.killpg(process.pid, ending)
                try:
                    process.wait(20)
                    break
                except subprocess.TimeoutExpired:
                    continue
            return "over its time"


@contextmanager
def shared() -> Iterator[None]:
    """Kernels of several processes run at a time (NVIDIA's MPS), where that can be had."""
    control = shutil.which("nvidia-cuda-mps-control", path=f"{os.environ['PATH']}:{DRIVER}")
    if control is None:
        print("no nvidia-cuda-mps-control here: processes take turns on the GPU", flush=True)
        yield
        return
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        places = dict.fromkeys(("CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_LOG_DIRECTORY"), folder)
        probe = [sys.executable, "-c", "import torch; torch.zeros(1, device='cuda')"]
        shares = os.environ | places

        def ask(question: str) -> str:
            options = {"input": question, "text": True, "env": shares, "timeout": 30}
            return subprocess.run([control], capture_output=True, **options).stdout.strip()

        works = False
        with suppress(subprocess.SubprocessError):
            subprocess.run([control, "-d"], env=shares, check=True)
            subprocess.run(probe, env=shares, timeout=60, check=True)
            works = ask("get_server_list\n").isdigit()  # without a server CUDA runs unshared
        print("processes share the GPU" if works else "MPS does not work here", flush=True)
        before = dict(os.environ)
        if works:
            os.environ.update(places)
        try:
            yield
        finally:
            for name in places:
                os.environ.pop(name, None)
                if name in before:
                    os.environ[name] = before[name]
            with suppress(subprocess.SubprocessError):
                ask("quit\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data-path", help="folder of CIFAR-100")
    parser.add_argument("--peer", help="a checkout of the official implementation")
    parser.add_argument("--out", type=Path, default=Path("results/gpu"))
    parser.add_argument("--runs", type=Path, default=Path("runs/gpu"), help="run directories")
    parser.add_argument("--parts", nargs="+", help="[all that the arguments allow]")
    parser.add_argument("--minutes", type=float, default=13, help="for accuracy")
    parser.add_argument("--jobs", type=int, default=6, help="trainings at a time, for accuracy")
    parser.add_argument("--share", action="store_true", help="let kernels of processes overlap")
    args, study = parser.parse_known_args()
    if study and "accuracy" not in (args.parts or ["accuracy"]):
        parser.error(f"unknown: {' '.join(study)}; only accuracy takes more options")
    args.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for name, (minutes, command) in parts(args, study).items():
        needs_data = name in ("train_speed", "accuracy")
        if name not in (args.parts or [name]) or (needs_data and not args.data_path):
            continue
        began = time.monotonic()
        output = args.out / f"{name}.txt"
        with shared() if args.share and needs_data else nullcontext():
            code = run(command, output, minutes)
        rows.append((name, code, time.monotonic() - began))
        print(output.read_text()[-3000:], flush=True)
    print(f"\n{'part':15} {'exit':>13} {'seconds':>8}")
    for name, code, taken in rows:
        print(f"{name:15} {code!s:>13} {taken:8.0f}")
    return any(code != 0 for _, code, _ in rows)


if __name__ == "__main__":
    sys.exit(main())
