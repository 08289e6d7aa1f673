"""Compiled steps, and determinism."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from decided import choices
from interrupting import interrupt
from small_training import CLASSES, noise
from small_training import new_trainer as small_trainer
from torch import nn

from greedy import GreedyTrainer, Reporter
from greedy.base.errors import Interrupted
from greedy.losses import PredSim
from greedy.memory.choice import Choice
from greedy.models import Shape, cut
from greedy.recipes import load
from greedy.runs.choices import Mode
from greedy.steps.step import Learner, gradients
from greedy.stores.source import Batch
from greedy.training.resolve import compiles, graphs

ROWS = 32  # what is compiled for one test is found by the next


def network() -> nn.Sequential:
    torch.manual_seed(0)
    convolution = [nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU()]
    return nn.Sequential(*convolution, nn.Flatten(), nn.Linear(6 * 64, CLASSES))


def new_trainer(run: Path, reporter: Reporter | None = None, **settings) -> GreedyTrainer:
    defaults = {"views": 1, "batch_size": ROWS, "checkpoint_minutes": 0, "reporter": reporter}
    return small_trainer(run, network(), **(defaults | settings))


class Notes(Reporter):
    """What is said of compiling, and how the process computes; ends it after some batches."""

    def __init__(self, batches: int = 10**6) -> None:
        self.batches, self.failures, self.deterministic = batches, [], set()

    def compiling_failed(self, number: int, reason: str) -> None:
        self.failures.append((number, reason))

    def batch_finished(self, rows: int) -> None:
        self.deterministic.add(torch.are_deterministic_algorithms_enabled())
        self.batches -= 1
        if not self.batches:
            interrupt()


def weights(run: Path) -> list[bytes]:
    """Reads stage 1's weights."""
    return [(run / f"stage1/{name}.safetensors").read_bytes() for name in ("encoder", "heads")]


@pytest.mark.parametrize("later", [(), ((4, 4, 4), (5,))])
def test_a_compiled_step_is_the_same_but_for_rounding(later: tuple[Shape, ...]) -> None:
    def computed(compiled_rows: int) -> dict[str, torch.Tensor]:
        stage = cut(network())[0]
        with torch.no_grad():
            stage.layer[0].weight[2] = 0  # a dead feature map
            stage.layer[1].bias[2] = -1
        loss = PredSim(later=later)
        torch.manual_seed(1)
        heads = loss.heads((6, 8, 8), CLASSES)
        learner = Learner(stage, heads, loss, CLASSES, "float32", compiled_rows=compiled_rows)
        learner.train()
        x = torch.randn(ROWS, 1, 8, 8)
        value, logits = gradients(learner, Batch(torch.arange(ROWS) % CLASSES, x.__getitem__))
        named = {k: p.grad for m in (stage, heads) for k, p in m.named_parameters()}
        assert compiled_rows == learner.compiled_rows
        return named | dict(stage.named_buffers()) | {"loss": value, "logits": logits}

    expected, compiled = computed(0), computed(ROWS)
    for name, value in expected.items():
        worst = (compiled[name] - value).abs().max()
        assert worst <= 1e-4 * value.abs().max() + 1e-5, name


def test_a_compiled_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    notes = Notes()
    new_trainer(tmp_path / "whole", notes, compile="on").fit(noise(112), noise(32))
    assert notes.failures == []
    with pytest.raises(Interrupted):
        new_trainer(tmp_path / "cut", Notes(3), compile="on").fit(noise(112), noise(32))
    done = new_trainer(tmp_path / "cut", compile="off").fit(noise(112), noise(32))
    assert [record.choices.compile for record in done] == [True, False]
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")


def test_without_a_compiler_it_says_so_once_and_goes_on(tmp_path: Path) -> None:
    script = (
        "import sys, pathlib; sys.path.insert(0, sys.argv[1])\n"
        "from test_compiled import *\n"
        "notes, run = Notes(), pathlib.Path(sys.argv[2])\n"
        "records = new_trainer(run, notes, compile='on').fit(noise(96), noise(32))\n"
        "print(notes.failures, [r.choices.compile for r in records], sep='\\n')\n"
    )
    environment = os.environ | {
        "CXX": str(tmp_path / "there-is-no-compiler"),
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "compiled"),
    }
    command = [sys.executable, "-c", script, str(Path(__file__).parent), str(tmp_path / "run")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    failures, compiled = done.stdout.splitlines()
    assert failures.count("there-is-no-compiler") == 2  # once a stage
    assert compiled == "[False, False]"


@pytest.mark.parametrize(
    ("wanted", "settings", "expected"),
    [
        ("auto", {}, True),
        ("auto", {"epochs": 10}, False),
        ("auto", {"hidden": (1024,)}, False),
        ("auto", {"device": "mps"}, False),
        ("auto", {"mode": "keep-c"}, False),
        ("auto", {"deterministic": "true"}, False),
        ("on", {"epochs": 10, "deterministic": "true"}, True),
        ("on", {"mode": "keep-c"}, False),
        ("off", {}, False),
    ],
)
def test_what_is_compiled(wanted: str, settings: dict, expected: bool) -> None:
    fields = {"epochs": settings.get("epochs", 400), "compile": wanted}
    fields |= {"deterministic": settings.get("deterministic", "false")}
    recipe = load("cifar10/vgg8b-predsim", [f"training.{k}={v}" for k, v in fields.items()])
    hidden, device = settings.get("hidden", (128, 32, 32)), settings.get("device", "cpu")
    memory = Choice(Mode(settings.get("mode", "plain")), 128, 0)
    assert compiles(recipe, 1, hidden, 50_000, memory, torch.device(device)) == expected


@pytest.mark.parametrize(
    ("device", "other", "expected"),
    [
        ("cuda", {}, True),
        ("cuda", {"planned_peak_bytes": 2**29 + 1}, False),
        ("cuda", {"memory_mode": "heads"}, False),
        ("cpu", {}, False),
    ],
)
def test_graphs_are_for_plain_steps_with_room_for_two(
    device: str, other: dict, expected: bool
) -> None:
    recipe = load("cifar10/vgg8b-predsim", ["memory.budget=1GiB"])
    decided = choices(**{"planned_peak_bytes": 2**29} | other)
    assert graphs(recipe, decided, torch.device(device)) == expected


def test_deterministic_is_torch_s_and_for_this_run_alone(tmp_path: Path) -> None:
    for wanted in (True, False):
        notes, run = Notes(), tmp_path / str(wanted)
        new_trainer(run, notes, deterministic=wanted, epochs=1).fit(noise(64), noise(32))
        assert notes.deterministic == {wanted}
    notes = Notes()
    (again, _) = new_trainer(run, notes, deterministic=True, epochs=1).train(retrain_from=1)
    assert notes.deterministic == {again.choices.deterministic} == {True}
