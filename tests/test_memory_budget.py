"""A run under a memory budget."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import TensorDataset

from greedy import GreedyTrainer, Reporter, UserError
from greedy.losses import PredSim
from greedy.memory.choice import choose
from greedy.memory.counting import Counter
from greedy.models import cut, shapes, vgg11b
from greedy.training.modes import Mode, StepMemory

CLASSES, SIDE = 4, 12
RUNS = ("plain", "small")


def data(rows: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(rows)
    labels = torch.randint(CLASSES, (rows,), generator=generator)
    images = torch.randint(0, 64, (rows, 1, SIDE, SIDE), generator=generator).to(torch.uint8)
    return TensorDataset(images + (labels * 48).to(torch.uint8)[:, None, None, None], labels)


def fit(run: Path, **settings) -> list:
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)]
    network = nn.Sequential(*layers, nn.Flatten(), nn.Linear(144, CLASSES))
    settings |= {"epochs": 1, "learning_rate": 0.01, "batch_size": 64, "views": 1}
    settings |= {"device": "cpu", "precision": "float32"}
    return GreedyTrainer(network, run_dir=run, **settings).fit(data(256), data(64))


def test_a_budget_chooses_the_mode_and_not_the_result(tmp_path: Path) -> None:
    plain = fit(tmp_path / "plain")
    small = fit(tmp_path / "small", memory_budget="2MiB", optimizer_state="host")
    assert plain[0].resolved["memory_mode"] == Mode.PLAIN
    assert small[0].resolved["memory_mode"] != Mode.PLAIN
    assert small[0].resolved["planned_peak_bytes"] <= 2 * 2**20
    assert plain[0].resolved["planned_peak_bytes"] > 2 * 2**20
    assert small[0].resolved["write_batch"] < plain[0].resolved["write_batch"]
    one, other = (load_file(tmp_path / f"{name}/stage1/encoder.safetensors") for name in RUNS)
    # A bias before batch norm drifts with rounding, and the mean with it, both without effect.
    for name in ("layer.0.weight", "layer.1.weight", "layer.1.bias", "layer.1.running_var"):
        assert torch.allclose(one[name], other[name], atol=1e-4), name


def test_a_budget_that_nothing_meets_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"stage 1 \(conv16\) takes at least .* KiB for weights"):
        fit(tmp_path / "run", memory_budget="150KiB")
    assert not (tmp_path / "run/stage1").exists()


def test_another_budget_goes_on_with_the_same_run(tmp_path: Path) -> None:
    fit(tmp_path / "run")
    before = json.loads((tmp_path / "run/stage1/stage.json").read_text())
    fit(tmp_path / "run", memory_budget="2MiB")
    assert json.loads((tmp_path / "run/stage1/stage.json").read_text()) == before


@pytest.mark.parametrize(
    ("number", "precision", "state", "budget"),
    [
        (4, "float32", "device", 768),
        (7, "float32", "device", 768),
        (6, "float32", "host", 512),
        (4, "bfloat16", "device", 400),
    ],
)
def test_vgg11b_3x_fits_small_gpus(number: int, precision: str, state: str, budget: int) -> None:
    with torch.device("meta"):
        stages = cut(vgg11b(3, 32, 10, feature_multiplier=3))
    shape = shapes(stages, (3, 32, 32))[number - 1]
    stage, row = stages[number - 1], shape.input[0] * shape.input[1] * shape.input[2]
    found = choose(stage, shape, PredSim(), 10, 128, precision, row, budget * 2**20, state, "meta")
    assert found.peak_bytes <= budget * 2**20


def test_a_stage_that_runs_out_of_memory_says_how_it_went_on(tmp_path: Path) -> None:
    class Told(Reporter):
        reduced: StepMemory | None = None

        def epoch_started(self, epoch: int, rows: int) -> None:
            allocator.reset_peak()

        def batch_finished(self, rows: int) -> None:
            if allocator.limit is None:  # what a step has taken is too much from here on
                allocator.limit = allocator.live + (allocator.peak - allocator.live) // 2

        def memory_reduced(self, number: int, memory: StepMemory) -> None:
            self.reduced, allocator.limit = memory, 2**40

    told = Told()
    with Counter() as allocator:
        first, *_ = fit(tmp_path / "run", reporter=told)
    assert told.reduced is not None
    assert first.resolved["memory_mode"] == told.reduced.mode != Mode.PLAIN
    assert first.resolved["micro_batch"] == told.reduced.micro_batch
