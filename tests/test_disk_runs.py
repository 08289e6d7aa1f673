"""A run under a disk budget."""

import itertools
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from command_line import answer, greedy, refused, said, small_recipe, times
from small_training import CLASSES, SIDE, samples, states
from small_training import new_trainer as small_trainer
from torch import nn

from greedy import GreedyTrainer, Reporter, UserError, evaluate
from greedy.cache import Store
from greedy.runs.directory import RunDirectory
from greedy.runs.disk_demand import COMPRESSED, ByteOperations
from greedy.runs.disk_plan import DiskPlan
from greedy.runs.plan_basis import PlanBasis
from greedy.runs.state import RunState

WIDTHS = (256, 256, 64, 256, 64)
ROWS = {"train": 300, "test": 60}


TRAIN, TEST = samples(ROWS["train"], 0), samples(ROWS["test"], 1)


class Notes(Reporter):
    """Records the plan and which stages were trained."""

    def __init__(self) -> None:
        self.plans: list[DiskPlan] = []
        self.trained: list[int] = []

    def disk_planned(self, plan):
        self.plans.append(plan)

    def stage_started(self, number, name, epochs, resolved):
        self.trained.append(number)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    modules: list[nn.Module] = [nn.Flatten()]
    for before, after in itertools.pairwise((SIDE**2, *WIDTHS)):
        modules += [nn.Linear(before, after), nn.BatchNorm1d(after), nn.LeakyReLU(0.01)]
    return nn.Sequential(*modules, nn.Linear(WIDTHS[-1], CLASSES))


def new_trainer(run: Path, budget: int | str, **changes) -> GreedyTrainer:
    settings = {"epochs": 1, "batch_size": 64, "views": 4, "encoding": "float32"}
    settings |= {"augmentation": "hflip", "reporter": Notes()}
    settings["disk_budget"] = budget if isinstance(budget, str) else f"{budget}B"
    return small_trainer(run, network(), **(settings | changes))


def estimate(width: int, views: int) -> int:
    return int((views * ROWS["train"] + ROWS["test"]) * width * COMPRESSED["float32"])


def stores(run: Path) -> dict[int, int]:
    """Returns the numbers of views in the stores on disk, by stage."""
    numbers = (int(p.parent.name[5:]) for p in run.glob("stage*/activations.zarr"))
    return {n: Store(run / f"stage{n}/activations.zarr/train").views for n in sorted(numbers)}


def weights(run: Path, stage: int) -> bytes:
    return (run / f"stage{stage}/encoder.safetensors").read_bytes()


IMAGES = 40_000  # about what stage 0 takes
# The first two stores fit side by side with 2 views each, not with 4.
BUDGET = 2 * estimate(256, 2) + IMAGES
PLANNED = [2, 2, 4, 2, 4, "live"]
LEFT = {0: 1, 3: 4, 4: 2, 5: 4}


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "run"
    trainer = new_trainer(run, BUDGET)
    trainer.fit(TRAIN, TEST)
    (plan,) = trainer.reporter.plans
    assert [plan.views(n) for n in range(1, 7)] == PLANNED
    assert plan.peak <= BUDGET < plan.needed
    return run


def test_a_tight_budget_lowers_views_and_deletes_stores(finished: Path) -> None:
    assert stores(finished) == LEFT
    directory = RunDirectory.open(finished)
    assert states(directory, range(7)) == ["complete"] * 7
    records = [directory.record(n) for n in range(1, 7)]
    assert [r.choices.views for r in records] == PLANNED
    assert [r.source for r in records] == [0, 1, 2, 3, 4, 5]
    assert [path.name for path in finished.rglob(".*")] == [".lock"]
    test = new_trainer(finished, BUDGET).assemble()(torch.rand(2, 1, SIDE, SIDE))
    assert test.shape == (2, CLASSES)


def test_the_plan_knows_which_stores_are_written_from_the_images(finished: Path) -> None:
    trainer = new_trainer(finished, BUDGET)
    plan = trainer._planner.disk(RunState.read(trainer.run), 1)
    planned = [plan.is_written_from_images(n) for n in range(1, 7)]
    written = [trainer.run.record(n).store.source == 0 for n in range(1, 6)]
    assert planned == [*written, False] == [True, False, True, False, True, False]


def test_a_finished_run_is_unchanged_by_any_budget(run: Path) -> None:
    before = times(run)
    trainer = new_trainer(run, 1)
    trainer.train()
    assert (trainer.reporter.trained, trainer.reporter.plans) == ([], [])
    assert times(run) == before


def test_a_stage_whose_store_was_deleted_is_not_trained_again(run: Path, finished: Path) -> None:
    for number in (5, 6):
        shutil.rmtree(run / f"stage{number}")
    trainer = new_trainer(run, BUDGET)
    trainer.train()
    assert trainer.reporter.trained == [5, 6]
    assert stores(run) == LEFT
    for number in (5, 6):
        assert weights(run, number) == weights(finished, number)


def test_an_interrupted_run_ends_as_it_would_have_in_one_go(tmp_path: Path, finished: Path) -> None:
    class Crash(Notes):
        def stage_started(self, number, name, epochs, resolved):
            super().stage_started(number, name, epochs, resolved)
            if number == 3:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        new_trainer(tmp_path / "run", BUDGET, reporter=Crash()).fit(TRAIN, TEST)
    assert stores(tmp_path / "run") == {0: 1, 2: 2}
    trainer = new_trainer(tmp_path / "run", BUDGET)
    trainer.fit(TRAIN, TEST)
    assert trainer.reporter.trained == [3, 4, 5, 6]
    assert stores(tmp_path / "run") == LEFT
    for number in range(1, 7):
        assert weights(tmp_path / "run", number) == weights(finished, number)


def disk_with(free: int, patch: pytest.MonkeyPatch) -> None:
    usage = SimpleNamespace(free=free)
    patch.setattr("greedy.runs.plan_basis.shutil", SimpleNamespace(disk_usage=lambda path: usage))


def test_an_interrupted_run_keeps_to_the_room_that_there_was(
    tmp_path: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stop(Notes):
        def stage_started(self, number, name, epochs, resolved):
            raise KeyboardInterrupt

    run = tmp_path / "run"
    disk_with(int(BUDGET / 0.7), monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        new_trainer(run, "auto", reporter=Stop()).fit(TRAIN, TEST)
    begun = shutil.copytree(run, tmp_path / "begun")
    disk_with(2**40, monkeypatch)
    trainer = new_trainer(run, "auto")
    trainer.fit(TRAIN, TEST)
    assert stores(run) == LEFT
    assert not trainer.reporter.plans[0].notes
    for number in range(1, 7):
        assert weights(run, number) == weights(finished, number)

    disk_with(BUDGET * 3 // 4, monkeypatch)  # now with less room than it began with
    trainer = new_trainer(begun, "auto")
    trainer.fit(TRAIN, TEST)
    (plan,) = trainer.reporter.plans
    (note,) = plan.notes
    assert note == "there is less room than when the run began, so its stores are planned anew"
    assert plan.peak < 0.7 * BUDGET
    (begun / "plan.json").write_text('{"budget": -1}')
    with pytest.raises(UserError, match="plan.json is damaged: delete it"):
        new_trainer(begun, "auto").train(6)


@pytest.mark.parametrize("number", [4, 5])
def test_train_stage_again_gives_the_same(run: Path, finished: Path, number: int) -> None:
    record = new_trainer(run, "1TB").train_stage(number, again=True)  # the views it had, not four
    assert record.lineage == RunDirectory.open(finished).record(number).lineage
    assert weights(run, number) == weights(finished, number)
    assert stores(run) == LEFT
    assert RunState.read(RunDirectory.open(run)).stage_state(6) == "complete"


def test_train_stage_finds_the_views_that_train_gives(run: Path, finished: Path) -> None:
    shutil.rmtree(run / "stage4")
    new_trainer(run, BUDGET).train_stage(4)
    assert stores(run) == LEFT
    for split in ("train", "test"):
        a, b = (Store(each / f"stage4/activations.zarr/{split}") for each in (run, finished))
        np.testing.assert_array_equal(a.load(), b.load())
    assert RunState.read(RunDirectory.open(run)).stage_state(5) == "complete"


def test_stages_without_a_store_are_replayed_from_the_nearest_store(tmp_path: Path) -> None:
    """The budget has room only for the narrow stores."""
    trainer = new_trainer(tmp_path / "run", IMAGES + estimate(64, 4))
    records = trainer.fit(TRAIN, TEST)
    assert [r.choices.views for r in records] == ["live", "live", 1, "live", 2, "live"]
    assert [r.source for r in records] == [0, 0, 0, 3, 3, 5]
    figures = evaluate(trainer.run, trainer.assemble(), "test", torch.device("cpu"))
    assert figures.error_percent == pytest.approx(records[-1].metrics.test_error_percent, abs=5)
    lines = trainer.reporter.plans[0].explain()
    assert lines[2] == "stage 2: live, replayed from stage 0's store"
    assert lines[4] == "stage 4: live, replayed from stage 3's store"


def test_retraining_under_a_tight_budget_deletes_the_old_stores_first(run: Path) -> None:
    trainer = new_trainer(run, BUDGET)
    before = [weights(run, n) for n in range(1, 7)]
    trainer.train(retrain_from=1)
    assert trainer.reporter.plans[0].dropped_first == (3, 4, 5)
    assert stores(run) == LEFT
    assert [weights(run, n) for n in range(1, 7)] == before


def test_deleting_a_store_is_completed_after_a_crash(run: Path) -> None:
    store = run / "stage3/activations.zarr"
    store.rename(run / "stage3/.activations.zarr.old")
    directory = RunDirectory.create(run, RunDirectory.open(run).recipe)
    with directory.write_lock():
        pass
    assert not list((run / "stage3").glob("*activations*")) + list((run / "stage3").glob(".*"))
    assert RunState.read(directory).stage_state(3) == "complete"
    directory.drop_stores(3, 4)
    assert list(stores(run)) == [0, 5]


def test_keep_all_insists(tmp_path: Path) -> None:
    needed = 3 * estimate(256, 4) + 2 * estimate(64, 4) + IMAGES
    with pytest.raises(UserError, match=r"keeping all stores takes 3.8 MiB and the disk budget is"):
        new_trainer(tmp_path / "run", BUDGET, keep="all").fit(TRAIN, TEST)
    assert not (tmp_path / "run").exists()
    new_trainer(tmp_path / "run", needed, keep="all").fit(TRAIN, TEST)
    assert stores(tmp_path / "run") == {0: 1} | dict.fromkeys(range(1, 6), 4)


def test_auto_is_a_share_of_the_space_free_without_the_run(run: Path, monkeypatch) -> None:
    def left(free: int) -> int:
        with monkeypatch.context() as patch:
            disk_with(free, patch)
            budget = PlanBasis.of_run(new_trainer(run, "auto").run, ByteOperations(1, 1)).budget
            assert budget is not None
            return budget

    (run / "plan.json").unlink()

    before = left(2**40)
    assert before == pytest.approx(0.7 * 2**40, rel=0.01)
    with (run / "ballast").open("wb") as file:
        file.write(bytes(2**26))
    assert left(2**40 - 2**26) == pytest.approx(before, rel=1e-6)


@pytest.mark.parametrize("change", [{"disk_budget": "much"}, {"keep": "none"}])
def test_an_invalid_budget_is_refused(tmp_path: Path, change: dict) -> None:
    with pytest.raises(UserError, match=f"store.{next(iter(change))} is .* but must be"):
        new_trainer(tmp_path / "run", "auto", **change)


def test_status_counts_all_bytes_ever_written(run: Path, tmp_path: Path) -> None:
    def use() -> tuple[int, int]:
        document = answer("status", "--run", run)
        return document["bytes_on_disk"], document["bytes_written"]

    on_disk, written = use()
    files = (p for p in run.glob("stage*/activations.zarr/**/*") if p.is_file())
    assert on_disk == pytest.approx(sum(p.stat().st_size for p in files), rel=0.02)
    records = [RunDirectory.open(run).record(n).store for n in range(6)]
    assert written == sum(store.bytes for store in records) > on_disk
    trainer = new_trainer(run, BUDGET)
    trainer.train_stage(5, again=True)
    trainer.train_stage(4, again=True)
    trainer.train_stage(4, again=True)
    more = records[5].bytes + 2 * records[4].bytes
    assert use() == (on_disk, written + more)
    trainer.run.drop_stores(4)
    assert use() == (on_disk - records[4].bytes, written + more)
    trainer.train_stage(5, again=True, to=tmp_path / "elsewhere")
    assert use()[1] == written + more
    table = said("status", "--run", run)
    assert re.fullmatch(
        r"stores, with the images: .* KiB on disk, .* MiB written since the run began",
        table.splitlines()[-1],
    )


RECIPE = small_recipe(
    data={"augmentation": "hflip"},
    model={"hidden_width": 64},
    training={"batch_size": 512, "precision": None},
)


def test_the_command_line_shows_the_plan_of_the_stores(tmp_path: Path) -> None:
    (tmp_path / "tiny.toml").write_text(RECIPE)
    command = ["train", "--recipe", str(tmp_path / "tiny.toml"), "--run", str(tmp_path / "run")]
    command += ["--views", "4"]
    tight = ["--disk-budget", "5MiB"]
    assert "raise store.disk_budget" in refused(*command, *tight, "--keep", "all")
    result = greedy(*command, *tight)
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("disk: "))
    assert re.fullmatch(r"disk: all stores would take \d\.\d MiB, so:", lines[start])
    assert re.fullmatch(r"stage 1: \d views?, .* KiB, (kept|deleted.*)", lines[start + 1])
    assert lines[start + 4].startswith("stage 1/3 linear64: training")
    roomy = greedy(*command, "--disk-budget", "1GB", "--retrain", "3")
    assert re.search(r"\ndisk: the stores take up to .* of a budget of 953.7 MiB\n", roomy.output)


def test_small_late_stores_keep_all_views_that_a_ring_would_draw(tmp_path: Path) -> None:
    """In 30 epochs with four uses of a copy, these are 8 views. To draw each through all frozen
    stages, anew for every stage, takes more operations than to store them."""
    run = tmp_path / "run"
    trainer = new_trainer(run, "1GiB", epochs=30, batch_size=300, views="auto", encoding="uint4")
    trainer.fit(TRAIN, TEST)
    (plan,) = trainer.reporter.plans
    views = [(plan.views(n), plan.reuse(n)) for n in range(1, 6)]
    assert views == [("live", 0), (4, 4), (8, 0), ("live", 0), (8, 0)]
    assert stores(run) == {0: 1, 2: 4, 3: 8, 5: 8}
    assert [trainer.run.record(n).store.source for n in (2, 3, 5)] == [0, 0, 3]
    assert trainer.assemble()(torch.rand(2, 1, SIDE, SIDE)).shape == (2, CLASSES)
