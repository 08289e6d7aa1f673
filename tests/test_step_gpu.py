"""What the step does on a GPU alone: graphs, layout, TF32, and never waiting."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

from greedy import GreedyTrainer, Reporter
from greedy.base.devices import preferred_layout, set_determinism
from greedy.losses import PredSim
from greedy.losses.deviation import deviation
from greedy.models import cut, shapes, vgg8b
from greedy.models.memory_format import placed
from greedy.runs.choices import Mode
from greedy.steps.graph import WARM_UP
from greedy.steps.guard import Guard
from greedy.steps.host_state import HostAdam
from greedy.steps.step import Learner, step
from greedy.stores.source import Batch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DEVICE = torch.device("cuda")
ROWS, CLASSES = 64, 10


def trained(steps: int, **settings) -> tuple[Learner, dict[str, torch.Tensor]]:
    """Trains the second stage of a narrow VGG8B for some steps. Returns it, and what it has
    learned."""
    torch.manual_seed(0)
    stages = cut(vgg8b(3, 32, CLASSES, feature_multiplier=0.25))
    stage, shape, loss = stages[1], shapes(stages, (3, 32, 32))[1], PredSim()
    heads = loss.heads(shape.hidden, CLASSES)
    learner = Learner(
        placed(stage, DEVICE), placed(heads, DEVICE), loss, CLASSES, "bfloat16", **settings
    )
    learner.optimizer = torch.optim.Adam(learner.parameters(), fused=True)
    learner.train()
    x = torch.randn(ROWS, *shape.input, generator=torch.Generator().manual_seed(1))
    x = preferred_layout(x.to(DEVICE))
    labels = torch.arange(ROWS, device=DEVICE) % CLASSES
    for position in range(steps):
        loss_now, logits = step(learner, Batch(labels, x.__getitem__), Guard(), position)
    assert logits is not None
    parts = {"stage": stage, "heads": learner.heads}
    state = {f"{k}.{name}": v for k, part in parts.items() for name, v in part.state_dict().items()}
    return learner, state | {"loss": loss_now, "logits": logits}


@pytest.mark.parametrize("compiled_rows", [0, ROWS])
def test_graphs_change_no_number(compiled_rows: int) -> None:
    set_determinism(DEVICE, True)
    _, expected = trained(8, compiled_rows=compiled_rows)
    learner, numbers = trained(8, compiled_rows=compiled_rows, graph_rows=ROWS)
    assert learner._graph is not None
    assert (learner.compiled_rows, learner.compiling_failed) == (compiled_rows, "")
    for name, value in expected.items():
        torch.testing.assert_close(numbers[name], value, rtol=0, atol=0, msg=name)


def test_graphs_leave_no_memory_behind() -> None:
    def reserved(graphs: bool) -> int:
        learner, _ = trained(8, graph_rows=ROWS if graphs else 0)
        learner.release()
        del learner, _
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved()

    reserved(False)  # libraries take their workspaces
    assert reserved(True) <= reserved(False)


def test_graphs_give_way_where_memory_is_short() -> None:
    """The step continues in the plain mode, without them."""
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    torch.cuda.reset_peak_memory_stats()
    trained(3)
    total = torch.cuda.get_device_properties(DEVICE).total_memory
    room = torch.cuda.max_memory_reserved() - before
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((before + 1.1 * room) / total)
    try:
        learner, _ = trained(8, graph_rows=ROWS)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert learner.memory.mode is Mode.PLAIN
    assert learner.graph_rows == 0


def test_tf32_is_for_convolutions_that_need_not_be_deterministic() -> None:
    random = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(s, generator=random) for s in [(8, 64, 16, 16), (64, 64, 3, 3)])
    exact = F.conv2d(x.double(), weight.double(), padding=1).to(DEVICE)

    def error() -> float:
        product = F.conv2d(x.to(DEVICE), weight.to(DEVICE), padding=1)
        return float((product - exact).abs().max() / exact.abs().max())

    set_determinism(DEVICE, True)
    assert error() < 1e-5
    set_determinism(DEVICE, False)
    assert not torch.backends.cuda.matmul.allow_tf32
    if torch.cuda.get_device_capability() >= (8, 0):
        assert 1e-5 < error() < 1e-2


class NeverWaiting(Reporter):
    """Between an epoch's first step and its last, whatever waits for the device is an error."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def epoch_started(self, epoch: int, rows: int) -> None:
        self.done = 0

    def batch_finished(self, rows: int) -> None:
        self.done += 1
        # The first steps warm up libraries and are recorded.
        inside = WARM_UP + 2 <= self.done < self.steps
        torch.cuda.set_sync_debug_mode("error" if inside else "default")


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")  # torch calls it a prototype
@pytest.mark.parametrize(
    ("precision", "compiling"),
    [("float32", "off"), ("bfloat16", "off"), ("float16", "off"), ("bfloat16", "on")],
)
def test_no_step_waits_for_the_device(tmp_path: Path, precision: str, compiling: str) -> None:
    convolution = [nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)]
    network = nn.Sequential(*convolution, nn.Flatten(), nn.Linear(8 * 16, CLASSES))
    random = torch.Generator().manual_seed(0)
    images = torch.randint(256, (256, 1, 8, 8), dtype=torch.uint8, generator=random)
    data = TensorDataset(images, torch.arange(256) % CLASSES)
    trainer = GreedyTrainer(
        network,
        run_dir=tmp_path / "run",
        device=DEVICE.type,
        reporter=NeverWaiting(256 // 32),
        epochs=2,
        batch_size=32,
        precision=precision,
        compile=compiling,
    )
    try:
        records = trainer.fit(data, data)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert [record.choices.compile for record in records] == [compiling == "on"] * 2


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_a_constant_map_deviates_by_nothing_where_compiled_too(precision: torch.dtype) -> None:
    """The map is made in the same kernel, so that it could be rounded in two ways."""

    def deviations(x: torch.Tensor) -> torch.Tensor:
        return deviation(F.leaky_relu(x * 3.0 - 0.7, 0.01))

    x = torch.full((8, 16, 12, 12), 0.1, device=DEVICE, dtype=precision, requires_grad=True)
    computed = torch.compile(deviations)(x)
    computed.sum().backward()
    assert x.grad is not None
    assert not computed.any()
    assert not x.grad.any()


def test_adam_on_the_host_learns_the_same() -> None:
    """Sums have another order; gradients are read that were copied without waiting."""
    torch.manual_seed(0)
    weights = [torch.randn(512, 512, device=DEVICE) for _ in range(4)]
    learned = []
    for make in (torch.optim.Adam, HostAdam):
        parameters = [nn.Parameter(weight.clone()) for weight in weights]
        optimizer = make(parameters, lr=0.01)
        for _ in range(5):
            loss = torch.stack([(p @ p).sin().mean() for p in parameters]).sum()
            for parameter in parameters:
                parameter.grad = None
            loss.backward()
            optimizer.step()
        learned.append(parameters)
    for device, host in zip(*learned, strict=True):
        torch.testing.assert_close(host, device, rtol=1e-4, atol=1e-4)


def test_no_more_is_taken_than_a_named_budget(tmp_path: Path) -> None:
    """A whole run, whose steps would take more."""
    network = vgg8b(1, 16, CLASSES, feature_multiplier=0.5)
    random = torch.Generator().manual_seed(0)
    images = torch.randint(256, (512, 1, 16, 16), dtype=torch.uint8, generator=random)
    data = TensorDataset(images, torch.arange(512) % CLASSES)
    budget = 160 * 2**20
    trainer = GreedyTrainer(
        network,
        run_dir=tmp_path / "run",
        device=DEVICE.type,
        epochs=1,
        views=1,
        batch_size=512,
        precision="float32",
        memory_budget="160MiB",
    )
    torch.cuda.empty_cache()
    records = trainer.fit(data, data)
    modes = {record.choices.memory_mode for record in records}
    assert modes > {Mode.PLAIN}, "no stage was short of memory"
    assert all((record.peak_memory_bytes or 0) <= budget for record in records)
    assert torch.cuda.get_per_process_memory_fraction() == 1
