"""What a terminal shows while a run trains."""

import io
import re
from itertools import pairwise

from decided import choices
from hypothesis import example, given
from hypothesis import strategies as st
from rich.console import Console
from small_training import noise

from greedy import GreedyTrainer
from greedy.cli.dashboard import Dashboard, reporter, sparkline
from greedy.cli.progress import Lines
from greedy.models import mlp
from greedy.runs.events import EpochReport, RunOutline
from greedy.runs.record import Metrics, Parent, StageRecord, StoreRecord

RECORD = StageRecord(
    recipe_digest="",
    stage=10,
    name="conv1536",
    lineage="",
    row_shape=(1536, 2, 2),
    class_names=["a", "b"],
    network=["conv1536"] * 11,
    metrics=Metrics(train_error_percent=12.344, test_error_percent=None),
    store=StoreRecord(
        encoding="uint8",
        compressor="lz4",
        views=1,
        values=2,
        split_bytes={"train": 3 * 2**20, "test": 2**20},
        digests={"train": "", "test": ""},
        bytes_written=4 * 2**20,
    ),
    parent=Parent(stage=9, lineage=""),
    source=9,
    resolved=choices(),
    rows={"train": 4, "test": 2},
    seconds=1234,
)


def a_stage(shown):
    """Reports the events of a stage of one epoch of four rows."""
    shown.stage_started(10, "conv1536", 400, choices())
    for epoch in (123, 124):
        shown.epoch_started(epoch, 50_000)
        for _ in range(3):
            shown.batch_finished(128)
        shown.epoch_finished(EpochReport(epoch, 1e-3, 0.0123456, 12.344, None, 12345.6, 4.0))
        shown.writing_started(9, "train", 200_000)  # its views are refreshed
        shown.batch_finished(100_000)
    shown.stage_finished(RECORD)


FINISHED = "stage 10/11 conv1536: train error 12.34 %, test -, 4.0 MiB, 1,234.0 s"


def test_waiting_for_data_is_named_where_it_takes_long(capsys):
    lines = Lines()
    for waited in (9.9, 37.4):
        lines.epoch_finished(EpochReport(1, 1e-3, 0.5, 12, None, 100, 4.0, None, waited))
    short, long = capsys.readouterr().out.splitlines()
    assert "waiting" not in short
    assert long.endswith("100 images/s, waiting for data: 37 % of the time")


NAMES = [*["conv384"] * 9, "conv1536", "output"]
OUTLINE = RunOutline(NAMES, {10: 1000, 11: 500}, 2**20, 2**30)


def frames(console):
    """Returns the lines of each time that something was drawn."""
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue())
    drawn = text.split("stage  name")[1:]
    return [[line.rstrip() for line in re.split(r"[\r\n]+", each)] for each in drawn]


def rows(frame):
    """Returns the words of each line."""
    return [line.split() for line in frame]


def shown_by(height=40):
    """Returns a dashboard of 80 columns that draws only when asked to, and its console."""
    console = Console(file=io.StringIO(), force_terminal=True, width=80, height=height)
    shown = reporter(console)
    assert isinstance(shown, Dashboard)
    return shown, console


def test_a_terminal_of_80_columns_shows_all_of_it():
    shown, console = shown_by()
    shown.run_started(OUTLINE)
    shown.stage_skipped(RECORD.model_copy(update={"stage": 9, "name": "conv384"}))
    console.print(shown)
    shown.stage_started(10, "conv1536", 400, choices(planned_peak_bytes=3 * 2**20))
    for epoch in (123, 124):
        shown.epoch_started(epoch, 50_000)
        shown.batch_finished(128)
        loss, error = 1 / epoch, 136.4 - epoch
        shown.epoch_finished(EpochReport(epoch, 1e-3, loss, error, None, 12345.6, 4.0))
    console.print(shown)
    shown.writing_started(9, "train", 200_000)  # its views are refreshed
    shown.batch_finished(100_000)
    console.print(shown)
    shown.stage_finished(RECORD)
    console.print(shown)
    before, training, writing, after = (
        each for each in frames(console) if any("conv1536" in line for line in each)
    )
    assert max(len(line) for each in frames(console) for line in each) <= 80
    done = ["9", "conv384", "done", "-", "-", "4.0", "MiB", "20:34"]
    for frame in (before, training, writing, after):
        assert done in rows(frame)
    assert ["10", "conv1536", "waiting", "-", "-", "-", "-"] in rows(before)
    running = next(row for row in rows(training) if row[:1] == ["10"])
    assert running[:-1] == ["10", "conv1536", "running", "12.40", "%", "3.0", "MiB", "-"]
    assert re.fullmatch(r"\d+:\d\d", running[-1])
    assert ["10", "conv1536", "done", "-", "-", "4.0", "MiB", "20:34"] in rows(after)
    assert ["11", "output", "waiting", "-", "-", "-", "-"] in rows(after)
    text = "\n".join(training)
    assert re.search(r"stage 10/11 conv1536: epoch 124/400, [\d,]+ images/s, [\d:]+ left", text)
    assert re.search(r"^━+", text, re.M)
    assert "loss 0.008065  █▁" in training
    assert "error 12.40 % █▁  (train 12.40 %)" in training
    assert re.search(r"memory 3.0 MiB of 1.0 GiB, run [\d:]+ left", text)
    assert any(line.startswith("stage 10/11 conv1536: writing stage 9's train") for line in writing)


def test_a_low_terminal_shows_the_stages_around_the_running_one():
    shown, console = shown_by(height=14)
    shown.run_started(OUTLINE)
    shown.stage_started(6, "conv384", 4, choices())
    console.print(shown)
    (frame,) = frames(console)
    assert [line.split()[0] for line in frame[1:6]] == ["4", "5", "6", "7", "8"]


def test_all_stages_run_where_they_train_at_once():
    shown, console = shown_by()
    shown.run_started(OUTLINE)
    shown.network_started("joint", 2, choices(planned_peak_bytes=2**20))
    shown.epoch_started(1, 100)
    shown.batch_finished(100)
    shown.epoch_finished(EpochReport(1, 1e-3, 0.5, 12.0, None, 1.0, 1.0, 11.0))
    console.print(shown)
    (frame,) = frames(console)
    assert sum("running" in line for line in frame) == 11
    last = next(row for row in rows(frame) if row[:1] == ["11"])
    assert last[:-1] == ["11", "output", "running", "11.00", "%", "1.0", "MiB", "-"]
    assert any(line.startswith("joint, 11 stages: epoch 1/2") for line in frame)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=40))
@example([0.0, 5e-324])  # the least number, whose inverse is infinite
def test_a_sparkline_has_a_bar_a_value_and_rises_with_them(values):
    bars = sparkline(values)
    recent = values[-16:]
    assert len(bars) == len(recent)
    for (a, x), (b, y) in pairwise(sorted(zip(recent, bars, strict=True))):
        assert x <= y and (a < b or x == y)


def test_without_a_terminal_there_are_plain_lines(capsys):
    shown = reporter(Console(file=io.StringIO()))
    assert type(shown) is Lines
    with shown:
        shown.run_started(OUTLINE)
        a_stage(shown)
        shown.stage_skipped(RECORD)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "stage 10/11 conv1536: training, 400 epochs in float32"
    epoch = "epoch 123/400, loss 0.01235, error 12.34 %, 12,346 images/s"
    assert lines[1] == f"stage 10/11 conv1536: {epoch}"
    assert lines[2] == "stage 10/11 conv1536: writing stage 9's train store, 200,000 rows"
    assert lines[-2:] == [FINISHED, "stage 10/11 conv1536: complete already"]
    assert all("\x1b" not in line for line in lines)


def test_where_nothing_can_be_drawn_over_there_are_plain_lines_too(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    assert type(reporter(Console(file=io.StringIO(), force_terminal=True))) is Lines


def test_a_trainer_in_python_is_shown_as_one_on_the_command_line(tmp_path):
    data = noise(40, classes=4)
    model = mlp(1, 8, 4, hidden_layers=1, hidden_width=8)
    console = Console(file=io.StringIO(), force_terminal=True, width=80, height=24)
    for again in (False, True):
        with reporter(console) as shown:
            GreedyTrainer(
                model, run_dir=tmp_path / "run", reporter=shown, epochs=2, device="cpu"
            ).fit(data, data)
            console.print(shown)
        last = rows(frames(console)[-1])
        assert [row[:3] for row in last[1:3]] == [["1", "linear8", "done"], ["2", "output", "done"]]
        assert shown.skipped is again
    with reporter(console) as shown:
        trainer = GreedyTrainer(model, run_dir=tmp_path / "run", reporter=shown, epochs=2)
        trainer.train_stage(2, again=True)
        console.print(shown)
    last = rows(frames(console)[-1])
    assert [row[:3] for row in last[1:3]] == [["1", "linear8", "-"], ["2", "output", "done"]]
