"""Sparse training of a segmentation network of MONAI: 3D UNet, Dice loss, sliding windows.

    python examples/monai_segmentation.py

Trains a small UNet to find bright balls in volumes, and segments a larger volume window by window.
Requires: pip install torch-feather monai
"""

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from monai.inferers import sliding_window_inference
from monai.losses import DiceCELoss
from monai.networks.nets import UNet

import torch_feather as feather

SIZE = 16


def volumes(count: int, seed: int, size: int = SIZE) -> tuple[torch.Tensor, torch.Tensor]:
    """Return noisy volumes with a bright ball each, and the ball's voxels."""
    random = torch.Generator().manual_seed(seed)
    grid = torch.stack(torch.meshgrid(*3 * [torch.arange(size)], indexing="ij"))
    center = torch.randint(5, size - 5, (count, 3, 1, 1, 1), generator=random)
    inside = ((grid - center) ** 2).sum(1, keepdim=True) < 25
    return inside + 0.5 * torch.randn(inside.shape, generator=random), inside.long()


def train(folder: Path, steps: int, stop: int | None = None) -> UNet:
    """Train, from the checkpoint in `folder` if it exists; `stop` ends the run after that step."""
    torch.manual_seed(0)
    model = UNet(
        spatial_dims=3, in_channels=1, out_channels=2, channels=(8, 16, 32), strides=(2, 2),
        num_res_units=1, norm="batch",
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    loss = DiceCELoss(to_onehot_y=True, softmax=True)
    sparsifier = feather.sparsify(  # new
        model, optimizer, sparsity=0.9, total_steps=steps, min_density=0.05
    )
    file = folder / "checkpoint.pt"
    if file.exists():
        state = torch.load(file)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    while sparsifier.step_count < (steps if stop is None else stop):
        image, label = volumes(4, seed=sparsifier.step_count)
        loss(model(image), label).backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    if stop is None:
        sparsifier.finalize()  # new
    return model


def main(steps: int = 40) -> None:
    """Train in two parts, then segment a larger volume."""
    with TemporaryDirectory() as folder:
        train(Path(folder), steps, stop=steps // 2)
        model = train(Path(folder), steps).eval()
    image, label = volumes(1, seed=10**6, size=24)
    with torch.no_grad():
        found = sliding_window_inference(image, 3 * [SIZE], 1, model).argmax(1, keepdim=True)
    dice = 2 * (found & label).sum() / (found.sum() + label.sum())
    print(f"Dice {dice:.2f}, {feather.sparsity(model):.2%} of the weights are zero")


if __name__ == "__main__":
    main()
