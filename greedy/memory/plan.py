"""How the steps of a run fit its memory budget."""

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field

from greedy.disk import Plan
from greedy.losses import Glob, LocalLoss
from greedy.memory.baselines import choose_network
from greedy.memory.choice import Choice, choose, fused_adam, stored_row_bytes
from greedy.memory.peaks import OptimizerFactory, Replay, StepDemand, weight_bytes
from greedy.models import Stage, StageShapes
from greedy.recipes import Recipe
from greedy.training.freeze import write_batch
from greedy.training.strategies import losses_of


@dataclass(frozen=True)
class MemoryPlan:
    """The memory of every stage's step, counted once.

    Attributes:
        stages: of the network; they stay as they are.
        loss: the recipe's local loss.
        precision: ``float32`` or ``bfloat16``.
        budget: bytes on the device that a step may take; ``None`` for any number.
        device_type: ``cpu``, ``cuda`` or ``mps``.
        optimizer: makes a stage's optimiser.
    """

    recipe: Recipe
    stages: Sequence[Stage]
    shapes: Sequence[StageShapes]
    loss: LocalLoss
    num_classes: int
    precision: str
    budget: int | None
    device_type: str
    optimizer: OptimizerFactory = fused_adam
    _choices: dict[Hashable, Choice] = field(default_factory=dict, repr=False)
    _flops: dict[Hashable, int] = field(default_factory=dict, repr=False)

    def require(self, numbers: Iterable[int], disk: Plan) -> None:
        """Raises ``UserError`` for a stage that the budget has no room for, if each trains from
        the last store that the disk plan gives it; or for a network that trains at once."""
        if self.recipe.training.strategy != "greedy":
            self.network()
            return
        for number in numbers:
            self.stage(number, disk.source(number))

    def stage(self, number: int, source: int) -> Choice:
        """How stage ``number`` trains from the store of stage ``source``. Raises ``UserError``
        where nothing fits."""
        replayed = tuple(self.stages[source : number - 1])
        rows = min(map(write_batch, self.shapes[source : number - 1]), default=0)
        replay = Replay(replayed, self.shapes[source].input, rows) if replayed else None
        refreshed = self.stages[:source] if self.recipe.store.refresh_every else ()
        beside = sum(map(weight_bytes, refreshed))
        memory = self.recipe.memory
        alike = (self._alike(number), *map(repr, replayed), source == 0, beside)
        if alike not in self._choices:
            self._choices[alike] = choose(
                *self._what(number),
                stored_row_bytes(source, self.shapes[source], self.recipe),
                self.budget,
                memory.optimizer_state,
                self.device_type,
                self.optimizer,
                replay,
                memory.micro_batch,
                beside,
            )
        return self._choices[alike]

    def network(self) -> Choice:
        """How all stages train at once. Raises ``UserError`` where that does not fit."""
        on_device = self.recipe.memory.optimizer_state == "device"
        return choose_network(
            self.stages,
            self.shapes,
            self.loss,
            self.num_classes,
            self.recipe.training,
            self.precision,
            self.budget,
            self.device_type,
            self.optimizer if on_device else None,
        )

    def flops(self, number: int) -> int:
        """Floating-point operations of a stage's plain step, a multiply-add counting 2; trained
        from the network's end, with those of its input's gradient."""
        through = self.recipe.training.strategy in ("backprop", "glob+sim") and number > 1
        forward = 2 * self.recipe.training.batch_size * self.shapes[number - 1].operations
        return self._own_flops(number, 2 * forward) + (forward if through else 0)

    def _own_flops(self, number: int, without_heads: int) -> int:
        if isinstance(self.loss_of(number), Glob):
            return without_heads
        alike = self._alike(number)
        if alike not in self._flops:
            demand = StepDemand(*self._what(number), None, self.device_type, 0)
            self._flops[alike] = demand.flops()
        return self._flops[alike]

    def loss_of(self, number: int) -> LocalLoss:
        """The loss of a stage."""
        return losses_of(self.recipe.training.strategy, self.loss, len(self.stages))[number - 1]

    def _what(self, number: int) -> tuple[Stage, StageShapes, LocalLoss, int, int, str]:
        stage, shape = self.stages[number - 1], self.shapes[number - 1]
        batch_size = self.recipe.training.batch_size
        return stage, shape, self.loss_of(number), self.num_classes, batch_size, self.precision

    def _alike(self, number: int) -> Hashable:
        """Networks repeat themselves, and of stages that are alike one is counted."""
        stage, shape = self.stages[number - 1], self.shapes[number - 1]
        sizes = tuple(p.shape for p in stage.parameters())
        return repr(stage), stage.flatten, stage.dropout, sizes, shape, self.loss_of(number)
