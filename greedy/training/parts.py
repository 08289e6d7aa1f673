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
BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d
# In a head they would couple samples, or draw other masks each time a row passes.
COUPLED = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)


@dataclass(frozen=True)
class Parts:
    """An encoder, batch norm or none, an elementwise activation, and the local heads."""

    encoder: Layer
    norm: BatchNorm | None
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
    norm = others[0] if others and isinstance(others[0], BatchNorm) else None
    activation = others[1:] if norm else others
    if not isinstance(encoder, Layer) or not _is_plain(encoder):
        return None
    if norm is not None and not (norm.affine and norm.track_running_stats):
        return None
    if not all(type(each) in ELEMENTWISE for each in activation):
        return None
    if norm is None and any(getattr(each, "inplace", False) for each in activation):
        return None
    if any(isinstance(each, COUPLED) for each in heads.modules()):
        return None
    return Parts(encoder, norm, nn.Sequential(*activation), heads)


def _is_plain(encoder: Layer) -> bool:
    if isinstance(encoder, nn.Linear):
        return True
    zeros = encoder.padding_mode == "zeros" and isinstance(encoder.padding, tuple)
    return encoder.groups == 1 and zeros
