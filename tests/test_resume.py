"""A run that is cut short ends as one that was not."""

import json
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import TensorDataset

from greedy import GreedyTrainer, Reporter, RunDirectory, UserError
from greedy.errors import Interrupted
from greedy.models import mlp

SIDE, CLASSES = 8, 3


def samples(rows: int, seed: int) -> TensorDataset:
    random = np.random.default_rng(seed)
    images = torch.from_numpy(random.integers(0, 255, (rows, 1, SIDE, SIDE)).astype(np.uint8))
    return TensorDataset(images, torch.from_numpy(random.integers(0, CLASSES, rows)))


TRAIN, TEST = samples(300, 0), samples(60, 1)
REFRESHED = {"augmentation": "hflip", "refresh_every": 2, "views": 2, "epochs": 3}
PATIENT = {"patience": 1, "epochs": 7, "views": "live", "augmentation": "crop4"}
FROM_DISK = {"ram_budget": "1B", "views": 3}


class Killed(Exception):
    pass


class KillAt(Reporter):
    """Ends the process, or raises, when so many batches were heard of."""

    def __init__(self, batches: int, how: Callable[[], None]) -> None:
        self.left, self.how = batches, how

    def batch_finished(self, rows: int) -> None:
        self.left -= 1
        if not self.left:
            self.how()


def trainer(run: Path, reporter: Reporter | None = None, **settings) -> GreedyTrainer:
    torch.manual_seed(0)
    model = mlp(1, SIDE, CLASSES, hidden_layers=2, hidden_width=12, dropout=0.1)
    defaults = {"epochs": 2, "learning_rate": 0.01, "batch_size": 64, "views": 1}
    defaults |= {"precision": "float32", "device": "cpu", "checkpoint_minutes": 0}
    return GreedyTrainer(model, run_dir=run, reporter=reporter, **(defaults | settings))


def outcome(run: Path) -> dict[str, object]:
    """All files of a run but for what tells of time, memory and who wrote."""
    found: dict[str, object] = {}
    for path in sorted(path for path in run.rglob("*") if path.is_file()):
        name = str(path.relative_to(run))
        if name.endswith("stage.json"):
            document = json.loads(path.read_bytes())
            document["store"] = document["store"] and document["store"] | {"bytes_written": 0}
            free = ("seconds", "peak_memory_bytes", "digest", "written_before")
            kept = {k: v for k, v in document.items() if k not in free}
            found[name] = kept | {"files": sorted(document["files"])}
        elif name.endswith("history.jsonl"):
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            free = ("seconds", "images_per_second")
            found[name] = [{k: v for k, v in x.items() if k not in free} for x in lines]
        elif name not in (".lock", "run.toml"):
            found[name] = path.read_bytes()
    return found


def fit_until_killed(run: Path, batches: int, settings: dict) -> None:
    reporter = KillAt(batches, lambda: os.kill(os.getpid(), signal.SIGKILL))
    torch.set_num_threads(1)
    trainer(run, reporter, **settings).fit(TRAIN, TEST)


@pytest.mark.parametrize(
    "settings", [{}, REFRESHED, PATIENT, FROM_DISK], ids=["plain", "refreshed", "patient", "disk"]
)
def test_killed_anywhere_it_ends_the_same(tmp_path: Path, settings: dict) -> None:
    torch.set_num_threads(1)
    trainer(tmp_path / "whole", **settings).fit(TRAIN, TEST)
    expected = outcome(tmp_path / "whole")
    fork = multiprocessing.get_context("fork")
    for _ in range(40):
        child = fork.Process(target=fit_until_killed, args=(tmp_path / "cut", 9, settings))
        child.start()
        child.join()
        assert child.exitcode in (0, -signal.SIGKILL)
        if child.exitcode == 0:
            break
    assert child.exitcode == 0
    assert outcome(tmp_path / "cut") == expected
