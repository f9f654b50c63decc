"""Sparse training with Accelerate: call sparsify on the objects that prepare() returned.

    python examples/accelerate_loop.py

Trains a small network on scikit-learn's digits at 95% sparsity, with gradient accumulation and
clipping, and resumes from save_state().
Requires: pip install 'torch-feather[train,frameworks]'
"""

import math
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

import torch_feather as feather


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """Return images and labels; the last 397 are for testing."""
    x, y = load_digits(return_X_y=True)
    return torch.tensor(x, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16, torch.tensor(y)


def train(folder: Path, epochs: int, stop: int | None = None, **options) -> torch.nn.Module:
    """Train, from the state in `folder` if it exists; `stop` ends the run after that epoch."""
    set_seed(0)
    # A seedable sampler: a resumed run sees the images in the same order.
    seeded = DataLoaderConfiguration(use_seedable_sampler=True)
    accelerator = Accelerator(
        gradient_accumulation_steps=2, dataloader_config=seeded, cpu=True, **options
    )
    images, labels = digits()
    loader = DataLoader(TensorDataset(images[:1400], labels[:1400]), batch_size=32, shuffle=True)
    model = feather.models.resnet8(num_classes=10, in_channels=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    steps = math.ceil(len(loader) / accelerator.gradient_accumulation_steps)
    sparsifier = feather.sparsify(  # new
        model, optimizer, sparsity=0.95, total_steps=epochs * steps
    )
    begin = 0
    if folder.exists():
        accelerator.load_state(folder)
        begin = sparsifier.step_count // steps

    for epoch in range(begin, epochs if stop is None else stop):
        loader.set_epoch(epoch)
        for x, y in loader:
            with accelerator.accumulate(model):
                accelerator.backward(F.cross_entropy(model(x), y))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 3.0)
                optimizer.step()
                optimizer.zero_grad()
        accelerator.save_state(folder)
    if stop is None:
        sparsifier.finalize()  # new
    return accelerator.unwrap_model(model)


def main(epochs: int = 4) -> None:
    """Train in two parts, then evaluate."""
    with TemporaryDirectory() as folder:
        train(Path(folder) / "state", epochs, stop=epochs // 2)
        model = train(Path(folder) / "state", epochs).eval()
    images, labels = digits()
    with torch.no_grad():
        accuracy = (model(images[1400:]).argmax(1) == labels[1400:]).float().mean()
    print(f"{accuracy:.1%} accuracy, {feather.sparsity(model):.2%} of the weights are zero")


if __name__ == "__main__":
    main()
