"""DenseNet-BC (Huang et al., 2017) for 32x32 images."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .sizes import check_sizes


class Bottleneck(nn.Module):
    """BN-ReLU-1x1, then BN-ReLU-3x3. Appends `growth` channels to the input.

    Args:
        in_channels: channels of the input.
        growth: channels that are appended.

    Example:
        >>> Bottleneck(in_channels=8, growth=4)(torch.zeros(2, 8, 16, 16)).shape
        torch.Size([2, 12, 16, 16])
    """

    def __init__(self, in_channels: int, growth: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, 4 * growth, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(4 * growth)
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, C, H, W)` to `(B, C + growth, H, W)`."""
        y = self.conv1(torch.relu(self.bn1(x)))
        y = self.conv2(torch.relu(self.bn2(y)))
        return torch.cat([x, y], dim=1)


class Transition(nn.Module):
    """BN-ReLU-1x1 to half the channels, then 2x2 average pooling.

    Args:
        in_channels: channels of the input.

    Example:
        >>> Transition(in_channels=8)(torch.zeros(2, 8, 16, 16)).shape
        torch.Size([2, 4, 8, 8])
    """

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(in_channels)
        self.conv = nn.Conv2d(in_channels, in_channels // 2, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, C, H, W)` to `(B, C/2, H/2, W/2)`."""
        return F.avg_pool2d(self.conv(torch.relu(self.bn(x))), 2)


class DenseNet(nn.Module):
    """Stem of 2·growth channels, three dense blocks, global average pooling, linear layer.

    Args:
        growth: channels that each bottleneck appends.
        bottlenecks: bottlenecks in each dense block.
        num_classes: number of classes.
        in_channels: channels of an image.

    Example:
        >>> model = DenseNet(growth=4, bottlenecks=2, num_classes=10, in_channels=3)
        >>> model(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
        >>> model.fc.in_features  # channels after the last block
        16
    """

    def __init__(self, growth: int, bottlenecks: int, num_classes: int, in_channels: int) -> None:
        super().__init__()
        check_sizes(num_classes, in_channels)
        channels = 2 * growth
        self.stem = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
        self.blocks = nn.Sequential()
        for stage in range(3):
            if stage > 0:
                self.blocks.append(Transition(channels))
                channels //= 2
            block = nn.Sequential()
            for _ in range(bottlenecks):
                block.append(Bottleneck(channels, growth))
                channels += growth
            self.blocks.append(block)
        self.bn = nn.BatchNorm2d(channels)
        self.fc = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):  # N(0, 2 / (k²·out))
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map images `(B, in_channels, H, W)` to logits `(B, num_classes)`; H and W at least 4."""
        x = torch.relu(self.bn(self.blocks(self.stem(x))))
        return self.fc(x.mean(dim=(2, 3)))


def densenet40_24(num_classes: int = 100, in_channels: int = 3) -> DenseNet:
    """Create DenseNet-BC with depth 40 and growth 24.

    With 100 classes it has 703,920 prunable weights, and 288.2 M multiply-adds (MACs) at 32x32.

    Args:
        num_classes: number of classes.
        in_channels: channels of an image.

    Example:
        >>> sum(p.numel() for p in densenet40_24(num_classes=100).parameters())
        714196
    """
    return DenseNet(growth=24, bottlenecks=6, num_classes=num_classes, in_channels=in_channels)
