"""Memory that the process keeps between steps."""

import ctypes
import json
import subprocess
import sys

import pytest
from decided import choices

from greedy.recipes import load
from greedy.runs.choices import Mode
from greedy.training.resolve import ample_memory


@pytest.mark.parametrize(
    ("budget", "mode", "ample"),
    [
        ("auto", Mode.PLAIN, True),
        ("4MiB", Mode.PLAIN, True),
        ("3MiB", Mode.PLAIN, False),
        ("4MiB", Mode.HEADS, False),
    ],
)
def test_it_stays_only_where_the_budget_has_room(budget: str, mode: Mode, ample: bool) -> None:
    recipe = load("demo", [f"memory.budget={budget}"])
    assert ample_memory(recipe, choices(planned_peak_bytes=3 * 2**20, memory_mode=mode)) == ample


# In a process of its own: what others freed before would serve as well.
SCRIPT = """
import resource, torch
from greedy.base.heap import freed_memory_kept

def faults(steps):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(steps):
        torch.ones(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

with freed_memory_kept(torch.device("cpu")):
    faults(40)  # until the blocks fit
    print(faults(10))
    inside = resident()
print(inside - resident())
print(faults(10))
"""


on_glibc = pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "malloc_trim"),
    reason="only glibc can keep freed memory, and only Linux can reset the peak",
)


@on_glibc
def test_freed_memory_is_kept_between_steps_and_given_back_at_the_end() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True
    )
    inside, given_back, outside = map(int, done.stdout.split())
    assert outside > 4 * inside
    assert given_back > 32 * 2**20  # of at least 64 MiB


# Two wide stages and a narrow one, under a budget that leaves no room for memory that is kept.
TRAINING = """
import ctypes, json, sys
from pathlib import Path
import torch
from torch import nn
from torch.utils.data import TensorDataset
from greedy import GreedyTrainer
from greedy.runs.events import Reporter

def resident():
    return 1024 * int(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0])

class Watching(Reporter):
    def stage_finished(self, record):
        before = resident()
        ctypes.CDLL(None).malloc_trim(0)
        print(json.dumps([record.peak_memory_bytes, before, before - resident()]))

images = torch.randint(0, 256, (96, 3, 32, 32), dtype=torch.uint8)
data = TensorDataset(images, torch.arange(96) % 2)
wide = (nn.Conv2d(3, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU())
also = (nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(8))
network = nn.Sequential(*wide, *also, nn.Flatten(), nn.Linear(1024, 2))
settings = {"epochs": 1, "views": 1, "batch_size": 96, "memory_budget": "64MiB"}
trainer = GreedyTrainer(
    network, run_dir=sys.argv[1], device="cpu", reporter=Watching(), **settings
)
trainer.fit(data, data)
"""


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> list[list[int]]:
    """Returns for each stage, in bytes: the peak in its record, the process's memory after it, and
    how much of that the C library could release."""
    run = tmp_path_factory.mktemp("resident") / "run"
    command = [sys.executable, "-c", TRAINING, str(run)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


@on_glibc
def test_a_finished_stage_leaves_nothing_in_memory(stages: list[list[int]]) -> None:
    assert max(left for _, _, left in stages) < 8 * 2**20


@on_glibc
def test_the_memory_of_a_stage_is_not_that_of_the_one_before(stages: list[list[int]]) -> None:
    _, (wide, after, _), (narrow, _, _) = stages
    assert wide > after + 32 * 2**20
    assert narrow < after + 32 * 2**20
