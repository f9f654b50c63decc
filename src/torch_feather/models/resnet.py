"""Residual networks for small images (He et al., 2016), in the widths of the Feather paper."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

WIDTHS = (32, 64, 128)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut; `(B, in, H, W)` to `(B, out, H/stride, W/stride)`.

    The shortcut is the identity where the shape stays, a 1x1 convolution with norm elsewhere.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False),
                nn.BatchNorm2d(out_channels),
            )

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, in, H, W)` to `(B, out, H/stride, W/stride)`."""
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """Stem, three stages of basic blocks at widths 32, 64 and 128, global average pool, linear.

    Takes `(B, in_channels, H, W)` of any H and W, and gives logits `(B, num_classes)`.
    """

    def __init__(self, blocks: Sequence[int], num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, WIDTHS[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(WIDTHS[0])
        self.layer1 = _stage(WIDTHS[0], WIDTHS[0], blocks[0], stride=1)
        self.layer2 = _stage(WIDTHS[0], WIDTHS[1], blocks[1], stride=2)
        self.layer3 = _stage(WIDTHS[1], WIDTHS[2], blocks[2], stride=2)
        self.fc = nn.Linear(WIDTHS[2], num_classes)
        self._initialize()

    def _initialize(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.normal_(self.fc.weight, std=0.01)
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map images `(B, in_channels, H, W)` to logits `(B, num_classes)`."""
        x = torch.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(x.mean(dim=(2, 3)))


def _stage(in_channels: int, out_channels: int, blocks: int, stride: int) -> nn.Sequential:
    first = BasicBlock(in_channels, out_channels, stride)
    return nn.Sequential(
        first, *(BasicBlock(out_channels, out_channels, stride=1) for _ in range(blocks - 1))
    )


def resnet20(num_classes: int = 100, in_channels: int = 3) -> ResNet:
    """ResNet-20: 1,092,960 prunable weights with 100 classes, 162.4 M MACs at 32x32."""
    return ResNet((3, 3, 3), num_classes, in_channels)


def resnet8(num_classes: int = 100, in_channels: int = 3) -> ResNet:
    """One block per stage: 318,816 prunable weights with 100 classes, 49.1 M MACs at 32x32."""
    return ResNet((1, 1, 1), num_classes, in_channels)
