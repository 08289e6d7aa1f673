"""The passes over the micro-batches of a batch that give a module's outputs and gradients."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from greedy.base.errors import UserError
from greedy.base.ranks import Shares
from greedy.exact.layers import Layers
from greedy.exact.norms import Norm, Norms, Stop, back
from greedy.exact.replay import Replay
from greedy.exact.rows import KeptRows, each_tensor, row_count, tensors_in, write_rows
from greedy.exact.schedule import Schedule, learn

TOLERANCE = 0.05  # of the largest output: another mask changes more, rounding less


@dataclass(frozen=True)
class Keep:
    """What is kept for the whole batch, so that later passes need not compute it again.

    Attributes:
        layers: the outputs of the convolutions and linear layers before the last batch norm.
        gradients: those of the batch norms' outputs, until they have been used.
    """

    layers: bool = False
    gradients: bool = False


class Passes:
    """One batch through a module, forward and then backward:

    1. the statistics of batch norms, in order of execution, without gradient;
    2. the outputs of the whole batch, from which the loss is computed;
    3. the sums of each batch norm's gradient, from the last one back: a norm may be gathered once
       the sums of all norms between it and the outputs are known;
    4. the gradients.

    Without batch norm only 2 and 4 are left.

    Args:
        module: the module.
        inputs: its inputs, rows first: a tensor, a tuple or list of its positional or a dictionary
            of its named arguments. They may be on another device than the module.
        slices: the rows of each micro-batch.
        device: the device of the module.
        replay: the random numbers and buffers of the module.
        part: the number of the module in ``replay``.
        schedule: the passes that it needs; ``None`` to learn them.
        keep: what is kept for the whole batch so that it is computed once.
        shares: of the processes that compute the batch, where the inputs are the rows of this one;
            ``None`` for one alone.
        home: the device where outputs are put together; ``None`` for the module's.
    """

    def __init__(
        self,
        module: nn.Module,
        inputs: Any,
        slices: Sequence[slice],
        device: torch.device,
        replay: Replay,
        part: int = 0,
        schedule: Schedule | None = None,
        keep: Keep = Keep(),
        shares: Shares | None = None,
        home: torch.device | None = None,
    ) -> None:
        self.module, self.inputs, self.slices = module, inputs, slices
        self.device, self.replay, self.part = device, replay, part
        self.schedule = schedule or self._learned()
        self.keep, self.home = keep, home or device
        layers = Layers(self.others) if keep.layers else None
        self.norms = Norms([Norm(shares=shares) for _ in range(self.schedule.count)], layers)
        self.expected: Any = None  # the outputs, until a second pass has given all of them again

    @property
    def others(self) -> int:
        """The number of rows that belong to no micro-batch."""
        computed = sum(rows.stop - rows.start for rows in self.slices)
        return row_count(self.inputs, "the inputs") - computed

    @torch.no_grad()
    def outputs(self) -> Any:
        """Computes the outputs of all rows, without gradient."""
        for run in self.schedule.statistics:
            self.norms.until = run.stop
            for number in range(len(self.slices)):
                with suppress(Stop):
                    self._forward(number, self._inputs(self.slices[number]))
            for norm in self.norms.norms[run.start : run.stop]:
                norm.close_statistics()
        self.norms.until = None
        whole = self._whole_outputs()
        if not self.replay.fake:
            self.expected = each_tensor(Tensor.detach, whole)
        return whole

    def backward(self, slopes: Any) -> Any:
        """Adds the parameters' gradients to their ``grad``.

        Args:
            slopes: the gradients of the outputs, ``None`` for one without.

        Returns:
            The inputs' gradients in their place, ``None`` for inputs that want none.
        """
        levels = [[self.norms.norms[n] for n in level] for level in self.schedule.sums]
        whole = each_tensor(lambda t: torch.zeros_like(t) if t.requires_grad else None, self.inputs)
        if self.keep.gradients:
            self._by_segments(levels, slopes, whole)
            return whole
        for level in levels:
            self._gather_sums(level, slopes)
        self._each(whole, lambda number, leaves: self._back(number, leaves, slopes))
        return whole

    def update_running(self) -> None:
        """Updates the running statistics of all batch norms as one forward pass would."""
        for norm in self.norms.norms:
            norm.update_running()

    def _learned(self) -> Schedule:
        wanted = [t.requires_grad for t in tensors_in(self.inputs)]
        some = self._inputs(slice(0, 2))  # rows that could meet
        some = each_tensor(lambda t: t.requires_grad_(t.is_floating_point()), some)
        with self.replay.micro_batch(self.part, 0):
            return learn(self._call, some, wanted, compare=not self.replay.fake)

    def _whole_outputs(self) -> Any:
        whole, count = None, row_count(self.inputs, "the inputs")
        for number, rows in enumerate(self.slices):
            part = self._forward(number, self._inputs(rows))
            part = each_tensor(lambda t: t.to(self.home), part)
            self.replay.observe()
            if row_count(part, "the outputs") != rows.stop - rows.start:
                raise UserError(
                    f"the module gives {row_count(part, 'the outputs')} rows for "
                    f"{rows.stop - rows.start} of the inputs: let it give one for each"
                )
            if whole is None:
                whole = each_tensor(lambda t, rows=rows: write_rows(None, count, rows, t), part)
            else:
                each_tensor(lambda t, w, rows=rows: write_rows(w, count, rows, t), part, whole)
        return whole

    def _gather_sums(self, norms: Sequence[Norm], slopes: Any) -> None:
        """Gathers the sums of the gradients of norms that only known ones separate from the
        outputs."""
        handles = [norm.open_sums() for norm in norms]
        for number, rows in enumerate(self.slices):
            self._back(number, self._inputs(rows), slopes, handles)
        for norm in norms:
            norm.close_sums()

    def _by_segments(self, levels: Sequence[Sequence[Norm]], slopes: Any, whole: Any) -> None:
        """Computes the gradients from the outputs to the last batch norms, then from the inputs of
        these to those before, and so on: each layer's once, while g waits at the norms."""
        for norm in chain(*levels):
            norm.open_sums()
            norm.gradients = KeptRows(self.others)
        self._each(whole, lambda number, leaves: self._back(number, leaves, slopes))
        for level, numbers in zip(levels, self.schedule.sums, strict=True):
            for norm in level:
                norm.close_sums()
            self.norms.until = max(numbers) + 1
            self._each(whole, partial(self._back_from, level))
        self.norms.until = None

    def _each(self, whole: Any, back: Callable[[int, Any], None]) -> None:
        """Calls ``back`` for the inputs of every micro-batch, and adds their gradients to
        ``whole``."""

        def add(t: Tensor, leaf: Tensor, place: Tensor | None) -> None:
            if place is not None and leaf.grad is not None:
                place[rows] += leaf.grad.to(t.device)

        for number, rows in enumerate(self.slices):
            leaves = self._inputs(rows)
            each_tensor(lambda t, leaf: leaf.requires_grad_(t.requires_grad), self.inputs, leaves)
            back(number, leaves)
            each_tensor(add, self.inputs, leaves, whole)

    def _back_from(self, norms: Sequence[Norm], number: int, inputs: Any) -> None:
        """Adds to all gradients what a micro-batch gives through the inputs of some norms."""
        with torch.enable_grad(), suppress(Stop):
            self._forward(number, inputs)
        found = [(norm.root, norm.root_gradient(number)) for norm in norms]
        given = [(root, g) for root, g in found if root is not None and g is not None]
        for norm in self.norms.norms:
            norm.root = None
        if given:
            back([root for root, _ in given], [g for _, g in given], None)

    def _back(
        self, number: int, inputs: Any, slopes: Any, leaves: Sequence[Tensor] | None = None
    ) -> None:
        """Adds to the gradients of ``leaves``, or of all leaves, what a micro-batch gives."""
        with torch.enable_grad():
            out = self._forward(number, inputs)
        if self.expected is not None:
            _require_repeated(out, each_tensor(lambda t: t[self.slices[number]], self.expected))
            if number == len(self.slices) - 1:
                self.expected = None
        given: list[Tensor] = []
        gradients: list[Tensor] = []

        def add(t: Tensor, slope: Tensor | None) -> None:
            if t.requires_grad and slope is not None:
                given.append(t)
                gradients.append(slope[self.slices[number]].to(t.device))

        each_tensor(add, out, slopes)
        if given:
            back(given, gradients, leaves)

    def _inputs(self, rows: slice) -> Any:
        at_once = self.device.type == "cuda"  # from page-locked memory
        return each_tensor(
            lambda t: t.detach()[rows].to(self.device, non_blocking=at_once), self.inputs
        )

    def _forward(self, number: int, inputs: Any) -> Any:
        with self.replay.micro_batch(self.part, number), self.norms:
            self.norms.begin(number)
            out = self._call(inputs)
            self.norms.end()
        return out

    def _call(self, inputs: Any) -> Any:
        if isinstance(inputs, dict):
            return self.module(**inputs)
        return self.module(*inputs) if isinstance(inputs, (tuple, list)) else self.module(inputs)


def _require_repeated(outputs: Any, expected: Any) -> None:
    """Raises ``UserError`` if a micro-batch's outputs are not those of the pass before."""
    for out, kept in zip(tensors_in(outputs), tensors_in(expected), strict=True):
        before = kept.to(out.device)
        if not out.is_floating_point() or not out.numel():
            continue
        finite = torch.where(before.isfinite(), before, 0)
        moved = torch.where(before.isfinite(), out.detach(), 0) - finite
        if bool(moved.abs().max() > TOLERANCE * finite.abs().max()):
            raise UserError(
                "the module gives other outputs when it sees the same samples again: let it draw "
                "random numbers from torch's own generators alone"
            )
