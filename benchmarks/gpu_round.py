"""Everything that wants a GPU, in one go: tests, selection, step overhead; and a short table.

    python benchmarks/gpu_round.py [--peer OFFICIAL] [--out results/gpu]

Each part runs in its own process under its own time limit and leaves its output in `--out` as it
ends, so that a round that is cut off keeps what it has.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

BENCHMARKS = Path(__file__).parent


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--peer", help="a checkout of the official implementation")
    parser.add_argument("--out", type=Path, default=Path("results/gpu"))
    parser.add_argument("--limit", type=float, default=240, help="seconds per part")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    peer = ["--peer", args.peer] if args.peer else []
    overhead = [str(BENCHMARKS / "step_overhead.py"), "--device", "cuda", *peer]
    parts = {
        "tests": ["-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", str(BENCHMARKS.parent)],
        "selection": [
            str(BENCHMARKS / "selection.py"), "--device", "cuda",
            "--json", str(args.out / "selection.json"),
        ],
        "step_overhead": [*overhead, "--suite", "--json", str(args.out / "step_overhead.json")],
    }  # fmt: skip
    rows = []
    for name, command in parts.items():
        began = time.monotonic()
        with (args.out / f"{name}.txt").open("w") as file:
            try:
                code: int | str = subprocess.run(
                    [sys.executable, *command], stdout=file, stderr=subprocess.STDOUT,
                    timeout=args.limit, check=False,
                ).returncode  # fmt: skip
            except subprocess.TimeoutExpired:
                code = "over its time"
        rows.append((name, code, time.monotonic() - began))
        print((args.out / f"{name}.txt").read_text()[-3000:], flush=True)
    print(f"\n{'part':15} {'exit':>13} {'seconds':>8}")
    for name, code, seconds in rows:
        print(f"{name:15} {code!s:>13} {seconds:8.0f}")
    return any(code != 0 for _, code, _ in rows)


if __name__ == "__main__":
    sys.exit(main())
