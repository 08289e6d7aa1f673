"""Disk plans of runs that go on: under another budget, in another room, or from the beginning."""

import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_disk import demands, modest
from test_disk_runs import BUDGET, LEFT, TEST, TRAIN, disk_with, new_trainer, stores

from greedy import UserError
from greedy.runs.disk_plan import plan_stores
from greedy.runs.integrity import verify_run


@modest
@given(demands(most=4), st.data())
def test_a_plan_that_fits_what_is_still_to_be_trained_is_found(demand, data):
    done = data.draw(st.integers(0, len(demand.stages) - 1))
    had = st.sampled_from([1, 2, 4, "live"])
    finished = [replace(stage, views=data.draw(had)) for stage in demand.stages[:done]]
    demand = replace(demand, stages=(*finished, *demand.stages[done:]))
    choices = [demand.choices(n) or [None] for n in range(1, done + 1)]
    choices += [[None, *demand.choices(n)] for n in range(done + 1, len(demand.stages))]
    possible = [
        {number: views for number, views in enumerate(choice, start=1) if views}
        for choice in itertools.product(*choices)
    ]
    least = min(demand.peak(stored, sorted(stored)[-1:]) for stored in possible)
    assert plan_stores(demand, least).peak <= least


def begun(path: Path, budget: str = "auto", **settings) -> Path:
    trainer = new_trainer(path, budget, **settings)
    trainer.fit(TRAIN, TEST)
    return path


def test_retraining_in_less_room_deletes_the_old_stores_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = begun(tmp_path / "run")
    kept = stores(run)
    assert len(kept) == 6
    disk_with(500_000, monkeypatch)  # besides what the run has
    trainer = new_trainer(run, "auto")
    trainer.train(1)
    (plan,) = trainer.reporter.plans
    assert plan.dropped_first == (1, 2, 3, 4, 5) and not plan.notes
    assert stores(run) == kept


def test_a_run_that_begins_again_is_planned_in_the_room_there_is_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    disk_with(int(BUDGET / 0.7), monkeypatch)
    assert stores(begun(run)) == LEFT
    for stage in run.glob("stage*"):
        shutil.rmtree(stage)
    disk_with(2**40, monkeypatch)
    assert stores(begun(run, epochs=2)) == {0: 1} | dict.fromkeys(range(1, 6), 4)


def test_object_storage_has_room_for_what_the_local_disk_had_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    disk_with(int(BUDGET / 0.7), monkeypatch)
    begun(run)
    for number in range(1, 7):
        shutil.rmtree(run / f"stage{number}")
    trainer = new_trainer(run, "auto", stores=f"file://{tmp_path}/bucket")
    trainer.train()
    (plan,) = trainer.reporter.plans
    assert plan.budget is None
    assert [plan.views(n) for n in range(1, 6)] == [4] * 5


def test_what_a_run_was_planned_from_is_checked(tmp_path: Path) -> None:
    run = begun(tmp_path / "run", views=1)
    assert not verify_run(run)
    basis = json.loads((run / "plan.json").read_text())
    (run / "plan.json").write_text(json.dumps(basis | {"read": basis["read"] + 1}))
    (damage,) = verify_run(run)
    assert damage.path == run / "plan.json"
    with pytest.raises(UserError, match="plan.json is damaged: delete it"):
        new_trainer(run, "auto", views=1).train(6)
    (run / "plan.json").unlink()
    new_trainer(run, "auto", views=1).train(6)
    assert not verify_run(run)
