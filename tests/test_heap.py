"""Memory that stays with the process between steps."""

import ctypes
import subprocess
import sys

import pytest

from greedy.recipes import load
from greedy.training.modes import Mode
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
    assert ample_memory(recipe, {"planned_peak_bytes": 3 * 2**20, "memory_mode": mode}) == ample


# In a process of its own: what others freed before would serve as well.
SCRIPT = """
import resource, torch
from greedy.heap import kept_memory

def faults(steps):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(steps):
        torch.ones(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

with kept_memory(torch.device("cpu")):
    faults(40)  # until the blocks fit
    print(faults(10))
    kept = resident()
print(kept - resident())
print(faults(10))
"""


@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "malloc_trim"),
    reason="only glibc can be told to keep memory",
)
def test_freed_memory_is_kept_between_steps_and_given_back_at_the_end() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True
    )
    inside, given_back, outside = map(int, done.stdout.split())
    assert outside > 4 * inside
    assert given_back > 32 * 2**20  # of at least 64 MiB
