"""What a terminal shows while a run trains."""

import io
import re

from rich.console import Console

from greedy.cli.progress import Bar, Lines, reporter
from greedy.manifest import Metrics, Parent, StageRecord, StoreRecord
from greedy.reporting import EpochReport

RECORD = StageRecord(
    recipe="",
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
    resolved={
        "precision": "float32",
        "views": 1,
        "encoding": "uint8",
        "shuffle": "rows",
        "chunk_rows": 16,
        "memory_mode": "plain",
        "micro_batch": 16,
        "planned_peak_bytes": None,
        "write_batch": 16,
        "threads": 1,
    },
    rows={"train": 4, "test": 2},
    seconds=1234,
)


def a_stage(shown):
    """The events of a stage of one epoch of four rows."""
    shown.stage_started(10, "conv1536", 400, {"precision": "float32"})
    for epoch in (123, 124):
        shown.epoch_started(epoch, 50_000)
        for _ in range(3):
            shown.batch_finished(128)
        shown.epoch_finished(EpochReport(epoch, 1e-3, 0.0123456, 12.344, None, 12345.6, 4.0))
        shown.writing_started(9, "train", 200_000)  # its views are refreshed
        shown.batch_finished(100_000)
    shown.stage_finished(RECORD)


FINISHED = "stage 10/11 conv1536: train error 12.34 %, test -, 4.0 MiB, 1,234.0 s"


def test_a_terminal_of_80_columns_shows_all_of_it():
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    shown = reporter(console, 11)
    assert isinstance(shown, Bar)
    with shown:
        a_stage(shown)
    frames = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue())
    lines = [line.rstrip() for line in re.split(r"[\r\n]+", frames)]
    assert max(map(len, lines)) <= 80
    assert "stage 10/11 conv1536" in lines and FINISHED in lines
    measured = re.compile(
        r"epoch 124/400 .*━ loss 0\.01235, error 12\.34 % [\d,]+ images/s [-:\d]+"
    )
    assert any(measured.fullmatch(line) for line in lines)
    writing = re.compile(r"writing +━+ stage 9's train store .*[-:\d]+")
    assert any(writing.fullmatch(line) for line in lines)


def test_without_a_terminal_there_are_plain_lines(capsys):
    shown = reporter(Console(file=io.StringIO()), 11)
    assert type(shown) is Lines
    with shown:
        a_stage(shown)
        shown.stage_skipped(RECORD)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "stage 10/11 conv1536: training, 400 epochs in float32"
    epoch = "epoch 123/400, loss 0.01235, error 12.34 %, 12,346 images/s"
    assert lines[1] == f"stage 10/11 conv1536: {epoch}"
    assert lines[2] == "stage 10/11 conv1536: writing stage 9's train store, 200,000 rows"
    assert lines[-2:] == [FINISHED, "stage 10/11 conv1536: complete already"]
    assert all("\x1b" not in line for line in lines)
