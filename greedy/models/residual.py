"""Residual networks as flat ``nn.Sequential`` modules, whose children are stem, blocks and head.

They take images of any side. Weights begin at PyTorch's defaults, as in all networks here.
"""

from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from greedy.base.errors import UserError
from greedy.models.networks import ACTIVATIONS, scaled

Block = Callable[[int, int, int], nn.Module]  # of input channels, output channels and stride
Group = tuple[int, int]  # channels and stride of its first block


class ResidualBlock(nn.Module):
    """The block of He et al., "Deep residual learning for image recognition" (2016): convolution,
    norm, activation, convolution, norm; and an activation of the sum with the shortcut.

    The shortcut has no parameters. Where the block halves the sides it takes every second pixel,
    and where it has more channels it adds channels of zeros: the paper's option A, which all its
    networks for CIFAR-10 use.
    """

    def __init__(self, channels: int, out: int, stride: int = 1, activation: str = "relu") -> None:
        super().__init__()
        self.stride, self.added = stride, out - channels
        self.residual = nn.Sequential(
            _convolution(channels, out, stride),
            nn.BatchNorm2d(out),
            ACTIVATIONS[activation](),
            _convolution(out, out),
            nn.BatchNorm2d(out),
        )
        self.activation = ACTIVATIONS[activation]()

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, channels, H, W) to (B, out, H / stride, W / stride), sides rounded up."""
        shortcut = x[:, :, :: self.stride, :: self.stride]
        shortcut = F.pad(shortcut, (0, 0, 0, 0, 0, self.added))
        return self.activation(self.residual(x) + shortcut)


class PreActivationBlock(nn.Module):
    """The block of He et al., "Identity mappings in deep residual networks" (2016), and of
    Zagoruyko & Komodakis, "Wide residual networks" (2016): norm, activation, convolution, twice.

    The shortcut is the identity. Where the block halves the sides or changes the number of
    channels, it is a 1x1 convolution of the first activation, as in both works. ``dropout`` is
    that of single values before the second convolution, as in wide residual networks.
    """

    def __init__(
        self,
        channels: int,
        out: int,
        stride: int = 1,
        activation: str = "relu",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.entry = nn.Sequential(nn.BatchNorm2d(channels), ACTIVATIONS[activation]())
        self.residual = nn.Sequential(
            _convolution(channels, out, stride),
            nn.BatchNorm2d(out),
            ACTIVATIONS[activation](),
            *([nn.Dropout(dropout)] if dropout else []),
            _convolution(out, out),
        )
        projects = stride > 1 or channels != out
        self.shortcut = nn.Conv2d(channels, out, 1, stride, bias=False) if projects else None

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, channels, H, W) to (B, out, H / stride, W / stride), sides rounded up."""
        entry = self.entry(x)
        shortcut = x if self.shortcut is None else self.shortcut(entry)
        return shortcut + self.residual(entry)


def resnet(
    in_channels: int = 3,
    num_classes: int = 10,
    *,
    depth: int = 32,
    feature_multiplier: float = 1.0,
    activation: str = "relu",
) -> nn.Sequential:
    """Builds the ResNet for CIFAR-10 of He et al. (2016) with ``depth`` = 6n + 2 layers: a stem, 3
    groups of n ``ResidualBlock`` of 16, 32 and 64 channels, and a linear layer.

    The last block and the linear layer are one child, and so one stage: the linear layer sees only
    averages over all positions, which the local loss of a block does not prepare.

    It maps images (B, in_channels, H, W) to logits (B, num_classes). ``feature_multiplier`` scales
    all channels. Raises ``UserError`` for another depth, and when a layer is left no channel.
    """
    widths = [scaled(width, feature_multiplier) for width in (16, 32, 64)]
    stem = [
        _convolution(in_channels, widths[0]),
        nn.BatchNorm2d(widths[0]),
        ACTIVATIONS[activation](),
    ]
    *blocks, last = _blocks(
        widths[0],
        list(zip(widths, (1, 2, 2), strict=True)),
        _blocks_a_group(depth, 2),
        lambda channels, out, stride: ResidualBlock(channels, out, stride, activation),
    )
    end = nn.Sequential(last, *_head(widths[-1], num_classes))
    return nn.Sequential(*stem, *blocks, end)


def wide_resnet(
    in_channels: int = 3,
    num_classes: int = 10,
    *,
    depth: int = 28,
    widen_factor: int = 10,
    feature_multiplier: float = 1.0,
    dropout: float = 0.0,
    activation: str = "relu",
) -> nn.Sequential:
    """Builds WRN-``depth``-``widen_factor`` of Zagoruyko & Komodakis (2016), with ``depth`` = 6n +
    4 layers: a convolution of 16 channels, 3 groups of n ``PreActivationBlock`` of 16, 32 and 64
    channels times ``widen_factor``, norm, activation, and a linear layer.

    It maps images (B, in_channels, H, W) to logits (B, num_classes). ``feature_multiplier`` scales
    all channels; ``dropout`` is within the blocks. Raises ``UserError`` for another depth, and when
    a layer is left no channel.
    """
    stem = scaled(16, feature_multiplier)
    widths = [scaled(width * widen_factor, feature_multiplier) for width in (16, 32, 64)]
    groups = list(zip(widths, (1, 2, 2), strict=True))
    each = _blocks_a_group(depth, 4)
    return _pre_activated(in_channels, num_classes, stem, groups, each, activation, dropout)


def preact_resnet18(
    in_channels: int = 3,
    num_classes: int = 10,
    *,
    feature_multiplier: float = 1.0,
    activation: str = "relu",
) -> nn.Sequential:
    """Builds PreActResNet-18 for small images: a 3x3 convolution of 64 channels, 4 groups of 2
    ``PreActivationBlock`` of 64, 128, 256 and 512 channels, norm, activation, and a linear layer.

    It maps images (B, in_channels, H, W) to logits (B, num_classes). ``feature_multiplier`` scales
    all channels. Raises ``UserError`` when a layer is left no channel.
    """
    widths = [scaled(width, feature_multiplier) for width in (64, 128, 256, 512)]
    groups = list(zip(widths, (1, 2, 2, 2), strict=True))
    return _pre_activated(in_channels, num_classes, widths[0], groups, 2, activation, 0.0)


def _pre_activated(
    in_channels: int,
    num_classes: int,
    stem: int,
    groups: Sequence[Group],
    each: int,
    activation: str,
    dropout: float,
) -> nn.Sequential:
    blocks = _blocks(
        stem,
        groups,
        each,
        lambda channels, out, stride: PreActivationBlock(
            channels, out, stride, activation, dropout
        ),
    )
    width = groups[-1][0]
    end = [nn.BatchNorm2d(width), ACTIVATIONS[activation]()]
    return nn.Sequential(_convolution(in_channels, stem), *blocks, *end, *_head(width, num_classes))


def _blocks(channels: int, groups: Sequence[Group], each: int, block: Block) -> list[nn.Module]:
    """Returns ``each`` blocks for each group, the first of which has the group's stride."""
    blocks = []
    for out, first in groups:
        for stride in (first, *[1] * (each - 1)):
            blocks.append(block(channels, out, stride))
            channels = out
    return blocks


def _head(width: int, num_classes: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, num_classes)]


def _convolution(channels: int, out: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels, out, 3, stride, padding=1, bias=False)


def _blocks_a_group(depth: int, others: int) -> int:
    """Returns the blocks in each of 3 groups, of 2 layers each, besides which there are
    ``others``."""
    each, left = divmod(depth - others, 6)
    if left or each < 1:
        raise UserError(
            f"a residual network of this kind cannot have {depth} layers: give 6n + {others}, "
            f"such as {others + 6 * max(each, 1)}"
        )
    return each
