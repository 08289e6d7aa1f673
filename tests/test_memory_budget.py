"""A run under a memory budget."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from allocator import Allocator
from safetensors.torch import load_file
from small_training import new_trainer
from torch import nn
from torch.utils.data import TensorDataset
from torchvision.models.resnet import BasicBlock

from greedy import GreedyTrainer, Reporter, RunDirectory, UserError
from greedy.build.cut_network import CutNetwork
from greedy.losses import Pred, PredSim
from greedy.memory.choice import Choice, choose, fused_adam, reserved
from greedy.memory.counting import Counter
from greedy.memory.forward import fit_forward
from greedy.memory.peaks import StepDemand
from greedy.memory.plan import MemoryPlan, StageStores
from greedy.models import cut, shapes, vgg11b
from greedy.results.evaluation import evaluate
from greedy.runs.choices import Mode, StepMemory
from greedy.runs.network import assemble
from greedy.stores.source import replay

CLASSES, SIDE = 4, 12
RUNS = ("plain", "small")


def data(rows: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(rows)
    labels = torch.randint(CLASSES, (rows,), generator=generator)
    images = torch.randint(0, 64, (rows, 1, SIDE, SIDE), generator=generator).to(torch.uint8)
    return TensorDataset(images + (labels * 48).to(torch.uint8)[:, None, None, None], labels)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(144, CLASSES))


def block_network() -> nn.Sequential:
    torch.manual_seed(0)
    down = nn.Sequential(nn.Conv2d(8, 12, 1, 2, bias=False), nn.BatchNorm2d(12))
    entry = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), BasicBlock(8, 12, 2, down))
    return nn.Sequential(entry, nn.Flatten(), nn.Linear(432, CLASSES))


def fit(run: Path, model: nn.Sequential | None = None, **settings) -> list:
    settings = {"epochs": 1, "batch_size": 64, "views": 1} | settings
    return new_trainer(run, model or network(), **settings).fit(data(256), data(64))


def test_a_budget_chooses_the_mode_and_not_the_result(tmp_path: Path) -> None:
    plain = fit(tmp_path / "plain")
    small = fit(tmp_path / "small", memory_budget="2MiB", optimizer_state="host")
    assert plain[0].choices.memory_mode == Mode.PLAIN
    assert small[0].choices.memory_mode != Mode.PLAIN
    assert small[0].choices.planned_peak_bytes <= 2 * 2**20
    assert plain[0].choices.planned_peak_bytes > 2 * 2**20
    assert small[0].choices.write_batch < plain[0].choices.write_batch
    one, other = (load_file(tmp_path / f"{name}/stage1/encoder.safetensors") for name in RUNS)
    # A bias before batch norm drifts with rounding, and the mean with it, both without effect.
    for name in ("layer.0.weight", "layer.1.weight", "layer.1.bias", "layer.1.running_var"):
        assert torch.allclose(one[name], other[name], atol=1e-4), name


def test_a_budget_that_nothing_meets_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"stage 1 \(conv16\) takes at least .* KiB for weights"):
        fit(tmp_path / "run", memory_budget="150KiB")
    assert not (tmp_path / "run").exists()


def test_micro_batches_can_be_of_a_size_of_ones_own(tmp_path: Path) -> None:
    first, *_ = fit(tmp_path / "four", memory_budget="2MiB", micro_batch=4)
    assert first.choices.micro_batch == 4
    assert first.choices.memory_mode != Mode.PLAIN
    plain, *_ = fit(tmp_path / "plain", micro_batch=4)
    assert plain.choices.memory_mode == Mode.PLAIN
    least = "at least .* in mode .* and micro-batches of 32.* or lower memory.micro_batch or"
    with pytest.raises(UserError, match=least):
        fit(tmp_path / "none", memory_budget="900KiB", micro_batch=32)


class Peaks(Reporter):
    """The most bytes that were counted in an epoch of each stage."""

    def __init__(self, counter: Counter) -> None:
        self.counter, self.stage, self.bytes = counter, 0, {}

    def stage_started(self, number: int, *rest: object) -> None:
        self.stage = number

    def epoch_started(self, epoch: int, rows: int) -> None:
        self.counter.reset_peak()

    def epoch_finished(self, report: object) -> None:
        self.bytes[self.stage] = self.counter.peak


def test_replayed_stages_are_within_the_budget_too(tmp_path: Path) -> None:
    """Their weights, and what is computed on the way to the stage that trains."""
    with Counter() as counter:
        peaks = Peaks(counter)
        records = fit(tmp_path / "run", views="live", memory_budget="1200KiB", reporter=peaks)
    planned = [record.choices.planned_peak_bytes for record in records]
    assert records[1].source == 0 and records[1].choices.memory_mode != Mode.PLAIN
    for peak, plan in zip(peaks.bytes.values(), planned, strict=True):
        images = 2 * 64 * SIDE**2 * 4  # of a batch while they are normalised
        assert plan <= 1200 * 1024
        assert peak <= plan + images + 16 * 1024  # and the loop's own small tensors


class StagePeaks(Peaks):
    """The most bytes that were counted in a stage's training: views that are drawn and looks
    at rows that it does not train on are part of it."""

    def stage_started(self, number: int, *rest: object) -> None:
        self.stage = number
        self.counter.reset_peak()

    def epoch_started(self, epoch: int, rows: int) -> None:
        pass


class WithConstant(nn.Module):
    """Has a buffer that is larger than all else."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(SIDE**2, 32)
        self.register_buffer("constant", torch.ones(64, 4096))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) * self.constant.mean()


@pytest.mark.parametrize("kind", ["optimizer", "buffer"])
def test_what_an_optimizer_computes_and_copies_of_buffers_are_planned(
    tmp_path: Path, kind: str
) -> None:
    """An unfused step of Adam takes more than the gradients of a wide layer do."""
    torch.manual_seed(0)
    first = WithConstant() if kind == "buffer" else nn.Linear(SIDE**2, 2048)
    width = 32 if kind == "buffer" else 2048
    model = nn.Sequential(nn.Flatten(), first, nn.ReLU(), nn.Linear(width, CLASSES))
    settings = {"optimizer": partial(torch.optim.Adam, lr=1e-3)} if kind == "optimizer" else {}
    with Counter() as counter:
        peaks = Peaks(counter)
        records = fit(tmp_path / "run", model, reporter=peaks, batch_size=4, **settings)
    assert peaks.bytes[1] <= records[0].choices.planned_peak_bytes + 128 * 1024


def test_held_out_rows_and_looks_at_the_test_split_are_within_the_budget(tmp_path: Path) -> None:
    with Counter() as counter:
        peaks = StagePeaks(counter)
        records = fit(tmp_path / "run", memory_budget="1300KiB", reporter=peaks, patience=2)
    assert records[0].choices.memory_mode != Mode.PLAIN
    images = 2 * 64 * SIDE**2 * 4  # of a batch while they are normalised
    assert max(peaks.bytes.values()) <= 1300 * 1024 + images


def test_views_are_drawn_within_the_budget(tmp_path: Path) -> None:
    """A wide stage draws them before one whose weights and moments are many."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten()]
    layers += [nn.Linear(16 * SIDE**2, 64), nn.BatchNorm1d(64), nn.ReLU()]
    layers += [nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, CLASSES)]
    model, budget = nn.Sequential(*layers), 7_000 * 1024
    ring = {"augmentation": "hflip", "views": 2, "reuse": 1, "epochs": 2}
    with Counter() as counter:
        peaks = StagePeaks(counter)
        fit(tmp_path / "run", model, memory_budget="7000KiB", reporter=peaks, **ring)
    assert 4_000 * 1024 < peaks.bytes[3] <= max(peaks.bytes.values()) <= budget


def test_rows_go_through_frozen_stages_a_few_at_a_time() -> None:
    stages = cut(network())[:2]
    seen = []
    for stage in stages:
        stage.eval().register_forward_hook(lambda stage, inputs, h: seen.append(len(h)))
    x = torch.rand(10, 1, SIDE, SIDE)
    with torch.no_grad():
        torch.testing.assert_close(replay(stages, x, 4), replay(stages, x, 10))
    assert seen == [4, 4, 4, 4, 2, 2, 10, 10]


def test_evaluation_keeps_within_the_budget_and_finds_the_same(tmp_path: Path) -> None:
    fit(tmp_path / "run")
    run = RunDirectory.open(tmp_path / "run")
    evaluations, peaks = [], []
    for budget in (2**30, 400 * 1024):
        net = assemble(run, PredSim(), network())
        evaluations.append(evaluate(run, net, "test", torch.device("cpu"), budget))
        forward = fit_forward(net, (1, SIDE, SIDE), budget, "cpu")
        with Counter() as counter, torch.no_grad():
            counter.add(net.state_dict().values())
            forward(torch.zeros(forward.rows, 1, SIDE, SIDE))
        peaks.append(counter.peak)
    free, tight = evaluations
    assert tight.error_percent == pytest.approx(free.error_percent, abs=5)  # of 64 images
    assert tight.loss == pytest.approx(free.loss, rel=1e-4)
    assert peaks[1] < 400 * 1024 < peaks[0]
    with pytest.raises(UserError, match="forward pass takes at least .* is 1.0 KiB: raise"):
        evaluate(run, net, "test", torch.device("cpu"), 1024)


def test_weights_that_do_not_fit_together_come_one_module_at_a_time() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), *(nn.Linear(256, 256) for _ in range(20))).eval()
    weights = sum(p.numel() * p.element_size() for p in net.parameters())
    budget = weights // 2 + 2**21 + reserved(0, "cuda")
    forward = fit_forward(net, (1, 16, 16), budget, "cuda")
    assert not forward.resident
    assert fit_forward(net, (1, 16, 16), 2 * weights + reserved(0, "cuda"), "cuda").resident
    x = torch.rand(8, 1, 16, 16)
    assert torch.equal(forward(x), net(x))


def test_another_budget_goes_on_with_the_same_run(tmp_path: Path) -> None:
    fit(tmp_path / "run")
    before = json.loads((tmp_path / "run/stage1/stage.json").read_text())
    fit(tmp_path / "run", memory_budget="2MiB")
    assert json.loads((tmp_path / "run/stage1/stage.json").read_text()) == before


def test_a_smaller_budget_holds_for_a_stage_that_is_trained_again(tmp_path: Path) -> None:
    fit(tmp_path / "run", memory_budget="1GiB")
    settings = {"memory_budget": "2MiB", "epochs": 1, "learning_rate": 0.01, "batch_size": 64}
    settings |= {"views": 1, "device": "cpu", "precision": "float32"}
    trainer = GreedyTrainer(network(), run_dir=tmp_path / "run", **settings)
    again = trainer.train_stage(1, again=True)
    assert again.choices.memory_mode != Mode.PLAIN
    assert again.choices.planned_peak_bytes <= 2 * 2**20
    roomy = GreedyTrainer(
        network(), run_dir=tmp_path / "run", **settings | {"memory_budget": "1GiB"}
    )
    assert roomy.train_stage(1, again=True).choices.memory_mode == Mode.PLAIN


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
    adam = fused_adam if state == "device" else None
    demand = StepDemand(stage, shape, PredSim(), 10, 128, precision, adam, "meta", row)
    choice = choose(demand, budget * 2**20)
    assert choice.peak_bytes <= budget * 2**20


@pytest.mark.parametrize("make", [network, block_network])
def test_a_stage_that_runs_out_of_memory_says_how_it_went_on(tmp_path: Path, make) -> None:
    class Told(Reporter):
        reduced: StepMemory | None = None

        def epoch_started(self, epoch: int, rows: int) -> None:
            allocator.reset_peak()

        def batch_finished(self, rows: int) -> None:
            if allocator.limit is None:  # what a step has taken is too much from here on
                allocator.limit = allocator.live + (allocator.peak - allocator.live) // 2

        def memory_reduced(self, number: int, memory: StepMemory) -> None:
            self.reduced, allocator.limit = memory, 2**40

    reporter = Told()
    with Allocator() as allocator:
        first, *_ = fit(tmp_path / "run", make(), reporter=reporter)
    assert reporter.reduced is not None
    assert first.choices.memory_mode == reporter.reduced.mode != Mode.PLAIN
    assert first.choices.micro_batch == reporter.reduced.micro_batch


@pytest.mark.parametrize("budget", [1270, 920, 780])
def test_a_block_s_steps_take_what_was_counted(tmp_path: Path, budget: int) -> None:
    with Counter() as counter:
        peaks = Peaks(counter)
        first, _ = fit(tmp_path, block_network(), memory_budget=f"{budget}KiB", reporter=peaks)
    planned, images = first.choices.planned_peak_bytes, 2 * 64 * SIDE**2 * 4
    assert first.choices.memory_mode != Mode.PLAIN
    assert planned <= budget * 1024
    assert 0.8 * planned <= peaks.bytes[1] <= planned + images + 16 * 1024


def test_a_block_without_batch_norm_keeps_its_input_or_nothing() -> None:
    layers = [nn.Conv2d(1, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 8, 3)]
    stages = cut(nn.Sequential(nn.Sequential(*layers), nn.Flatten(), nn.Linear(800, CLASSES)))
    shape = shapes(stages, (1, SIDE, SIDE))[0]
    what = (stages[0], shape, PredSim(), CLASSES, 64, "float32", fused_adam)
    roomy = choose(StepDemand(*what, "cuda", 1), None)
    tight = choose(StepDemand(*what, "cuda", 1), roomy.peak_bytes - 500 * 1024)
    least = choose(StepDemand(*what, "cuda", 1), tight.peak_bytes, 1)
    assert roomy.mode is Mode.PLAIN
    assert tight.mode is least.mode is Mode.KEEP_NOTHING
    assert 1 == least.micro_batch < tight.micro_batch


def test_a_block_whose_samples_meet_has_the_plain_mode_alone(tmp_path: Path) -> None:
    class Centred(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x - x.mean(0) if self.training else x

    layers = [nn.Conv2d(1, 8, 3, padding=1), Centred(), nn.ReLU(), nn.Flatten()]
    model = nn.Sequential(*layers, nn.Linear(8 * SIDE**2, CLASSES))
    first, _ = fit(tmp_path / "roomy", model)
    assert first.choices.memory_mode == Mode.PLAIN
    with pytest.raises(UserError, match="in mode plain"):
        fit(tmp_path / "tight", model, memory_budget="1MiB")


def test_frozen_stages_that_only_writing_needs_are_streamed_where_there_is_no_room(
    tmp_path: Path,
) -> None:
    """The store of the last of eight equal stages is written from the images, as where the one
    before has fewer views."""
    layers: list[nn.Module] = [nn.Flatten()]
    for _ in range(8):
        layers += [nn.Linear(SIDE**2, SIDE**2), nn.ReLU()]
    model, loss = nn.Sequential(*layers, nn.Linear(SIDE**2, CLASSES)), Pred()
    trainer = GreedyTrainer(model, run_dir=tmp_path / "run", loss=loss, batch_size=8, device="cpu")
    network = CutNetwork.of(trainer.recipe, model, (1, SIDE, SIDE), CLASSES, loss)

    def choice(budget: int | None, written_from: int) -> Choice:
        plan = MemoryPlan(trainer.recipe, network, "float32", budget, "cpu")
        return plan.stage(8, StageStores(7, written_from=written_from))

    step = choice(None, 7).peak_bytes
    assert not choice(None, 0).writes_streamed
    assert not choice(3 * step, 0).writes_streamed
    assert choice(step, 0).writes_streamed
    assert choice(step, 0).write_batch > 1
