"""The parts that a module calls one after the other, found in a trace of its forward pass."""

import operator
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from greedy.base.errors import first_line
from greedy.base.torch_private import has_hooks
from greedy.models.stages import ENCODERS

_WINDOW = ("kernel_size", "stride", "padding", "ceil_mode")

# Functions as the modules that compute the same, and the arguments that both have.
MODULES: dict[Any, tuple[type[nn.Module], tuple[str, ...]]] = {
    F.relu: (nn.ReLU, ()),
    torch.relu: (nn.ReLU, ()),
    "relu": (nn.ReLU, ()),
    F.dropout: (nn.Dropout, ("p",)),
    F.dropout2d: (nn.Dropout2d, ("p",)),
    F.max_pool2d: (nn.MaxPool2d, (*_WINDOW[:3], "dilation", "ceil_mode", "return_indices")),
    F.avg_pool2d: (nn.AvgPool2d, (*_WINDOW, "count_include_pad", "divisor_override")),
    F.adaptive_avg_pool2d: (nn.AdaptiveAvgPool2d, ("output_size",)),
    torch.flatten: (nn.Flatten, ("start_dim", "end_dim")),
    "flatten": (nn.Flatten, ("start_dim", "end_dim")),
    F.softmax: (nn.Softmax, ("dim",)),
    F.log_softmax: (nn.LogSoftmax, ("dim",)),
}
LEFT_OUT = {"inplace", "training", "_stacklevel"}  # modules know it themselves


class NotTraceable(Exception):
    """A forward pass that cannot be traced; its message says why."""


@dataclass(frozen=True)
class Part:
    """A module that takes and gives one tensor.

    Attributes:
        module: one of the model's own modules, or glue between them.
        path: its name in the model, empty for glue.
    """

    module: nn.Module
    path: str

    @property
    def learns(self) -> bool:
        """Whether it is or contains a convolution or linear layer."""
        return any(isinstance(module, ENCODERS) for module in self.module.modules())

    @property
    def is_block(self) -> bool:
        """Whether it is a module of a model's own with several layers."""
        plain = isinstance(self.module, (*ENCODERS, fx.GraphModule)) or is_sequential(self.module)
        return self.learns and not plain


def is_sequential(module: nn.Module) -> bool:
    """Returns whether a module does nothing but call its children one after the other."""
    return (
        isinstance(module, nn.Sequential)
        and type(module).forward is nn.Sequential.forward
        and not has_hooks(module)
    )


def parts(module: nn.Module, path: str = "") -> list[Part]:
    """Returns the parts of a module's forward pass. ``path`` is its name in the model. Raises
    ``NotTraceable`` where they are not known."""
    if is_sequential(module):
        pieces = [
            Part(child, _below(path, name)) for name, child in module._modules.items() if child
        ]
    else:
        pieces = list(_pieces(module, path))
    return [part for piece in pieces for part in opened(piece)]


def opened(part: Part) -> list[Part]:
    """Returns the parts of a part: of a ``Sequential``, and of a module that holds several blocks.
    A ``Sequential`` with one layer stays together, so that a norm before its convolution does not
    become the end of the stage before."""
    module = part.module
    if type(module) is nn.Identity and not has_hooks(module):
        return []
    if is_sequential(module):
        inner = parts(module, part.path)
        if sum(p.learns for p in inner) == 1 < len(inner):
            return [Part(nn.Sequential(*(p.module for p in inner)), part.path)]
        return inner
    if not part.is_block or has_hooks(module):
        return [part]
    try:
        inner = parts(module, part.path)
    except NotTraceable:
        return [part]
    return inner if sum(p.is_block for p in inner) > 1 else [part]


class _Whole(nn.Module):
    """A module that is called with one argument, so that its others have their defaults."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> Any:
        return self.model(x)


class _Tracer(fx.Tracer):
    """Traces a module's forward pass; calls of other modules are single steps."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(autowrap_functions=_untraced())
        self.module = module

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return m is not self.module


def _untraced() -> tuple[Callable[..., Any], ...]:
    """Returns the functions that timm itself does not trace into."""
    timm = sys.modules.get("timm.models")
    return tuple(timm.get_notrace_functions()) if timm else ()


def _pieces(module: nn.Module, path: str) -> Iterator[Part]:
    """Yields the pieces of a forward pass between two places where one tensor is alive."""
    whole = _Whole(module)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            graph = _Tracer(module).trace(whole)
    except Exception as error:
        raise NotTraceable(first_line(error)) from error
    graph.eliminate_dead_code(lambda node: node.op == "call_module" or node.is_impure())
    value = next(iter(graph.nodes))
    for nodes, end, free in _cuts(graph):
        yield _part(whole, value, nodes, free, path)
        value = end


def _cuts(graph: fx.Graph) -> Iterator[tuple[list[fx.Node], fx.Node, set[fx.Node]]]:
    """Yields the nodes of each piece, the one that gives its output, and the nodes that can be
    computed again in any piece: attributes and the number of rows."""
    value, *nodes, output = graph.nodes
    if not isinstance(output.args[0], fx.Node):
        raise NotTraceable(f"it gives a {type(output.args[0]).__name__} where a tensor is needed")
    values, free = {value}, set[fx.Node]()
    position = {node: index for index, node in enumerate(graph.nodes)}
    last_use = {node: max(map(position.__getitem__, node.users), default=0) for node in position}
    piece: list[fx.Node] = []
    alive = {value}
    for node in nodes:
        if node.op == "get_attr" or _counts_rows(node, values):
            free.add(node)
            continue
        piece.append(node)
        alive = {n for n in alive | {node} if last_use[n] > position[node]}
        if alive == {node} and not _is_unpacked(node):
            yield piece, node, free
            values.add(node)
            piece = []
    if piece:
        raise NotTraceable("its output is not the last that it computes")


def _counts_rows(node: fx.Node, values: set[fx.Node]) -> bool:
    """Returns whether a node is the number of rows of one of the ``values``."""
    if node.op == "call_method" and node.target == "size":
        return node.args[0] in values and node.args[1:] == (0,)
    if node.target is not operator.getitem or node.args[1] != 0:
        return False
    shape = node.args[0]
    assert isinstance(shape, fx.Node)
    named = shape.target is getattr and shape.args[1] == "shape"
    called = shape.op == "call_method" and shape.target == "size" and len(shape.args) == 1
    return (named or called) and shape.args[0] in values


def _is_unpacked(node: fx.Node) -> bool:
    """Returns whether a node gives a tuple, of which others take items, or a size."""
    return all(
        user.target is operator.getitem and isinstance(user.args[1], int) for user in node.users
    ) and bool(node.users)


def _part(
    whole: nn.Module, value: fx.Node, nodes: Sequence[fx.Node], free: set[fx.Node], path: str
) -> Part:
    """Returns a piece as the module that it calls, as a module that computes the same, or as
    glue."""
    called = [str(node.target) for node in nodes if node.op == "call_module"]
    names = {name: _below(path, name.removeprefix("model").lstrip(".")) for name in called}
    if len(nodes) == 1:
        node = nodes[0]
        if called and node.args == (value,) and not node.kwargs:
            return Part(whole.get_submodule(called[0]), names[called[0]])
        if module := _as_module(node, free):
            return Part(module, "")
    glue = fx.GraphModule(whole, _graph(value, nodes, free))
    learning = [n for n in called if Part(whole.get_submodule(n), "").learns]
    return Part(glue, names[learning[0]] if learning else "")


def _as_module(node: fx.Node, free: set[fx.Node]) -> nn.Module | None:
    """Returns the module that computes the same as a function, if there is one."""
    arguments = node.args[1:]
    if node.target in ("view", "reshape") and len(arguments) == 2:
        rows, rest = arguments
        return nn.Flatten() if rows in free and rest == -1 else None
    if node.target not in MODULES:
        return None
    kind, names = MODULES[node.target]
    given = dict(zip(names, arguments, strict=False)) | dict(node.kwargs)
    given = {name: value for name, value in given.items() if name not in LEFT_OUT}
    if kind is nn.Flatten:
        given = {"start_dim": 0} | given
    if set(given) - set(names) or any(isinstance(value, fx.Node) for value in given.values()):
        return None
    return kind(**given)


def _graph(value: fx.Node, nodes: Sequence[fx.Node], free: set[fx.Node]) -> fx.Graph:
    """Returns a graph of some nodes, whose input is ``value``."""
    graph = fx.Graph()
    copies = {value: graph.placeholder("x")}

    def copy(node: fx.Node) -> fx.Node:
        if node not in copies and node in free and node.op != "get_attr":
            copies[node] = graph.call_method("size", (copies[value], 0))
        elif node not in copies:
            copies[node] = graph.node_copy(node, copy)
        return copies[node]

    for node in nodes:
        copy(node)
    graph.output(copies[nodes[-1]])
    graph.lint()
    return graph


def _below(path: str, name: str) -> str:
    return f"{path}.{name}".strip(".")
