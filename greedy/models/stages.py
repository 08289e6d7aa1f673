"""Cutting a network into stages."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from greedy.base.errors import UserError

ENCODERS = (nn.modules.conv._ConvNd, nn.Linear)
"""The layers that a stage begins at."""

DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
POOLS = (
    nn.modules.pooling._MaxPoolNd,
    nn.modules.pooling._AvgPoolNd,
    nn.modules.pooling._AdaptiveMaxPoolNd,
    nn.modules.pooling._AdaptiveAvgPoolNd,
)

PROBABILITIES = (nn.Softmax, nn.LogSoftmax, nn.Softmax2d, nn.Sigmoid)

Shape = tuple[int, ...]
"""Of one row: maps (C, H, W), tokens (T, D) or features (F,)."""


@dataclass(frozen=True)
class InputDropout:
    """Dropout on a stage's input: whole channels of feature maps, or single values."""

    rate: float
    channels: bool

    def mask(self, batch: int, shape: Shape, generator: torch.Generator) -> Tensor:
        """One mask for a whole batch, scaled by 1/(1 - rate): (batch, C, 1, 1) for channels,
        else (batch, *shape). Row i belongs to position i in the batch."""
        wide = (shape[0],) + (1,) * (len(shape) - 1) if self.channels else shape
        keep = torch.rand((batch, *wide), generator=generator) >= self.rate
        return keep.float().div_(1 - self.rate)


class Stage(nn.Module):
    """One trainable layer, or a block of several, and what belongs to it.

    ``layer`` (encoder, batch norm, activation; of a block one after the other, with what stands
    between them) gives the activation h that the local loss sees; ``pool`` reduces it to the
    stage's output. ``dropout`` applies to the stage's input, in training only and by the training
    step, which owns the masks. ``flatten`` says that feature maps are flattened on the way in.
    """

    def __init__(
        self,
        number: int,
        layer: nn.Sequential,
        pool: nn.Sequential,
        *,
        flatten: bool = False,
        dropout: InputDropout | None = None,
    ) -> None:
        super().__init__()
        self.number = number
        self.layer = layer
        self.pool = pool
        self.flatten = flatten
        self.dropout = dropout

    @property
    def name(self) -> str:
        """What the stage is called in tables: ``conv128``, ``linear1024``, ``conv128+conv256``,
        ``transformer64``."""
        blocks = [m for m in self.layer.modules() if isinstance(m, nn.TransformerEncoderLayer)]
        within = {id(part) for block in blocks for part in block.modules() if part is not block}
        named = (_name(m) for m in self.layer.modules() if id(m) not in within)
        return "+".join(filter(None, named))

    @property
    def kinds(self) -> list[str]:
        """The classes of its modules in order, by which a stage is told from another that would
        take the same weights."""
        return [type(m).__name__ for m in (*self.layer.modules(), *self.pool.modules())]

    def hidden(self, x: Tensor) -> Tensor:
        """The activation h before pooling, of an input on which dropout has been applied."""
        return self.layer(x.flatten(1) if self.flatten else x)

    def forward(self, x: Tensor) -> Tensor:
        """The stage's output as stored and as the next stage receives it."""
        return self.pool(self.hidden(x))

    def modules_for_inference(self) -> Iterator[nn.Module]:
        """The stage as plain torch modules in order."""
        if self.flatten:
            yield nn.Flatten()
        yield from self.layer
        yield from self.pool


def _name(module: nn.Module) -> str | None:
    if isinstance(module, nn.TransformerEncoderLayer):
        return f"transformer{module.self_attn.embed_dim}"
    if isinstance(module, nn.Linear):
        return f"linear{module.out_features}"
    return f"conv{module.out_channels}" if isinstance(module, ENCODERS) else None


def cut(network: nn.Sequential, layers: int = 1) -> list[Stage]:
    """Cuts a network into stages of ``layers`` layers each, and the output layer.

    A stage begins at each child that is, or contains, a convolution or linear layer; what
    follows joins it. A flat network is so cut into single layers, a staged one (a Sequential
    of Sequentials) along its children. Dropout and flattening at the end of a stage move to
    the input of the next, pooling is the stage's last act; dropping whole channels commutes
    with it, and what does not is refused.

    With more than one of ``layers``, so many of these stages become one, trained as a block; the
    last before the output layer may have fewer. What stands between a block's layers stays there.
    """
    if not isinstance(network, nn.Sequential):
        raise UserError(
            f"a network must be an nn.Sequential to be cut into stages, not a "
            f"{type(network).__name__}: arrange its layers or blocks in one"
        )
    if any(is_lazy(p) for p in chain(network.parameters(), network.buffers())):
        raise UserError(
            "the network has lazy layers, which have no weights yet: pass one batch through it "
            "first, or give the layers their sizes"
        )
    groups: list[list[nn.Module]] = []
    leading: list[nn.Module] = []
    for child in network:
        if any(isinstance(m, ENCODERS) for m in child.modules()):
            groups.append(list(child) if type(child) is nn.Sequential else [child])
        else:
            (groups[-1] if groups else leading).append(child)
    if not groups:
        raise UserError("the network has no convolution or linear layer to train: add one")
    stages = []
    for number, group in enumerate(_blocks(groups, layers), start=1):
        stage, leading = _stage(number, leading + group)
        stages.append(stage)
    if leading:
        raise UserError(
            f"the output layer is followed by {type(leading[0]).__name__}: "
            f"end the network with the linear layer that gives the logits"
        )
    if isinstance(last := stages[-1].layer[-1], PROBABILITIES):
        raise UserError(
            f"the network ends in {type(last).__name__}, and training needs logits: leave it out"
        )
    return stages


def _blocks(groups: list[list[nn.Module]], layers: int) -> Iterator[list[nn.Module]]:
    """The modules of each block of layers, and of the output layer."""
    *hidden, output = groups
    for start in range(0, len(hidden), layers):
        yield list(chain(*hidden[start : start + layers]))
    yield output


def _stage(number: int, modules: list[nn.Module]) -> tuple[Stage, list[nn.Module]]:
    """A stage of these modules, and those at its end that the next stage's input takes over."""
    first = next(
        i for i, m in enumerate(modules) if any(isinstance(s, ENCODERS) for s in m.modules())
    )
    last = max(
        i for i, m in enumerate(modules) if not isinstance(m, (*DROPOUTS, *POOLS, nn.Flatten))
    )
    entry, layer, end = modules[:first], modules[first : last + 1], modules[last + 1 :]
    _require_movable(number, entry, end)
    plain = next(
        (i for i, m in enumerate(entry) if not isinstance(m, (*DROPOUTS, nn.Flatten))), first
    )
    # Activations, normalisation or pooling in front of the first encoder, and what follows them.
    entry, layer = entry[:plain], entry[plain:] + layer
    _require_samples_first(number, layer)
    stage = Stage(
        number,
        nn.Sequential(*layer),
        nn.Sequential(*(m for m in end if isinstance(m, POOLS))),
        flatten=any(isinstance(m, nn.Flatten) for m in entry),
        dropout=_dropout(number, entry),
    )
    return stage, [m for m in end if not isinstance(m, POOLS)]


def _require_movable(number: int, entry: Sequence[nn.Module], end: Sequence[nn.Module]) -> None:
    """What moves behind the pooling must give the same there."""
    for flatten in (m for m in entry if isinstance(m, nn.Flatten)):
        if flatten.start_dim not in (1, -3) or flatten.end_dim not in (-1, 3):
            raise UserError(
                f"{flatten} stands before stage {number}, whose input can only be flattened "
                f"entirely: use nn.Flatten()"
            )
    pools = [i for i, m in enumerate(end) if isinstance(m, POOLS)]
    for module in end[: pools[-1]] if pools else ():
        values = isinstance(module, nn.Dropout) and module.p > 0
        if values or isinstance(module, nn.Flatten):
            raise UserError(
                f"stage {number} has {module} before its pooling, where it does something else "
                f"than after it: put it after the pooling"
            )


def _require_samples_first(number: int, layer: Sequence[nn.Module]) -> None:
    """Transformers take tokens (T, B, D) unless told otherwise, and torch would not notice."""
    for module in layer:
        within = module.layers if isinstance(module, nn.TransformerEncoder) else [module]
        for each in within:
            if isinstance(each, nn.TransformerEncoderLayer) and not each.self_attn.batch_first:
                raise UserError(
                    f"stage {number} has a {type(each).__name__} that takes samples for tokens: "
                    f"make it with batch_first=True"
                )


def _dropout(number: int, entry: Sequence[nn.Module]) -> InputDropout | None:
    found = [m for m in entry if isinstance(m, DROPOUTS) and m.p > 0]
    if len(found) > 1:
        raise UserError(f"two dropouts stand before stage {number}: keep one of them")
    return InputDropout(found[0].p, not isinstance(found[0], nn.Dropout)) if found else None
