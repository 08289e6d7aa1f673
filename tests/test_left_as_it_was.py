"""What is done with a caller's network leaves it as it was, where it was, and fit to be trained."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from small_training import CLASSES, SIDE, TEST, TRAIN, new_trainer
from torch import nn

from greedy import GreedyTrainer, evaluate, predict
from greedy.losses import PredSim
from greedy.memory.choice import reserved
from greedy.memory.counting import Counter
from greedy.memory.forward import fit_forward
from greedy.results.exits import evaluate_exits
from greedy.results.export import export
from greedy.results.similarity import similarity_by_stage

CPU, ELSEWHERE = torch.device("cpu"), torch.device("meta")


class Remembering(nn.Module):
    """A module with two names for one layer, a buffer that counts, one that is no part of its
    state, and a table that is made when it is first needed."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 3, padding=1)
        self.again = self.conv
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("factor", torch.full((1, 1, 1, 1), 0.5), persistent=False)
        self.table: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.table is None:
            self.table = torch.arange(SIDE) / SIDE
        return self.again(self.conv(x)) * self.factor + self.table


class Merging(nn.Dropout):
    """Merges its weights when training ends, as layers of low rank do."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def train(self, mode: bool = True) -> "Merging":
        if self.training and not mode:
            self.weight.data += 1
        return super().train(mode)


class Failing(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("as it is")


def own_network(*more: nn.Module) -> nn.Sequential:
    """Makes a network in training mode but for one layer, some of it frozen, with gradients of a
    step."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), Merging()]
    head = [nn.Flatten(), nn.Linear(4 * SIDE * SIDE, CLASSES)]
    network = nn.Sequential(Remembering(), nn.BatchNorm2d(1), *layers, *head, *more)
    network[1].eval().requires_grad_(False)
    if not more:
        trained(network)
    return network


def trained(network: nn.Module) -> float:
    """Computes the loss and gradients of a step on the CPU, as users write it."""
    images, labels = TRAIN[:32]
    loss = F.cross_entropy(network(images.float() / 255), labels)
    loss.backward()
    torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr=0.01).step()
    return float(loss.detach())


def state(network: nn.Module) -> list:
    """Returns everything of a network that calling it could change: tensors, by identity and by
    their numbers, and flags."""
    parameters = list(network.named_parameters(remove_duplicate=False))
    buffers = list(network.named_buffers(remove_duplicate=False))
    values: list = [(name, module.training) for name, module in network.named_modules()]
    for name, tensor in parameters + buffers:
        values += [name, id(tensor), tensor.device, tensor.requires_grad, tensor.is_inference()]
        values += [id(tensor.grad), tensor.tolist(), tensor.grad is None or tensor.grad.tolist()]
    return values


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> GreedyTrainer:
    trainer = new_trainer(tmp_path_factory.mktemp("trained") / "run", epochs=1)
    trainer.fit(TRAIN, TEST)
    return trainer


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "one.png"
    Image.fromarray(TEST[0][0][0].numpy().astype(np.uint8)).save(path)
    return path


def by_predict(run: GreedyTrainer, network: nn.Sequential, picture: Path) -> None:
    (prediction,) = predict(run.run, network, [picture], CPU, top=1)
    assert 0 < prediction.confidences[0] <= 1


def by_evaluate(run: GreedyTrainer, network: nn.Sequential, picture: Path) -> None:
    evaluate(run.run, network, "test", CPU)


@pytest.mark.parametrize("use", [by_evaluate, by_predict])
def test_a_network_stays_as_it_was_and_trains_on(
    run: GreedyTrainer, picture: Path, use: Callable[..., None]
) -> None:
    network, twin = own_network(), own_network()
    before = state(network)
    use(run, network, picture)
    assert state(network) == before
    torch.manual_seed(1)
    losses = [trained(network)]
    torch.manual_seed(1)
    losses.append(trained(twin))
    assert losses[0] == losses[1]


def test_what_training_gives_can_be_evaluated_and_trained_on(run: GreedyTrainer) -> None:
    network = run.assemble().requires_grad_(True)
    network[1:].train()  # but for what normalises images
    before = state(network)
    evaluate(run.run, network, "test", CPU)
    assert state(network) == before
    trained(network)


def test_a_network_is_evaluated_in_evaluation_mode(run: GreedyTrainer) -> None:
    network, quiet = own_network(), own_network()
    for module in quiet.modules():
        module.training = False
    images, labels = TEST.tensors
    with torch.no_grad():
        expected = F.cross_entropy(quiet(images.float() / 255), labels)
    assert evaluate(run.run, network, "test", CPU).loss == pytest.approx(float(expected), rel=1e-5)


def test_a_network_that_fails_stays_as_it_was(run: GreedyTrainer, picture: Path) -> None:
    network = own_network(Failing())
    before = state(network)
    with pytest.raises(RuntimeError, match="as it is"):
        evaluate(run.run, network, "test", CPU)
    with pytest.raises(RuntimeError, match="as it is"):
        by_predict(run, network, picture)
    assert state(network) == before


@pytest.mark.parametrize("share", [2.0, 0.7], ids=["whole", "a module at a time"])
def test_another_device_gets_copies_and_each_weight_once(share: float) -> None:
    """The meta device stands for a GPU."""
    torch.manual_seed(0)
    twice = nn.Linear(256, 256)
    layers = [nn.Linear(256, 256) for _ in range(20)]
    network = nn.Sequential(nn.Flatten(), twice, *layers, twice)
    before = state(network)
    size = sum(p.numel() * p.element_size() for p in network.parameters())  # the shared one once
    forward = fit_forward(
        network, (1, 16, 16), int(share * size) + 2**20 + reserved(0, "cuda"), "cuda"
    )
    assert forward.resident == (share > 1)
    with Counter("meta") as counter:
        for _ in range(2):
            out = forward(torch.zeros(1, 1, 16, 16, device=ELSEWHERE))
    assert out.device == ELSEWHERE and not out.requires_grad
    assert (size if share > 1 else size // 21) < counter.peak < share * size / 1.5
    assert state(network) == before


def test_weights_that_are_on_the_device_are_not_copied() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(256, 256))
    forward = fit_forward(network, (1, 16, 16), 2**30, "cpu")
    with Counter() as counter:
        forward(torch.zeros(1, 1, 16, 16))
    assert counter.peak < 16 * 1024


def test_a_network_that_is_trained_or_looked_at_by_stage_stays_as_it_was(tmp_path: Path) -> None:
    network = own_network()
    before = state(network)
    trainer = new_trainer(tmp_path / "run", network, epochs=1)
    trainer.fit(TRAIN, TEST)
    evaluate_exits(trainer.run, PredSim(), network, "test", CPU)
    similarity_by_stage(trainer.run, PredSim(), network, rows=20)
    export(trainer.run, None, network, tmp_path / "net.pt2", "torch-export")
    assert state(network) == before
    trained(network)
