"""The plan by which the steps of a run fit its memory budget."""

from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field, replace

from greedy.build.cut_network import CutNetwork
from greedy.losses import Glob, LocalLoss
from greedy.memory.baselines import choose_network
from greedy.memory.choice import (
    Choice,
    choose,
    choose_smaller,
    fused_adam,
    room_for,
    stored_row_bytes,
)
from greedy.memory.peaks import OptimizerFactory, Replay, StepDemand, weight_bytes
from greedy.models import Stage, StageShapes
from greedy.recipes import Recipe
from greedy.runs.disk_plan import DiskPlan
from greedy.steps.step import Learner
from greedy.stores.writing import write_batch


@dataclass(frozen=True)
class MemoryPlan:
    """Chooses the memory mode of every stage's step, counting each demand once.

    Attributes:
        recipe: the run's recipe.
        network: the network; its stages stay as they are.
        precision: ``float32``, ``bfloat16`` or ``float16``.
        budget: bytes that a step may take on the device; ``None`` for any number.
        device_type: ``cpu``, ``cuda`` or ``mps``.
        optimizer: makes a stage's optimiser.
        images: the encoding of stage 0's store.
    """

    recipe: Recipe
    network: CutNetwork
    precision: str
    budget: int | None
    device_type: str
    optimizer: OptimizerFactory = fused_adam
    images: str = "uint8"
    _choices: dict[Hashable, Choice] = field(default_factory=dict, repr=False)
    _flops: dict[Hashable, int] = field(default_factory=dict, repr=False)

    def require(self, numbers: Iterable[int], disk: DiskPlan) -> None:
        """Raises ``UserError`` if the budget is too small for one of the stages ``numbers``, each
        trained from the store that the disk plan gives it, or for all of them at once if the run
        trains them so."""
        if self.recipe.training.strategy != "greedy":
            self.at_once()
            return
        for number in numbers:
            self.stage(number, disk.source(number))

    def stage(self, number: int, source: int, written_from: int | None = None) -> Choice:
        """Returns how a stage trains, and how many rows are computed at a time when its store is
        written.

        Args:
            number: the number of the stage.
            source: the stage from whose store it is trained.
            written_from: the stage from whose store its own is written, by default ``source``.

        Raises:
            UserError: no mode fits the budget.
        """
        demand, writing = self._demands(number, source, written_from)
        writes = writing and (number, writing.replay)
        key = (
            self._cache_key(number),
            demand.replay,
            demand.other_resident_bytes,
            source == 0,
            writes,
        )
        if key not in self._choices:
            micro_batch = self.recipe.memory.micro_batch
            self._choices[key] = choose(demand, self.budget, micro_batch, writing)
        return self._choices[key]

    def smaller(
        self, number: int, source: int, written_from: int | None, learner: Learner
    ) -> Choice | None:
        """Chooses a smaller mode for a stage after a step of its ``learner`` ran out of memory and
        was freed: one that fits the memory that is now free and takes less than before. Returns
        ``None`` if no mode takes less. Other arguments are those of ``stage``."""
        demand, writing = self._demands(number, source, written_from)
        room = room_for(learner) + demand.frozen_bytes()
        micro_batch = self.recipe.memory.micro_batch
        return choose_smaller(demand, learner.memory, room, micro_batch, writing)

    def _demands(
        self, number: int, source: int, written_from: int | None
    ) -> tuple[StepDemand, StepDemand | None]:
        """Returns the demand of a stage's step, and that of writing its store or ``None`` if that
        is the same."""
        demand = self._demand(number, source)
        if self.recipe.store.refresh_every > 0:
            demand = replace(
                demand, other_resident_bytes=sum(map(weight_bytes, self.network.stages[:source]))
            )
            return demand, self._writing(number, 0)
        if written_from is None or written_from == source:
            return demand, None
        return demand, self._writing(number, written_from)

    def _replay(self, source: int, number: int) -> Replay | None:
        """Returns the frozen stages between the store of stage ``source`` and stage ``number``."""
        stages = tuple(self.network.stages[source : number - 1])
        if not stages:
            return None
        rows = min(map(write_batch, self.network.shapes[source : number - 1]))
        return Replay(stages, self.network.shapes[source].input, rows)

    def _writing(self, number: int, source: int) -> StepDemand:
        """Returns the demand of writing a frozen stage's store from that of stage ``source``. If
        views are refreshed, that happens while the next stage is in memory."""
        next_stage = 0
        if self.recipe.store.refresh_every and number < len(self.network):
            next_stage = self._demand(number + 1, number).parameter_bytes()
        return replace(self._demand(number, source), other_resident_bytes=next_stage)

    def _demand(self, number: int, source: int) -> StepDemand:
        on_device = self.recipe.memory.optimizer_state == "device"
        return StepDemand(
            *self._what(number),
            self.optimizer if on_device else None,
            self.device_type,
            stored_row_bytes(
                self.recipe.store.encoding if source else self.images,
                self.network.shapes[source].input,
            ),
            self._replay(source, number),
        )

    def at_once(self) -> Choice:
        """Returns how all stages train at once. Raises ``UserError`` if that does not fit the
        budget."""
        on_device = self.recipe.memory.optimizer_state == "device"
        return choose_network(
            self.network,
            self.recipe.training,
            self.precision,
            self.budget,
            self.device_type,
            self.optimizer if on_device else None,
        )

    def flops(self, number: int) -> int:
        """Returns the floating-point operations of a stage's plain step, two for a multiply-add,
        with those of its input's gradient if gradients pass through it."""
        through = self.recipe.training.strategy in ("backprop", "glob+sim") and number > 1
        forward = 2 * self.recipe.training.batch_size * self.network.shapes[number - 1].operations
        return self._own_flops(number, 2 * forward) + (forward if through else 0)

    def _own_flops(self, number: int, without_heads: int) -> int:
        if isinstance(self.loss_of(number), Glob):
            return without_heads
        key = self._cache_key(number)
        if key not in self._flops:
            demand = StepDemand(*self._what(number), None, self.device_type, 0)
            self._flops[key] = demand.flops()
        return self._flops[key]

    def loss_of(self, number: int) -> LocalLoss:
        """Returns the loss of a stage."""
        return self.network.losses(self.recipe.training.strategy)[number - 1]

    def _what(self, number: int) -> tuple[Stage, StageShapes, LocalLoss, int, int, str]:
        stage, shape = self.network.stages[number - 1], self.network.shapes[number - 1]
        batch_size = self.recipe.training.batch_size
        return stage, shape, self.loss_of(number), self.network.classes, batch_size, self.precision

    def _cache_key(self, number: int) -> Hashable:
        """Returns a key that is the same for equal stages, so that only one of them is counted."""
        stage, shape = self.network.stages[number - 1], self.network.shapes[number - 1]
        sizes = tuple(p.shape for p in stage.parameters())
        loss = self.loss_of(number)
        named = loss if isinstance(loss, Hashable) else id(loss)
        return repr(stage), stage.flatten, stage.dropout, sizes, shape, named
