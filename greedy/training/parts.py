"""The usual pattern of a stage, whose gradients can be had a micro-batch at a time."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from greedy.lean import Layer
from greedy.losses import LocalHeads
from greedy.models import Stage
from greedy.training.statistics import Statistics

ELEMENTWISE = (nn.ReLU, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.Identity)
# In a head they would couple samples, or draw other masks each time a row passes.
COUPLED = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)


@dataclass(frozen=True)
class Parts:
    """An encoder, batch norm or none, an elementwise activation, and the local heads."""

    encoder: Layer
    norm: nn.BatchNorm1d | nn.BatchNorm2d | None
    activation: nn.Sequential
    heads: LocalHeads

    def parameters(self) -> Iterator[nn.Parameter]:
        """All that is trained."""
        for module in (self.encoder, self.norm, self.heads):
            if module is not None:
                yield from module.parameters()

    def hidden(self, c: Tensor, statistics: Statistics | None) -> Tensor:
        """h of the encoder's output c, normalised by the whole batch's statistics."""
        if self.norm is not None:
            assert statistics is not None
            c = F.batch_norm(
                c,
                statistics.mean,
                statistics.variance,
                self.norm.weight,
                self.norm.bias,
                training=False,
                eps=self.norm.eps,
            )
        return self.activation(c)


def parts_of(stage: Stage, heads: LocalHeads) -> Parts | None:
    """The parts of a stage, or ``None`` for one that is not of the pattern and can therefore only
    be trained in the plain mode."""
    encoder, *others = stage.layer
    norm = None
    if others and isinstance(others[0], nn.BatchNorm1d | nn.BatchNorm2d):
        norm, *others = others
    elementwise = all(type(each) in ELEMENTWISE for each in others)
    if norm is None:
        elementwise = elementwise and not any(getattr(m, "inplace", False) for m in others)
    else:
        elementwise = elementwise and norm.affine and norm.track_running_stats
    if not elementwise or any(isinstance(each, COUPLED) for each in heads.modules()):
        return None
    if not isinstance(encoder, nn.Linear) and not _is_plain_convolution(encoder):
        return None
    return Parts(encoder, norm, nn.Sequential(*others), heads)


def _is_plain_convolution(module: nn.Module) -> bool:
    return (
        type(module) is nn.Conv2d
        and module.groups == 1
        and module.padding_mode == "zeros"
        and isinstance(module.padding, tuple)
    )
