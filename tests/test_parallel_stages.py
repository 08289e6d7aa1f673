"""Stages that several processes train, each some of them, to the bytes of one process."""

import json
import re
import time
from collections.abc import Iterator, Sequence
from itertools import combinations, pairwise
from pathlib import Path

import psutil
import pytest
import torch
from chained import hold_what_was_planned
from command_line import greedy, refused, said
from hypothesis import given
from hypothesis import strategies as st
from interrupting import StopAfter
from joint_training import network, train
from ranked import command_together, together
from small_training import TEST, TRAIN, new_trainer
from test_torchrun import arguments, content, started
from torch import nn

from greedy.base.errors import Interrupted, UserError
from greedy.base.ranks import Ranks
from greedy.base.relay import Form
from greedy.models import cut
from greedy.models.division import balanced
from greedy.models.shares import parts_of_stages

JOINT = {
    "training__strategy": "joint",
    "training__epochs": 4,
    "training__checkpoint_minutes": 0.002,
}
TIMES = ("seconds", "images_per_second", "waiting_percent", "peak_memory_bytes", "digest", "files")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def whole_content(run: Path) -> dict[str, object]:
    """Returns all files of a run, of documents what does not depend on time and memory."""
    found: dict[str, object] = {}
    for path in (path for path in run.rglob("*") if path.is_file()):
        name = str(path.relative_to(run))
        if path.name == "history.jsonl":
            found[name] = [timeless(line) for line in path.read_text().splitlines()]
        else:
            is_record = path.name == "stage.json"
            found[name] = timeless(path.read_text()) if is_record else path.read_bytes()
    return found


def timeless(document: str) -> dict[str, object]:
    found = {name: value for name, value in json.loads(document).items() if name not in TIMES}
    found.get("resolved", {}).pop("planned_peak_bytes", None)  # of the stages of one process
    return found


def test_three_processes_train_the_bytes_of_one(tmp_path: Path) -> None:
    """Has checkpoints within epochs, and a rate that the held-out rows decide."""
    settings = {"patience": 1, "checkpoint_minutes": 0.002}
    train(Ranks(), tmp_path / "one", "data", settings)
    together(3, train, tmp_path / "three", "stages", settings)
    assert whole_content(tmp_path / "three") == whole_content(tmp_path / "one")


@pytest.mark.slow
def test_whatever_ends_a_process_the_run_is_resumed_to_the_same_bytes(tmp_path: Path) -> None:
    """First a signal, then a killed process; at last a process alone finishes the run."""
    run = tmp_path / "run"
    for ending, epoch in (("signal", 1), ("kill", 3)):
        process = started([*arguments(run, **JOINT), "--parallel", "stages"])
        assert process.stdout is not None
        while f": epoch {epoch}/4" not in process.stdout.readline():
            assert process.poll() is None
        time.sleep(0.05)  # into the next epoch
        if ending == "signal":
            process.terminate()
        else:
            children = psutil.Process(process.pid).children(recursive=True)
            next(child for child in children if child.environ().get("RANK") == "1").kill()
        _, err = process.communicate(timeout=120)
        assert process.returncode != 0
        if ending == "kill":
            (sentence,) = (line for line in err.splitlines() if line.startswith("Error"))
            # Which of them is first: the leader that misses the other, or torchrun that stops it.
            assert re.match("Error: (one of the 2 processes .* has ended|interrupted)", sentence)
            assert "same command" in sentence
        progress = json.loads((run / "network/training/checkpoint/progress.json").read_text())
        assert progress["progress"]["epoch"] >= epoch
    said(*arguments(run, **JOINT))
    said(*arguments(tmp_path / "one", **JOINT))
    assert content(run) == content(tmp_path / "one")


@pytest.mark.parametrize(
    ("strategy", "sentence"),
    [
        ("greedy", "stages train in parallel only by the strategy joint"),
        ("backprop", "stages train in parallel only by the strategy joint"),
        ("joint", "stages train in parallel in several processes, and this is one"),
    ],
)
def test_what_cannot_be_divided_is_refused(tmp_path: Path, strategy: str, sentence: str) -> None:
    result = greedy(*arguments(tmp_path, training__strategy=strategy), "--parallel", "stages")
    assert result.exit_code == 2
    assert sentence in result.output


def test_the_budget_is_for_the_stages_of_one_process(tmp_path: Path) -> None:
    settings = {"training__strategy": "joint", "model__hidden_width": 1024}
    given = arguments(tmp_path / "run", **settings, memory__budget="34MiB")
    assert "a step of the whole network takes" in refused(*given)
    command_together(2, *given, "--parallel", "stages")


def test_the_plan_counts_batches_that_are_under_way() -> None:
    together(3, hold_what_was_planned)


def test_there_are_no_more_processes_than_stages() -> None:
    with pytest.raises(UserError, match="5 processes cannot each train some of 4 stages"):
        parts_of_stages(cut(network()), lambda _: 1, 5)


def test_shared_weights_stay_in_one_process() -> None:
    shared = nn.Linear(8, 8)
    stages = cut(nn.Sequential(nn.Linear(8, 8), shared, nn.ReLU(), shared, nn.Linear(8, 3)))
    assert parts_of_stages(stages, [0, 9, 1, 1, 1].__getitem__, 2) == [range(1), range(1, 4)]
    with pytest.raises(UserError, match="stage 3 shares weights"):
        parts_of_stages(stages, lambda _: 1, 2)


@given(st.lists(st.integers(0, 50), min_size=1, max_size=7), st.data())
def test_no_division_has_a_smaller_largest_part(operations: list[int], data: st.DataObject) -> None:
    def largest(edges: Sequence[int]) -> int:
        return max(sum(operations[a:b]) for a, b in pairwise([0, *edges, len(operations)]))

    parts = data.draw(st.integers(1, len(operations)))
    sizes = balanced(operations, parts)
    assert sum(sizes) == len(operations) and len(sizes) == parts and min(sizes) >= 1
    edges = [sum(sizes[: i + 1]) for i in range(parts - 1)]
    every = combinations(range(1, len(operations)), parts - 1)
    assert largest(edges) == min(map(largest, every))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["plain", "channels-last", "transposed", "linear"])
def test_a_batch_arrives_as_it_was(layout: str, dtype: torch.dtype) -> None:
    sent = torch.randn(5, 3, 4, 2).to(dtype)
    if layout == "channels-last":
        sent = sent.contiguous(memory_format=torch.channels_last)
    elif layout == "transposed":
        sent = sent.transpose(0, 1).contiguous().transpose(0, 1)
    elif layout == "linear":
        sent = sent.flatten(1)
    form = Form.of(sent)
    assert Form.read(form.numbers()) == form
    memory, arrived = form.empty(5, torch.device("cpu"))
    memory.copy_(sent.permute(form.order))
    assert torch.equal(arrived, sent)
    assert arrived.stride() == sent.stride()
    assert arrived.dtype == dtype


def test_a_training_goes_on_within_the_budget_of_now(tmp_path: Path) -> None:
    def fit(**settings: object) -> None:
        given = {"strategy": "joint", "checkpoint_minutes": 0, **settings}
        new_trainer(tmp_path / "run", network(), **given).fit(TRAIN, TEST)

    with pytest.raises(Interrupted):
        fit(memory_budget="1GiB", reporter=StopAfter(3))
    begun = json.loads((tmp_path / "run/network/training/checkpoint/start.json").read_text())[
        "resolved"
    ]
    fit(memory_budget=f"{begun['planned_peak_bytes'] // 1024 + 1}KiB")
    record = json.loads((tmp_path / "run/stage1/stage.json").read_text())
    assert record["resolved"]["write_batch"] < begun["write_batch"]
