"""A data set of your own for `feather train`: any map-style data set of (image, label).

    feather train --data own_data:shapes --network resnet8 --sparsity 0.9

The command calls the factory with `path`, the value of `--data-path`, if the factory takes this
keyword. Images are of Pillow or uint8, and are cropped, mirrored and normalized as the settings
say; or float tensors (C, H, W), which the network receives as they are.
"""

import numpy as np
import torch
from torch.utils.data import Dataset


class Shapes(Dataset):
    """Images of rectangles and ellipses at random positions, with noise."""

    classes = ("rectangle", "ellipse")

    def __init__(self, count: int, seed: int) -> None:
        self.count, self.seed = count, seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> tuple[np.ndarray, int]:
        """Return an image, uint8 (32, 32, 3), and its label."""
        if i >= self.count:
            raise IndexError(i)
        rng, label = np.random.RandomState(self.seed + i), i % 2
        (top, left), (high, wide) = rng.randint(2, 10, 2), rng.randint(10, 20, 2)
        y, x = np.mgrid[:32, :32]
        y, x = (y - top - high / 2) / (high / 2), (x - left - wide / 2) / (wide / 2)
        inside = (y**2 + x**2 < 1) if label else (abs(y) < 1) & (abs(x) < 1)
        pixels = rng.randint(0, 60, (32, 32, 3))
        pixels[inside] += rng.randint(60, 190, 3)
        return pixels.astype(np.uint8), label


def shapes() -> dict[str, Dataset]:
    """Return the parts of the data set; a part `validation` may be among them."""
    return {"train": Shapes(300, seed=0), "test": Shapes(100, seed=10**6)}


class Flattened(Dataset):
    """The same images, prepared for the network by this class, with its own random mirroring."""

    classes = Shapes.classes

    def __init__(self, images: Shapes, train: bool) -> None:
        self.images, self.train = images, train

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        """Return an image, float32 (1, 32, 32), and its label."""
        pixels, label = self.images[i]
        image = torch.from_numpy(pixels).float().mean(2)[None] / 255 - 0.2
        if self.train and torch.rand(()) < 0.5:  # seeded for each image: a run is reproducible
            image = image.flip(2)
        return image, label


def prepared() -> tuple[Dataset, Dataset]:
    """Return training and test images that are ready for the network."""
    parts = shapes()
    return Flattened(parts["train"], train=True), Flattened(parts["test"], train=False)
