"""The plan of which stores a disk budget keeps."""

import itertools
import math
import re
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from greedy import UserError
from greedy.models import cut, shapes, vgg11b
from greedy.runs.disk_demand import COMPRESSED, ByteOperations, DiskDemand, StageDemand
from greedy.runs.disk_plan import DiskPlan, plan_stores


def demands(most: int = 6, *, by_bytes: bool = False) -> st.SearchStrategy[DiskDemand]:
    """Makes runs whose stores all have the same wanted views; if bytes count, also frozen ones."""

    def of(wanted: int | str) -> st.SearchStrategy[DiskDemand]:
        stage = st.builds(
            StageDemand,
            values=st.integers(1, 40),
            operations=st.integers(1, 50),
            epochs=st.integers(1, 5),
            wanted_views=st.just(wanted),
            reuse=st.integers(0, 3),
            copies=st.integers(0, 9 if by_bytes else 0),
            frozen_views=st.sampled_from([None, 7] if by_bytes else [None]),
        )
        return st.builds(
            DiskDemand,
            stages=st.lists(stage, min_size=1, max_size=most).map(tuple),
            rows=st.just({"train": 10, "test": 3}),
            value_bytes=st.sampled_from([0.45, 1.0]),
            image_bytes=st.integers(1, 100),
            byte_operations=operations if by_bytes else st.none(),
        )

    operations = st.builds(ByteOperations, st.floats(0, 9), st.floats(0, 30))
    return st.sampled_from([1, 2, 4, 5, "live"]).flatmap(of)


def wanted_views(demand: DiskDemand) -> int:
    """The views that every store is to have, 0 for live."""
    wanted = demand.stages[0].wanted_views
    return wanted if isinstance(wanted, int) else 0


def planned(demand: DiskDemand, budget: int) -> DiskPlan:
    """Returns a plan, or discards the example if nothing fits."""
    try:
        return plan_stores(demand, budget)
    except UserError:
        assume(False)
        raise AssertionError from None


def views_of(demand: DiskDemand, plan: DiskPlan) -> list[int]:
    """Returns the views of each stage, 0 for live, without the output layer."""
    count = len(demand.stages) - 1
    return [v if isinstance(v := plan.views(n), int) else 0 for n in range(1, count + 1)]


def size(demand: DiskDemand, number: int, views: int, test: int = 1) -> int:
    rows = views * demand.rows["train"] + test * demand.rows["test"]
    return int(np.ceil(rows * demand.stages[number - 1].values * demand.value_bytes))


def ring(stage: StageDemand, views: int) -> int:
    """Returns after how many epochs one of a store's views is replaced, 0 for never."""
    return 0 if views == stage.frozen_views else stage.reuse


def simulated(demand: DiskDemand, views: list[int], dropped: dict[int, int]) -> int:
    """Returns the most bytes on disk when stages are trained in turn and stores deleted as
    planned."""
    disk, most, source = {0: demand.image_bytes}, 0, 0
    for number, count in enumerate([*views, 0], start=1):
        reuse = ring(demand.stages[source - 1], views[source - 1]) if source else 0
        drawn = 0 < reuse < demand.stages[number - 1].epochs
        new_view = size(demand, source, 1, test=0) if drawn else 0
        most = max(most, sum(disk.values()) + new_view)
        if count:
            disk[number] = size(demand, number, count)
            source = number
        most = max(most, sum(disk.values()))
        for each in [n for n, after in dropped.items() if after == number]:
            del disk[each]
    return most


def at_once(views: list[int]) -> dict[int, int]:
    """Returns after which stage each store is deleted, if that is as soon as the next one is
    written."""
    stored = [n for n, count in enumerate(views, start=1) if count]
    return dict(itertools.pairwise(stored))


def costs(demand: DiskDemand, views: list[int]) -> tuple[int, Fraction]:
    """Returns the multiply-adds for each row of replaying, and the sum of 1/views."""
    replayed, since = 0, 0
    for stage, count in zip(demand.stages, [*views, 0], strict=True):
        replayed += stage.epochs * since
        since = 0 if count else since + stage.operations
    return replayed, sum((Fraction(1, count) for count in views if count), Fraction())


def lacking(demand: DiskDemand, views: list[int]) -> int:
    """Returns the copies of a row that stages lack, summed."""
    missing, source = 0, 0
    for number, (stage, count) in enumerate(zip(demand.stages, [*views, 0], strict=True), start=1):
        if source:
            reuse = ring(demand.stages[source - 1], views[source - 1])
            seen = views[source - 1] + ((stage.epochs - 1) // reuse if reuse else 0)
            missing += max(0, stage.copies - seen)
        source = number if count else source
    return missing


def weighed(demand: DiskDemand, views: list[int]) -> int:
    """Returns the multiply-adds for each row of replaying, reading, drawing and writing, for views
    that are wanted or frozen, or 0."""
    assert demand.byte_operations is not None
    stages, (read, written) = demand.stages, demand.byte_operations
    sizes = [0, *(demand.value_bytes * stage.values for stage in stages)]

    def computed(first: int, last: int) -> int:
        return sum(stage.operations for stage in stages[first:last])

    total, source, source_views, source_ring = 0, 0, 0, 0
    for number, (stage, count) in enumerate(zip(stages, [*views, 0], strict=True), start=1):
        total += stage.epochs * computed(source, number - 1)
        total += math.ceil(stage.epochs * sizes[source] * read)
        drawn = (stage.epochs - 1) // source_ring if source_ring else 0
        total += drawn * (computed(0, source) + math.ceil(sizes[source] * written))
        if count:
            reuse = ring(stage, count)
            first = 0 if source_ring or reuse or source_views < count else source
            total += count * (computed(first, number) + math.ceil(sizes[number] * written))
            source, source_views, source_ring = number, count, reuse
    return total


def dropped(plan: DiskPlan) -> dict[int, int]:
    return {s.number: s.dropped_after for s in plan.stages if s.dropped_after is not None}


budgets = st.integers(0, 4000)
modest = settings(deadline=None, max_examples=150)


@modest
@given(demands() | demands(by_bytes=True), budgets)
def test_the_peak_is_what_training_needs_and_never_above_the_budget(demand, budget):
    plan = planned(demand, budget)
    assert plan.peak == simulated(demand, views_of(demand, plan), dropped(plan))
    assert plan.peak <= budget == plan.budget
    for stage in plan.stages:
        assert stage.bytes == (size(demand, stage.number, stage.views) if stage.bytes else 0)


@modest
@given(demands(), budgets)
def test_refuses_only_what_does_not_fit_without_any_store(demand, budget):
    fits = simulated(demand, [0] * (len(demand.stages) - 1), {}) <= budget
    if fits:
        plan_stores(demand, budget)
    else:
        with pytest.raises(UserError, match="raise it with --disk-budget"):
            plan_stores(demand, budget)


def test_what_a_run_takes_at_least_is_enough_though_a_large_store_is_there():
    large, small = StageDemand(40, 1, 1, 1, views=1), StageDemand(5, 1, 1, 2)
    demand = DiskDemand((large, small, small, small), {"train": 10, "test": 0}, 1.0, 5)
    with pytest.raises(UserError, match="takes at least 405 B on disk and the budget is 300 B"):
        plan_stores(demand, 300)
    assert plan_stores(demand, 405).peak == 405


@modest
@given(demands(), budgets)
def test_everything_is_kept_as_wanted_if_and_only_if_it_fits(demand, budget):
    everything = [wanted_views(demand)] * (len(demand.stages) - 1)
    needed = simulated(demand, everything, {})
    plan = planned(demand, budget)
    assert plan.needed == needed
    whole = views_of(demand, plan) == everything and not dropped(plan)
    assert whole == (needed <= budget)
    assert plan.explain()[0].startswith("disk: the stores take up to") == whole
    if needed <= budget:
        assert plan_stores(demand, budget, "all") == plan
    else:
        with pytest.raises(UserError, match="keeping all stores takes"):
            plan_stores(demand, budget, "all")


@modest
@given(demands(), budgets)
def test_nothing_is_lowered_or_deleted_without_need(demand, budget):
    plan = planned(demand, budget)
    views, gone = views_of(demand, plan), dropped(plan)
    ladder = [count for n in range(3) if (count := wanted_views(demand) >> n)]
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
    plan = planned(demand, budget)
    ladder = {0, *(wanted_views(demand) >> n for n in range(3))}
    choices = itertools.product(ladder, repeat=len(demand.stages) - 1)
    fitting = [v for v in map(list, choices) if simulated(demand, v, at_once(v)) <= budget]
    assert costs(demand, views_of(demand, plan)) == min(costs(demand, v) for v in fitting)


@modest
@given(demands(most=5, by_bytes=True))
def test_where_bytes_count_no_other_stores_lack_fewer_copies_or_take_less_time(demand):
    wanted, stages = wanted_views(demand), demand.stages[:-1]
    largest = max((size(demand, n, wanted) for n in range(1, len(demand.stages))), default=0)
    choices = [{0, wanted} for _ in stages]
    for number, stage in enumerate(stages, start=1):
        if wanted and stage.frozen_views and size(demand, number, stage.frozen_views) <= largest:
            choices[number - 1].add(stage.frozen_views)
    found = views_of(demand, plan_stores(demand, None))
    assert all(views in each for views, each in zip(found, choices, strict=True))
    every = map(list, itertools.product(*choices))
    best = min((lacking(demand, views), weighed(demand, views)) for views in every)
    assert (lacking(demand, found), weighed(demand, found)) == best


@modest
@given(demands(), budgets, st.integers(0, 2000))
def test_a_larger_budget_is_never_worse(demand, budget, more):
    small, large = (views_of(demand, planned(demand, b)) for b in (budget, budget + more))
    assert costs(demand, large) <= costs(demand, small)


@modest
@given(demands(), budgets, st.data())
def test_planning_again_with_stages_finished_gives_the_same_views(demand, budget, data):
    plan = planned(demand, budget)
    stages = [
        replace(stage, views=plan.views(n)) if data.draw(st.booleans()) else stage
        for n, stage in enumerate(demand.stages, start=1)
    ]
    again = plan_stores(replace(demand, stages=tuple(stages)), budget)
    assert views_of(demand, again) == views_of(demand, plan)


def equal_stages(count: int, **settings) -> DiskDemand:
    """Returns stages of one value and one operation; a view is 10 bytes."""
    stages = (StageDemand(1, 1, 1, 4),) * count
    return replace(DiskDemand(stages, {"train": 10, "test": 0}, 1.0, 5), **settings)


def test_sources_are_deleted_before_views_are_lowered_before_stores_are_left_out():
    demand = equal_stages(4)  # three stores of 40 bytes
    assert views_of(demand, plan_stores(demand, 125)) == [4, 4, 4]
    assert dropped(plan_stores(demand, 125)) == {}
    assert views_of(demand, plan_stores(demand, 85)) == [4, 4, 4]
    assert dropped(plan_stores(demand, 85)) == {1: 2}
    assert views_of(demand, plan_stores(demand, 84)) == [4, 2, 4]
    assert views_of(demand, plan_stores(demand, 25)) == [1, 1, 1]
    assert views_of(demand, plan_stores(demand, 24)) == [0, 1, 0]
    assert views_of(demand, plan_stores(demand, 5)) == [0, 0, 0]


@pytest.mark.parametrize(("operations", "gone"), [((9, 1), {2: 3}), ((1, 9), {1: 2})])
def test_the_stores_that_are_kept_save_most_replaying_per_byte(operations, gone):
    first, second = (StageDemand(1, n, 1, 4) for n in operations)
    other, large = StageDemand(1, 1, 1, 4), StageDemand(4, 1, 1, 4)
    demand = equal_stages(0, stages=(first, second, other, large, other))
    assert dropped(plan_stores(demand, 245)) == gone  # room for one beside the large one


def test_a_finished_stage_keeps_its_views_and_one_without_a_store_is_replayed():
    stages = list(equal_stages(4).stages)
    stages[0] = replace(stages[0], views=2)
    stages[1] = replace(stages[1], views="live")
    plan = plan_stores(equal_stages(4, stages=tuple(stages)), 1000)
    assert [s.views for s in plan.stages] == [2, "live", 4]
    with pytest.raises(UserError, match=r"takes at least 65 B on disk and the budget is 64 B"):
        finished = (replace(stages[0], views=6), *stages[2:])
        plan_stores(equal_stages(0, stages=finished), 64)


def test_old_stores_are_deleted_first_if_the_new_ones_need_their_room():
    demand = equal_stages(0, stages=(StageDemand(1, 1, 1, 4, replaced=50),) * 2)
    assert plan_stores(demand, 145).dropped_first == ()
    assert plan_stores(demand, 144).dropped_first == (1, 2)


def test_vgg11b_3x_of_the_paper():
    with torch.device("meta"):
        network = vgg11b(3, 32, 10, feature_multiplier=3)
    stage_shapes = shapes(cut(network), (3, 32, 32))
    assert stage_shapes[0].operations == 3 * 9 * 384 * 32 * 32
    assert stage_shapes[1].operations == 384 * 9 * 384 * 32 * 32
    assert stage_shapes[-1].operations == 10240
    stages = tuple(StageDemand(int(np.prod(s.output)), s.operations, 400, 4) for s in stage_shapes)
    assert sum(stage.values for stage in stages[:10]) == pytest.approx(1.8e6, rel=0.01)
    demand = DiskDemand(stages, {"train": 50_000, "test": 0}, 0.6, image_bytes=0)
    everything = plan_stores(demand, 10**12)
    assert everything.peak == everything.needed == pytest.approx(216e9, rel=0.01)
    a_view = replace(demand, value_bytes=COMPRESSED["float16"]).store_bytes(1, 1)
    assert a_view == pytest.approx(39e9, rel=0.1)

    tight = plan_stores(demand, 100 * 10**9)
    assert [tight.views(n) for n in range(1, 11)] == [4] * 10
    assert tight.stages[0].dropped_after == 2  # its 0.4 % of a stage are not worth 47 GB
    assert tight.stages[9].dropped_after is None
    tiny = plan_stores(demand, 20 * 10**9)
    assert tiny.views(1) == "live"
    assert tiny.views(10) == 4
    lines = tiny.explain()
    assert re.fullmatch(r"disk: all stores would take 20\d\.\d GiB, so:", lines[0])
    assert lines[1] == "stage 1: live, replayed from stage 0's store"
    assert re.fullmatch(r"at most 1\d\.\d GiB of a budget of 18\.6 GiB", lines[-1])
    assert max(map(len, lines)) < 80


def test_a_store_is_left_out_where_computing_is_faster_than_reading():
    """A stage of 10 values and 20 operations, then one of 1 value and 20 operations."""
    stages = [StageDemand(10, 20, 10, 4), StageDemand(1, 20, 10, 4), StageDemand(1, 1, 10, 4)]
    demand = DiskDemand(tuple(stages), {"train": 10, "test": 0}, 1.0, 5)

    def found(read: float, written: float = 0, reuse: int = 0) -> list[int]:
        ring = (stages[0], replace(stages[1], reuse=reuse), stages[2])
        weighed = replace(demand, stages=ring, byte_operations=ByteOperations(read, written))
        return views_of(demand, plan_stores(weighed, 1000))

    plan = plan_stores(replace(demand, byte_operations=ByteOperations(3, 0)), 1000)
    assert views_of(demand, plan) == [0, 4]  # 20 operations against 10 bytes, then 40 against one
    assert plan.explain()[1:] == ["stage 1: live, replayed from stage 0's store"]
    assert found(1) == [4, 4]
    assert found(50) == [0, 0]
    # In 10 epochs of 40 operations, 2 or 9 views are drawn besides the first 4, of 40 each.
    assert found(3, reuse=4) == [0, 4]
    assert found(3, reuse=1) == [0, 0]
    # Writing 4 views of 10 values, or of one.
    assert found(1, written=5) == [0, 4]
    assert found(1, written=70) == [0, 0]


def test_fewer_views_than_wanted_are_replaced():
    """Four views are enough for 20 epochs, two are not."""
    stage = StageDemand(1, 1, 20, 4, next_epochs=20)
    demand = DiskDemand((stage, StageDemand(1, 1, 20)), {"train": 10, "test": 0}, 1.0, 5)
    (ample,), (tight,) = (plan_stores(demand, budget).stages for budget in (45, 35))
    assert (ample.views, ample.reuse, ample.bytes_written) == (4, 0, 40)
    assert (tight.views, tight.reuse, tight.bytes_written) == (2, 5, 20 + 3 * 10)
    eight = replace(demand, stages=(replace(stage, wanted_views=8), demand.stages[1]))
    assert [(s.views, s.reuse) for s in plan_stores(eight, 45).stages] == [(4, 0)]  # enough


def test_bytes_written_count_the_views_that_are_replaced():
    stages = (StageDemand(1, 1, 9, 4, reuse=2), StageDemand(1, 1, 9, 2), StageDemand(1, 1, 9))
    demand = DiskDemand(stages, {"train": 10, "test": 3}, 1.0, 5)
    first, second = plan_stores(demand, 1000).stages
    assert (first.bytes, first.bytes_written) == (43, 43 + 4 * 10)  # 8 of 9 epochs by 2
    assert second.bytes_written == second.bytes == 23


def test_a_long_training_does_not_use_the_few_copies_made_for_a_short_one():
    """A large third stage has no store, so the last trains from the second stage's."""
    ring = StageDemand(10, 900, 26, 4, reuse=4, frozen_views=7, copies=7)
    large = replace(ring, values=1000, operations=1)
    operations = ByteOperations(50, 150)

    def planned(epochs: int, copies: int) -> list[int]:
        stages = (ring, ring, large, StageDemand(1, 1, epochs, copies=copies))
        demand = DiskDemand(stages, {"train": 10, "test": 0}, 1.0, 5, operations)
        return views_of(demand, plan_stores(demand, None))

    assert planned(26, 7) == [0, 7, 0]
    assert planned(200, 100) == [0, 0, 0]


def test_keeping_all_stores_takes_no_more_than_the_wanted_views():
    stage = StageDemand(10, 900, 60, 4, reuse=2, frozen_views=30, copies=30)
    large = replace(stage, values=100)
    stages = (large, stage, stage, StageDemand(1, 1, 60, copies=30))
    demand = DiskDemand(stages, {"train": 10, "test": 0}, 1.0, 0, ByteOperations(1, 1))
    assert views_of(demand, plan_stores(demand, None)) == [4, 30, 30]
    kept = plan_stores(demand, 5000, "all")
    assert (views_of(demand, kept), kept.peak) == ([4, 4, 4], 5000)
