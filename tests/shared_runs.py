"""What each of several processes does that train a run together."""

import os
import resource
from pathlib import Path

import pytest
from command_line import greedy
from small_training import TEST, TRAIN, new_trainer
from test_memory_budget import SIDE, Peaks, fit

from greedy import UserError
from greedy.base.ranks import Ranks
from greedy.memory.counting import Counter
from greedy.runs.choices import Mode


def count(ranks: Ranks, place: Path) -> None:
    """Compares the memory of a process with the plan, with and without a budget; then gives the
    processes different directories."""
    alone = {}
    for name, budget in (("plain", "auto"), ("small", "600KiB")):
        with Counter() as counter:
            peaks = Peaks(counter)
            records = fit(place / name, memory_budget=budget, reporter=peaks)
        choices = [record.choices for record in records]
        assert (choices[0].memory_mode == Mode.PLAIN) == (budget == "auto")
        images = 2 * 64 * SIDE**2 * 4  # of a batch while they are normalised
        for peak, choice in zip(peaks.bytes.values(), choices, strict=ranks.leads):
            assert peak <= choice.planned_peak_bytes + images + 16 * 1024, (peak, choice)
        alone[name] = choices[0].planned_peak_bytes
    assert alone["small"] <= 600 * 1024 < alone["plain"] < 0.8 * 3_700_000  # alone
    with pytest.raises(UserError, match="process 1 on .* does not see the run of the process that"):
        new_trainer(place / str(ranks.rank)).fit(TRAIN, TEST)


def fill(ranks: Ranks, place: Path) -> None:
    """Limits the files of the process that does not lead, which writes its part of a store."""
    os.environ |= {"TORCHELASTIC_RUN_ID": "1", "RANK": str(ranks.rank), "WORLD_SIZE": "2"}
    if not ranks.leads:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))
    result = greedy("train", "--recipe", place / "recipe.toml", "--run", place / "run")
    (place / f"{ranks.rank}.txt").write_text(result.stderr)
    assert result.exit_code == 1, result.output
