"""If nothing is drawn at random all views would be the same, so a store has one."""

from pathlib import Path

import pytest
from command_line import answer, said, small_recipe
from small_training import TEST, TRAIN, new_trainer, same, weights

from greedy import Reporter, RunDirectory
from greedy.cache import Store
from greedy.recipes import load, names
from greedy.runs.disk_plan import DiskPlan
from greedy.runs.state import RunState
from greedy.runs.views import wanted_views

SAYS = "nothing is drawn at random when images are read, so a store has one view instead of 4 "


class Cut(Reporter):
    """Records the plan; interrupts the first epoch of a stage, or the writing of its store."""

    def __init__(self, stage: int = 0, *, writing: bool = False) -> None:
        self.stage, self.writing, self.now = stage, writing, 0
        self.plan: DiskPlan | None = None

    def disk_planned(self, plan: DiskPlan) -> None:
        self.plan = plan

    def stage_started(self, number: int, *rest: object) -> None:
        self.now = number

    def batch_finished(self, rows: int) -> None:
        if self.now == self.stage and not self.writing:
            raise KeyboardInterrupt

    def writing_started(self, stage: int, split: str, rows: int) -> None:
        if stage == self.stage and self.writing:
            raise KeyboardInterrupt


def views(run: Path) -> list[int]:
    """Returns the numbers of views in the stores of stages 1 and 2."""
    return [Store(run / f"stage{n}/activations.zarr/train").views for n in (1, 2)]


def recorded(run: Path) -> list[int]:
    records = [RunDirectory.open(run).record(n) for n in (1, 2)]
    return [record.store.views for record in records]


@pytest.fixture
def as_before(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Makes the run ask for and write the number of views that earlier versions did."""
    wanted = lambda recipe, number, fresh: (recipe.store.views, 0)  # noqa: E731
    monkeypatch.setattr("greedy.runs.disk_budget.wanted_views", wanted)
    return monkeypatch


def test_one_view_gives_the_same_network_as_four_identical_ones(tmp_path: Path, as_before) -> None:
    new_trainer(tmp_path / "four", views=4).fit(TRAIN, TEST)
    assert views(tmp_path / "four") == [4, 4]
    as_before.undo()
    reporter = Cut()
    trainer = new_trainer(tmp_path / "one", views=4, reporter=reporter)
    trainer.fit(TRAIN, TEST)
    assert views(tmp_path / "one") == recorded(tmp_path / "one") == [1, 1]
    note, size = reporter.plan.explain()
    assert note == f"disk: {SAYS}identical ones"
    assert size.startswith("disk: the stores take up to ")
    for stage in (1, 2, 3):
        assert same(weights(tmp_path / "one", stage), weights(tmp_path / "four", stage))


@pytest.mark.parametrize("writing", [False, True])
def test_a_run_that_started_with_four_views_keeps_them(
    tmp_path: Path, as_before, writing: bool
) -> None:
    with pytest.raises(KeyboardInterrupt):
        new_trainer(tmp_path / "run", views=4, reporter=Cut(2, writing=writing)).fit(TRAIN, TEST)
    as_before.undo()
    reporter = Cut()
    trainer = new_trainer(tmp_path / "run", views=4, reporter=reporter)
    trainer.fit(TRAIN, TEST)
    assert [reporter.plan.views(n) for n in (1, 2)] == [4, 4]
    assert views(tmp_path / "run") == recorded(tmp_path / "run") == [4, 4]
    trainer.train_stage(2, again=True)
    assert recorded(tmp_path / "run") == [4, 4]
    trainer.train(2)
    assert recorded(tmp_path / "run") == [4, 1]
    assert RunState.read(RunDirectory.open(tmp_path / "run")).is_finished


def test_augmentation_and_cutout_are_drawn_at_random(tmp_path: Path) -> None:
    for name, settings in {"flip": {"augmentation": "hflip"}, "hole": {"cutout_length": 2}}.items():
        reporter = Cut()
        trainer = new_trainer(tmp_path / name, **settings, reporter=reporter)
        trainer.fit(TRAIN, TEST)
        assert views(tmp_path / name) == [2, 2]
        assert not reporter.plan.notes


def test_identical_views_are_not_replaced(tmp_path: Path) -> None:
    settings = {"views": 1, "reuse": 1, "epochs": 3}
    reporter = Cut()
    new_trainer(tmp_path / "run", **settings, reporter=reporter).fit(TRAIN, TEST)
    (note,) = reporter.plan.notes
    assert note.endswith("so views are not replaced")
    store = RunDirectory.open(tmp_path / "run").record(1).store
    assert (store.ring, store.bytes_written) == (None, store.bytes)


def test_the_command_line_plans_one_view_and_says_so(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("tiny.toml").write_text(small_recipe())
    plan = ("plan", "--recipe", "tiny.toml", "--device", "cpu")
    assert SAYS in said(*plan, "--views", "4")
    asked, one = answer(*plan, "--views", "4"), answer(*plan, "--views", "1")
    assert asked["stages"] == one["stages"]
    assert SAYS in asked["disk"]["plan"][0]
    assert len(one["disk"]["plan"]) == len(asked["disk"]["plan"]) - 1
    assert len(answer(*plan, "--views", "live")["disk"]["plan"]) == 1
    drawn = answer(*plan, "--views", "4", "--set", "data.augmentation=hflip")
    assert drawn["stages"][0]["store_bytes"] > 3 * one["stages"][0]["store_bytes"]


def test_shipped_recipes_that_draw_nothing_keep_one_view() -> None:
    for recipe in map(load, names()):
        drawn = recipe.data.augmentation != "none" or recipe.data.cutout_length
        assert (wanted_views(recipe, 2) == (1, 0)) == (not drawn), recipe.name
    assert wanted_views(load("kmnist/vgg8b-predsim"), 2) == (1, 0)
    assert wanted_views(load("kmnist/vgg8b-predsim-cutout"), 2) == (4, 2)
