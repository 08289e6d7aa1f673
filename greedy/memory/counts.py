"""Counts that equal stages share, so that only one of them is computed on fake tensors."""

from collections.abc import Callable, Hashable, Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field

import torch
from torch import Tensor

from greedy.base.torch_private import storage_key, without_modes
from greedy.memory.counting import Counter
from greedy.memory.fake import materialise
from greedy.models import Stage

META = torch.device("meta")
TENSORS = {"_parameters", "_buffers", "_modules", "training"}  # each told apart by its own means


@dataclass(frozen=True)
class Pass:
    """What a frozen stage's forward pass takes, or that of several from what a store holds.

    Attributes:
        peak: most bytes in use, beyond those before it.
        kept: bytes that stay in use beside the output, until autocast ends: weights in another
            precision.
        shape: the shape of the output.
        stride: its stride.
        dtype: its type.
        size: bytes of its storage.
    """

    peak: int
    kept: int
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    size: int

    @classmethod
    def of(cls, out: Tensor, counter: Counter, before: int) -> "Pass":
        """Returns the pass that gave an output, before which ``before`` bytes were in use."""
        size = out.untyped_storage().nbytes()
        peak, kept = counter.peak - before, counter.live - before - size
        return cls(peak, kept, out.shape, out.stride(), out.dtype, size)

    def taken(self, counter: Counter) -> Tensor:
        """Counts the pass as one that is computed, and returns its output without numbers."""
        counter.add_peak(self.peak)
        values = torch.empty(self.size // self.dtype.itemsize, dtype=self.dtype)
        return values.as_strided(self.shape, self.stride)


@dataclass
class Counts:
    """The counts of a plan by what decides them.

    Attributes:
        numbers: counted bytes of steps and of writing stores.
        passes: forward passes of frozen stages.
    """

    numbers: dict[Hashable, int] = field(default_factory=dict)
    passes: dict[Hashable, Pass] = field(default_factory=dict)
    _kinds: dict[Hashable, int] = field(default_factory=dict)
    _kind_of: dict[Stage, int] = field(default_factory=dict)  # which also keeps the stages alive

    def kind(self, stage: Stage) -> int:
        """Returns a number that is the same for stages of equal modules, settings and sizes."""
        if stage not in self._kind_of:
            described = _description(stage)
            self._kind_of[stage] = self._kinds.setdefault(described, len(self._kinds))
        return self._kind_of[stage]

    def number(self, key: Hashable, count: Callable[[], int]) -> int:
        """Returns ``count()``, which is called once for a key."""
        if key not in self.numbers:
            self.numbers[key] = count()
        return self.numbers[key]


class FrozenStage:
    """A frozen stage on fake tensors, for use inside a ``Counter``. A pass that was counted before,
    of this stage or an equal one, is not computed: as many bytes are taken.

    Args:
        stage: the stage, which stays as it is.
        counts: the passes that are known, to which those that are computed are added.
        counter: the counter of the bytes.
        precision: that autocast has.
        streamed: whether its weights are in memory only while it computes.
    """

    def __init__(
        self, stage: Stage, counts: Counts, counter: Counter, precision: str, *, streamed: bool
    ) -> None:
        self._stage, self._counts, self._counter = stage, counts, counter
        self._precision, self._streamed = precision, streamed
        self._computing: Stage | None = None
        self._weights = None if streamed else _taken(stage_bytes(stage))
        self._called = False
        self._kept: list[Tensor] = []

    def __call__(self, x: Tensor) -> Tensor:
        """Returns the stage's output for inputs (B, *shape), without numbers."""
        key = (
            self._counts.kind(self._stage),
            (x.shape, x.stride(), x.dtype),
            (self._precision, self._streamed, self._called),
        )
        known = self._counts.passes.get(key)
        if known is not None:
            out = known.taken(self._counter)
            self._kept += [_taken(known.kept)] if known.kept else []
        else:
            out = self._counted(key, x)
        self._called = not self._streamed  # which has new weights, that autocast does not know
        return out

    def end(self) -> None:
        """Ends the passes within one autocast, with which the weights in another precision go."""
        self._called = False
        self._kept.clear()

    def _counted(self, key: Hashable, x: Tensor) -> Tensor:
        if self._computing is None:
            self._weights = None
            with without_modes():
                self._computing = deepcopy(self._stage).to("meta")
            if not self._streamed:
                materialise(self._computing)
        counter, peak = self._counter, self._counter.peak
        if self._called and self._kept:  # so that autocast has the weights that it kept
            self._kept.clear()
            self._compute(x)
        before = counter.live
        counter.reset_peak()
        out = self._compute(x)
        found = Pass.of(out, counter, before)
        if _is_plain(out, x) and (found.kept == 0 or self._precision != "float32"):
            self._counts.passes[key] = found
        counter.peak = max(peak, counter.peak)
        return out

    def _compute(self, x: Tensor) -> Tensor:
        assert self._computing is not None
        if not self._streamed:
            return self._computing.eval()(x)
        output: Tensor = materialise(self._computing).eval()(x)
        with META:  # where nothing is counted
            materialise(self._computing)
        return output


def _is_plain(out: Tensor, x: Tensor) -> bool:
    """Returns whether an output has a storage of its own and of its size."""
    own = storage_key(out) != storage_key(x)
    return own and out.untyped_storage().nbytes() == out.numel() * out.element_size()


def _taken(count: int) -> Tensor:
    return torch.empty(count, dtype=torch.uint8)


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Returns the bytes of tensors."""
    return sum(t.numel() * t.element_size() for t in tensors)


def stage_bytes(stage: Stage) -> int:
    """Returns the bytes of a frozen stage's weights and buffers."""
    return tensor_bytes([*stage.parameters(), *stage.buffers()])


def _description(stage: Stage) -> Hashable:
    """Returns what decides a stage's memory: the classes of its modules, their attributes and the
    sizes of their tensors. An attribute whose representation has its address is like no other."""
    seen: dict[int, int] = {}  # tensors with two names

    def sizes(tensors: Sequence[tuple[str, Tensor | None]]) -> Hashable:
        return tuple(
            t
            if t is None
            else (name, seen.setdefault(id(t), len(seen)), t.shape, t.dtype, t.requires_grad)
            for name, t in tensors
        )

    def settings(values: dict[str, object], left_out: set[str]) -> Hashable:
        return tuple(
            (name, (value.shape, value.dtype) if isinstance(value, Tensor) else repr(value))
            for name, value in values.items()
            if name not in left_out
        )

    return tuple(
        (
            name,
            type(module),
            settings(vars(module), TENSORS | ({"number", "path"} if module is stage else set())),
            sizes([*module._parameters.items(), *module._buffers.items()]),
        )
        for name, module in stage.named_modules(remove_duplicate=False)
    )
