"""An interrupted training is never deleted: the store it needs is protected, or it is set aside."""

from pathlib import Path

import numpy as np
import pytest
from command_line import answer, refused, said
from interrupting import interrupt
from small_training import TEST, TRAIN, files, network, new_trainer, same, weights
from torch import nn

from greedy import Reporter
from greedy.base.errors import Interrupted
from greedy.runs.plan_basis import disk_room
from greedy.runs.state import RunState
from greedy.runs.status import trainings_set_aside


class Cut(Reporter):
    """Interrupts a stage after its first epoch; records epochs and trainings that are set aside."""

    def __init__(self, stage: int | None = None) -> None:
        self.stage, self.now, self.epochs, self.aside = stage, 0, {}, []

    def stage_started(self, number: int, *rest: object) -> None:
        self.now = number

    def network_started(self, *rest: object) -> None:
        self.now = 1

    def training_set_aside(self, number: int, path: Path, progress: str | None) -> None:
        self.aside.append((number, path.name, progress))

    def epoch_started(self, epoch: int, rows: int) -> None:
        self.epochs.setdefault(self.now, []).append(epoch)

    def batch_finished(self, rows: int) -> None:
        if self.now == self.stage and self.epochs.get(self.now, [0])[-1] == 2:
            interrupt()


def trainer_until(run: Path, stage: int | None = None, **settings) -> tuple[object, Cut]:
    """Returns a trainer that is interrupted in a stage, and its reporter."""
    trainer = new_trainer(run, **settings)
    trainer.reporter = Cut(stage)
    return trainer, trainer.reporter


def interrupted(run: Path, stage: int = 2, **settings) -> None:
    trainer, _ = trainer_until(run, stage, **settings)
    with pytest.raises(Interrupted):
        trainer.fit(TRAIN, TEST)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Returns a run that was interrupted in epoch 2 of stage 2."""
    interrupted(tmp_path / "run")
    return tmp_path / "run"


def test_dropping_a_store_that_a_training_needs_is_refused(run: Path) -> None:
    before = files(run)
    for place in (run, run / "stage1"):
        told = refused("cache", "drop", place)
        assert "stage 2 in " in told
        assert "interrupted after step" in told
        assert "--force" in told
        assert files(run) == before
    assert "stage 1: " in said("cache", "drop", run, "--force")


def test_a_training_whose_store_is_deleted_is_set_aside_and_resumes_after_repair(
    run: Path, tmp_path: Path
) -> None:
    new_trainer(tmp_path / "whole").fit(TRAIN, TEST)
    before = files(run / "stage2/training")
    new_trainer(run).run.drop_stores(1)
    trainer, reporter = trainer_until(run, 2)
    with pytest.raises(Interrupted):
        trainer.train()
    ((number, name, progress),) = reporter.aside
    assert (number, name) == (2, "stage2.unfinished")
    assert progress.endswith("of epoch 2")
    assert files(run / "stage2.unfinished") == before
    assert reporter.epochs[2] == [1, 2]
    (document,) = answer("status", "--run", run)["set_aside"]
    assert (Path(document["path"]).name, document["progress"]) == (name, progress)
    assert "stage2.unfinished: a training interrupted after" in said("status", "--run", run)
    new_trainer(run).repair([1], dropped=True)
    trainer, reporter = trainer_until(run)
    trainer.train_stage(2, source=1)
    assert reporter.epochs[2] == [2]
    assert same(weights(run, 2), weights(tmp_path / "whole", 2))
    (left,) = trainings_set_aside(trainer.run)  # the one that began from the images
    assert reporter.aside == [(2, left.path.name, left.progress)]


def test_another_source_sets_aside_and_the_first_resumes_it(run: Path) -> None:
    trainer, reporter = trainer_until(run, 2)
    with pytest.raises(Interrupted):
        trainer.train_stage(2, source=0)
    assert len(reporter.aside) == 1
    trainer, reporter = trainer_until(run)
    trainer.train_stage(2, source=1)
    assert reporter.epochs[2] == [2]
    assert len(trainings_set_aside(trainer.run)) == 1


def test_a_stage_outside_its_run_sets_aside_next_to_it(run: Path, tmp_path: Path) -> None:
    new_trainer(run).train()
    for source in (1, 0):
        trainer, reporter = trainer_until(run, 2)
        with pytest.raises(Interrupted):
            trainer.train_stage(2, source=source, to=tmp_path / "there")
    assert [name for _, name, _ in reporter.aside] == ["there.unfinished"]
    assert (tmp_path / "there.unfinished/checkpoint/progress.json").is_file()


def test_a_training_resumes_from_its_source_while_that_exists(tmp_path: Path) -> None:
    run = tmp_path / "run"
    new_trainer(run).fit(TRAIN, TEST)
    trainer, _ = trainer_until(run, 3)
    with pytest.raises(Interrupted):
        trainer.train_stage(3, source=1, again=True)
    trainer, reporter = trainer_until(run)
    trainer.train(3)
    assert (reporter.epochs[3], reporter.aside) == ([2], [])
    assert trainer.run.record(3).source == 1


def test_the_disk_plan_keeps_a_store_that_a_training_needs(run: Path, monkeypatch) -> None:
    new_trainer(run).train()
    trainer, _ = trainer_until(run, 3)
    with pytest.raises(Interrupted):
        trainer.train_stage(3, source=1, again=True)
    there = []

    class Watch(Cut):
        def stage_started(self, number: int, *rest: object) -> None:
            super().stage_started(number)
            there.append((number, (run / "stage1/activations.zarr").is_dir()))

    trainer = new_trainer(run)
    trainer.reporter = Watch()
    plan = trainer._planner.disk(RunState.read(trainer.run), 2)
    monkeypatch.setattr(type(plan), "dropped_after", lambda self, n: [1] if n == 2 else [])
    trainer.train(2)
    assert there == [(2, True), (3, True)]
    assert not (run / "stage1/activations.zarr").exists()


def test_a_joint_training_is_set_aside_too(tmp_path: Path) -> None:
    run, joint = tmp_path / "run", {"strategy": "joint", "views": "live"}
    interrupted(run, 1, **joint)
    other = network()
    other[3] = nn.Tanh()
    trainer = new_trainer(run, other, **joint)
    trainer.reporter = reporter = Cut()
    trainer.train()
    assert [name for _, name, _ in reporter.aside] == ["network.unfinished"]
    assert (run / "network.unfinished/checkpoint/progress.json").is_file()
    assert RunState.read(trainer.run).is_finished


def test_a_training_set_aside_counts_against_the_budget_and_is_no_stage(
    run: Path, monkeypatch
) -> None:
    trainer = new_trainer(run)
    full = type("", (), {"free": 0})
    monkeypatch.setattr("greedy.runs.plan_basis.shutil.disk_usage", lambda path: full)
    before = disk_room(trainer.run)
    place = run / "stage2.unfinished"
    place.mkdir()
    (place / "much").write_bytes(np.zeros(1000, np.uint8).tobytes())
    assert disk_room(trainer.run) == before
    assert not answer("cache", "verify", run)["damaged"]


def test_notes_in_a_stage_s_directory_survive_retraining(tmp_path: Path) -> None:
    run = tmp_path / "run"
    new_trainer(run).fit(TRAIN, TEST)
    (run / "stage2/notes.txt").write_text("mine")
    new_trainer(run).train(1)
    assert (run / "stage2/notes.txt").read_text() == "mine"
