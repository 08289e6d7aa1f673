"""The paper's networks (section 4) as flat ``nn.Sequential`` modules."""

from functools import partial

from torch import nn

from greedy.base.errors import UserError

POOL = "pool"
VGG8B = (128, 256, POOL, 256, 512, POOL, 512, POOL, 512, POOL)
VGG11B = (128, 128, 128, 256, POOL, 256, 512, POOL, 512, 512, POOL, 512, POOL)

LARGE_IMAGE = 64  # above this side the first convolution is 7x7 with stride 2
ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "leaky_relu": nn.LeakyReLU}
"""Activations by their names in a recipe."""


def mlp(
    in_channels: int = 1,
    image_size: int = 28,
    num_classes: int = 10,
    *,
    hidden_layers: int = 3,
    hidden_width: int = 1024,
    dropout: float = 0.0,
    activation: str = "leaky_relu",
) -> nn.Sequential:
    """Builds the fully connected network.

    It maps images (B, in_channels, image_size, image_size) to logits (B, num_classes).
    ``activation`` is ``relu`` or ``leaky_relu`` (slope 0.01).
    """
    modules: list[nn.Module] = [nn.Flatten()]
    width = in_channels * image_size**2
    for _ in range(hidden_layers):
        modules += _linear_block(width, hidden_width, dropout, activation)
        width = hidden_width
    return nn.Sequential(*modules, nn.Linear(width, num_classes))


def vgg(
    plan: tuple[int | str, ...],
    in_channels: int = 3,
    image_size: int = 32,
    num_classes: int = 10,
    *,
    feature_multiplier: float = 1.0,
    hidden_layers: int = 1,
    hidden_width: int = 1024,
    dropout: float = 0.0,
    activation: str = "leaky_relu",
) -> nn.Sequential:
    """Builds a VGG-like network; ``plan`` lists channels and pools in order.

    It maps images (B, in_channels, image_size, image_size) to logits (B, num_classes).
    ``feature_multiplier`` scales the convolutions' channels only. Raises ``UserError`` when it
    leaves a convolution no channel, or the pools leave nothing of the image.
    """
    modules: list[nn.Module] = []
    channels, side = in_channels, image_size
    for entry in plan:
        if entry == POOL:
            modules.append(nn.MaxPool2d(2))
            side //= 2
        else:
            out = scaled(int(entry), feature_multiplier)
            large = not modules and image_size > LARGE_IMAGE
            modules += _conv_block(channels, out, large, dropout, activation)
            channels, side = out, (side + 1) // 2 if large else side
        if side == 0:
            raise UserError(
                f"images of side {image_size} are too small for this network's "
                f"{plan.count(POOL)} poolings: use larger images (data.image_size) or an mlp"
            )
    modules.append(nn.Flatten())
    width = channels * side**2
    for _ in range(hidden_layers):
        modules += _linear_block(width, hidden_width, dropout, activation)
        width = hidden_width
    return nn.Sequential(*modules, nn.Linear(width, num_classes))


vgg8b = partial(vgg, VGG8B)
"""``vgg`` with VGG8B's six convolutions and four poolings."""
vgg11b = partial(vgg, VGG11B)
"""``vgg`` with VGG11B's nine convolutions and four poolings."""


def scaled(channels: int, multiplier: float) -> int:
    """Returns a convolution's channels times a multiplier, rounded down. Raises ``UserError`` when
    that leaves none."""
    out = int(channels * multiplier)
    if out == 0:
        raise UserError(
            f"a feature multiplier of {multiplier:g} leaves a convolution of "
            f"{channels} channels none: give a larger one"
        )
    return out


def _conv_block(
    channels: int, out: int, large: bool, dropout: float, activation: str
) -> list[nn.Module]:
    conv = (
        nn.Conv2d(channels, out, kernel_size=7, stride=2, padding=3)
        if large
        else nn.Conv2d(channels, out, kernel_size=3, padding=1)
    )
    block = [conv, nn.BatchNorm2d(out), ACTIVATIONS[activation]()]
    return [*block, nn.Dropout2d(dropout)] if dropout else block


def _linear_block(width: int, out: int, dropout: float, activation: str) -> list[nn.Module]:
    block = [nn.Linear(width, out), nn.BatchNorm1d(out), ACTIVATIONS[activation]()]
    return [*block, nn.Dropout(dropout)] if dropout else block
