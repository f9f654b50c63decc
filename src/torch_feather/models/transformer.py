"""Small transformers: a character-level GPT with nanoGPT's layers, and a vision transformer."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .sizes import check_sizes

STD = 0.02  # of initial weights, as in GPT-2 and DeiT


class Attention(nn.Module):
    """Multi-head self-attention with one projection for queries, keys and values.

    Args:
        dim: width of the input and of the output.
        heads: number of heads, a divisor of `dim`.
        causal: whether a position sees no later positions.

    Example:
        >>> Attention(dim=8, heads=2, causal=True)(torch.zeros(2, 5, 8)).shape
        torch.Size([2, 5, 8])
    """

    def __init__(self, dim: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, T, dim)` to `(B, T, dim)`."""
        batch, length, dim = x.shape
        qkv = self.qkv(x).view(batch, length, 3, self.heads, dim // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.proj(y.transpose(1, 2).reshape(batch, length, dim))


class Block(nn.Module):
    """Attention and a two-layer perceptron, each after a layer norm, with a shortcut.

    Args:
        dim: width of the input and of the output; the perceptron's hidden layer has 4 times this.
        heads: number of heads.
        causal: as for `Attention`.

    Example:
        >>> Block(dim=8, heads=2, causal=False)(torch.zeros(2, 5, 8)).shape
        torch.Size([2, 5, 8])
    """

    def __init__(self, dim: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, heads, causal)
        self.norm2 = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, T, dim)` to `(B, T, dim)`."""
        x = x + self.attn(self.norm1(x))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class Trunk(nn.Module):
    """Learned positions, blocks, and a final layer norm.

    Args:
        depth: number of blocks.
        dim: width.
        heads: number of heads.
        length: largest number of positions.
        causal: as for `Attention`.

    Example:
        >>> trunk = Trunk(depth=1, dim=8, heads=2, length=5, causal=True)
        >>> trunk(torch.zeros(2, 3, 8)).shape
        torch.Size([2, 3, 8])
        >>> trunk(torch.zeros(2, 6, 8))
        Traceback (most recent call last):
        ValueError: 6 positions are more than the 5 of the network
    """

    def __init__(self, depth: int, dim: int, heads: int, length: int, causal: bool) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.zeros(length, dim))
        self.blocks = nn.ModuleList(Block(dim, heads, causal) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, T, dim)` to `(B, T, dim)`, T at most the number of positions."""
        length, most = x.shape[1], len(self.positions)
        if length > most:
            raise ValueError(f"{length} positions are more than the {most} of the network")
        x = x + self.positions[:length]
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


def _initialize(network: nn.Module, trunk: Trunk) -> None:
    """Set all weights and positions to normal values with the same deviation, and biases to 0.

    GPT-2 makes projections that end in a shortcut smaller. A ranking of all layers by magnitude
    would prune these first.
    """
    for module in network.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=STD)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
    nn.init.normal_(trunk.positions, std=STD)


class GPT(nn.Module):
    """A language model: embedding, causal trunk, and a head that shares the embedding's weight.

    The embedding and the head are one weight, which `sparsify` leaves dense by default.

    Args:
        num_classes: number of different characters.
        depth: number of blocks.
        dim: width.
        heads: number of heads.
        length: largest number of characters of a text.

    Example:
        >>> model = GPT(num_classes=7, depth=1, dim=8, heads=2, length=16)
        >>> model(torch.tensor([[0, 3, 6]])).shape
        torch.Size([1, 3, 7])
    """

    def __init__(self, num_classes: int, depth: int, dim: int, heads: int, length: int) -> None:
        super().__init__()
        check_sizes(num_classes, 1)
        self.embedding = nn.Embedding(num_classes, dim)
        self.trunk = Trunk(depth, dim, heads, length, causal=True)
        self.head = nn.Linear(dim, num_classes, bias=False)
        _initialize(self, self.trunk)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        """Map characters, integers `(B, T)`, to logits of the next ones, `(B, T, classes)`."""
        return self.head(self.trunk(self.embedding(ids)))


class ViT(nn.Module):
    """A vision transformer (Dosovitskiy et al., 2021): linear patches, trunk, mean over patches.

    There is no class token. The positions are those of the training resolution.

    Args:
        num_classes: number of classes.
        in_channels: channels of an image.
        depth: number of blocks.
        dim: width.
        heads: number of heads.
        patch: height and width of a patch, a divisor of those of an image.
        length: largest number of patches.

    Example:
        >>> model = ViT(10, in_channels=3, depth=1, dim=8, heads=2, patch=4, length=64)
        >>> model(torch.zeros(2, 3, 16, 16)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int,
        *,
        depth: int,
        dim: int,
        heads: int,
        patch: int,
        length: int,
    ) -> None:
        super().__init__()
        check_sizes(num_classes, in_channels)
        self.patch = patch
        self.patches = nn.Linear(in_channels * patch**2, dim)
        self.trunk = Trunk(depth, dim, heads, length, causal=False)
        self.head = nn.Linear(dim, num_classes)
        _initialize(self, self.trunk)

    def forward(self, x: Tensor) -> Tensor:
        """Map images `(B, C, H, W)` to logits `(B, classes)`."""
        patches = F.pixel_unshuffle(x, self.patch).flatten(2).transpose(1, 2)
        return self.head(self.trunk(self.patches(patches)).mean(1))


def gpt_small(num_classes: int = 100, in_channels: int = 1) -> GPT:
    """Return a character-level GPT with 4 blocks of width 128, for at most 256 characters.

    Args:
        num_classes: number of different characters.
        in_channels: not used; a text has no channels.

    Example:
        >>> gpt_small(num_classes=80)(torch.zeros(1, 256, dtype=torch.int64)).shape
        torch.Size([1, 256, 80])
    """
    return GPT(num_classes, depth=4, dim=128, heads=4, length=256)


def vit_small(num_classes: int = 100, in_channels: int = 3) -> ViT:
    """Return a vision transformer with 6 blocks of width 96 and patches of 4x4, at most 64.

    Args:
        num_classes: number of classes.
        in_channels: channels of an image.

    Example:
        >>> vit_small(num_classes=100, in_channels=3)(torch.zeros(1, 3, 16, 16)).shape
        torch.Size([1, 100])
    """
    return ViT(num_classes, in_channels, depth=6, dim=96, heads=3, patch=4, length=64)
