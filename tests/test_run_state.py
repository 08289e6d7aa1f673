"""The state of a run is read once for each use, and does not follow the directory after that."""

from collections import Counter
from pathlib import Path

import pytest
from command_line import answer
from small_training import TEST, TRAIN, new_trainer, states

from greedy import RunState, UserError
from greedy.runs import record
from greedy.runs.directory import RunDirectory


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("state") / "run"
    new_trainer(place, epochs=1).fit(TRAIN, TEST)
    return place


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts how often the record of each stage is read."""
    counted, read = Counter(), record.read_with_digest

    def count(path: Path) -> dict:
        counted[path.parent.name] += 1
        return read(path)

    monkeypatch.setattr(record, "read_with_digest", count)
    return counted


def test_status_reads_each_record_once(run: Path, reads: Counter[str]) -> None:
    stages = answer("status", "--run", run)["stages"]
    assert [stage["state"] for stage in stages] == ["complete"] * 3
    assert reads == {f"stage{number}": 1 for number in range(4)}


def test_a_training_with_nothing_to_do_reads_each_record_once(
    run: Path, reads: Counter[str]
) -> None:
    trainer = new_trainer(run, epochs=1)
    reads.clear()
    assert len(trainer.train()) == 3
    del reads["stage0"]  # also compared with the recipe when the lock is taken
    assert reads == {f"stage{number}": 1 for number in range(1, 4)}


def test_a_training_reads_a_record_once_it_is_written(tmp_path: Path, reads: Counter[str]) -> None:
    """And once at the end, when later stages may have replaced views of its store."""
    new_trainer(tmp_path / "run", epochs=1).fit(TRAIN, TEST)
    del reads["stage0"]
    assert reads == {f"stage{number}": 2 for number in range(1, 4)}


def test_a_state_stays_as_it_was_read(tmp_path: Path) -> None:
    trainer = new_trainer(tmp_path / "run", epochs=1)
    before = RunState.read(trainer.run)
    trainer.fit(TRAIN, TEST)
    assert [before.stage_state(n) for n in range(4)] == ["pending"] * 4
    assert not before.is_finished
    after = before.read_again(0, 1)
    assert [after.stage_state(n) for n in (1, 2)] == ["complete", "pending"]
    assert after.has_store(1)
    assert states(trainer.run, range(4)) == ["complete"] * 4


def test_a_damaged_record_is_told_to_those_who_need_it(tmp_path: Path) -> None:
    trainer = new_trainer(tmp_path / "run", epochs=1)
    trainer.fit(TRAIN, TEST)
    (tmp_path / "run/stage2/stage.json").write_text("{}")
    state = RunState.read(trainer.run)
    assert state.complete_record(1).stage == 1
    for number in (2, 3):
        with pytest.raises(UserError, match="stage2/stage.json is damaged"):
            state.complete_record(number)


def test_networks_of_many_stages_are_read(tmp_path: Path) -> None:
    new_trainer(tmp_path / "run", epochs=1).fit(TRAIN, TEST)
    run = RunDirectory.open(tmp_path / "run")
    last = run.record(2)
    for number in range(3, 602):  # as many as a ResNet-1202 has blocks
        parent = record.Parent(stage=last.stage, lineage=last.lineage)
        changed = {"stage": number, "parent": parent, "lineage": f"{number:x}"}
        run.stage_dir(number).mkdir(exist_ok=True)
        last = last.model_copy(update=changed).write(run.stage_dir(number))
    state = RunState.read(run)
    assert {state.stage_state(number) for number in range(1, 602)} == {"complete"}
