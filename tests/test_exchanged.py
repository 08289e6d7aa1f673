"""A process that reads a run while a stage is exchanged reads the old stage or the new one.

The exchange is made to happen at every single opening of a file: the stage goes aside at one, the
new one comes and the old one is deleted at the next.
"""

import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from command_line import answer
from safetensors.torch import load_file, save_file
from small_training import TEST, TRAIN, network, new_trainer
from torch.utils.data import TensorDataset

from greedy import RunDirectory, evaluate
from greedy.losses import PredSim
from greedy.results.curves import stage_curves
from greedy.results.exits import evaluate_exits
from greedy.results.export import export
from greedy.results.similarity import similarity_by_stage
from greedy.runs.integrity import verify_run
from greedy.runs.network import assemble
from greedy.runs.record import ENCODER
from greedy.runs.state import RunState
from greedy.runs.status import status
from greedy.training.finetuning import begin_finetuning

CPU = torch.device("cpu")
steps: list[Callable[[], None]] = []
under: list[Path] = []
left = [0]
inside = threading.RLock()


def hear(event: str, what: tuple) -> None:
    """Does the next step of an exchange once enough files of the run were opened."""
    if event != "open" or not steps or not str(what[0]).startswith(str(under[0])):
        return
    with inside:
        left[0] -= 1
        if left[0] < 0 and steps:
            steps.pop(0)()


sys.addaudithook(hear)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trains a run, and next to it another stage 1, as if of other data, and another last stage."""
    place = tmp_path_factory.mktemp("exchanged")
    new_trainer(place / "run", epochs=1).fit(TRAIN, TEST)
    images, labels = TRAIN.tensors
    new_trainer(place / "other", epochs=1).fit(TensorDataset(255 - images, labels), TEST)
    (place / "other/stage1").rename(place / "stage1")
    last = shutil.copytree(place / "run/stage3", place / "stage3")
    tensors = load_file(last / ENCODER)
    save_file({name: -each for name, each in tensors.items()}, last / ENCODER)
    record = RunDirectory.open(place / "run").record(3)
    metrics = record.metrics.model_copy(update={"test_error_percent": 12.5})
    lines = (last / "history.jsonl").read_text()
    (last / "history.jsonl").write_text(lines.replace('"epoch": 1', '"epoch": 2'))
    record.model_copy(update={"lineage": "other", "metrics": metrics}).write(last)
    return place


def weights(network: torch.nn.Module) -> bytes:
    return b"".join(each.numpy().tobytes() for each in network.state_dict().values())


def exported(run: Path) -> object:
    to = run.parent / "network.safetensors"
    directory = RunDirectory.open(run)
    tensors = load_file(export(directory, None, network(), to, "safetensors", overwrite=True))
    return {name: each.tolist() for name, each in tensors.items()}


def fine_tuned(run: Path) -> bytes:
    to = run.parent / "tuned"
    shutil.rmtree(to, ignore_errors=True)
    begin_finetuning(RunDirectory.open(run), to)
    return (to / "initial.safetensors").read_bytes()


def assembled(run: Path) -> bytes:
    return weights(assemble(RunDirectory.open(run), None, network()))


def by_stage(run: Path) -> object:
    return evaluate_exits(RunDirectory.open(run), PredSim(), network(), "test", CPU)


def evaluated(run: Path) -> object:
    directory = RunDirectory.open(run)
    return evaluate(directory, assemble(directory, None, network()), "test", CPU)


def alike(run: Path) -> object:
    batch = similarity_by_stage(RunDirectory.open(run), model=network())
    return [each.difference for each in batch.stages]


def rated(run: Path) -> object:
    return [each.test_error_percent for each in status(RunState.read(RunDirectory.open(run)))]


# What reads, the stage that is exchanged meanwhile, and at every how many openings that is tried:
# fewer where reading takes long.
READERS = {
    "verify": (lambda run: list(verify_run(run)), 1, 2),
    "info": (lambda run: answer("cache", "info", run / "stage1"), 1, 1),
    "status": (lambda run: answer("status", "--run", run), 1, 1),
    "errors": (rated, 3, 1),
    "assemble": (assembled, 3, 1),
    "evaluate": (evaluated, 3, 2),
    "export": (exported, 3, 2),
    "finetune": (fine_tuned, 3, 6),
    "similarity": (alike, 3, 6),
    "curves": (lambda run: [each.test for each in stage_curves(RunDirectory.open(run))], 3, 1),
    "by-stage": (by_stage, 3, 6),
}


@pytest.mark.parametrize(("read", "stage", "every"), READERS.values(), ids=READERS)
def test_the_old_stage_or_the_new_one(
    runs: Path, tmp_path: Path, read: Callable[[Path], object], stage: int, every: int
) -> None:
    run, place = tmp_path / "run", tmp_path / f"run/stage{stage}"
    new, old = run / f".stage{stage}.new", run / f".stage{stage}.old"

    def fresh() -> None:
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(runs / "run", run)
        shutil.copytree(runs / f"stage{stage}", new)

    def go() -> None:
        place.rename(old)

    def come() -> None:
        new.rename(place)
        shutil.rmtree(old)

    fresh()
    before = read(run)
    go(), come()
    possible = [before, read(run)]
    under[:] = [run]
    for count in range(0, 200, every):
        fresh()
        steps[:], left[0] = [go, come], count
        try:
            assert read(run) in possible, count
        finally:
            done = len(steps) > 0
            steps.clear()
        if done:
            break
    assert count > 2
