"""The pattern of a stage of a single layer, which ``greedy.steps.exact`` takes apart."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from greedy.base.torch_private import BATCH_NORMS, DROPOUTS, has_hooks
from greedy.exact.statistics import Statistics
from greedy.losses import LocalHeads
from greedy.models import Shape, Stage
from greedy.models.lean import Layer

ELEMENTWISE = (nn.ReLU, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.Identity)
BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d
TORCH_CLASSES = {*ELEMENTWISE, nn.BatchNorm1d, nn.BatchNorm2d, nn.Conv2d, nn.Linear}
# In a head these would couple samples, or draw another mask each time a row is computed.
COUPLED = (BATCH_NORMS, DROPOUTS)


@dataclass(frozen=True)
class SingleLayer:
    """An encoder, batch norm or none, an elementwise activation, and the local heads."""

    encoder: Layer
    norm: BatchNorm | None
    activation: nn.Sequential
    heads: LocalHeads

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yields the parameters of encoder, batch norm and heads."""
        for module in (self.encoder, self.norm, self.heads):
            if module is not None:
                yield from module.parameters()

    def hidden(self, c: Tensor, statistics: Statistics | None) -> Tensor:
        """Computes h from the encoder's output c (m, C, ...), normalised by the statistics of the
        whole batch; ``None`` without batch norm."""
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


def parts_of(stage: Stage, heads: LocalHeads, hidden: Shape = ()) -> SingleLayer | None:
    """Returns the parts of a stage of a single layer, ``None`` for any other stage, which
    ``greedy.steps.blocks`` trains.

    Args:
        hidden: the shape of a row of the stage's activation, which distinguishes tokens (T, C) from
            vectors (F,).
    """
    encoder, *others = stage.layer
    norm = others[0] if others and isinstance(others[0], BatchNorm) else None
    activation = others[1:] if norm else others
    if not isinstance(encoder, Layer) or not _is_plain(encoder, norm, hidden):
        return None
    is_usual = (
        (norm is None or (norm.affine and norm.track_running_stats))
        and all(isinstance(module, ELEMENTWISE) for module in activation)
        and all(map(_is_unchanged, stage.layer))
        and (norm is not None or not any(getattr(m, "inplace", False) for m in activation))
        and not any(isinstance(module, COUPLED) for module in heads.modules())
        and all(p.requires_grad for p in (*stage.parameters(), *heads.parameters()))
    )
    return SingleLayer(encoder, norm, nn.Sequential(*activation), heads) if is_usual else None


def _is_unchanged(module: nn.Module) -> bool:
    """Returns whether a module is one of torch's and computes exactly what its class does."""
    return type(module) in TORCH_CLASSES and not has_hooks(module)


def _is_plain(encoder: Layer, norm: BatchNorm | None, hidden: Shape) -> bool:
    """Returns whether an encoder has neither groups nor unusual padding, and a batch-norm channel,
    if any, for each of its output channels."""
    if isinstance(encoder, nn.Linear):
        return len(hidden) < 2 or (len(hidden) == 2 and norm is None)
    zeros = encoder.padding_mode == "zeros" and isinstance(encoder.padding, tuple)
    return encoder.groups == 1 and zeros
