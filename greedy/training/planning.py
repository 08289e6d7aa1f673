"""The plan for training each stage of a run: its source, its memory mode and its choices."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from greedy.base.devices import pick_precision
from greedy.base.errors import UserError
from greedy.base.ranks import ALONE, Ranks
from greedy.base.relay import Relay
from greedy.base.versions import versions
from greedy.build.cut_network import CutNetwork
from greedy.build.fitting import checked_shapes
from greedy.build.modules import build_cross_entropy
from greedy.data import Split
from greedy.losses import LocalLoss
from greedy.memory.choice import Choice, memory_budget
from greedy.memory.drawing import DrawingDevice
from greedy.memory.peaks import OptimizerFactory
from greedy.memory.plan import MemoryPlan, StageStores
from greedy.models import Shape, Stage, sequential
from greedy.recipes import Recipe
from greedy.recipes.networks import is_library_network
from greedy.recipes.per_stage import for_stage
from greedy.runs.checkpoint_record import StartRecord
from greedy.runs.choices import Choices
from greedy.runs.directory import RunDirectory
from greedy.runs.disk_budget import plan_disk, previous_record
from greedy.runs.disk_plan import DiskPlan
from greedy.runs.events import Reporter, RunOutline
from greedy.runs.network import network_of, stages_of
from greedy.runs.plan_basis import PlanBasis
from greedy.runs.record import StageRecord
from greedy.runs.state import RunState
from greedy.runs.unfinished import find_training
from greedy.runs.views import Views
from greedy.stores.channels_last import takes_channels_last
from greedy.stores.fresh import require_data_set
from greedy.stores.opening import SourceFinder
from greedy.stores.ring import Drawing
from greedy.training.calibration import byte_operations, calibration_of
from greedy.training.following import Parallel, Task
from greedy.training.network import NetworkTraining
from greedy.training.resolve import compiles, resolve, resolve_again, within_budget
from greedy.training.stage import StageTraining


@dataclass
class StagePlanner:
    """Plans the stages of a run whose stage 0 is complete, given the state of the run.

    Attributes:
        model: the user's network, if the recipe has none; the recipe's own one where it has its
            first weights from the beginning.
        loss: the local loss of every stage but the output layer.
        optimizer: makes the user's optimiser; ``None`` for the recipe's.
        own_rates: whether that begins at its own learning rates.
        images: the data set's training split, for runs that read it again in every pass.
        ranks: the processes that train together.
        refresh_device: draws new views beside the steps; ``None`` for ``device`` between them.
        parallel: how they do: ``data``, each a share of every batch, or ``stages``, each some of
            the stages.
    """

    run: RunDirectory
    model: nn.Module | None
    loss: LocalLoss
    device: torch.device
    reporter: Reporter
    optimizer: OptimizerFactory | None = None
    own_rates: bool = False
    images: Split | None = None
    ranks: Ranks = ALONE
    refresh_device: torch.device | None = None
    parallel: Parallel = "data"
    _memory: MemoryPlan | None = field(default=None, init=False, repr=False)

    @property
    def recipe(self) -> Recipe:
        """The run's recipe."""
        return self.run.recipe

    @property
    def basis(self) -> PlanBasis:
        """What the run's stores are planned from."""
        operations = byte_operations(self.device.type, calibration_of(self.device.type))
        return PlanBasis.of_run(self.run, operations)

    @property
    def _precision(self) -> str:
        return pick_precision(self.recipe.training.precision, self.device)

    @property
    def _budget(self) -> int:
        return memory_budget(self.recipe, self.device, self.ranks.on_this_machine)

    def given_network(self, image: Shape) -> nn.Sequential | None:
        """Returns the user's network for images (C, H, W) as a ``Sequential``, if there is one."""
        if self.model is not None:
            self.model = sequential(self.model, image)
        return self.model

    def network(self, state: RunState) -> CutNetwork:
        """Returns the run's network without its trained weights."""
        if self.model is not None or is_library_network(self.recipe.model.network):
            self.model = network_of(state, self.model)  # not built and proved again for each stage
        data, stages = state.complete_record(0), stages_of(state, self.model)
        classes = len(data.class_names)
        shapes = checked_shapes(self.recipe, stages, data.row_shape, classes)
        rows = [0] * classes
        if self.recipe.loss.class_weights == "balanced":
            labels = self.run.open_store(0, "train").labels
            rows = np.bincount(labels, minlength=classes).tolist()
        cross_entropy = build_cross_entropy(self.recipe.loss, rows)
        return CutNetwork(stages, shapes, self.loss, classes, cross_entropy)

    def plan_memory(self, network: CutNetwork, images: str) -> MemoryPlan:
        """Plans how the steps of a network fit the memory budget, and keeps the plan for
        ``memory``. ``images`` is the encoding of stage 0's store."""
        drawing = None
        if (other := self.refresh_device) is not None:
            drawing = DrawingDevice.of(other, self.device.type, self.recipe)
        self._memory = MemoryPlan(
            self.recipe,
            network,
            self._precision,
            self._budget,
            self.device.type,
            self.optimizer,
            images,
            self.ranks.size if self.parallel == "data" else 1,
            drawing,
            self.ranks.size if self.parallel == "stages" else 1,
        )
        return self._memory

    def memory(self, state: RunState) -> MemoryPlan:
        """Returns the plan by which steps fit the memory budget."""
        if self._memory is None:
            store = state.complete_record(0).store
            assert store is not None
            return self.plan_memory(self.network(state), store.encoding)
        return self._memory

    def disk(self, state: RunState, retrain_from: int | None = None) -> DiskPlan:
        """Returns the plan for the disk of a training of all stages that are not complete, or of
        those from ``retrain_from`` on. What the first is made from is kept in the run."""
        data, basis = state.complete_record(0), self.basis
        assert data.store is not None
        shapes, rows = self.network(state).shapes, dict(data.rows.items())
        fresh = data.data_choices.fresh
        plan = plan_disk(state, shapes, rows, data.store.bytes, basis, retrain_from, fresh=fresh)
        basis.keep(self.run.path)
        return plan

    def require_images(self, state: RunState) -> None:
        """Raises ``UserError`` if the run reads its data set in every pass and was not given it."""
        if state.complete_record(0).data_choices.fresh:
            require_data_set(self.run.path, self.images)

    def replaces_views(self, state: RunState, source: int) -> bool:
        """Returns whether views are replaced while a stage trains from the store of stage
        ``source``, or of the nearest before it that has one."""
        sources = SourceFinder(state, (), self.device, self.reporter)
        return sources.is_ring(sources.last_stored(source))

    def note_drawing(self, replaced: Iterable[bool]) -> None:
        """Notes that ``refresh_device`` is not used if no stage that trains has views of its source
        replaced."""
        if self.refresh_device is not None and not any(replaced):
            self.reporter.noted("no views are replaced, so --refresh-device is not used")

    def outline(self, state: RunState, numbers: Iterable[int]) -> RunOutline:
        """Returns what is known of a run before the stages ``numbers`` are trained."""
        data, epochs = state.complete_record(0), self.recipe.training.epochs
        assert data.store is not None
        operations = {}
        for number in numbers:
            row = self.memory(state).network.shapes[number - 1].operations
            operations[number] = row * data.rows["train"] * for_stage(epochs, number)
        return RunOutline(data.network, operations, data.store.bytes, self._budget)

    def whole_network(self, state: RunState) -> NetworkTraining:
        """Returns the training of all stages at once."""
        network = self.network(state)
        relay, own, shared = Relay(), range(len(network)), self.ranks
        if self.parallel == "stages":
            relay, shared = Relay(self.ranks, self.device), ALONE
            own = self.memory(state).parts[self.ranks.rank]
        else:
            self._require_separate(state, range(1, len(network) + 1))
        sources = SourceFinder(state, network.stages, self.device, self.reporter, self.images)
        source = sources.for_training(1, 0, self._precision, ranks=shared)
        if not relay.is_first:
            source = replace(source, images=None, relay=relay)
        return NetworkTraining(
            run=self.run,
            network=network,
            source=source,
            data=state.complete_record(0),
            memory=self.memory(state).at_once(),
            device=self.device,
            reporter=self.reporter,
            optimizer=self.optimizer,
            own_rates=self.own_rates,
            ranks=self.ranks,
            relay=relay,
            own=own,
        )

    def stage(
        self,
        state: RunState,
        number: int,
        source: int,
        views: Views,
        reuse: int,
        directory: Path,
    ) -> StageTraining:
        """Returns the training of stage ``number`` in a directory, from the store of stage
        ``source`` or of the nearest stage before it that has one. An unfinished training keeps its
        choices."""
        parent, network = state.complete_record(number - 1), self.network(state)
        self._require_separate(state, [number])
        stage = network.stages[number - 1]
        sources = SourceFinder(state, network.stages, self.device, self.reporter, self.images)
        stored = sources.last_stored(source)
        written_from = sources.written_from(number, views, reuse)
        sources.require_images(number, stored, views, written_from)
        stores = StageStores(stored, sources.is_ring(stored), reuse > 0, written_from)
        memory = self.memory(state).stage(number, stores)
        choices = self._choices(state, number, stored, views, reuse, memory)
        start = self._start(parent, stage, stored, choices, memory, directory)
        in_memory = start.resolved.shuffle == "rows"
        return StageTraining(
            stage=stage,
            shapes=network.shapes[number - 1],
            loss=network.losses("greedy")[number - 1],
            recipe=self.recipe,
            source=sources.for_training(
                number,
                stored,
                start.resolved.precision,
                in_memory=in_memory,
                drawing=Drawing(
                    self.refresh_device or self.device,
                    memory.draws_streamed,
                    memory.drawing_bytes > 0,
                ),
                ranks=self.ranks,
            ),
            sources=sources,
            writes_streamed=memory.writes_streamed,
            start=start,
            parent=parent,
            is_output=number == len(network),
            device=self.device,
            reporter=self.reporter,
            smaller=partial(self.memory(state).smaller, number, stores),
            optimizer=self.optimizer,
            own_rates=self.own_rates,
        )

    def _start(
        self,
        parent: StageRecord,
        stage: Stage,
        source: int,
        choices: Choices,
        memory: Choice,
        directory: Path,
    ) -> StartRecord:
        """Returns what the training of a stage in a directory begins with, or has begun with."""
        start = StartRecord(
            stage=stage.number,
            recipe_digest=parent.recipe_digest,
            parent_lineage=parent.lineage,
            source=source,
            layers=stage.kinds,
            torch=versions()["torch"],
            resolved=choices,
        )
        begun = find_training(directory, start, self.reporter)
        if begun is None:
            return start
        kept = within_budget(self.recipe, begun.resolved, memory)
        return begun.model_copy(update={"resolved": kept})

    def _require_separate(self, state: RunState, numbers: Iterable[int]) -> None:
        """Raises ``UserError`` for a stage whose samples meet where several processes exchange
        nothing."""
        for number in numbers if self.ranks.size > 1 else ():
            if reason := self.memory(state).why_plain(number):
                raise UserError(
                    f"stage {number} cannot be trained by several processes ({reason}): train in "
                    f"one process"
                )

    def follow(self, task: Task) -> None:
        """Trains what another process leads, in the same steps. Nothing is written."""
        state = RunState.read(self.run)
        if task.stage == 0:
            self.whole_network(state).follow()
            return
        directory = Path(task.directory)
        self.stage(state, task.stage, task.source, task.views, task.reuse, directory).follow(
            directory / "training"
        )

    def _choices(
        self,
        state: RunState,
        number: int,
        stored: int,
        views: Views,
        reuse: int,
        memory: Choice,
    ) -> Choices:
        """Returns the choices of the stage's last training if that was from the store of stage
        ``stored`` too, else new ones."""
        before = previous_record(state, number)
        if before is not None and before.source == stored:
            return resolve_again(self.recipe, before.choices, views, reuse, memory)
        network = self.memory(state).network
        hidden = network.shapes[number - 1].hidden
        store = self.run.open_store(stored, "train")
        alone = self.ranks.size == 1
        compiled = alone and compiles(self.recipe, number, hidden, store.rows, memory, self.device)
        fresh = stored == 0 and state.complete_record(0).data_choices.fresh
        return resolve(
            self.recipe,
            store,
            views,
            memory,
            self.device,
            reuse=reuse,
            compiled=compiled,
            hidden=hidden,
            channels_last=takes_channels_last(network.stages[number - 1], self.device.type),
            fresh=fresh,
            processes=self.ranks.on_this_machine,
        )
