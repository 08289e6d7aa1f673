"""The plan by which the steps of a run fit its memory budget."""

from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Self

from greedy.base.errors import UserError
from greedy.build.cut_network import CutNetwork
from greedy.losses import Glob, LocalLoss
from greedy.memory.baselines import choose_network
from greedy.memory.choice import (
    Choice,
    choose,
    choose_smaller,
    room_for,
    rows_written,
    stored_row_bytes,
)
from greedy.memory.counts import Counts
from greedy.memory.drawing import DrawingDevice
from greedy.memory.fake import FakeRanks
from greedy.memory.peaks import FrozenStages, OptimizerFactory, StepDemand, key_of, weight_bytes
from greedy.memory.separate import why_plain
from greedy.models import Stage, StageShapes
from greedy.models.shares import parts_of_stages
from greedy.recipes import Recipe
from greedy.runs.disk_plan import DiskPlan
from greedy.steps.optimizers import factory
from greedy.steps.step import Learner
from greedy.stores.writing import write_batch


@dataclass(frozen=True)
class StageStores:
    """The stores that a stage reads and writes.

    Attributes:
        source: the stage from whose store it trains, 0 for the images.
        source_is_ring: whether views of that store are drawn while the stage trains.
        is_ring: whether views of its own store are drawn while the next stage trains.
        written_from: the stage from whose store its own is written; ``None`` for the source.
    """

    source: int
    source_is_ring: bool = False
    is_ring: bool = False
    written_from: int | None = None

    @classmethod
    def planned(cls, disk: DiskPlan, number: int) -> Self:
        """Returns the stores that a disk plan gives to stage ``number``."""
        source = disk.source(number)
        from_ring, is_ring = (disk.reuse(n) > 0 for n in (source, number))
        return cls(source, from_ring, is_ring, 0 if disk.is_written_from_images(number) else None)


@dataclass(frozen=True)
class MemoryPlan:
    """Chooses the memory mode of every stage's step, counting each demand once.

    Attributes:
        recipe: the run's recipe.
        network: the network; its stages stay as they are.
        precision: ``float32``, ``bfloat16`` or ``float16``.
        budget: bytes that a step may take on the device; ``None`` for any number.
        device_type: ``cpu``, ``cuda`` or ``mps``.
        optimizer: makes the user's optimiser; ``None`` for the recipe's.
        images: the encoding of stage 0's store.
        processes: the number of processes that train together; memory is that of each.
        drawing: the device that draws views beside the steps; ``None`` for that which trains, whose
            steps and drawing then take turns.
        chained: the number of processes that each train some of the stages.
    """

    recipe: Recipe
    network: CutNetwork
    precision: str
    budget: int | None
    device_type: str
    optimizer: OptimizerFactory | None = None
    images: str = "uint8"
    processes: int = 1
    drawing: DrawingDevice | None = None
    chained: int = 1
    _counts: Counts = field(default_factory=Counts, repr=False)
    _choices: dict[Hashable, Choice] = field(default_factory=dict, repr=False)
    _why_plain: dict[Hashable, str] = field(default_factory=dict, repr=False)
    _streamed: dict[int, bool] = field(default_factory=dict, repr=False)

    def require(self, numbers: Iterable[int], disk: DiskPlan) -> None:
        """Raises ``UserError`` if the budget is too small for one of the stages ``numbers``, each
        trained from the store that the disk plan gives it, or for all of them at once if the run
        trains them so."""
        if self.recipe.training.strategy != "greedy":
            self.at_once()
            return
        for number in numbers:
            self.stage(number, StageStores.planned(disk, number))

    def stage(self, number: int, stores: StageStores) -> Choice:
        """Returns how stage ``number`` trains, and how many rows are computed at a time when its
        store is written. Raises ``UserError`` if no mode fits the budget."""
        demand, writing = self._demands(number, stores)
        writes = writing and (number, writing.replay, writing.other_resident_bytes)
        streams = stores.source_is_ring and self._streams(stores.source)
        key = (
            self._cache_key(number),
            demand.replay,
            demand.other_resident_bytes,
            stores.source == 0,
            streams,
            writes,
            self.drawing and stores.source_is_ring and stores.source,
        )
        if key not in self._choices:
            choice = self._choose(demand, writing, draws_streamed=streams)
            self._choices[key] = self._with_drawing(choice, demand, number, stores)
        return self._choices[key]

    def _choose(
        self, demand: StepDemand, writing: StepDemand | None, *, draws_streamed: bool
    ) -> Choice:
        """Chooses how a stage trains; where there is no room for the frozen stages that views are
        drawn through, they are streamed."""
        micro_batch = self.recipe.memory.micro_batch
        try:
            choice = choose(demand, self.budget, micro_batch, writing)
        except UserError:
            if not demand.other_resident_bytes:
                raise
            demand, draws_streamed = replace(demand, other_resident_bytes=0), True
            choice = choose(demand, self.budget, micro_batch, writing)
        writes_streamed = bool(writing and writing.replay and writing.replay.streamed)
        return replace(choice, draws_streamed=draws_streamed, writes_streamed=writes_streamed)

    def _with_drawing(
        self, choice: Choice, demand: StepDemand, number: int, stores: StageStores
    ) -> Choice:
        """Returns how a stage trains while another device, or a thread, draws views of its source.
        Its step stays the same: a thread draws only where the budget has room for both."""
        if self.drawing is None:
            return choice
        if stores.is_ring and self.drawing.apart:
            drawn = self._drawing(number, streamed=self._streams(number))
            rows = min(choice.write_batch, rows_written(drawn, self._drawing_budget))
            choice = replace(choice, write_batch=rows)
        if not stores.source_is_ring:
            return choice
        source = self.network.stages[stores.source - 1]
        drawn = self._drawing(stores.source, streamed=choice.draws_streamed)
        rows = rows_written(drawn, self._drawing_budget)
        counted = drawn.writing_peak(rows) - drawn.other_resident_bytes
        if self.drawing.apart:
            title = f"stage {source.number} ({source.name})"
            return replace(choice, drawing_bytes=self.drawing.taken(counted, title))
        weights = 0 if choice.draws_streamed else demand.other_resident_bytes
        if self.budget is not None and choice.peak_bytes - weights + counted > self.budget:
            return choice
        return replace(choice, drawing_bytes=counted)

    @property
    def _draws_apart(self) -> bool:
        return self.drawing is not None and self.drawing.apart

    @property
    def _drawing_budget(self) -> int | None:
        """The bytes that tensors may take on the device that draws."""
        return self.drawing.usable if self.drawing and self.drawing.apart else self.budget

    def smaller(self, number: int, stores: StageStores, learner: Learner) -> Choice | None:
        """Chooses a smaller mode for a stage after a step of its ``learner`` ran out of memory and
        was freed: one that fits the memory that is now free and takes less than before. Returns
        ``None`` if no mode takes less."""
        demand, writing = self._demands(number, stores)
        if self.stage(number, stores).draws_streamed:
            demand = replace(demand, other_resident_bytes=0)
        room = room_for(learner) + demand.frozen_bytes()
        micro_batch = self.recipe.memory.micro_batch
        return choose_smaller(demand, learner.memory, room, micro_batch, writing)

    def _demands(self, number: int, stores: StageStores) -> tuple[StepDemand, StepDemand | None]:
        """Returns the demand of a stage's step, and that of writing its store or ``None`` if that
        is the same. Frozen stages that views are drawn through are resident if they may be."""
        source = stores.source
        demand = self._demand(number, source)
        if stores.source_is_ring and not self._draws_apart and not self._streams(source):
            drawing = sum(map(weight_bytes, self.network.stages[:source]))
            demand = replace(demand, other_resident_bytes=drawing)
        if stores.is_ring and self._draws_apart:
            return demand, self._writing(number, 0)
        if stores.is_ring:
            return demand, self._drawing(number, streamed=self._streams(number))
        if stores.written_from is None or stores.written_from == source:
            return demand, None
        return demand, self._writing(number, stores.written_from)

    def _streams(self, number: int) -> bool:
        """Returns whether there is no room for all frozen stages while views of a stage's store are
        drawn, so that each is on the device only while it computes."""
        if number not in self._streamed:
            resident, budget = self._drawing(number, streamed=False), self._drawing_budget
            room = budget is None or resident.writing_peak(1) <= budget
            self._streamed[number] = not room
        return self._streamed[number]

    def _replay(self, source: int, number: int) -> FrozenStages | None:
        """Returns the frozen stages between the store of stage ``source`` and stage ``number``."""
        stages = tuple(self.network.stages[source : number - 1])
        if not stages:
            return None
        between = self.network.shapes[source : number - 1]
        rows = min(write_batch(shapes, self.device_type) for shapes in between)
        return FrozenStages(stages, self.network.shapes[source].input, rows)

    def _drawing(self, number: int, *, streamed: bool) -> StepDemand:
        """Returns the demand of drawing views of a frozen stage's store from the images, while the
        next stage is in memory unless that is another device's."""
        demand = self._demand(number, 0)
        replay = demand.replay and replace(demand.replay, streamed=streamed)
        if self.drawing and self.drawing.apart:
            return replace(demand, replay=replay, device_type=self.drawing.type)
        next_stage = 0
        if number < len(self.network):
            next_stage = self._demand(number + 1, number).parameter_bytes()
        return replace(demand, replay=replay, other_resident_bytes=next_stage)

    def _writing(self, number: int, source: int) -> StepDemand:
        """Returns the demand of writing a stage's store from that of an earlier stage ``source``.
        Where there is no room for the frozen stages between them, they are streamed."""
        demand = self._demand(number, source)
        if self.budget is None or not demand.replay or demand.writing_peak(1) <= self.budget:
            return demand
        return replace(demand, replay=replace(demand.replay, streamed=True))

    def _demand(self, number: int, source: int) -> StepDemand:
        return StepDemand(
            *self._what(number),
            self._on_device,
            self.device_type,
            stored_row_bytes(
                self.recipe.store.encoding if source else self.images,
                self.network.shapes[source].input,
            ),
            self._replay(source, number),
            processes=self.processes,
            is_divided=self._is_divided,
            why_plain=self.why_plain(number),
            counts=self._counts,
        )

    @cached_property
    def _on_device(self) -> OptimizerFactory | None:
        """What makes the optimiser of a stage; ``None`` if its state is in host memory."""
        if self.recipe.memory.optimizer_state == "host":
            return None
        sharers = FakeRanks(0, self.processes if self._is_divided else 1)
        return self.optimizer or factory(self.recipe.training, sharers)

    @property
    def _is_divided(self) -> bool:
        return self.recipe.memory.optimizer_state == "sharded"

    def at_once(self) -> Choice:
        """Returns how all stages train at once, in each process its own. Raises ``UserError`` if
        that does not fit the budget."""
        return choose_network(
            self.network,
            self.recipe.training,
            self.precision,
            self.budget,
            self.device_type,
            self._on_device,
            self.processes,
            self.parts,
        )

    @property
    def parts(self) -> list[range]:
        """The positions of the stages that each of the chained processes trains."""
        if self.chained == 1:
            return [range(len(self.network.stages))]
        return parts_of_stages(self.network.stages, self.flops, self.chained)

    def why_plain(self, number: int) -> str:
        """Returns why a stage has no memory mode but ``plain``; empty if it has all."""
        key = self._cache_key(number)
        if key not in self._why_plain:
            stage, shape, loss, classes, *_ = self._what(number)
            self._why_plain[key] = why_plain(stage, shape, loss, classes)
        return self._why_plain[key]

    def flops(self, number: int) -> int:
        """Returns the floating-point operations of a stage's plain step, two for a multiply-add,
        with those of its input's gradient if gradients pass through it."""
        through = self.recipe.training.strategy in ("backprop", "glob+sim") and number > 1
        forward = 2 * self.recipe.training.batch_size * self.network.shapes[number - 1].operations
        return self._own_flops(number, 2 * forward) + (forward if through else 0)

    def _own_flops(self, number: int, without_heads: int) -> int:
        if isinstance(self.loss_of(number), Glob):
            return without_heads
        demand = StepDemand(*self._what(number), None, self.device_type, 0, counts=self._counts)
        return demand.flops()

    def loss_of(self, number: int) -> LocalLoss:
        """Returns the loss of a stage."""
        return self.network.losses(self.recipe.training.strategy)[number - 1]

    def _what(self, number: int) -> tuple[Stage, StageShapes, LocalLoss, int, int, str]:
        stage, shape = self.network.stages[number - 1], self.network.shapes[number - 1]
        batch_size = self.recipe.training.batch_size
        return stage, shape, self.loss_of(number), self.network.classes, batch_size, self.precision

    def _cache_key(self, number: int) -> Hashable:
        """Returns a key that is the same for equal stages, so that only one of them is counted."""
        named = key_of(self.loss_of(number))
        kind = self._counts.kind(self.network.stages[number - 1])
        return kind, self.network.shapes[number - 1], named
