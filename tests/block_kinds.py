"""Blocks of every kind, and the gradients that autograd gives them for a whole batch."""

from collections.abc import Callable
from copy import deepcopy
from warnings import catch_warnings, simplefilter

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm
from torchvision.models.convnext import CNBlock
from torchvision.models.mobilenetv2 import InvertedResidual
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.ops import SqueezeExcitation

ROWS, CLASSES, C, SIDE = 24, 5, 8, 9
MAPS, TOKENS = (C, SIDE, SIDE), (7, C)


def narrowed(channels: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(C, channels, 1, 2, bias=False), nn.BatchNorm2d(channels))


class PreActivation(nn.Module):
    """Batch norm and activation come before the convolution, and both paths start there."""

    def __init__(self, out: int = 12) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(C), nn.Conv2d(C, out, 3, 2, 1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(out), nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.shortcut = nn.Conv2d(C, out, 1, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm1(x))
        return self.conv2(F.relu(self.norm2(self.conv1(h)))) + self.shortcut(h)


class Twice(nn.Module):
    """A batch norm that is called twice, with other statistics each time."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(C, C, 3, padding=1), nn.BatchNorm2d(C)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(F.relu(self.norm(self.conv(x)))))


class Hidden(nn.Module):
    """The second batch norm depends on the first by a path that has no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.BatchNorm2d(C), nn.BatchNorm2d(C)
        self.conv = nn.Conv2d(C, C, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.one(self.conv(x))
        return self.two(self.conv(x) * (y > 0)) + y


class Branches(nn.Module):
    """Independent paths of different depth."""

    def __init__(self) -> None:
        super().__init__()
        self.long = nn.Sequential(
            nn.Conv2d(C, C, 1), nn.BatchNorm2d(C), nn.ReLU(), nn.Conv2d(C, C, 3, padding=1),
            nn.BatchNorm2d(C, affine=False), nn.ReLU(),
        )  # fmt: skip
        self.short = nn.Sequential(nn.Conv2d(C, C, 1), nn.BatchNorm2d(C), nn.ReLU(True))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.long(x), self.short(x)], 1)


class SqueezeExcited(nn.Module):
    """Convolutions stand between batch norms that do not depend on each other."""

    def __init__(self) -> None:
        super().__init__()
        self.path = nn.Sequential(
            nn.Conv2d(C, 6, 3, 2, 1), nn.BatchNorm2d(6), nn.ReLU(True), nn.Conv2d(6, 12, 1),
            nn.BatchNorm2d(12), SqueezeExcitation(12, 4),
        )  # fmt: skip
        self.shortcut = narrowed(12)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.path(x) + self.shortcut(x))


class AddedTo(nn.Module):
    """The output of a convolution is overwritten after the last batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.shortcut, self.conv = nn.Conv2d(C, C, 1), nn.Conv2d(C, C, 3, padding=1)
        self.norm = nn.BatchNorm2d(C)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = self.shortcut(x)
        shortcut += self.norm(self.conv(x))
        return F.relu(shortcut)


def halved(x: Tensor) -> Tensor:
    return torch.sigmoid(x) * 0.5


with catch_warnings():
    simplefilter("ignore")  # torch would have it compiled
    scripted = torch.jit.script(halved)


class Scripted(nn.Module):
    """A function that torch's modes do not see stands between two batch norms."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.BatchNorm2d(C), nn.BatchNorm2d(C)
        self.conv = nn.Conv2d(C, C, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.conv(scripted(self.one(self.conv(x)))))


def basic_with_fixed_norm() -> nn.Module:
    block = BasicBlock(C, C)
    block.bn1.eval()
    block.bn2.momentum = None
    return block


def partly_frozen() -> nn.Module:
    block = Bottleneck(C, 4, 2, narrowed(16))
    for part in (block.conv1, block.bn1, block.bn2, block.downsample):
        part.requires_grad_(False)
    return block


def untracked() -> nn.Module:
    return BasicBlock(C, C, norm_layer=lambda c: nn.BatchNorm2d(c, track_running_stats=False))


BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "basic": lambda: BasicBlock(C, C),
    "basic, downsampling": lambda: BasicBlock(C, 12, 2, narrowed(12)),
    "bottleneck": lambda: Bottleneck(C, 2),
    "bottleneck, downsampling": lambda: Bottleneck(C, 4, 2, narrowed(16)),
    "two blocks": lambda: nn.Sequential(BasicBlock(C, C), BasicBlock(C, 12, 2, narrowed(12))),
    "pre-activation": PreActivation,
    "inverted residual": lambda: InvertedResidual(C, C, 1, 3),
    "convnext": lambda: CNBlock(C, 1.0, 0.0),
    "transformer": lambda: nn.TransformerEncoderLayer(C, 2, 16, 0.0, batch_first=True),
    "nested": lambda: nn.Sequential(nn.Sequential(PreActivation(C)), nn.GroupNorm(2, C)),
    "called twice": Twice,
    "hidden dependence": Hidden,
    "branches": Branches,
    "squeeze and excitation": SqueezeExcited,
    "added to": AddedTo,
    "scripted function": Scripted,
    "a norm in evaluation mode": basic_with_fixed_norm,
    "partly frozen": partly_frozen,
    "untracked": untracked,
    "spectral norm": lambda: nn.Sequential(spectral_norm(nn.Conv2d(C, C, 3)), nn.BatchNorm2d(C)),
}


def similar(outputs: Tensor, labels: Tensor) -> Tensor:
    """A loss that compares all samples of a batch."""
    rows = F.normalize(outputs - outputs.mean(1, keepdim=True))
    same = F.one_hot(labels, CLASSES).to(rows) @ F.one_hot(labels, CLASSES).to(rows).T
    return F.cross_entropy(outputs, labels) + (rows @ rows.T - same).square().mean()


LOSSES = {"separable": F.cross_entropy, "of the whole batch": similar}


def with_head(block: nn.Module, shape: tuple[int, ...] = MAPS) -> nn.Module:
    """Returns a block with a linear classifier, in float64, with unusual weights."""
    torch.manual_seed(0)
    features = block(torch.randn(3, *shape)).flatten(1).shape[1]
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d) and module.affine:
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    return nn.Sequential(block, nn.Flatten(), nn.Linear(features, CLASSES)).double()


def data(shape: tuple[int, ...] = MAPS, rows: int = ROWS) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, *shape, generator=generator, dtype=torch.float64)
    return x.requires_grad_(), torch.randint(CLASSES, (rows,), generator=generator)


def by_autograd(module: nn.Module, loss, x: Tensor, y: Tensor) -> Tensor:
    value = loss(module(x), y)
    value.backward()
    return value.detach()


def measured(run, module: nn.Module, loss, x: Tensor, y: Tensor, *more) -> dict[str, Tensor]:
    """Returns the loss, all gradients and all buffers after a step of copies."""
    module, x = deepcopy(module), x.detach().requires_grad_(x.requires_grad)
    found = {"loss": run(module, loss, x, y, *more)}
    gradients = {name: p.grad for name, p in module.named_parameters()} | {"input": x.grad}
    found |= {f"{name}.grad": g for name, g in gradients.items() if g is not None}
    return found | dict(module.named_buffers())


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        worst = float((actual[name] - value).abs().max())
        assert worst <= 1e-10 * max(1.0, float(value.abs().max())), name
