"""MobileNetV1 (Howard et al., 2017) for 32x32 images."""

from torch import Tensor, nn

from .sizes import check_sizes

# (output channels, stride) of each depthwise-separable block
BLOCKS = (
    (64, 1),
    (128, 2),
    (128, 1),
    (256, 2),
    (256, 1),
    (512, 2),
    *((512, 1),) * 5,
    (1024, 2),
    (1024, 1),
)


class SeparableBlock(nn.Sequential):
    """A depthwise 3x3 convolution, then a pointwise (1x1) convolution with bias.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        stride: stride of the depthwise convolution.

    Example:
        >>> import torch
        >>> block = SeparableBlock(in_channels=8, out_channels=16, stride=2)
        >>> block(torch.zeros(2, 8, 16, 16)).shape
        torch.Size([2, 16, 8, 8])
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(
            in_channels, in_channels, 3, stride, padding=1, groups=in_channels, bias=False
        )
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.relu1 = nn.ReLU()
        self.pointwise = nn.Conv2d(in_channels, out_channels, 1)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.relu2 = nn.ReLU()


class MobileNetV1(nn.Module):
    """Stem with stride 1, thirteen separable blocks, global average pooling, linear layer.

    Weights have the default initialization of PyTorch's layers.

    Args:
        num_classes: number of classes.
        in_channels: channels of an image.

    Example:
        >>> import torch
        >>> model = MobileNetV1(num_classes=10, in_channels=1)
        >>> len(model.blocks), model(torch.zeros(2, 1, 8, 8)).shape
        (13, torch.Size([2, 10]))
    """

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__()
        check_sizes(num_classes, in_channels)
        self.stem = nn.Sequential()
        self.stem.conv = nn.Conv2d(in_channels, 32, 3, padding=1, bias=False)
        self.stem.bn = nn.BatchNorm2d(32)
        self.stem.relu = nn.ReLU()
        self.blocks = nn.Sequential()
        channels = 32
        for width, stride in BLOCKS:
            self.blocks.append(SeparableBlock(channels, width, stride))
            channels = width
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images `(B, in_channels, H, W)` to logits `(B, num_classes)`."""
        return self.fc(self.blocks(self.stem(x)).mean(dim=(2, 3)))


def mobilenet_v1(num_classes: int = 100, in_channels: int = 3) -> MobileNetV1:
    """Create MobileNetV1.

    With 100 classes it has 3,287,488 prunable weights, and 46.4 M multiply-adds (MACs) at 32x32.

    Args:
        num_classes: number of classes.
        in_channels: channels of an image.

    Example:
        >>> sum(p.numel() for p in mobilenet_v1(num_classes=100).parameters())
        3315428
    """
    return MobileNetV1(num_classes, in_channels)
