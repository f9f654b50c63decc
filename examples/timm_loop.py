"""Sparse training with timm: its models, optimizers, schedulers and checkpoints.

    python examples/timm_loop.py

Trains a small vision transformer on scikit-learn's digits at 90% sparsity, with layer-wise learning
rate decay and a sparse average of the weights.
Requires: pip install 'torch-feather[train,frameworks]'
"""

import copy
from pathlib import Path
from tempfile import TemporaryDirectory

import timm
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from timm.models import resume_checkpoint
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import CheckpointSaver
from torch.utils.data import DataLoader, TensorDataset

import torch_feather as feather


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """Return images and labels; the last 397 are for testing."""
    x, y = load_digits(return_X_y=True)
    return torch.tensor(x, dtype=torch.float32).reshape(-1, 1, 8, 8) / 8 - 1, torch.tensor(y)


def train(folder: Path, epochs: int, stop: int | None = None) -> tuple:
    """Train, from the checkpoint in `folder` if it exists; `stop` ends the run after that epoch.

    Returns:
        The network, and a copy with the average of its weights over time.
    """
    torch.manual_seed(0)
    images, labels = digits()
    data = TensorDataset(images[:1400], labels[:1400])
    model = timm.create_model(
        "test_vit", pretrained=False, num_classes=10, in_chans=1, img_size=8, patch_size=2
    )
    optimizer = create_optimizer_v2(model, opt="adamw", lr=4e-3, weight_decay=0.05, layer_decay=0.9)
    updates = len(DataLoader(data, batch_size=32))
    schedule = CosineLRScheduler(
        optimizer, t_initial=epochs * updates, warmup_t=updates, t_in_epochs=False
    )
    sparsifier = feather.sparsify(  # new
        model, optimizer, sparsity=0.9, total_steps=epochs * updates
    )
    # Instead of ModelEmaV3: masks change, so an average of sparse weights would be dense.
    average = feather.LatentAverage(sparsifier, decay=0.98)  # new
    folder.mkdir(parents=True, exist_ok=True)
    saver = CheckpointSaver(model, optimizer, model_ema=average, checkpoint_dir=str(folder))

    begin, last = 0, folder / "last.pth.tar"
    if last.exists():
        begin = resume_checkpoint(model, str(last), optimizer)
        average.load_state_dict(torch.load(last)["state_dict_ema"])
    schedule.step_update(begin * updates)

    for epoch in range(begin, epochs if stop is None else stop):
        order = torch.Generator().manual_seed(epoch)  # the same after a resume
        model.train()
        for i, (x, y) in enumerate(DataLoader(data, 32, shuffle=True, generator=order)):
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
            average.update()  # new
            schedule.step_update(epoch * updates + i + 1)
        saver.save_checkpoint(epoch)
    averaged = average.copy_to(copy.deepcopy(model))  # new
    if stop is None:
        sparsifier.finalize()  # new
    return model, averaged


def main(epochs: int = 8) -> None:
    """Train in two parts, then evaluate."""
    with TemporaryDirectory() as folder:
        train(Path(folder), epochs, stop=epochs // 2)
        networks = train(Path(folder), epochs)
    images, labels = digits()
    for name, model in zip(("last weights", "average"), networks, strict=True):
        with torch.no_grad():
            accuracy = (model.eval()(images[1400:]).argmax(1) == labels[1400:]).float().mean()
        zeros = feather.sparsity(model)
        print(f"{name}: {accuracy:.1%} accuracy, {zeros:.2%} of the weights are zero")


if __name__ == "__main__":
    main()
