"""A stage whose steps turn out not to fit continues as it would have been planned."""

from functools import cache
from pathlib import Path

import pytest
import torch
from interrupting import StopAfter
from small_training import new_trainer as small_trainer
from small_training import noise
from torch import nn
from torch.utils.data import TensorDataset

from greedy import GreedyTrainer, Reporter
from greedy.base.errors import Interrupted
from greedy.losses import Pred
from greedy.memory import choice
from greedy.memory.choice import Choice, choose, fused_adam
from greedy.memory.peaks import StepDemand
from greedy.models import cut, shapes
from greedy.runs.choices import Mode, StepMemory
from greedy.runs.record import StageRecord
from greedy.steps import step
from greedy.steps.step import Learner

CLASSES, SIDE, BATCH = 4, 12, 64
KIB = 1024


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(16 * 36, CLASSES))


def data(rows: int) -> TensorDataset:
    return noise(rows, CLASSES, side=SIDE)


def new_trainer(run: Path, reporter: Reporter | None = None, **settings) -> GreedyTrainer:
    defaults = {"epochs": 1, "batch_size": BATCH, "views": 1, "reporter": reporter}
    return small_trainer(run, network(), loss=Pred(), **defaults | settings)


@cache
def demand() -> StepDemand:
    """Makes the demand of stage 1."""
    stage, shape = cut(network())[0], shapes(cut(network()), (1, SIDE, SIDE))[0]
    what = (stage, shape, Pred(), CLASSES, BATCH, "float32", fused_adam, "cpu", SIDE**2)
    return StepDemand(*what)


@cache
def planned(limit: int | None, micro_batch: int | None = None) -> Choice:
    """Chooses for stage 1 under a budget."""
    return choose(demand(), limit, micro_batch)


@cache
def peak(memory: StepMemory) -> int:
    return demand().peak(memory)


def held() -> int:
    """Returns the bytes that stage 1 holds between its steps: weights, statistics and Adam's
    state."""
    heads = Pred().heads(demand().shapes.hidden, CLASSES)
    weights = [*demand().stage.parameters(), *heads.parameters()]
    statistics = sum(t.numel() * t.element_size() for t in demand().stage.buffers())
    return sum(3 * 4 * p.numel() + 4 for p in weights) + statistics


class Device:
    """Whose memory is exhausted by every step of stage 1 that is counted above ``limit``.

    Attributes:
        tells: what is free, once a step has failed.
        tried: with what memory steps have failed.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, limit: int, *, tells: bool = True) -> None:
        self.limit, self.tells, self.tried = limit, tells, []
        self._gradients = step.gradients
        monkeypatch.setattr(step, "gradients", self.gradients)
        monkeypatch.setattr(choice, "free_memory", self.free)

    def free(self, device: torch.device) -> float:
        known = self.tells and self.tried
        return (self.limit - held()) / choice.FREE_MEMORY_SHARE if known else 2**40

    def gradients(self, learner: Learner, batch: object) -> tuple:
        memory = StepMemory(learner.memory.mode, learner.memory.micro_batch)
        if learner.stage.number == 1 and peak(memory) > self.limit:
            self.tried.append(memory)
            raise torch.OutOfMemoryError
        return self._gradients(learner, batch)


def assert_trained(record: StageRecord, expected: Choice) -> None:
    memory = (record.choices.memory_mode, record.choices.micro_batch)
    assert memory == (expected.mode, expected.micro_batch)
    assert record.choices.planned_peak_bytes == expected.peak_bytes


@pytest.mark.parametrize("limit", [1500 * KIB, 900 * KIB])
def test_it_ends_where_the_planner_would_have_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    """Though nothing but the failures tells how much there is."""
    device = Device(monkeypatch, limit, tells=False)
    first, last = new_trainer(tmp_path / "run").fit(data(128), data(64))
    assert planned(limit).mode is not Mode.PLAIN
    assert_trained(first, planned(limit))
    peaks = [*map(peak, device.tried), planned(limit).peak_bytes]
    assert peaks == sorted(set(peaks), reverse=True)
    assert last.choices.memory_mode == Mode.PLAIN


def test_what_turns_out_to_be_free_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One step fails, and rows are written so that they fit too."""
    limit = 900 * KIB
    device = Device(monkeypatch, limit)
    first, _ = new_trainer(tmp_path / "run").fit(data(128), data(64))
    assert [memory.mode for memory in device.tried] == [Mode.PLAIN]
    assert_trained(first, planned(limit))
    assert first.choices.write_batch == planned(limit).write_batch < planned(None).write_batch


def test_a_micro_batch_that_is_named_stays_while_any_mode_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = Device(monkeypatch, 1500 * KIB)
    first, _ = new_trainer(tmp_path / "roomy", micro_batch=2).fit(data(128), data(64))
    assert_trained(first, planned(device.limit, 2))
    device.limit, device.tried = 900 * KIB, []
    first, _ = new_trainer(tmp_path / "tight", micro_batch=32).fit(data(128), data(64))
    assert_trained(first, planned(device.limit))


def test_where_nothing_smaller_is_counted_the_failure_is_the_user_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = Device(monkeypatch, held())
    with pytest.raises(torch.OutOfMemoryError):
        new_trainer(tmp_path / "run").fit(data(128), data(64))
    assert device.tried[1:] == [StepMemory(Mode.KEEP_NOTHING, 1)]


def test_a_stage_goes_on_as_it_was_and_is_planned_anew_when_it_is_trained_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = Device(monkeypatch, 900 * KIB)
    with pytest.raises(Interrupted):
        new_trainer(tmp_path, StopAfter(1)).fit(data(128), data(64))
    device.limit = 2**40
    resumed, _ = new_trainer(tmp_path).train()
    assert_trained(resumed, planned(900 * KIB))
    again, _ = new_trainer(tmp_path).train(retrain_from=1)
    assert_trained(again, planned(None))
