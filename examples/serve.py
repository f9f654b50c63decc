"""Serve images one by one with the network of a sparse file, and measure the time.

    python examples/serve.py model.sparse.safetensors images.npz

Requires only the runtime: pip install 'torch-feather[files,runtime]'
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import torch_feather as feather
from torch_feather.export import SparseFile


def load(path: Path) -> torch.nn.Module:
    """Load the network of a file that `feather export` wrote; the file names the network."""
    with SparseFile(path) as file:
        about = file.metadata
    model = feather.models.create(about["network"], about["classes"], about["input_shape"][0])
    return feather.load_sparse(path, model).eval()


def serve(
    network: Callable[[Tensor], Tensor], images: Tensor, requests: int
) -> tuple[float, list[int]]:
    """Return the median milliseconds of a request, and the answers; cycles through the images."""
    times, answers = [], []
    for i in range(requests):
        start = time.perf_counter()
        answers.append(int(network(images[i % len(images), None]).argmax()))
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times), answers


def main() -> None:
    """Load, compile and serve, first dense and then sparse."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, help="written by feather export")
    parser.add_argument("images", type=Path, help="written by examples/images.py")
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument(
        "--tuning", type=Path, help="tuning results: read if the file exists, otherwise written"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)

    with np.load(options.images) as file:
        images, labels = torch.from_numpy(file["images"]), file["labels"]
    start = time.perf_counter()
    model = load(options.file)
    read = time.perf_counter()
    known = options.tuning if options.tuning and options.tuning.exists() else None
    sparse = feather.compile_sparse(model, images[:1], tuning=known)
    compiled = time.perf_counter()
    if options.tuning and known is None:
        sparse.save_tuning(options.tuning)

    print(f"{options.file.name}: {options.file.stat().st_size:,} bytes, ", end="")
    print(f"{feather.sparsity(model):.2%} of the weights are zero")
    print(f"loaded in {read - start:.2f} s, compiled in {compiled - read:.2f} s")
    for name, network in (("PyTorch", model), ("compile_sparse", sparse)):
        with torch.inference_mode():
            _, answers = serve(network, images, len(images))
            ms, _ = serve(network, images, options.requests)
        accuracy = np.mean(answers == labels)
        print(f"{name:14} {ms:8.3f} ms per image, {accuracy:.2%} accuracy on {len(labels)} images")


if __name__ == "__main__":
    main()
