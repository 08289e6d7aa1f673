"""Layers whose outputs are kept from an earlier pass over a micro-batch."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from greedy.base.torch_private import function_modes
from greedy.exact.rows import KeptRows

CONVOLUTIONS = (torch.conv1d, torch.conv2d, torch.conv3d)
LAYERS = (F.linear, *CONVOLUTIONS)

Place = tuple[int, int]  # a weight, by ``id``, and the number of its use in a forward pass


class LayerCall(NamedTuple):
    """The arguments of a layer's function."""

    input: Tensor
    weight: Tensor
    bias: Tensor | None = None
    stride: Any = 1
    padding: Any = 0
    dilation: Any = 1
    groups: int = 1

    @property
    def geometry(self) -> list[Any]:
        """Stride, padding and dilation, each with a number for every dimension."""
        dims = self.weight.dim() - 2
        settings = (self.stride, self.padding, self.dilation)
        return [[s] * dims if isinstance(s, int) else list(s) for s in settings]


class Layers:
    """The layers of a forward pass, which are computed or, where their output is kept, recalled.

    Attributes:
        keeps: whether outputs are kept now: the layers' inputs are those of a whole forward pass.
        others: as for ``KeptRows``.
    """

    def __init__(self, others: int = 0) -> None:
        self.keeps, self.others = False, others
        self._number = 0
        self._uses: dict[int, int] = {}
        self._kept: dict[Place, KeptRows] = {}
        self._seen: dict[Place, int] = {}  # in this forward pass, with their versions
        self._overwritten: set[Place] = set()

    def begin(self, number: int) -> None:
        """Starts a forward pass of micro-batch ``number``."""
        for place, version in self._seen.items():
            out = self._kept[place][self._number]
            # What the module has overwritten is no longer the layer's output.
            if out is None or out._version != version:
                del self._kept[place]
                self._overwritten.add(place)
        self._number, self._uses, self._seen = number, {}, {}

    def __call__(self, function: Callable[..., Tensor], args: Any, kwargs: Any) -> Tensor:
        """Returns what one of ``LAYERS`` gives."""
        call = LayerCall(*args, **kwargs)
        if not isinstance(call.weight, nn.Parameter) or isinstance(call.padding, str):
            return function(*args, **kwargs)
        use = self._uses.get(id(call.weight), 0)
        self._uses[id(call.weight)] = use + 1
        place = id(call.weight), use
        kept = self._kept.get(place)
        if kept is not None and (known := kept[self._number]) is not None:
            self._seen[place] = known._version
            out: Tensor = Recalled.apply(*call[:3], call, known)
            return out
        out = function(*args, **kwargs)
        if self.keeps and place not in self._overwritten:
            self._kept.setdefault(place, KeptRows(self.others))[self._number] = out.detach()
            self._seen[place] = out._version
        return out


class Recalled(torch.autograd.Function):
    """A layer whose output is known."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, call: LayerCall, known: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.geometry, ctx.groups = call.geometry, call.groups
        ctx.sizes = None if bias is None else list(bias.shape)
        ctx.modes = function_modes()
        return known.detach()  # another tensor, which may have a history

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        needed = ctx.needs_input_grad[:3]
        # Autocast has computed in a lower precision.
        given = g, x.to(g.dtype), weight.to(g.dtype)
        if weight.dim() == 2:
            found = _linear_backward(*given, needed)
        else:
            with ctx.modes():
                found = torch.ops.aten.convolution_backward(
                    *given, ctx.sizes, *ctx.geometry, False, [0] * (g.dim() - 2), ctx.groups, needed
                )
        return *(found[i] if need else None for i, need in enumerate(needed)), None, None


def _linear_backward(
    g: Tensor, x: Tensor, weight: Tensor, needed: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    flat = g.flatten(0, -2)
    return (
        g @ weight if needed[0] else None,
        flat.T @ x.flatten(0, -2) if needed[1] else None,
        flat.sum(0) if needed[2] else None,
    )
