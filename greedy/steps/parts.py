"""The usual pattern of a stage, whose gradients can be had a micro-batch at a time."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from greedy.losses import LocalHeads
from greedy.models import Shape, Stage
from greedy.models.lean import Layer
from greedy.steps.statistics import Statistics

ELEMENTWISE = (nn.ReLU, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.Identity)
BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d
TORCHS_OWN = {*ELEMENTWISE, nn.BatchNorm1d, nn.BatchNorm2d, nn.Conv2d, nn.Linear}
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
        """Yields all trained parameters."""
        for module in (self.encoder, self.norm, self.heads):
            if module is not None:
                yield from module.parameters()

    def hidden(self, c: Tensor, statistics: Statistics | None) -> Tensor:
        """Computes h from the encoder's output c, normalised by the whole batch's statistics."""
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


def parts_of(stage: Stage, heads: LocalHeads, hidden: Shape = ()) -> Parts | None:
    """Finds the parts of a stage.

    Args:
        hidden: the shape of a row of its activation, by which tokens are told from vectors.

    Returns:
        ``None`` for a stage of another pattern, which trains in the plain mode only.
    """
    encoder, *others = stage.layer
    norm = others[0] if others and isinstance(others[0], BatchNorm) else None
    activation = others[1:] if norm else others
    if not isinstance(encoder, Layer) or not _is_plain(encoder, norm, hidden):
        return None
    is_of_the_pattern = (
        (norm is None or (norm.affine and norm.track_running_stats))
        and all(isinstance(each, ELEMENTWISE) for each in activation)
        and all(map(_is_torchs_own, stage.layer))
        and (norm is not None or not any(getattr(each, "inplace", False) for each in activation))
        and not any(isinstance(each, COUPLED) for each in heads.modules())
        and all(each.requires_grad for each in (*stage.parameters(), *heads.parameters()))
    )
    return Parts(encoder, norm, nn.Sequential(*activation), heads) if is_of_the_pattern else None


def _is_torchs_own(module: nn.Module) -> bool:
    """Returns whether a module computes exactly what its class says."""
    return type(module) in TORCHS_OWN and not (module._forward_hooks or module._forward_pre_hooks)


def _is_plain(encoder: Layer, norm: BatchNorm | None, hidden: Shape) -> bool:
    """Returns whether each of an encoder's output channels has a batch-norm channel, and the
    encoder no groups or unusual padding."""
    if isinstance(encoder, nn.Linear):
        return len(hidden) < 2 or (len(hidden) == 2 and norm is None)
    zeros = encoder.padding_mode == "zeros" and isinstance(encoder.padding, tuple)
    return encoder.groups == 1 and zeros
