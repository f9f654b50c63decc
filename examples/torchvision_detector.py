"""Sparse training of a detector of torchvision, in the loop of its reference scripts.

    python examples/torchvision_detector.py

Trains a small Faster R-CNN to find bright squares, resumes from its checkpoint, and detects.
Requires: pip install 'torch-feather[train,vision]'
"""

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.ops import MultiScaleRoIAlign

import torch_feather as feather

SIZE, BATCH = 64, 4


def small_detector() -> FasterRCNN:
    """Return a detector of one class with a backbone of three layers."""
    backbone = nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU(),
        nn.Conv2d(32, 32, 3, 2, 1), nn.ReLU(),
    )  # fmt: skip
    backbone.out_channels = 32
    return FasterRCNN(
        backbone, min_size=SIZE, max_size=SIZE, image_mean=[0] * 3, image_std=[1] * 3,
        rpn_anchor_generator=AnchorGenerator(((16, 32),), ((1.0,),)),
        rpn_pre_nms_top_n_train=100, rpn_post_nms_top_n_train=50, box_batch_size_per_image=32,
        box_roi_pool=MultiScaleRoIAlign(["0"], 4, 2), box_head=TwoMLPHead(32 * 4 * 4, 64),
        box_predictor=FastRCNNPredictor(64, num_classes=2), box_detections_per_img=4,
    )  # fmt: skip


def squares(count: int, seed: int) -> tuple[list, list]:
    """Return images with a bright square each, and its box."""
    random = torch.Generator().manual_seed(seed)
    images, targets = [], []
    for _ in range(count):
        image = 0.2 * torch.rand(3, SIZE, SIZE, generator=random)
        side = int(torch.randint(16, 32, (), generator=random))
        x, y = torch.randint(0, SIZE - side, (2,), generator=random).tolist()
        image[:, y : y + side, x : x + side] = 0.9
        box = torch.tensor([[x, y, x + side, y + side]], dtype=torch.float32)
        images.append(image)
        targets.append({"boxes": box, "labels": torch.ones(1, dtype=torch.int64)})
    return images, targets


def train(folder: Path, epochs: int, batches: int = 8, stop: int | None = None) -> FasterRCNN:
    """Train, from the checkpoint in `folder` if it exists; `stop` ends the run after that epoch."""
    torch.manual_seed(0)
    model = small_detector()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * batches)
    sparsifier = feather.sparsify(  # new
        model, optimizer, sparsity=0.9, total_steps=epochs * batches, min_density=0.05
    )
    file, begin = folder / "checkpoint.pth", 0
    if file.exists():
        state = torch.load(file)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        torch.set_rng_state(state["random"])  # anchors are sampled at random
        begin = state["epoch"]
    for epoch in range(begin, epochs if stop is None else stop):
        model.train()
        for i in range(batches):
            losses = model(*squares(BATCH, seed=epoch * batches + i))
            optimizer.zero_grad()
            sum(losses.values()).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
            schedule.step()
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        state |= {"schedule": schedule.state_dict(), "random": torch.get_rng_state()}
        torch.save(state | {"epoch": epoch + 1}, file)
    if stop is None:
        sparsifier.finalize()  # new
    return model


def main(epochs: int = 5) -> None:
    """Train in two parts, then detect."""
    with TemporaryDirectory() as folder:
        train(Path(folder), epochs, stop=epochs // 2)
        model = train(Path(folder), epochs).eval()
    with torch.no_grad():
        (found,) = model(squares(1, seed=10**6)[0])
    print(f"{len(found['boxes'])} boxes; {feather.sparsity(model):.2%} of the weights are zero")


if __name__ == "__main__":
    main()
