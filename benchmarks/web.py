"""Sparse networks in the browser, compared with the dense ones in onnxruntime-web.

Pages of `export_web` are opened in headless Chromium. The page times both networks in turn on one
thread, WebAssembly with vectors; a measurement is the mean of calls over at least 20 ms. The digits
network comes from a run of `feather train`; other networks are initialized and pruned with ERK
densities. `--unpruned` adds the digits network without zeros, which shows how much of the ratio is
due to the engines and not to the zeros.

    npm install onnxruntime-web
    feather train digits --out runs/digits
    python benchmarks/web.py --run runs/digits --engine node_modules/onnxruntime-web \\
        --unpruned --json results/web.json > results/web.md
"""

from __future__ import annotations

import argparse
import functools
import gzip
import http.server
import json
import os
import shutil
import statistics
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import torch_feather as feather
from torch_feather.allocation import ERK
from torch_feather.training.checkpoint import RunDirectory
from torch_feather.training.export_run import load_network
from torch_feather.training.provenance import provenance

ENGINE = "ort-wasm-simd-threaded.wasm"
AIM = 2.0  # times as fast, at 95%
NETWORKS = [
    *("timm/resnet18:64", "timm/resnet18:224", "timm/mobilenetv3_small_100:224"),
    *("timm/efficientnet_b0:224", "timm/deit_tiny_patch16_224:224"),
]
IN_PAGE = """async ([input, options]) => {
  const { load } = await import("./model.js");
  const { compare } = await import("./compare.js");
  const model = await load();
  const x = Float32Array.from(input);
  return { ...await compare(model, x, options), outputs: Array.from(model.run(x)) };
}"""


class Server(http.server.SimpleHTTPRequestHandler):
    """Serves a folder without a log."""

    def log_message(self, *_: object) -> None:
        """Print nothing."""


def pruned(name: str, size: int, sparsity: float) -> tuple[nn.Module, Tensor]:
    """Return an initialized network of timm with ERK densities, and an input."""
    torch.manual_seed(0)
    model = feather.models.create(name, num_classes=1000, in_channels=3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    options = {"sparsity": sparsity, "total_steps": 1, "schedule": "constant"}
    sparsifier = feather.sparsify(model, optimizer, "hard-ste", allocation=ERK(), **options)
    return sparsifier.finalize().eval(), torch.randn(1, 3, size, size)


def measure(browser: Any, model: nn.Module, x: Tensor, engine: Path, rounds: int) -> dict[str, Any]:
    """Return the times of a network in the browser, its errors, and the sizes of its files."""
    with tempfile.TemporaryDirectory() as folder:
        feather.export_web(model, x, folder, compare=engine)
        handler = functools.partial(Server, directory=folder)
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        page = browser.new_page()
        page.goto(f"http://127.0.0.1:{server.server_port}/")
        options = {"rounds": rounds, "milliseconds": 20}
        found = page.evaluate(IN_PAGE, [x.flatten().tolist(), options])
        page.close()
        server.shutdown()
        server.server_close()
        sizes = {file.name: sizes_of(file) for file in Path(folder).rglob("*") if file.is_file()}
    with torch.no_grad():
        expected = model(x).flatten()
    outputs = torch.tensor(found.pop("outputs"))
    return found | {
        "error": float((outputs - expected).abs().max() / expected.abs().max()),
        "sparsity": feather.sparsity(model),
        "sizes": sizes,
        "load_average": os.getloadavg()[0],
    }


def sizes_of(file: Path) -> dict[str, int]:
    """Return the bytes of a file, and those of it compressed."""
    data = file.read_bytes()
    return {"bytes": len(data), "gzip": len(gzip.compress(data, 6))}


def spread(times: list[float]) -> str:
    """Return the median and the quartiles of times."""
    low, middle, high = statistics.quantiles(times, n=4)
    return f"{middle:.3g} ({low:.3g} to {high:.3g})"


def report(rows: list[dict[str, Any]], facts: dict[str, Any]) -> str:
    """Return the results as Markdown."""
    commit = str(facts["commit"])
    commit = commit[:10] + "+" * commit.endswith("+")
    lines = [
        "# Sparse networks in the browser",
        "",
        f"    {facts['command']}",
        "",
        f"Commit {commit}, PyTorch {facts['versions']['torch']}, "
        f"Chromium {facts['chromium']}, onnxruntime-web {rows[0]['version']}, one thread, batch 1; "
        f"{facts['hardware']['cpu']}. Median and quartiles of {facts['rounds']} alternating "
        "measurements in milliseconds. The load of the machine was "
        f"{min(r['load_average'] for r in rows):.1f} to {max(r['load_average'] for r in rows):.1f} "
        f"on {os.cpu_count()} cores.",
        "",
        "| network | zeros | sparse, ms | dense, onnxruntime-web, ms | ratio | error |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['network']} | {100 * row['sparsity']:.1f}% | {spread(row['sparse'])} | "
            f"{spread(row['dense'])} | {row['ratio']:.1f}× | {row['error']:.0e} |"
        )
    pruned_rows = [row for row in rows if row["sparsity"] > 0.5]
    reached = [row for row in pruned_rows if row["ratio"] >= AIM]
    lines += [
        "",
        f"Aim: {AIM:.0f}× at 95%. Reached by {len(reached)} of {len(pruned_rows)} networks. Error: "
        "largest difference from PyTorch's outputs, relative to the largest output.",
        "",
        "Bytes, and in parentheses compressed with gzip:",
        "",
        "| network | `model.wasm`: code and weights | `dense.onnx` | engine of `dense.onnx` |",
        "|---|---|---|---|",
    ]
    for row in rows:
        files = ("model.wasm", "dense.onnx", ENGINE)
        cells = [f"{row['sizes'][f]['bytes']:,} ({row['sizes'][f]['gzip']:,})" for f in files]
        lines.append(f"| {row['network']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Run the measurements and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, help="run directory of the digits network")
    parser.add_argument("--engine", type=Path, required=True, help="folder of onnxruntime-web")
    parser.add_argument("--networks", nargs="*", default=NETWORKS, metavar="NAME:SIZE")
    parser.add_argument("--sparsity", type=float, default=0.95)
    parser.add_argument("--unpruned", action="store_true", help="also the digits network, dense")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--json", type=Path, help="file of the results as JSON")
    args = parser.parse_args()
    cases: list[tuple[str, nn.Module, Tensor]] = []
    if args.run is not None:
        model, x = load_network(RunDirectory(args.run))
        network = RunDirectory(args.run).read_config().network
        cases.append((f"{network}, digits, {x.shape[-1]}", model.eval(), torch.randn(x.shape)))
        if args.unpruned:
            dense = feather.models.create(network, num_classes=10, in_channels=x.shape[1]).eval()
            cases.append((f"{network}, not pruned, {x.shape[-1]}", dense, torch.randn(x.shape)))
    for text in args.networks:
        name, size = text.rsplit(":", 1)
        label = f"{name.removeprefix('timm/')}, {size}"
        cases.append((label, *pruned(name, int(size), args.sparsity)))
    from playwright.sync_api import sync_playwright

    rows = []
    path = shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        for name, model, x in cases:
            found = measure(browser, model, x, args.engine, args.rounds)
            rows.append({"network": name, "input": list(x.shape), **found})
        facts = provenance(torch.device("cpu"))
        facts |= {"chromium": browser.version, "rounds": args.rounds}
        browser.close()
    shown = [Path(a).name if a.startswith(("/", "..")) else a for a in sys.argv[1:]]
    facts["command"] = " ".join(["python", "benchmarks/web.py", *shown])
    print(report(rows, facts))
    if args.json is not None:
        args.json.write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
