"""Residual networks for small images (He et al., 2016) with the widths of the Feather paper."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .sizes import check_sizes

WIDTHS = (32, 64, 128)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut.

    The shortcut is the identity if the shape does not change; otherwise it is a 1x1 convolution
    with batch norm.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        stride: stride of the first convolution and of the shortcut.

    Example:
        >>> BasicBlock(in_channels=8, out_channels=16, stride=2)(torch.zeros(2, 8, 16, 16)).shape
        torch.Size([2, 16, 8, 8])
        >>> BasicBlock(in_channels=8, out_channels=8, stride=1).shortcut
        Identity()
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
    """Stem, three stages of basic blocks (32, 64 and 128 channels), average pooling, linear layer.

    Args:
        blocks: blocks of each stage.
        num_classes: number of classes.
        in_channels: channels of an image.

    Example:
        >>> model = ResNet(blocks=(1, 2, 1), num_classes=10, in_channels=3)
        >>> len(model.layer2), model(torch.zeros(2, 3, 32, 32)).shape
        (2, torch.Size([2, 10]))
    """

    def __init__(self, blocks: Sequence[int], num_classes: int, in_channels: int) -> None:
        super().__init__()
        check_sizes(num_classes, in_channels)
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
    """Create ResNet-20.

    With 100 classes it has 1,092,960 prunable weights, and 162.4 M multiply-adds (MACs) at 32x32.

    Args:
        num_classes: number of classes.
        in_channels: channels of an image.

    Example:
        >>> sum(p.numel() for p in resnet20(num_classes=100).parameters())
        1096196
    """
    return ResNet((3, 3, 3), num_classes, in_channels)


def resnet8(num_classes: int = 100, in_channels: int = 3) -> ResNet:
    """Create ResNet-8: one block per stage.

    With 100 classes it has 318,816 prunable weights, and 49.1 M multiply-adds (MACs) at 32x32.

    Args:
        num_classes: number of classes.
        in_channels: channels of an image.

    Example:
        >>> model = resnet8(num_classes=10)
        >>> model(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """
    return ResNet((1, 1, 1), num_classes, in_channels)
