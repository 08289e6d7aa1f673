"""Disk budgets: which stores are kept, as a plan and in a run."""

import itertools
import json
import re
import shutil
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import TensorDataset

from greedy import GreedyTrainer, Reporter, UserError
from greedy.cache import Store
from greedy.cli.main import cli
from greedy.disk import COMPRESSED, Demand, Plan, StageDemand, plan
from greedy.models import cut, shapes, vgg11b
from greedy.planning import disk_budget
from greedy.runs import RunDirectory

# The plan


def demands(most: int = 6) -> st.SearchStrategy[Demand]:
    stage = st.builds(
        StageDemand,
        values=st.integers(1, 40),
        operations=st.integers(1, 50),
        epochs=st.integers(1, 5),
    )
    return st.builds(
        Demand,
        stages=st.lists(stage, min_size=1, max_size=most).map(tuple),
        rows=st.just({"train": 10, "test": 3}),
        wanted=st.sampled_from([1, 2, 4, 5, "live"]),
        value_bytes=st.sampled_from([0.45, 1.0]),
        images=st.integers(1, 100),
        refreshed=st.booleans(),
    )


def planned(demand: Demand, budget: int) -> Plan:
    """A plan, or a discarded example where nothing fits."""
    try:
        return plan(demand, budget)
    except UserError:
        assume(False)
        raise AssertionError from None


def views_of(demand: Demand, plan: Plan) -> list[int]:
    """Views a stage, 0 for live, without the output layer."""
    count = len(demand.stages) - 1
    return [v if isinstance(v := plan.views(n), int) else 0 for n in range(1, count + 1)]


def size(demand: Demand, number: int, views: int, test: int = 1) -> int:
    rows = views * demand.rows["train"] + test * demand.rows["test"]
    return int(np.ceil(rows * demand.stages[number - 1].values * demand.value_bytes))


def simulated(demand: Demand, views: list[int], dropped: dict[int, int]) -> int:
    """The most bytes on disk when stages are trained in turn and stores deleted as said."""
    disk, most, source = {0: demand.images}, 0, 0
    for number, count in enumerate([*views, 0], start=1):
        copy = size(demand, source, views[source - 1], test=0) if source else 0
        most = max(most, sum(disk.values()) + (copy if demand.refreshed else 0))
        if count:
            disk[number] = size(demand, number, count)
            source = number
        most = max(most, sum(disk.values()))
        for each in [n for n, after in dropped.items() if after == number]:
            del disk[each]
    return most


def at_once(views: list[int]) -> dict[int, int]:
    """Every store deleted as soon as the next one is written."""
    stored = [n for n, count in enumerate(views, start=1) if count]
    return dict(itertools.pairwise(stored))


def costs(demand: Demand, views: list[int]) -> tuple[int, Fraction]:
    """Multiply-adds a row spent on replaying, and the sum of 1/views."""
    replayed, since = 0, 0
    for stage, count in zip(demand.stages, [*views, 0], strict=True):
        replayed += stage.epochs * since
        since = 0 if count else since + stage.operations
    return replayed, sum((Fraction(1, count) for count in views if count), Fraction())


def dropped(plan: Plan) -> dict[int, int]:
    return {s.number: s.dropped_after for s in plan.stages if s.dropped_after is not None}


budgets = st.integers(0, 4000)
modest = settings(deadline=None, max_examples=150)


@modest
@given(demands(), budgets)
def test_the_peak_is_what_training_needs_and_never_above_the_budget(demand, budget):
    found = planned(demand, budget)
    assert found.peak == simulated(demand, views_of(demand, found), dropped(found))
    assert found.peak <= budget == found.budget
    for stage in found.stages:
        assert stage.bytes == (size(demand, stage.number, stage.views) if stage.bytes else 0)


@modest
@given(demands(), budgets)
def test_refuses_only_what_does_not_fit_without_any_store(demand, budget):
    fits = simulated(demand, [0] * (len(demand.stages) - 1), {}) <= budget
    if fits:
        plan(demand, budget)
    else:
        with pytest.raises(UserError, match="raise it with --disk-budget"):
            plan(demand, budget)


@modest
@given(demands(), budgets)
def test_everything_is_kept_as_wanted_if_and_only_if_it_fits(demand, budget):
    wanted = 0 if demand.wanted == "live" else demand.wanted
    everything = [wanted] * (len(demand.stages) - 1)
    needed = simulated(demand, everything, {})
    found = planned(demand, budget)
    assert found.needed == needed
    whole = views_of(demand, found) == everything and not dropped(found)
    assert whole == (needed <= budget)
    assert (len(found.explain()) == 1) == whole
    if needed <= budget:
        assert plan(demand, budget, "all") == found
    else:
        with pytest.raises(UserError, match="keeping all stores takes"):
            plan(demand, budget, "all")


@modest
@given(demands(), budgets)
def test_nothing_is_lowered_or_deleted_without_need(demand, budget):
    found = planned(demand, budget)
    views, gone = views_of(demand, found), dropped(found)
    ladder = [] if demand.wanted == "live" else [demand.wanted >> n for n in range(3)]
    ladder = [count for count in ladder if count]
    assert set(views) <= {0, *ladder}
    for i, count in enumerate(views):
        for more in (each for each in ladder if each > count):
            raised = [*views[:i], more, *views[i + 1 :]]
            assert simulated(demand, raised, at_once(raised)) > budget
    for number in gone:
        assert simulated(demand, views, {n: a for n, a in gone.items() if n != number}) > budget
    assert gone.items() <= at_once(views).items()


@modest
@given(demands(most=4), budgets)
def test_no_other_choice_replays_less_or_has_more_views(demand, budget):
    found = planned(demand, budget)
    ladder = {0} if demand.wanted == "live" else {0, *(demand.wanted >> n for n in range(3))}
    choices = itertools.product(ladder, repeat=len(demand.stages) - 1)
    fitting = [v for v in map(list, choices) if simulated(demand, v, at_once(v)) <= budget]
    assert costs(demand, views_of(demand, found)) == min(costs(demand, v) for v in fitting)


@modest
@given(demands(), budgets, st.integers(0, 2000))
def test_a_larger_budget_is_never_worse(demand, budget, more):
    small, large = (views_of(demand, planned(demand, b)) for b in (budget, budget + more))
    assert costs(demand, large) <= costs(demand, small)


@modest
@given(demands(), budgets, st.data())
def test_planning_again_with_stages_finished_gives_the_same_views(demand, budget, data):
    found = planned(demand, budget)
    stages = [
        replace(stage, views=found.views(n)) if data.draw(st.booleans()) else stage
        for n, stage in enumerate(demand.stages, start=1)
    ]
    again = plan(replace(demand, stages=tuple(stages)), budget)
    assert views_of(demand, again) == views_of(demand, found)


def equal_stages(count: int, **settings) -> Demand:
    """Stages of one value and one operation; a view is 10 bytes."""
    stages = (StageDemand(1, 1, 1),) * count
    return replace(Demand(stages, {"train": 10, "test": 0}, 4, 1.0, 5), **settings)


def test_sources_are_deleted_before_views_are_lowered_before_stores_are_left_out():
    demand = equal_stages(4)  # three stores of 40 bytes
    assert views_of(demand, plan(demand, 125)) == [4, 4, 4]
    assert dropped(plan(demand, 125)) == {}
    assert views_of(demand, plan(demand, 85)) == [4, 4, 4]
    assert dropped(plan(demand, 85)) == {1: 2}
    assert views_of(demand, plan(demand, 84)) == [4, 2, 4]
    assert views_of(demand, plan(demand, 25)) == [1, 1, 1]
    assert views_of(demand, plan(demand, 24)) == [0, 1, 0]
    assert views_of(demand, plan(demand, 5)) == [0, 0, 0]


@pytest.mark.parametrize(("operations", "gone"), [((9, 1), {2: 3}), ((1, 9), {1: 2})])
def test_the_stores_that_stay_save_most_replaying_a_byte(operations, gone):
    first, second = (StageDemand(values=1, operations=n, epochs=1) for n in operations)
    other, large = StageDemand(1, 1, 1), StageDemand(4, 1, 1)
    demand = equal_stages(0, stages=(first, second, other, large, other))
    assert dropped(plan(demand, 245)) == gone  # room for one beside the large one


def test_a_finished_stage_keeps_its_views_and_one_without_a_store_is_replayed():
    stages = list(equal_stages(4).stages)
    stages[0] = replace(stages[0], views=2)
    stages[1] = replace(stages[1], views="live")
    found = plan(equal_stages(4, stages=tuple(stages)), 1000)
    assert [s.views for s in found.stages] == [2, "live", 4]
    with pytest.raises(UserError, match=r"takes at least 65 B on disk and the budget is 64 B"):
        finished = (replace(stages[0], views=6), *stages[2:])
        plan(equal_stages(0, stages=finished), 64)


def test_old_stores_go_first_where_the_new_ones_need_their_room():
    demand = equal_stages(0, stages=(StageDemand(1, 1, 1, replaced=50),) * 2)
    assert plan(demand, 145).dropped_first == ()
    assert plan(demand, 144).dropped_first == (1, 2)


def test_vgg11b_3x_of_the_paper():
    with torch.device("meta"):
        network = vgg11b(3, 32, 10, feature_multiplier=3)
    found = shapes(cut(network), (3, 32, 32))
    assert found[0].operations == 3 * 9 * 384 * 32 * 32
    assert found[1].operations == 384 * 9 * 384 * 32 * 32
    assert found[-1].operations == 10240
    stages = tuple(StageDemand(int(np.prod(s.output)), s.operations, 400) for s in found)
    assert sum(stage.values for stage in stages[:10]) == pytest.approx(1.8e6, rel=0.01)
    demand = Demand(stages, {"train": 50_000, "test": 0}, 4, 0.6, images=0)
    everything = plan(demand, 10**12)
    assert everything.peak == everything.needed == pytest.approx(216e9, rel=0.01)
    a_view = replace(demand, value_bytes=COMPRESSED["float16"]).store_bytes(1, 1)
    assert a_view == pytest.approx(39e9, rel=0.1)

    tight = plan(demand, 100 * 10**9)
    assert [tight.views(n) for n in range(1, 11)] == [4] * 10
    assert tight.stages[0].dropped_after == 2  # its 0.4 % of a stage are not worth 47 GB
    assert tight.stages[9].dropped_after is None
    tiny = plan(demand, 20 * 10**9)
    assert tiny.views(1) == "live"
    assert tiny.views(10) == 4
    lines = tiny.explain()
    assert re.fullmatch(r"disk: all stores with 4 views would take 20\d\.\d GiB, so:", lines[0])
    assert lines[1] == "stage 1: live, replayed from stage 0's store"
    assert re.fullmatch(r"at most 1\d\.\d GiB of a budget of 18\.6 GiB", lines[-1])
    assert max(map(len, lines)) < 80


# Runs

SIDE, CLASSES, WIDTHS = 8, 3, (256, 256, 64, 256, 64)
ROWS = {"train": 300, "test": 60}


def samples(rows: int, seed: int) -> TensorDataset:
    """Images whose class is the third that is brighter, under noise."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, CLASSES, rows)
    images = random.integers(0, 150, (rows, 1, SIDE, SIDE))
    for i, label in enumerate(labels):
        images[i, :, :, 3 * label : 3 * label + 2] += 80
    return TensorDataset(torch.from_numpy(images.astype(np.uint8)), torch.from_numpy(labels))


TRAIN, TEST = samples(ROWS["train"], 0), samples(ROWS["test"], 1)


class Notes(Reporter):
    """Keeps the plan and which stages were trained."""

    def __init__(self) -> None:
        self.plans: list[Plan] = []
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


def trainer(run: Path, budget: int | str, **changes) -> GreedyTrainer:
    settings = {"epochs": 1, "learning_rate": 0.01, "batch_size": 64, "views": 4, "device": "cpu"}
    settings |= {"encoding": "float32", "augmentation": "hflip", "reporter": Notes()}
    settings["disk_budget"] = budget if isinstance(budget, str) else f"{budget}B"
    return GreedyTrainer(network(), run_dir=run, **(settings | changes))


def estimate(width: int, views: int) -> int:
    return int((views * ROWS["train"] + ROWS["test"]) * width * COMPRESSED["float32"])


def stores(run: Path) -> dict[int, int]:
    """Views of the stores on disk."""
    found = (int(p.parent.name[5:]) for p in run.glob("stage*/activations.zarr"))
    return {n: Store(run / f"stage{n}/activations.zarr/train").views for n in sorted(found)}


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
    mine = trainer(run, BUDGET)
    mine.fit(TRAIN, TEST)
    (found,) = mine.reporter.plans
    assert [found.views(n) for n in range(1, 7)] == PLANNED
    assert found.peak <= BUDGET < found.needed
    return run


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def test_a_tight_budget_lowers_views_and_deletes_stores(finished: Path) -> None:
    assert stores(finished) == LEFT
    directory = RunDirectory.open(finished)
    assert [directory.state(n) for n in range(7)] == ["complete"] * 7
    records = [directory.record(n) for n in range(1, 7)]
    assert [r.resolved["views"] for r in records] == PLANNED
    assert [r.source for r in records] == [0, 1, 2, 3, 4, 5]
    assert [path.name for path in finished.rglob(".*")] == [".lock"]
    test = trainer(finished, BUDGET).assemble()(torch.rand(2, 1, SIDE, SIDE))
    assert test.shape == (2, CLASSES)


def test_a_finished_run_stays_as_it_is_whatever_the_budget(run: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*")}
    mine = trainer(run, 1)
    mine.train()
    assert (mine.reporter.trained, mine.reporter.plans) == ([], [])
    assert {p: p.stat().st_mtime_ns for p in run.rglob("*")} == before


def test_a_stage_whose_store_was_deleted_is_not_trained_again(run: Path, finished: Path) -> None:
    for number in (5, 6):
        shutil.rmtree(run / f"stage{number}")
    mine = trainer(run, BUDGET)
    mine.train()
    assert mine.reporter.trained == [5, 6]
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
        trainer(tmp_path / "run", BUDGET, reporter=Crash()).fit(TRAIN, TEST)
    assert stores(tmp_path / "run") == {0: 1, 2: 2}
    mine = trainer(tmp_path / "run", BUDGET)
    mine.fit(TRAIN, TEST)
    assert mine.reporter.trained == [3, 4, 5, 6]
    assert stores(tmp_path / "run") == LEFT
    for number in range(1, 7):
        assert weights(tmp_path / "run", number) == weights(finished, number)


@pytest.mark.parametrize("number", [4, 5])
def test_train_stage_again_gives_the_same(run: Path, finished: Path, number: int) -> None:
    record = trainer(run, "1TB").train_stage(number, again=True)  # the views it had, not four
    assert record.lineage == RunDirectory.open(finished).record(number).lineage
    assert weights(run, number) == weights(finished, number)
    assert stores(run) == LEFT
    assert RunDirectory.open(run).state(6) == "complete"


def test_train_stage_finds_the_views_that_train_gives(run: Path, finished: Path) -> None:
    shutil.rmtree(run / "stage4")
    trainer(run, BUDGET).train_stage(4)
    assert stores(run) == LEFT
    for split in ("train", "test"):
        a, b = (Store(each / f"stage4/activations.zarr/{split}") for each in (run, finished))
        np.testing.assert_array_equal(a.load(), b.load())
    assert RunDirectory.open(run).state(5) == "complete"


def test_what_is_left_out_is_replayed_from_the_nearest_store(tmp_path: Path) -> None:
    """A budget for the narrow stores alone."""
    mine = trainer(tmp_path / "run", IMAGES + estimate(64, 4))
    records = mine.fit(TRAIN, TEST)
    assert [r.resolved["views"] for r in records] == ["live", "live", 1, "live", 2, "live"]
    assert [r.source for r in records] == [0, 0, 0, 3, 3, 5]
    assert records[-1].metrics.test_error_percent < 50
    lines = mine.reporter.plans[0].explain()
    assert lines[2] == "stage 2: live, replayed from stage 0's store"
    assert lines[4] == "stage 4: live, replayed from stage 3's store"


def test_retraining_under_a_tight_budget_deletes_the_old_stores_first(run: Path) -> None:
    mine = trainer(run, BUDGET)
    before = [weights(run, n) for n in range(1, 7)]
    mine.train(retrain_from=1)
    assert mine.reporter.plans[0].dropped_first == (3, 4, 5)
    assert stores(run) == LEFT
    assert [weights(run, n) for n in range(1, 7)] == before


def test_deleting_a_store_ends_after_a_crash(run: Path) -> None:
    store = run / "stage3/activations.zarr"
    store.rename(run / "stage3/.activations.zarr.old")
    directory = RunDirectory.create(run, RunDirectory.open(run).recipe)
    with directory.writing():
        pass
    assert not list((run / "stage3").glob("*activations*")) + list((run / "stage3").glob(".*"))
    assert directory.state(3) == "complete"
    directory.drop_store(3)
    directory.drop_store(4)
    assert list(stores(run)) == [0, 5]


def test_keep_all_insists(tmp_path: Path) -> None:
    needed = 3 * estimate(256, 4) + 2 * estimate(64, 4) + IMAGES
    with pytest.raises(UserError, match=r"keeping all stores takes 3.8 MiB and the disk budget is"):
        trainer(tmp_path / "run", BUDGET, keep="all").fit(TRAIN, TEST)
    assert not (tmp_path / "run").exists()
    trainer(tmp_path / "run", needed, keep="all").fit(TRAIN, TEST)
    assert stores(tmp_path / "run") == {0: 1} | dict.fromkeys(range(1, 6), 4)


def test_auto_is_a_share_of_what_is_free_without_the_run(run: Path) -> None:
    free = shutil.disk_usage(run).free
    assert disk_budget(trainer(run, "auto").run) == pytest.approx(0.7 * free, rel=0.05)
    with (run / "ballast").open("wb") as file:
        file.write(bytes(2**26))
    assert disk_budget(trainer(run, "auto").run) == pytest.approx(0.7 * free, rel=0.05)


@pytest.mark.parametrize("change", [{"disk_budget": "much"}, {"keep": "none"}])
def test_what_is_no_budget_is_refused(tmp_path: Path, change: dict) -> None:
    with pytest.raises(UserError, match=f"store.{next(iter(change))} is .* but must be"):
        trainer(tmp_path / "run", "auto", **change)


def test_status_counts_what_was_written_since_the_run_began(run: Path, tmp_path: Path) -> None:
    def use() -> tuple[int, int]:
        result = CliRunner().invoke(cli, ["status", "--run", str(run), "--json"])
        document = json.loads(result.output)
        return document["bytes_on_disk"], document["bytes_written"]

    on_disk, written = use()
    files = (p for p in run.glob("stage*/activations.zarr/**/*") if p.is_file())
    assert on_disk == pytest.approx(sum(p.stat().st_size for p in files), rel=0.02)
    records = [RunDirectory.open(run).record(n).store for n in range(6)]
    assert written == sum(store.bytes for store in records) > on_disk
    mine = trainer(run, BUDGET)
    mine.train_stage(5, again=True)
    mine.train_stage(4, again=True)
    mine.train_stage(4, again=True)
    more = records[5].bytes + 2 * records[4].bytes
    assert use() == (on_disk, written + more)
    mine.run.drop_store(4)
    assert use() == (on_disk - records[4].bytes, written + more)
    mine.train_stage(5, again=True, to=tmp_path / "elsewhere")
    assert use()[1] == written + more
    table = CliRunner().invoke(cli, ["status", "--run", str(run)]).output
    assert re.fullmatch(
        r"stores, with the images: .* KiB on disk, .* MiB written since the run began",
        table.splitlines()[-1],
    )


RECIPE = """
[data]
name = "fashion-mnist-sample"
[model]
network = "mlp"
hidden_layers = 2
hidden_width = 64
[loss]
name = "predsim"
[training]
epochs = 1
batch_size = 512
learning_rate = 0.002
"""


def test_the_command_line_says_what_becomes_of_the_stores(tmp_path: Path) -> None:
    (tmp_path / "tiny.toml").write_text(RECIPE)
    command = ["train", "--recipe", str(tmp_path / "tiny.toml"), "--run", str(tmp_path / "run")]
    tight = ["--disk-budget", "5MiB"]
    refused = CliRunner().invoke(cli, [*command, *tight, "--keep", "all"])
    assert refused.exit_code == 2
    assert "raise store.disk_budget" in refused.output
    result = CliRunner().invoke(cli, [*command, *tight])
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("disk: "))
    assert re.fullmatch(r"disk: all stores with 4 views would take \d\.\d MiB, so:", lines[start])
    assert re.fullmatch(r"stage 1: \d views?, .* KiB, (kept|deleted.*)", lines[start + 1])
    assert lines[start + 4].startswith("stage 1/3 linear64: training")
    roomy = CliRunner().invoke(cli, [*command, "--disk-budget", "1GB", "--retrain", "3"])
    assert re.search(r"\ndisk: the stores take up to .* of a budget of 953.7 MiB\n", roomy.output)
