"""An interrupted run ends with the same files as an uninterrupted one."""

import json
import multiprocessing
import os
import runpy
import shutil
import signal
from itertools import count
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from decided import choices
from interrupting import Listener, StopAfter, interrupt
from safetensors.torch import load_file
from small_training import new_trainer as small_trainer
from small_training import noise, states
from torch import nn

from greedy import GreedyTrainer, Reporter, RunDirectory, TrainingError, UserError
from greedy.base.errors import Interrupted
from greedy.losses import Pred
from greedy.models import cut
from greedy.runs.checkpoint_record import Progress, StartRecord
from greedy.runs.state import RunState
from greedy.steps.guard import Guard
from greedy.steps.step import Learner, step
from greedy.steps.strategies import Greedy
from greedy.stores.source import Batch
from greedy.training.checkpoint import Checkpoints
from greedy.training.schedule import Milestones, set_first_rates

TRAIN, TEST = noise(300), noise(60)
RING = {"augmentation": "hflip", "reuse": 2, "views": 2, "epochs": 3}
PATIENT = {"patience": 1, "epochs": 5, "views": "live", "augmentation": "crop4"}
FROM_DISK = {"ram_budget": "1B", "augmentation": "hflip", "views": 3}
JOINT = {"strategy": "joint", "augmentation": "crop4"}
PATIENT_JOINT = JOINT | {"patience": 1, "epochs": 5}
HALF = {"precision": "float16"}
BACKPROP = {"strategy": "backprop", "accumulate": 3}


def new_trainer(run: Path, reporter: Reporter | None = None, **settings) -> GreedyTrainer:
    defaults = {"batch_size": 64, "views": 1, "checkpoint_minutes": 0, "reporter": reporter}
    return small_trainer(run, **(defaults | settings))


def outcome(run: Path) -> dict[str, object]:
    """Returns the contents of a run's files without times, memory and the process that wrote
    them."""
    contents: dict[str, object] = {}
    for path in sorted(path for path in run.rglob("*") if path.is_file()):
        name = str(path.relative_to(run))
        if name.endswith("stage.json"):
            document = json.loads(path.read_bytes())
            document["store"] = document["store"] and document["store"] | {"bytes_written": 0}
            free = ("seconds", "images_per_second", "peak_memory_bytes", "digest")
            free += ("written_before",)
            fields = {k: v for k, v in document.items() if k not in free}
            contents[name] = fields | {"files": sorted(document["files"])}
        elif name.endswith("history.jsonl"):
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            free = ("seconds", "images_per_second", "waiting_percent")
            contents[name] = [{k: v for k, v in x.items() if k not in free} for x in lines]
        elif name not in (".lock", "run.toml", "plan.json"):
            contents[name] = path.read_bytes()
    return contents


def fit_until_killed(run: Path, batches: int, settings: dict) -> None:
    reporter = StopAfter(batches, lambda: os.kill(os.getpid(), signal.SIGKILL))
    torch.set_num_threads(1)
    new_trainer(run, reporter, **settings).fit(TRAIN, TEST)


KILLED = {
    "ring": RING,
    "patient-joint": PATIENT_JOINT,
    "float16": HALF,
    "plain": {},
    "patient": PATIENT,
    "disk": FROM_DISK,
    "joint": JOINT,
    "backprop": BACKPROP,
    "float16-backprop": BACKPROP | HALF,
}
AT_ONCE = ("ring", "patient-joint", "float16")  # each of them has what the slow ones have too


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(each, id=name, marks=() if name in AT_ONCE else pytest.mark.slow)
        for name, each in KILLED.items()
    ],
)
def test_a_run_killed_anywhere_ends_the_same(tmp_path: Path, settings: dict) -> None:
    torch.set_num_threads(1)
    new_trainer(tmp_path / "whole", **settings).fit(TRAIN, TEST)
    expected = outcome(tmp_path / "whole")
    # Forked from a server that has only imported: autograd's threads do not survive a fork.
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["greedy.trainer", "pytest"])
    given = {"GIVEN": (tmp_path / "cut", 23, settings)}
    for _ in range(40):
        child = server.Process(target=runpy.run_path, args=(__file__, given, "child"))
        child.start()
        child.join()
        assert child.exitcode in (0, -signal.SIGKILL)
        if child.exitcode == 0:
            break
    assert child.exitcode == 0
    assert outcome(tmp_path / "cut") == expected


def test_the_scale_of_a_float16_loss_is_resumed(tmp_path: Path) -> None:
    for steps in (2, 4):  # the second process counts on from the first one's two
        reporter = StopAfter(2)
        with pytest.raises(Interrupted):
            new_trainer(tmp_path / "run", reporter, **HALF).fit(TRAIN, TEST)
        (tensors,) = (tmp_path / "run/stage1/training/checkpoint").glob("*.safetensors")
        assert load_file(tensors)["0.scale.steps"] == steps


def test_a_signal_finishes_the_batch_and_keeps_it(tmp_path: Path) -> None:
    new_trainer(tmp_path / "whole").fit(TRAIN, TEST)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        reporter = StopAfter(3, lambda number=number: os.kill(os.getpid(), number))
        cut = new_trainer(tmp_path / "cut", reporter, checkpoint_minutes=60)
        with pytest.raises(Interrupted, match="in stage 1 after .* resumes there") as caught:
            cut.fit(TRAIN, TEST)
        assert caught.value.signal == number
        progress = tmp_path / "cut/stage1/training/checkpoint/progress.json"
        assert json.loads(progress.read_text())["progress"]["position"] > 0
    new_trainer(tmp_path / "cut", checkpoint_minutes=60).fit(TRAIN, TEST)
    assert outcome(tmp_path / "cut") == outcome(tmp_path / "whole")


@pytest.mark.parametrize("epoch", [1, 2])
def test_a_signal_while_an_epoch_is_saved_stops_too(tmp_path: Path, epoch: int) -> None:
    write, number = Checkpoints._write, count(1)

    def write_and_stop(*given: object) -> None:
        write(*given)
        if next(number) == epoch:
            interrupt()

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted, match="resumes"):
        patch.setattr(Checkpoints, "_write", write_and_stop)
        new_trainer(tmp_path / "cut", checkpoint_minutes=60).fit(TRAIN, TEST)
    progress = json.loads((tmp_path / "cut/stage1/training/checkpoint/progress.json").read_text())
    assert progress["progress"]["epoch"] == epoch
    new_trainer(tmp_path / "cut").train()
    new_trainer(tmp_path / "whole").fit(TRAIN, TEST)
    assert outcome(tmp_path / "cut") == outcome(tmp_path / "whole")


def test_a_checkpoint_that_does_not_fit_in_memory_is_not_called_damaged(tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        new_trainer(tmp_path / "run", StopAfter(3)).fit(TRAIN, TEST)

    def load(optimizer: torch.optim.Optimizer, state: dict) -> None:
        assert not optimizer.state  # the new one takes its place
        raise torch.OutOfMemoryError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.Adam, "load_state_dict", load)
        with pytest.raises(TrainingError, match="memory ran out while the checkpoint .* is whole"):
            new_trainer(tmp_path / "run").train()
    new_trainer(tmp_path / "run").train()


def test_a_crash_between_new_views_and_their_record_is_noticed(tmp_path: Path) -> None:
    trainer = new_trainer(tmp_path / "run", **RING)
    trainer.fit(TRAIN, TEST)
    expected = outcome(tmp_path / "run")
    record = trainer.run.record(1)
    assert record.store.view_numbers == [2, 1]
    unknown = record.store.ring.with_view(0, -1)  # as it is at the exchange
    record.update_store(tmp_path / "run/stage1", ring=unknown)
    trainer.train_stage(2, again=True)
    contents = outcome(tmp_path / "run")
    trained = {name for name in expected if name.startswith("stage1/")}
    trained |= {f"stage2/{name}" for name in ("encoder.safetensors", "history.jsonl")}
    assert {name: contents[name] for name in trained} == {name: expected[name] for name in trained}


def test_a_stage_outside_its_run_resumes_too(tmp_path: Path) -> None:
    new_trainer(tmp_path / "run").fit(TRAIN, TEST)
    cut = new_trainer(tmp_path / "run", StopAfter(3))
    with pytest.raises(Interrupted):
        cut.train_stage(2, to=tmp_path / "there")
    new_trainer(tmp_path / "run").train_stage(2, to=tmp_path / "there")
    assert outcome(tmp_path / "there") == outcome(tmp_path / "run/stage2")
    with pytest.raises(UserError, match="exists already"):
        new_trainer(tmp_path / "run").train_stage(2, to=tmp_path / "there")
    before = outcome(tmp_path / "there")
    (tmp_path / "there").rename(tmp_path / ".there.new")  # a crash while it takes its place
    (tmp_path / "there").mkdir()
    again = new_trainer(tmp_path / "run", StopAfter(1, lambda: pytest.fail("it was trained")))
    assert again.train_stage(2, to=tmp_path / "there").stage == 2
    assert outcome(tmp_path / "there") == before
    assert not (tmp_path / ".there.new").exists()
    (tmp_path / "there").rename(tmp_path / ".there.new")
    with pytest.raises(UserError, match="exists already"):  # it is another stage
        new_trainer(tmp_path / "run").train_stage(1, to=tmp_path / "there")


@pytest.mark.parametrize(
    ("asked", "again", "left"),
    [(1, 1, [2, 3]), (1, None, [2, 3]), (1, 3, [2, 3]), (2, 1, [1, 2, 3])],
)
def test_a_retraining_resumes(
    tmp_path: Path, asked: int, again: int | None, left: list[int]
) -> None:
    run = tmp_path / "run"
    new_trainer(run).fit(TRAIN, TEST)
    expected = outcome(run)
    with pytest.raises(Interrupted, match="in stage 2 .* the same command resumes there"):
        new_trainer(run, Listener(interrupted=2)).train(asked)
    listener = Listener()
    new_trainer(run, listener).train(again)
    assert listener.trained == left
    assert outcome(run) == expected
    listener = Listener()
    new_trainer(run, listener).train(asked)  # done once, it can be asked for again
    assert listener.trained == list(range(asked, 4))


def test_a_retraining_that_stops_after_a_stage_goes_on_with_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stops while the old directory is deleted, which may take long."""
    run = tmp_path / "run"
    new_trainer(run).fit(TRAIN, TEST)
    expected = outcome(run)
    for asked, stage in ((2, 2), (3, 3)):

        def stop(directory: Path, name: str = f".stage{stage}.old") -> None:
            if directory.name == name:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr("greedy.runs.exchange.remove_tree", stop)
            new_trainer(run).train(asked)
        after = shutil.copytree(run, tmp_path / f"after{stage}")
        for path, again, left in ((run, asked, stage + 1), (after, asked + 1, stage + 1)):
            listener = Listener()
            new_trainer(path, listener).train(min(again, 3))
            assert listener.trained == list(range(left, 4))
            assert outcome(path) == expected
            assert RunState.read(RunDirectory.open(path)).is_finished


def test_a_stage_with_a_damaged_record_is_trained_again(tmp_path: Path) -> None:
    run = tmp_path / "run"
    new_trainer(run).fit(TRAIN, TEST)
    expected = outcome(run)
    for first, damaged in ((2, 2), (1, 3)):
        record = run / f"stage{damaged}/stage.json"
        record.write_bytes(record.read_bytes().replace(b"e", b"x", 1))
        new_trainer(run).train(first)
        assert outcome(run) == expected


def test_an_interrupted_store_goes_on_in_the_encoding_that_it_began_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another device may fit another one in the last digit."""
    new_trainer(tmp_path / "whole").fit(TRAIN, TEST)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("greedy.training.stage.write_split", Mock(side_effect=KeyboardInterrupt))
        new_trainer(tmp_path / "cut").fit(TRAIN, TEST)
    monkeypatch.setattr("greedy.training.stage.fit_output_encoding", Mock(side_effect=[None]))
    new_trainer(tmp_path / "cut").train_stage(1)
    assert outcome(tmp_path / "cut/stage1") == outcome(tmp_path / "whole/stage1")


def test_a_retraining_resumes_if_the_old_stages_are_stale(tmp_path: Path) -> None:
    run = tmp_path / "run"
    new_trainer(run).fit(TRAIN, TEST)
    cut, trainer = new_trainer(run, Listener(interrupted=2)), new_trainer(run)
    cut._planner.loss = trainer._planner.loss = Pred()
    with pytest.raises(Interrupted):
        cut.train(1)
    assert states(trainer.run, (1, 2, 3)) == ["complete", "stale", "stale"]
    trainer.train()
    assert states(trainer.run, (1, 2, 3)) == ["complete"] * 3


def test_a_damaged_file_of_a_retraining_is_named(tmp_path: Path) -> None:
    new_trainer(tmp_path / "run").fit(TRAIN, TEST)
    (tmp_path / "run/retraining.json").write_text('{"first": 1, "left": -2}')
    with pytest.raises(UserError, match="retraining.json is damaged: delete it"):
        new_trainer(tmp_path / "run").train()


@pytest.mark.parametrize("name", ["start.json", "progress.json", "*.safetensors"])
def test_a_damaged_checkpoint_is_named(tmp_path: Path, name: str) -> None:
    reporter = StopAfter(3)
    with pytest.raises(Interrupted):
        new_trainer(tmp_path / "run", reporter).fit(TRAIN, TEST)
    (path,) = (tmp_path / "run/stage1/training/checkpoint").glob(name)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
    with pytest.raises(UserError, match=f"{path.name} is damaged .*: delete .*training"):
        new_trainer(tmp_path / "run").train()


def test_user_defined_optimisers_resume(tmp_path: Path) -> None:
    def optimizer(parameters):
        return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, nesterov=True)

    def make(run, reporter=None):
        trainer = new_trainer(tmp_path / run, reporter)
        trainer._planner.optimizer = optimizer
        return trainer

    make("whole").fit(TRAIN, TEST)
    with pytest.raises(Interrupted):
        make("cut", StopAfter(7)).fit(TRAIN, TEST)
    make("cut").fit(TRAIN, TEST)
    assert outcome(tmp_path / "cut") == outcome(tmp_path / "whole")


def test_a_loss_that_is_not_finite_changes_nothing_and_is_named(tmp_path: Path) -> None:
    class Spoilt(nn.Module):
        steps = 0

        def forward(self, x):
            # Not while memory is counted, or the stage is planned with two rows.
            learns = self.training and type(x) is torch.Tensor and len(x) > 2
            Spoilt.steps += learns
            return x * float("nan") if learns and Spoilt.steps == 8 else x

    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), Spoilt(), nn.Linear(8, 3))
    settings = {"epochs": 4, "batch_size": 64, "learning_rate": 0.01, "precision": "float32"}
    trainer = GreedyTrainer(model, run_dir=tmp_path / "run", device="cpu", **settings)
    text = r"stage 1 is not finite in epoch 2, step 3, at a learning rate of 0.01 \(the last good"
    with pytest.raises(TrainingError, match=text + " checkpoint is after epoch 1"):
        trainer.fit(TRAIN, TEST)
    (tensors,) = (tmp_path / "run/stage1/training/checkpoint").glob("*.safetensors")
    assert all(torch.isfinite(v).all() for v in load_file(tensors).values())


def test_only_one_process_writes(tmp_path: Path) -> None:
    trainer = new_trainer(tmp_path / "run")
    trainer.fit(TRAIN, TEST)
    with trainer.run.write_lock():
        other = new_trainer(tmp_path / "run")
        for attempt in (other.train, lambda: other.train_stage(1), lambda: other.fit(TRAIN, TEST)):
            with pytest.raises(UserError, match=f"is in use by process {os.getpid()} on .* since"):
                attempt()
        assert RunState.read(RunDirectory.open(tmp_path / "run")).stage_state(3) == "complete"
        other.assemble()
    other.train()


if __name__ == "child":
    fit_until_killed(*GIVEN)  # noqa: F821


def test_moments_come_back_in_the_layout_of_their_weights(tmp_path: Path) -> None:
    """Which is channels-last on CUDA, where a fused Adam refuses another."""

    def checkpoints() -> Checkpoints:
        torch.manual_seed(0)
        stage = cut(nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2)))[0]
        for parameter in stage.parameters():
            if parameter.dim() == 4:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
        loss = Pred(pool_target=16)
        learner = Learner(stage, loss.heads((4, 2, 2), 2), loss, 2, "float32")
        learner.optimizer = torch.optim.Adam(learner.parameters(), fused=True)
        start = StartRecord(
            stage=1, recipe_digest="", parent_lineage="", source=0, layers=[], resolved=choices()
        )
        start.write(tmp_path)
        return Checkpoints(tmp_path, Greedy(learner), Milestones(0.1, 0.5, []), 10, start)

    saved, again = checkpoints(), checkpoints()
    (learner,), (other,) = saved.strategy.learners, again.strategy.learners
    x = torch.randn(8, 2, 4, 4).contiguous(memory_format=torch.channels_last)
    set_first_rates([learner.optimizer, other.optimizer])
    step(learner, Batch(torch.arange(8) % 2, x.__getitem__), Guard(), 0)
    saved.save(Progress(epoch=1))
    again.load()
    weight, moments = other.stage.layer[0].weight, other.optimizer.state
    assert weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
    for parameter, state in moments.items():
        assert state["exp_avg"].stride() == parameter.stride()
    before = learner.optimizer.state[learner.stage.layer[0].weight]
    assert torch.equal(moments[weight]["exp_avg"], before["exp_avg"])
