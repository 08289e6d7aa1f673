"""Cutting a network into stages."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from greedy.base.errors import UserError
from greedy.base.torch_private import CONVOLUTIONS, POOLS, has_hooks
from greedy.models.memory_format import takes_any_layout, usual_layout

ENCODERS = (CONVOLUTIONS, nn.Linear)
"""The layers that begin a stage."""

DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)

PROBABILITIES = (nn.Softmax, nn.LogSoftmax, nn.Softmax2d, nn.Sigmoid)

Shape = tuple[int, ...]
"""The shape of one row: maps (C, H, W), tokens (T, D) or features (F,)."""


@dataclass(frozen=True)
class InputDropout:
    """Dropout on a stage's input: whole channels of feature maps, or single values."""

    rate: float
    channels: bool

    def mask(self, batch: int, shape: Shape, generator: torch.Generator) -> Tensor:
        """Returns one mask for a whole batch, scaled by 1/(1 - rate): (batch, C, 1, 1) for
        channels, else (batch, *shape). Row i belongs to position i in the batch."""
        row = (shape[0],) + (1,) * (len(shape) - 1) if self.channels else shape
        keep = torch.rand((batch, *row), generator=generator) >= self.rate
        return keep.float().div_(1 - self.rate or 1)  # a rate of 1 keeps nothing


def dropped(x: Tensor, mask: Tensor | None, rows: slice = slice(None)) -> Tensor:
    """Applies the dropout mask of a batch, if there is one, to the stage's inputs (rows, *shape)
    of a slice of the batch."""
    return x if mask is None else x * mask[rows].to(x.dtype)


class Stage(nn.Module):
    """One trainable layer, or a block of several, with dropout on its input and pooling.

    Attributes:
        number: counted from 1.
        layer: encoder, batch norm and activation, of a block one after the other with the modules
            between them; gives the activation h that the local loss takes.
        pool: reduces h to the stage's output.
        flatten: whether the input's feature maps are flattened first.
        path: its name in tables, for a stage of modules that have names in a model.
        dropout: applied to the stage's input in training only, by the training step, which draws
            the masks.
        any_layout: whether its modules take feature maps in any memory format.
    """

    def __init__(
        self,
        number: int,
        layer: nn.Sequential,
        pool: nn.Sequential,
        *,
        flatten: bool = False,
        dropout: InputDropout | None = None,
        path: str = "",
    ) -> None:
        super().__init__()
        self.number = number
        self.layer = layer
        self.pool = pool
        self.flatten = flatten
        self.dropout = dropout
        self.path = path
        self.any_layout = takes_any_layout(layer) and takes_any_layout(pool)

    @property
    def name(self) -> str:
        """The stage's name in tables: ``conv128``, ``linear1024``, ``conv128+conv256``,
        ``transformer64``; or of a model's own modules ``layer2.0`` or ``layer2.0…layer3.1``."""
        if self.path:
            return self.path
        blocks = [m for m in self.layer.modules() if isinstance(m, nn.TransformerEncoderLayer)]
        within = {id(part) for block in blocks for part in block.modules() if part is not block}
        named = (_name(m) for m in self.layer.modules() if id(m) not in within)
        return "+".join(filter(None, named))

    @property
    def kinds(self) -> list[str]:
        """The kinds of its modules in order, which tell it from another stage with the same shapes
        of weights: their classes, and the arguments that torch's own show."""
        return [_kind(m) for m in (*self.layer.modules(), *self.pool.modules())]

    def arranged(self, x: Tensor) -> Tensor:
        """Returns an input (B, *shape) as its layers take it: flattened, or in torch's usual
        memory format."""
        if self.flatten:
            return x.flatten(1)
        return x if self.any_layout else usual_layout(x)

    def hidden(self, x: Tensor) -> Tensor:
        """Returns the activation h, before pooling, of an input with dropout applied."""
        return self.layer(self.arranged(x))

    def forward(self, x: Tensor) -> Tensor:
        """Returns the stage's output, which is stored and which the next stage takes."""
        return self.pool(self.hidden(x))

    def modules_for_inference(self) -> Iterator[nn.Module]:
        """Yields the stage's torch modules in order."""
        if self.flatten:
            yield nn.Flatten()
        yield from self.layer
        yield from self.pool


def _kind(module: nn.Module) -> str:
    kind = type(module)
    if not kind.__module__.startswith("torch.nn.modules."):
        return kind.__name__
    arguments = [re.sub("(, )?inplace=True", "", module.extra_repr())]  # it computes the same
    if isinstance(module, nn.MultiheadAttention):
        arguments = [f"num_heads={module.num_heads}"]
    elif isinstance(module, nn.TransformerEncoderLayer):
        activation = getattr(module.activation, "__name__", type(module.activation).__name__)
        arguments = [f"norm_first={module.norm_first}", f"activation={activation}"]
    return f"{kind.__name__}({', '.join(arguments)})"


def _name(module: nn.Module) -> str | None:
    if isinstance(module, nn.TransformerEncoderLayer):
        return f"transformer{module.self_attn.embed_dim}"
    if isinstance(module, nn.Linear):
        return f"linear{module.out_features}"
    return f"conv{module.out_channels}" if isinstance(module, ENCODERS) else None


@dataclass
class Layer:
    """A child of a network with a convolution or linear layer, and the children after it without.

    Attributes:
        modules: what the child consists of, and the children after it.
        path: the name of the child.
    """

    modules: list[nn.Module]
    path: str


def layers_of(network: nn.Sequential) -> tuple[list[nn.Module], list[Layer]]:
    """Returns the children of a network before its first layer, and its layers."""
    leading: list[nn.Module] = []
    layers: list[Layer] = []
    paths = getattr(network, "paths", list(network._modules))
    for path, child in zip(paths, network, strict=True):
        if any(isinstance(m, ENCODERS) for m in child.modules()):
            if type(child) is nn.Sequential and not has_hooks(child):
                layers.append(Layer(list(child), path))
            else:
                layers.append(Layer([child], path))
        else:
            (layers[-1].modules if layers else leading).append(child)
    return leading, layers


def cut(network: nn.Sequential, layers: int | Sequence[int] = 1) -> list[Stage]:
    """Cuts a network into stages of ``layers`` layers each, and the output layer.

    A stage begins at each child that is, or contains, a convolution or linear layer, and takes the
    children after it. So a flat network is cut into single layers, and a nested one (a Sequential
    of Sequentials) into its children. Dropout and flattening at the end of a stage move to the
    input of the next, after the pooling; dropping whole channels commutes with pooling, and a
    module that does not is refused.

    Where ``layers`` is more than one, as many of these stages become one block; the last before the
    output layer may have fewer. The modules between a block's layers stay there. A list gives the
    number for each stage but the output layer.

    Raises ``UserError`` for a network that cannot be cut or trained.
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
    leading, found = layers_of(network)
    if not found:
        raise UserError("the network has no convolution or linear layer to train: add one")
    stages = []
    for number, block in enumerate(_blocks(found, layers), start=1):
        stage, leading = _stage(number, leading + [m for layer in block for m in layer.modules])
        if hasattr(network, "paths"):
            stage.path = _range([layer.path for layer in block])
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


def _blocks(found: list[Layer], layers: int | Sequence[int]) -> Iterator[list[Layer]]:
    """Yields the layers of each block, then the output layer."""
    *hidden, output = found
    if isinstance(layers, int):
        layers = [layers] * -(-len(hidden) // layers)
    for count in layers:
        yield hidden[:count]
        hidden = hidden[count:]
    yield [output]


def _range(paths: list[str]) -> str:
    """Returns the names of a stage's layers as one, without what the last shares with the first."""
    first, last = paths[0].split("."), paths[-1].split(".")
    shared = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), None)
    return paths[0] if shared is None else f"{paths[0]}…{'.'.join(last[shared:])}"


def _stage(number: int, modules: list[nn.Module]) -> tuple[Stage, list[nn.Module]]:
    """Returns a stage of these modules, and those at its end that move to the next stage's
    input."""
    first = next(
        i for i, m in enumerate(modules) if any(isinstance(s, ENCODERS) for s in m.modules())
    )
    last = max(i for i, m in enumerate(modules) if not _moves(m) and not isinstance(m, POOLS))
    entry, layer, end = modules[:first], modules[first : last + 1], modules[last + 1 :]
    _require_movable(number, entry, end)
    kept = next((i for i, m in enumerate(entry) if not _moves(m)), first)
    # Other modules before the first encoder, and all after them, belong to the layer.
    entry, layer = entry[:kept], entry[kept:] + layer
    _require_samples_first(number, layer)
    stage = Stage(
        number,
        nn.Sequential(*layer),
        nn.Sequential(*(m for m in end if isinstance(m, POOLS))),
        flatten=any(isinstance(m, nn.Flatten) for m in entry),
        dropout=_dropout(number, entry),
    )
    return stage, [m for m in end if not isinstance(m, POOLS)]


def _moves(module: nn.Module) -> bool:
    """Returns whether a module between stages is done at the input of the second: one of torch's
    own that nobody has changed."""
    return type(module) in (*DROPOUTS, nn.Flatten) and not has_hooks(module)


def _require_movable(number: int, entry: Sequence[nn.Module], end: Sequence[nn.Module]) -> None:
    """Raises ``UserError`` for modules that compute something else after the pooling than before
    it."""
    for flatten in (m for m in entry if isinstance(m, nn.Flatten)):
        if flatten.start_dim not in (1, -3) or flatten.end_dim not in (-1, 3):
            raise UserError(
                f"{flatten} stands before stage {number}, whose input can only be flattened "
                f"entirely: use nn.Flatten()"
            )
    pools = [i for i, m in enumerate(end) if isinstance(m, POOLS)]
    for module in end[: pools[-1]] if pools else ():
        drops_values = isinstance(module, nn.Dropout) and module.p > 0
        if drops_values or isinstance(module, nn.Flatten):
            raise UserError(
                f"stage {number} has {module} before its pooling, where its result differs from "
                f"that after the pooling: put it after the pooling"
            )


def _require_samples_first(number: int, layer: Sequence[nn.Module]) -> None:
    """Raises ``UserError`` for a transformer layer that takes tokens (T, B, D), torch's default: it
    would silently mix samples."""
    for module in layer:
        within = module.layers if isinstance(module, nn.TransformerEncoder) else [module]
        for block in within:
            if isinstance(block, nn.TransformerEncoderLayer) and not block.self_attn.batch_first:
                raise UserError(
                    f"stage {number} has a {type(block).__name__} that takes samples for tokens: "
                    f"make it with batch_first=True"
                )


def _dropout(number: int, entry: Sequence[nn.Module]) -> InputDropout | None:
    dropouts = [i for i, m in enumerate(entry) if isinstance(m, DROPOUTS) and m.p > 0]
    if len(dropouts) > 1:
        raise UserError(f"two dropouts stand before stage {number}: keep one of them")
    if not dropouts:
        return None
    dropout, before = entry[dropouts[0]], entry[: dropouts[0]]
    assert isinstance(dropout, DROPOUTS)
    # Of flattened maps nn.Dropout2d drops single values.
    is_flat = any(isinstance(m, nn.Flatten) for m in before)
    return InputDropout(dropout.p, not (is_flat or isinstance(dropout, nn.Dropout)))
