"""All measurements that require a GPU: tests, speed and the full recipe.

    python benchmarks/gpu_round.py --data-path FOLDER [--reference OFFICIAL] [--out results/gpu]
    python benchmarks/gpu_round.py --data-path FOLDER --parts accuracy --minutes 8 --share \
        --methods feather,st3 --sparsity 0.98

The suite takes 15 to 25 minutes on one large GPU. Each part runs in its own process with a time
limit and writes its output to `--out` while it runs, so an interrupted suite keeps completed parts.
`recipe` times one run of the 160-epoch recipe of CIFAR-100, which may take 100 s. `accuracy` trains
it by `feather study compare`; it gets all other options and resumes when started again.
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

from renamed_options import current_options

BENCHMARKS = Path(__file__).parent
DRIVER = "/usr/local/nvidia/bin"  # tools of the driver in containers
LIMIT_S = {"recipe": 100}  # seconds that a part may take
FASTEST = ["system.amp=true", "system.compile=true", "system.cuda_graph=true"]


def parts(args: argparse.Namespace, study: list[str]) -> dict[str, tuple[float, list[str]]]:
    """Return minutes and command line of each part; `study` is added to that of `accuracy`."""
    reference = ["--reference", args.reference] if args.reference else []
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
        "selection": (
            3,
            [script("selection"), *cuda, "--sizes", "1e5", "1e6", "1e7", "25e6", "1e8", "1e9",
             *record("selection")],
        ),
        "launches": (1, [script("launches"), *cuda, *record("launches")]),
        "step_overhead": (
            2,
            [script("step_overhead"), *cuda, *reference, "--suite", *record("step_overhead")],
        ),
        "step_graph": (
            1,
            [script("step_overhead"), *cuda, "--network", "resnet20", "--batch", "128", "--graph",
             *record("step_graph")],
        ),
        "resnet50": (
            2,
            [script("step_overhead"), *cuda, "--network", "timm/resnet50", "--batch", "256",
             "--size", "224", "--amp", "--channels-last", *record("resnet50")],
        ),
        "train_speed": (
            3,
            [script("train_speed"), *data, *cuda, *reference, "--workers", "8", "--steps", "50",
             "--repetitions", "3", "--pause", "0.1", "--switches", "none", "graph", "amp+graph",
             "amp+compile+graph", "--jobs", "1", "6", "12", *record("train_speed")],
        ),
        "recipe": (
            4,
            ["-m", "torch_feather.cli", "train", "--recipe", "cifar100", *data,
             "--sparsity", "0.95", *(word for setting in FASTEST for word in as_option(setting)),
             "--out", str(args.runs / f"recipe-{time.time():.0f}")],
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


def as_option(setting: str) -> list[str]:
    """Return a setting as an option of `feather train`."""
    name, _, value = setting.partition("=")
    return [f"--{name}", value]


def run(command: list[str], output: Path, minutes: float) -> int | str:
    """Run a command; return its exit status.

    After `minutes`, the command and its child processes are terminated.
    """
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
            for ending in (
                signal.SIGTERM,
                signal.SIGKILL,
            ):  # training saves a checkpoint on SIGTERM
                os.killpg(process.pid, ending)
                try:
                    process.wait(20)
                    break
                except subprocess.TimeoutExpired:
                    continue
            return "time limit"


@contextmanager
def shared() -> Iterator[None]:
    """Let kernels of several processes run concurrently (NVIDIA MPS), if it is available."""
    control = shutil.which("nvidia-cuda-mps-control", path=f"{os.environ['PATH']}:{DRIVER}")
    if control is None:
        print("nvidia-cuda-mps-control not found: processes take turns on the GPU", flush=True)
        yield
        return
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        folders = dict.fromkeys(("CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_LOG_DIRECTORY"), folder)
        probe = [sys.executable, "-c", "import torch; torch.zeros(1, device='cuda')"]
        environment = os.environ | folders

        def ask(question: str) -> str:
            options = {"input": question, "text": True, "env": environment, "timeout": 30}
            return subprocess.run([control], capture_output=True, **options).stdout.strip()

        works = False
        with suppress(subprocess.SubprocessError):
            subprocess.run([control, "-d"], env=environment, check=True)
            subprocess.run(probe, env=environment, timeout=60, check=True)
            works = ask("get_server_list\n").isdigit()  # without a server, CUDA does not share
        print("processes share the GPU" if works else "MPS is not available", flush=True)
        before = dict(os.environ)
        if works:
            os.environ.update(folders)
        try:
            yield
        finally:
            for name in folders:
                os.environ.pop(name, None)
                if name in before:
                    os.environ[name] = before[name]
            with suppress(subprocess.SubprocessError):
                ask("quit\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data-path", help="folder of CIFAR-100")
    parser.add_argument("--reference", help="checkout of the official implementation")
    parser.add_argument("--out", type=Path, default=Path("results/gpu"))
    parser.add_argument("--runs", type=Path, default=Path("runs/gpu"), help="run directories")
    parser.add_argument("--parts", nargs="+", help="default: all that the options allow")
    parser.add_argument("--minutes", type=float, default=13, help="time limit of accuracy")
    parser.add_argument("--jobs", type=int, default=6, help="concurrent runs of accuracy")
    parser.add_argument(
        "--share", action="store_true", help="let kernels of processes run concurrently"
    )
    options = current_options(None, {"--peer": "--reference"})
    args, study = parser.parse_known_args(options)
    if study and "accuracy" not in (args.parts or ["accuracy"]):
        parser.error(f"unknown options {' '.join(study)}: only accuracy takes options of a study")
    args.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for name, (minutes, command) in parts(args, study).items():
        needs_data = name in ("train_speed", "recipe", "accuracy")
        if name not in (args.parts or [name]) or (needs_data and not args.data_path):
            continue
        began = time.monotonic()
        output = args.out / f"{name}.txt"
        with shared() if args.share and name in ("train_speed", "accuracy") else nullcontext():
            code = run(command, output, minutes)
        rows.append((name, code, time.monotonic() - began))
        print(output.read_text()[-3000:], flush=True)
    print(f"\n{'part':15} {'exit':>13} {'seconds':>8}")
    for name, code, taken in rows:
        limit, judged = LIMIT_S.get(name), ""
        if limit is not None:
            judged = f"  {'within' if code == 0 and taken <= limit else 'OVER'} {limit} s"
        print(f"{name:15} {code!s:>13} {taken:8.0f}{judged}")
    return any(code != 0 for _, code, _ in rows)


if __name__ == "__main__":
    sys.exit(main())
