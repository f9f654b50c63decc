"""Write the test images of a training run to a NumPy file, for examples/serve.py.

    python examples/images.py RUN images.npz

Requires the training dependencies: pip install 'torch-feather[train]'
"""

import sys
from pathlib import Path

import numpy as np
import torch

from torch_feather.training.checkpoint import RunDirectory
from torch_feather.training.data import eval_loader, load_dataset


def write_images(run: Path, out: Path, most: int = 1000) -> int:
    """Write the first `most` test images as the network receives them; return their number."""
    config = RunDirectory(run).read_config()
    data = load_dataset(config.data, config.seed)
    batches = list(eval_loader(data, data.test, config, torch.device("cpu")))
    images, labels = (torch.cat(parts)[:most].numpy() for parts in zip(*batches, strict=True))
    np.savez_compressed(out, images=images, labels=labels)
    return len(labels)


if __name__ == "__main__":
    _, run, out = sys.argv
    print(f"{write_images(Path(run), Path(out))} images in {out}")
