"""The passes that a module needs, learned from two rows."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

from greedy.base.errors import UserError
from greedy.base.torch_private import storage_key
from greedy.exact.norms import Norm, Normalise, NormCall, Norms, back, differs
from greedy.exact.rows import row_count, tensors_in
from greedy.exact.statistics import Statistics

REENTRANT = "CheckpointFunctionBackward"  # it hides a graph, which is made again in its backward


@dataclass(frozen=True)
class Schedule:
    """The batch norms of a module's forward pass, numbered in order, by the passes that gather
    what is to be known of them.

    Attributes:
        count: their number.
        statistics: the norms whose statistics are gathered in each pass.
        sums: the norms whose gradient's sums are gathered in each pass: those whose input has a
            gradient, from the last one back.
    """

    count: int
    statistics: Sequence[range]
    sums: Sequence[Sequence[int]]


def learn(
    forward: Callable[[Any], Any], inputs: Any, wanted: Sequence[bool], *, compare: bool = True
) -> Schedule:
    """Learns the schedule of a module.

    Args:
        forward: the module.
        inputs: a few rows of its inputs, leaves with gradients where numbers allow it.
        wanted: of each tensor of the inputs, whether its gradient is wanted.
        compare: whether the gradients may be looked at.

    Raises:
        UserError: samples meet elsewhere than in batch norms, or outputs have no rows.
    """
    leaves = tensors_in(inputs)
    with torch.enable_grad(), Probe() as probe:
        probe.begin(0)
        whole = forward(inputs)
    row_count(whole, "the outputs")
    outputs = [t for t in tensors_in(whole) if t.requires_grad]
    fixed = [leaf for leaf, want in zip(leaves, wanted, strict=True) if not want]
    below = _below([t.grad_fn for t in outputs], [*fixed, *probe.handles])
    if compare:
        _require_separate(outputs, [leaf for leaf in leaves if leaf.requires_grad])
    numbers = {id(norm): number for number, norm in enumerate(probe.norms)}
    sources: dict[int, set[int]] = {}
    for norm, (reached, trains) in below:
        number, behind = numbers[id(norm)], {numbers[key] for key in reached}
        probe.sources[number] |= behind  # the probe does not see into scripted functions
        if trains:
            sources[number] = behind
    return Schedule(len(probe.norms), _runs(probe.sources), _levels(sources))


class Probe(Norms):
    """Normalises by the statistics of the micro-batch, as constants, and watches on which norms
    each tensor depends, by whatever path.

    Attributes:
        sources: of each norm, the numbers of those that its input depends on.
        handles: a leaf of each norm, which keeps it in the graph.
    """

    def __init__(self) -> None:
        super().__init__([])
        self.norms: list[Norm] = []
        self.sources: list[set[int]] = []
        self.handles: list[Tensor] = []
        self._behind: dict[int, set[int]] = {}  # by storage

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        given = list(map(storage_key, _stored((args, kwargs))))
        behind = set().union(*(self._behind.get(key, ()) for key in given))
        calls = len(self.norms)
        result = super().__torch_function__(func, types, args, kwargs)
        if len(self.norms) > calls:
            self.sources.append(behind)
            behind = behind | {calls}
        written = args[:1] if result is None else result
        for key in map(storage_key, _stored(written)):
            # The storage of a tensor that was freed may be used again.
            old = self._behind.get(key, set()) if key in given else set()
            self._behind[key] = old | behind
        return result

    def _norm(self, call: NormCall) -> Tensor:
        statistics = Statistics.of(call.input.detach())
        mean = statistics.mean
        like = next((t for t in call[1:4] if t is not None), call.input)
        norm = Norm(statistics.to(like.dtype), mean.new_zeros((2, *mean.shape), dtype=like.dtype))
        self.norms.append(norm)
        self.index += 1
        self.handles.append(torch.zeros((), device=mean.device, requires_grad=True))
        out: Tensor = Normalise.apply(*call[:1], *call[3:5], self.handles[-1], norm, call.eps, 0)
        return out


def _stored(tree: Any) -> list[Tensor]:
    return [t for t in tensors_in(tree) if t.layout is torch.strided]


def _require_separate(outputs: Sequence[Tensor], leaves: Sequence[Tensor]) -> None:
    """Raises ``UserError`` if the first or the last row of the outputs depends on another row of
    the inputs, with all statistics held fixed."""
    if not outputs or not leaves:
        return
    for row, others in ((0, slice(1, None)), (-1, slice(-1))):
        own = torch.stack([t[row].sum() for t in outputs]).sum()
        back([own], [None], leaves, retain=row == 0)
        slopes = [leaf.grad[others] for leaf in leaves if leaf.grad is not None]
        if any(bool(((slope != 0) & slope.isfinite()).any()) for slope in slopes):
            raise UserError(
                "the module's samples meet elsewhere than in batch norms, so that its gradients "
                "cannot be computed a micro-batch at a time: samples must stand in the first "
                "dimension, and a row of the outputs depend on the same row of the inputs alone"
            )
        for leaf in leaves:
            leaf.grad = None


Reached = tuple[set[int], bool]


def _below(roots: Iterable[Node | None], fixed: Sequence[Tensor]) -> list[tuple[Norm, Reached]]:
    """Returns the norms in an autograd graph; of each, which other ones (by ``id``) its input's
    gradient reaches, and whether it reaches a leaf that is none of ``fixed``."""
    known: dict[Node | None, Reached] = {None: (set(), False)}
    found = []
    stack = [root for root in roots if root is not None]
    while stack:
        node = stack[-1]
        nexts = [following for following, _ in node.next_functions]
        if missing := [n for n in nexts if n is not None and n not in known]:
            stack += missing
            continue
        stack.pop()
        if node in known:
            continue
        if node.name() == REENTRANT:
            raise differs()
        leaf = getattr(node, "variable", None)
        trains = leaf is not None and not any(leaf is other for other in fixed)
        reached = set().union(*(known[n][0] for n in nexts))
        norm = getattr(node, "norm", None)
        if isinstance(norm, Norm):
            found.append((norm, known[nexts[0]]))  # its input's, which is the first
            reached = reached | {id(norm)}
        known[node] = reached, trains or any(known[n][1] for n in nexts)
    return found


def _runs(sources: Sequence[set[int]]) -> list[range]:
    """Returns norms that follow each other and do not depend on each other, run by run."""
    runs: list[range] = []
    for number, behind in enumerate(sources):
        if runs and not behind & set(runs[-1]):
            runs[-1] = range(runs[-1].start, number + 1)
        else:
            runs.append(range(number, number + 1))
    return runs


def _levels(sources: dict[int, set[int]]) -> list[list[int]]:
    """Returns the norms level by level, given those before each: a norm follows all those after
    it."""
    left, levels = set(sources), []
    while left:
        level = left - set().union(*(sources[number] for number in left))
        levels.append(sorted(level))
        left -= level
    return levels
