"""What is kept of a machine's speed, and the times that follow from it."""

import json
import math
from collections import Counter
from itertools import pairwise

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_training import new_trainer, noise
from torch import nn

from greedy.base.files import with_digest
from greedy.data import dataset_from_torch
from greedy.forecasts.duration import Durations
from greedy.losses import Sim
from greedy.models import cut, shapes
from greedy.recipes import from_document
from greedy.runs.choices import Mode
from greedy.runs.directory import RunDirectory
from greedy.runs.disk_budget import plan_disk
from greedy.runs.disk_demand import COMPRESSED
from greedy.runs.plan_basis import PlanBasis
from greedy.runs.state import RunState
from greedy.training.calibration import (
    WRITE_RATE,
    Calibration,
    Measured,
    NotCalibrated,
    Work,
    byte_operations,
)

CPU = torch.device("cpu")
WORK = Work(
    kind="conv",
    precision="float32",
    mode="plain",
    rows=64,
    flops=8_000_000,
    forward_flops=1_000_000,
    values=10_000,
)
DOCUMENT = {
    "data": {"name": "python"},
    "model": {"network": "python"},
    "loss": {"name": "sim"},
    "training": {"epochs": 3, "batch_size": 16, "learning_rate": 1e-3, "test_every": 0},
    "store": {"views": 2},
}
amounts = st.integers(1, 10**12)
works = st.builds(
    Work,
    kind=st.sampled_from(["conv", "linear"]),
    precision=st.sampled_from(["float32", "bfloat16"]),
    mode=st.sampled_from([str(mode) for mode in Mode]),
    rows=amounts,
    flops=amounts,
    forward_flops=amounts,
    values=amounts,
)
speeds = st.floats(1e-3, 1e9)
measurements = st.builds(
    Measured,
    work=works,
    rows_per_second=speeds,
    frozen_rows_per_second=speeds,
    written_bytes_per_second=st.none() | speeds,
)
modest = settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.too_slow])

BASIS = PlanBasis(budget=None, read=0, written=0)  # every stage has a store


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """Sets the folder of calibrations to a temporary one, not the developer's."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    return tmp_path


def like(work=WORK, **changes):
    return work.model_copy(update=changes)


def calibration(*measured):
    known = Calibration.begin(CPU, peak_flops=1e12)
    for each in measured:
        known = known.adding(each)
    return known


def speed(work=WORK, **measured):
    speeds = {"rows_per_second": 10.0, "frozen_rows_per_second": 100.0}
    return Measured(**{"work": work, "written_bytes_per_second": 1e3} | speeds | measured)


@modest
@given(st.lists(measurements, min_size=1, max_size=6, unique_by=lambda each: each.work))
def test_a_measured_stage_takes_what_it_took(measured):
    known = calibration(*measured)
    for each in measured:
        assert known.seconds_a_row(each.work) == pytest.approx(1 / each.rows_per_second)
        frozen = known.frozen_seconds_a_row(each.work)
        assert frozen == pytest.approx(1 / each.frozen_rows_per_second)


@modest
@given(st.lists(measurements, max_size=6), works)
def test_only_stages_of_the_same_kind_and_precision_say_anything(measured, work):
    known = calibration(*measured)
    alike = [
        each
        for each in known.measured
        if each.work.kind == work.kind and each.work.precision == work.precision
    ]
    seconds = known.seconds_a_row(work)
    assert (seconds is None) is (not alike)
    assert seconds is None or (math.isfinite(seconds) and seconds > 0)
    assert (known.frozen_seconds_a_row(work) is None) is (not alike)


def test_a_stage_computes_as_fast_as_the_nearest_one():
    large = like(flops=80_000_000, forward_flops=10_000_000, values=20_000)
    known = calibration(speed(rows_per_second=10), speed(large, rows_per_second=2))
    twice = like(flops=16_000_000, forward_flops=2_000_000, values=20_000)
    assert known.seconds_a_row(twice) == pytest.approx(2 / 10)
    assert known.frozen_seconds_a_row(twice) == pytest.approx(2 / 100)
    half_of_large = like(flops=40_000_000, forward_flops=5_000_000, values=10_000)
    assert known.seconds_a_row(half_of_large) == pytest.approx(1 / 2 / 2)


def test_a_mode_costs_its_passes_until_it_is_measured():
    """The encoder's pass is 1 and the heads' 2 of the plain step's 8 = 2 + 3 x 2, so s is 2 in
    "plain 2 + 3s; heads 2 + 4s; c kept 3 + 4s; nothing kept 5 + 4s"."""
    known = calibration(speed(rows_per_second=8))
    costs = {"plain": 8, "heads": 10, "keep-c": 11, "keep-nothing": 13}
    costs |= {"keep-c-stream-x": 11, "stream-x": 13}
    for mode, passes in costs.items():
        assert known.seconds_a_row(like(mode=mode)) == pytest.approx(passes / 8 / 8)
    measured = known.adding(speed(like(mode="keep-c"), rows_per_second=7.5))
    assert measured.seconds_a_row(like(mode="keep-c")) == pytest.approx(1 / 7.5)
    assert measured.seconds_a_row(WORK) == pytest.approx(1 / 8)


def test_a_stage_measured_again_replaces_itself():
    known = calibration(speed(rows_per_second=8), speed(rows_per_second=4))
    assert known.measured == [speed(rows_per_second=4)]


def test_recomputation_is_no_gain():
    assert speed(like(mode="keep-nothing"), rows_per_second=3).flops_per_second == 3 * WORK.flops


def test_a_calibration_is_kept_for_this_machine(home):
    path = Calibration.path("cpu")
    assert home in path.parents
    with pytest.raises(NotCalibrated, match="`greedy bench --device cpu`"):
        Calibration.load("cpu")
    calibration(speed()).write(path)
    assert Calibration.load("cpu") == calibration(speed())
    for peak, best in ((2e12, 2e12), (5e11, 1e12)):
        again = Calibration.begin(CPU, peak_flops=peak)
        assert again.peak_flops == best
        assert again.measured == [speed()]


def test_another_number_of_threads_is_another_machine(home):
    calibration(speed()).write(Calibration.path("cpu"))
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        with pytest.raises(
            NotCalibrated, match=f"with {threads} threads.*`greedy bench --device cpu`"
        ):
            Calibration.load("cpu")
        assert Calibration.begin(CPU, peak_flops=1e12).measured == []
    finally:
        torch.set_num_threads(threads)
    Calibration.load("cpu")


@pytest.mark.parametrize("change", [{"device": "cpu, 1000 cores"}, {"versions": {"torch": "1"}}])
def test_what_was_measured_elsewhere_is_not_mixed_in(home, change):
    known = calibration(speed()).model_copy(update=change)
    known.write(Calibration.path("cpu"))
    assert Calibration.begin(CPU, peak_flops=1e12).measured == []
    if "device" in change:
        with pytest.raises(NotCalibrated, match="1000 cores"):
            Calibration.load("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without CUDA")
def test_a_device_that_is_not_here_is_not_known(home):
    calibration(speed()).write(Calibration.path("cuda"))
    with pytest.raises(NotCalibrated, match="where the cuda device is"):
        Calibration.load("cuda")


def cut_short(text):
    return text[: len(text) // 2]


def changed(text):
    return text.replace("10.0", "99.0")


def claims_too_much(text):
    document = json.loads(text)
    del document["digest"]
    document["measured"][0]["rows_per_second"] = -1.0
    return with_digest(document).decode()


@pytest.mark.parametrize("damage", [cut_short, changed, claims_too_much, lambda text: "[" * 10**5])
def test_a_damaged_calibration_says_so_in_a_sentence_and_is_replaced(home, damage):
    path = Calibration.path("cpu")
    calibration(speed()).write(path)
    path.write_text(damage(path.read_text()))
    with pytest.raises(NotCalibrated, match="is damaged") as raised:
        Calibration.load("cpu")
    assert "\n" not in str(raised.value)
    assert "`greedy bench --device cpu`" in str(raised.value)
    begun = Calibration.begin(CPU, peak_flops=1e12)
    assert begun.measured == []
    begun.write(path)
    assert Calibration.load("cpu") == begun


WIDTHS = (16, 11, 12, 13)  # inputs of the stages; the last is the output layer


def network():
    layers = [nn.Flatten()]
    for inputs, outputs in pairwise(WIDTHS):
        layers += [nn.Linear(inputs, outputs), nn.BatchNorm1d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(WIDTHS[-1], 2))


def trained(path, **settings):
    """Trains a run. Returns it, and the number of rows that passed each stage while it was frozen:
    those that its encoder saw in evaluation mode. Encoders have a bias, heads of the similarity
    loss none."""
    known = {"epochs": 3, "batch_size": 16, "test_every": 0, "compressor": "none"}
    trainer = new_trainer(path, network(), loss=Sim(), **(known | settings))
    passed = Counter()

    def count(module, inputs, output):
        computed = type(output) is torch.Tensor and not output.is_meta  # others are only planned
        frozen = not module.training and getattr(module, "bias", None) is not None
        if computed and frozen and isinstance(module, nn.Linear):
            passed[1 + WIDTHS.index(module.in_features)] += len(output)

    trainer.prepare(dataset_from_torch(noise(80, 2, side=4), noise(20, 2, side=4)))
    hook = nn.modules.module.register_module_forward_hook(count)
    try:
        trainer.train()
    finally:
        hook.remove()
    return trainer.run, passed


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"views": "live"},
        {"reuse": 1},
        {"reuse": 2, "views": 1},
        {"patience": 5},
        {"encoding": "float32", "disk_budget": "14KiB"},
    ],
    ids=str,
)
def test_the_rows_that_pass_frozen_stages_are_those_of_a_run(changes, tmp_path):
    run, passed = trained(tmp_path / "run", **changes)
    stages = [run.record(number) for number in range(1, 5)]
    stage_shapes = shapes(cut(network()), (1, 4, 4))
    unbegun = RunDirectory.create(tmp_path / "unbegun", run.recipe)
    data = run.record(0)
    disk = plan_disk(RunState.read(unbegun), stage_shapes, dict(data.rows), data.store.bytes, BASIS)
    held_out = 8 if "patience" in changes else 0
    durations = Durations(run.recipe, disk, data.rows, held_out, [WORK] * 4)
    planned = [durations.frozen_rows(stage.stage, stage.source, epochs=3) for stage in stages]
    planned += [durations.drawn_rows(stage.source, epochs=3) for stage in stages]
    assert sum(planned, Counter()) == passed
    if "disk_budget" in changes:
        assert {stage.source for stage in stages} not in ({0}, {0, 1, 2, 3})


def test_seconds_are_those_of_all_rows(tmp_path):
    """Three epochs of 80 rows at 10 a second, and of the frozen stage, which nothing replays, 20
    test rows, two views of 80, 20 more, and 80 for the encoding's ranges at 100 a second. Two views
    and the test rows are written, at 1,000 bytes a second."""
    twice_drawn = DOCUMENT | {"data": {"name": "python", "augmentation": "hflip"}}
    run = RunDirectory.create(tmp_path / "run", from_document(twice_drawn, name="unbegun"))
    stage_shapes = shapes(cut(network()), (1, 4, 4))
    disk = plan_disk(RunState.read(run), stage_shapes, {"train": 80, "test": 20}, 1, BASIS)
    durations = Durations(run.recipe, disk, {"train": 80, "test": 20}, 0, [WORK] * 4)
    known = calibration(speed(rows_per_second=10, frozen_rows_per_second=100))
    written = 180 * WIDTHS[2] * COMPRESSED["uint8"]
    assert disk.stages[1].bytes == math.ceil(written)
    assert durations.seconds(known, 2, 1) == pytest.approx(26.8 + math.ceil(written) / 1000)
    assert durations.seconds(known, 4, 3) == pytest.approx(240 / 10 + 20 / 100)
    assert durations.seconds(calibration(), 2, 1) is None
    untested = Durations(run.recipe, disk, {"train": 80, "test": 0}, 0, [WORK] * 4)
    assert untested.seconds(known, 1, 0) == pytest.approx(26.4 + disk.stages[0].bytes / 1000)
    unwritten = calibration(speed(written_bytes_per_second=None))  # an output layer alone
    assert durations.seconds(unwritten, 2, 1) is None
    assert durations.seconds(unwritten, 4, 3) == pytest.approx(240 / 10 + 20 / 100)


def test_what_another_device_draws_takes_time_only_if_it_is_slower(tmp_path):
    """Stage 2 trains for 24 s, and computes 280 rows of its output for 2.8; two views of 80 are
    drawn, and written at a byte in a millisecond."""
    drawn = DOCUMENT | {
        "data": {"name": "python", "augmentation": "hflip"},
        "store": {"views": 1, "reuse": 1},
    }
    run = RunDirectory.create(tmp_path / "run", from_document(drawn, name="unbegun"))
    stage_shapes, rows = shapes(cut(network()), (1, 4, 4)), {"train": 80, "test": 20}
    disk = plan_disk(RunState.read(run), stage_shapes, rows, 1, BASIS)
    known = calibration(speed(rows_per_second=10, frozen_rows_per_second=100))
    settings = (run.recipe, disk, rows, 0, [WORK] * 4)
    in_turn = Durations(*settings).seconds(known, 2, 1)

    def beside(drawing: Calibration | None) -> float | None:
        return Durations(*settings, apart=True, drawing=drawing).seconds(known, 2, 1)

    drawn_bytes = 160 * WIDTHS[1] * COMPRESSED["uint8"]
    assert beside(known) == pytest.approx(in_turn - 160 / 100 - drawn_bytes / 1000, rel=1e-3)
    slow = calibration(speed(rows_per_second=10, frozen_rows_per_second=1))
    assert beside(slow) == pytest.approx(160 + drawn_bytes / 1000, rel=1e-3)
    assert beside(None) is None


def test_bytes_are_weighed_against_the_measured_rate_of_frozen_stages():
    """Three and seven operations take as long as reading a byte, at 1e9 a second."""
    unmeasured = byte_operations("cpu", None)
    assert byte_operations("cpu", calibration()) == unmeasured < byte_operations("cuda", None)
    assert unmeasured.read < unmeasured.written
    slow, fast = (
        speed(
            WORK.model_copy(update={"rows": rows}),
            frozen_rows_per_second=rows * 2e9 / WORK.forward_flops,
            written_bytes_per_second=rows * 1e8,
        )
        for rows in (3, 7)
    )
    output = speed(
        WORK.model_copy(update={"rows": 5}),
        frozen_rows_per_second=5 * 2e9 / WORK.forward_flops,
        written_bytes_per_second=None,
    )
    assert byte_operations("cpu", calibration(slow)) == pytest.approx((3, 10))
    assert byte_operations("cpu", calibration(fast, slow)) == pytest.approx((5, 10))
    assert byte_operations("cpu", calibration(fast, slow, output)) == pytest.approx((5, 10))
    unwritten = byte_operations("cpu", calibration(output))
    assert unwritten == pytest.approx((5, 5e9 / WRITE_RATE["cpu"]))
