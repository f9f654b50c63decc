"""A network of your own for `feather train`, here a small one for small images.

    feather train --network own_network:small_net

The command finds this file in the current folder or on PYTHONPATH. It calls the factory with those
of the keywords `num_classes` and `in_channels` that the factory takes.
"""

from torch import nn


def small_net(num_classes: int, in_channels: int) -> nn.Module:
    """Return a network that maps images (B, in_channels, H, W) to logits (B, num_classes)."""
    return nn.Sequential(
        nn.Conv2d(in_channels, 32, 3, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, num_classes),
    )
