"""DenseNet-BC (Huang et al., 2017) for 32x32 images."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Bottleneck(nn.Module):
    """BN-ReLU-1x1, BN-ReLU-3x3; its `growth` new channels are appended to its input."""

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
    """BN-ReLU-1x1 to half the channels, then a 2x2 average pool."""

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(in_channels)
        self.conv = nn.Conv2d(in_channels, in_channels // 2, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, C, H, W)` to `(B, C/2, H/2, W/2)`."""
        return F.avg_pool2d(self.conv(torch.relu(self.bn(x))), 2)


class DenseNet(nn.Module):
    """Stem of 2·growth channels, three dense blocks, global average pool, linear.

    Takes `(B, in_channels, H, W)` with H and W at least 4; gives logits `(B, num_classes)`.
    """

    def __init__(self, growth: int, bottlenecks: int, num_classes: int, in_channels: int) -> None:
        super().__init__()
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

    def forward(self, x: Tensor) -> Tensor:
        """Map images `(B, in_channels, H, W)` to logits `(B, num_classes)`."""
        x = torch.relu(self.bn(self.blocks(self.stem(x))))
        return self.fc(x.mean(dim=(2, 3)))


def densenet40_24(num_classes: int = 100, in_channels: int = 3) -> DenseNet:
    """DenseNet-BC, depth 40, growth 24: 703,920 prunable weights, 288.2 M MACs at 32x32."""
    return DenseNet(growth=24, bottlenecks=6, num_classes=num_classes, in_channels=in_channels)
