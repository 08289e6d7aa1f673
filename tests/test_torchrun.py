"""Runs that several processes train, started by torchrun."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from command_line import greedy, said
from ranked import command_together
from safetensors.torch import load_file

SETTINGS = {
    "model.hidden_layers": 2,
    "model.hidden_width": 16,
    "training.epochs": 2,
    "training.optimizer": "sgd",
    "training.checkpoint_minutes": 0,
    "store.views": 3,
}
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
START = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]


def arguments(run: Path, **settings: object) -> list[str]:
    given = ["train", "--recipe", "fashion-mnist/mlp-predsim", "--data", "fashion-mnist-sample"]
    named = {**SETTINGS, **{name.replace("__", "."): value for name, value in settings.items()}}
    for name, value in named.items():
        given += ["--set", f"{name}={value}"]
    return [*given, "--device", "cpu", "--precision", "float32", "--run", str(run)]


def start(run: Path, processes: int = 2, **settings: object) -> subprocess.Popen:
    return started(arguments(run, **settings), processes)


def started(
    arguments: Sequence[object], processes: int = 2, **environment: str
) -> subprocess.Popen:
    return subprocess.Popen(
        [*START, str(processes), "-m", "--", "greedy", *map(str, arguments)],
        env=ENVIRONMENT | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def train(run: Path, processes: int = 2, **settings: object) -> None:
    """Trains in processes that torchrun has not started, which takes less time."""
    command_together(processes, *arguments(run, **settings))


def weights(run: Path) -> list[dict[str, torch.Tensor]]:
    return [load_file(path) for path in sorted(run.glob("stage*/encoder.safetensors"))]


def history(run: Path, stage: int) -> list[dict[str, Any]]:
    lines = (run / f"stage{stage}/history.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def content(run: Path) -> dict[str, bytes]:
    """Returns weights, histories but for times, and stores of a run."""
    names = ("encoder.safetensors", "heads.safetensors")
    files = [path for path in run.rglob("*") if path.name in names or path.name.startswith("c.")]
    return {str(path.relative_to(run)): path.read_bytes() for path in files if path.is_file()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("torchrun") / "run"
    process = start(run)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert out.count("stage 1/3 linear16: epoch 1/2") == 1  # one process speaks
    return run


def test_two_processes_train_what_one_does(finished: Path, tmp_path: Path) -> None:
    greedy(*arguments(tmp_path / "one"))
    for one, two in zip(weights(tmp_path / "one"), weights(finished), strict=True):
        for name, tensor in one.items():
            torch.testing.assert_close(tensor, two[name], rtol=0, atol=1e-4)


def test_stores_are_those_that_one_process_writes(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    for stage in (1, 2):
        said("cache", "drop", run / f"stage{stage}")
        said("cache", "repair", run / f"stage{stage}")
    assert content(run) == content(finished)
    assert len(list(run.glob("stage1/activations.zarr/train/activations/c.*"))) == 3


def test_the_record_says_how_many_processes_trained(finished: Path) -> None:
    stages = json.loads(said("status", "--run", finished, "--json"))["stages"]
    assert [stage["processes"] for stage in stages] == [[2]] * 3
    assert "stage 3 was trained by 2 processes together" in said("status", "--run", finished)
    assert [line["processes"] for line in history(finished, 3)] == [[2], [2]]


def test_joint_training_and_patience(tmp_path: Path) -> None:
    settings = {"training__strategy": "joint", "training__patience": 1}
    train(tmp_path / "two", **settings)
    greedy(*arguments(tmp_path / "one", **settings))
    for one, two in zip(weights(tmp_path / "one"), weights(tmp_path / "two"), strict=True):
        for name, tensor in one.items():
            torch.testing.assert_close(tensor, two[name], rtol=0, atol=1e-4)


def kill(rank: str, agents: Sequence[subprocess.Popen], run: Path) -> None:
    """Kills a process of a training once that is in the second epoch of stage 2."""
    epochs = run / "stage2/training/history.jsonl"
    while not (epochs.is_file() and epochs.read_text()):
        assert all(agent.poll() is None for agent in agents)
        time.sleep(0.01)
    children = [c for agent in agents for c in psutil.Process(agent.pid).children(recursive=True)]
    (victim,) = (child for child in children if child.environ().get("RANK") == rank)
    victim.kill()


@pytest.mark.slow
def test_when_the_leader_is_killed_all_end_and_the_same_command_resumes(
    finished: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    process = start(run)
    kill("0", [process], run)
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0
    assert not re.search("^Error: ", err, re.MULTILINE)  # torchrun says which process ended
    train(run)
    assert content(run) == content(finished)


@pytest.mark.slow
def test_torchrun_on_two_machines_starts_again_by_itself(finished: Path, tmp_path: Path) -> None:
    """Has its stores in a folder elsewhere, so that another start is not needed for these."""
    run, stores = tmp_path / "run", tmp_path / "stores"
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{port}"]
    command = [*START[:3], "--nnodes", "2", *meeting, "--max-restarts", "1"]
    given = [*arguments(run), "--stores", f"file://{stores}"]
    agents = []
    for machine in ("first", "second"):
        logs = ["--log-dir", str(tmp_path / machine), "--redirects", "3"]
        alone = ["--nproc-per-node", "1", "-m", "--", "greedy"]
        agents.append(subprocess.Popen([*command, *logs, *alone, *given], env=ENVIRONMENT))
    kill("1", agents, run)
    for agent in agents:
        assert agent.wait(timeout=300) == 0
    logs = [path.read_text() for path in tmp_path.glob("*/*/attempt_*/0/stdout.log")]
    assert sum("test error" in log for log in logs) == 1
    written = {
        f"{path.relative_to(stores).parts[0].partition('-')[0]}/activations.zarr/"
        + "/".join(path.relative_to(stores).parts[1:]): path.read_bytes()
        for path in stores.rglob("c.*")
    }
    ours = {name: data for name, data in content(run).items() if not name.endswith(".uploaded")}
    assert ours | written == content(finished)


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start(run, 3)
    assert process.stdout is not None
    while "stage 2/3 linear16: epoch 1" not in process.stdout.readline():
        assert process.poll() is None
    process.terminate()
    process.communicate(timeout=120)
    greedy(*arguments(run))
    stages = json.loads(said("status", "--run", run, "--json"))["stages"]
    assert [stage["processes"] for stage in stages] == [[3], [3, 1], [1]]
    assert "stage 2 was trained by 3, then 1 processes" in said("status", "--run", run)
    assert "processes" not in history(run, 3)[-1]
    for one, two in zip(weights(run), weights(finished), strict=True):
        for name, tensor in one.items():
            torch.testing.assert_close(tensor, two[name], rtol=0, atol=1e-4)


def test_one_stage_is_trained_alone(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    shutil.rmtree(run / "stage3")
    again = "train-stage", "--stage", 2, "--from-cache", run / "stage1", "--retrain"
    command_together(2, *again, "--device", "cpu")
    wanted = {name: data for name, data in content(finished).items() if "stage3" not in name}
    assert content(run) == wanted


MEETING = """
import torch
from torch import nn


class Centred(nn.Module):
    def forward(self, x):
        return x - x.mean(0) if self.training else x


def network():
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 8), Centred(), nn.ReLU(), nn.Linear(8, 10)
    )
"""


def test_samples_that_meet_elsewhere_need_one_process(tmp_path: Path) -> None:
    (tmp_path / "meeting.py").write_text(MEETING)
    given = ["train", "--recipe", "fashion-mnist/mlp-predsim", "--model", "meeting:network"]
    data = ["--data", "fashion-mnist-sample", "--device", "cpu", "--run", tmp_path / "run"]
    process = started([*given, *data], PYTHONPATH=str(tmp_path))
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0
    assert err.count("Error: stage 1 cannot be trained by several processes (") == 1
    assert "Error in process" not in err


def test_mixup_needs_one_process(tmp_path: Path) -> None:
    process = start(tmp_path / "run", data__mixup="input", loss__name="pred")
    _, err = process.communicate(timeout=120)
    assert err.count("Error: mixup mixes rows that several processes have") == 1


def test_a_divided_optimiser_state_changes_no_byte(finished: Path, tmp_path: Path) -> None:
    train(tmp_path / "run", memory__optimizer_state="sharded")
    assert content(tmp_path / "run") == content(finished)


@pytest.mark.slow
def test_a_divided_state_is_resumed_as_a_whole_one(finished: Path, tmp_path: Path) -> None:
    """Only the weights of stage 1 are large enough to be divided."""
    run = tmp_path / "run"
    process = start(run, memory__optimizer_state="sharded")
    assert process.stdout is not None
    while "stage 1/3 linear16: epoch 1" not in process.stdout.readline():
        assert process.poll() is None
    process.terminate()
    process.communicate(timeout=120)
    assert not (run / "stage1/encoder.safetensors").exists()
    train(run)
    assert content(run) == content(finished)
