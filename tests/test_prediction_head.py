"""Hidden layers of the prediction head."""

import json
from pathlib import Path

import onnxruntime
import pytest
import safetensors
import torch
from safetensors.torch import load_file
from small_training import CLASSES, TEST, TRAIN, convolutional, new_trainer
from torch import Tensor, nn

from greedy import GreedyTrainer
from greedy.cache import Store
from greedy.losses import Pred, PredictionHead, PredSim
from greedy.results.evaluation import evaluate, raw_to_float
from greedy.results.export import export, format_of

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> GreedyTrainer:
    trainer = new_trainer(
        tmp_path_factory.mktemp("runs") / "run",
        convolutional(),
        loss=PredSim(0.5, pool_target=60, hidden_layers=2),
        epochs=6,
        views=1,
        encoding="float32",
    )
    trainer.fit(TRAIN, TEST)
    return trainer


@pytest.mark.parametrize("shape", [(6, 7, 5), (9,)])
def test_hidden_layers_keep_the_width_and_see_a_row_at_a_time(shape: tuple[int, ...]) -> None:
    head = PredictionHead(shape, CLASSES, pool_target=40, hidden_layers=2).double()
    layer = nn.Conv2d if len(shape) == 3 else nn.Linear
    kinds = [type(module) for module in head][:4]
    assert kinds == [layer, nn.ReLU, layer, nn.ReLU]
    hidden = nn.Sequential(*list(head)[:4])
    h = torch.randn(4, *shape).double()
    before = h.clone()
    assert hidden(h).shape == h.shape
    assert torch.equal(h, before)
    nn.init.normal_(head.classifier.weight)
    torch.testing.assert_close(torch.cat([head(row) for row in h.split(1)]), head(h))
    assert not any("norm" in type(module).__name__.lower() for module in head.modules())


def test_without_hidden_layers_the_head_is_what_it_was() -> None:
    shallow = ["prediction.classifier.weight", "prediction.classifier.bias"]
    assert list(Pred().heads((6, 7, 5), CLASSES).state_dict()) == shallow
    deep = Pred(hidden_layers=1).heads((6, 7, 5), CLASSES)
    assert list(deep.state_dict()) == ["prediction.hidden1.weight", *shallow]


def test_hidden_layers_learn_and_are_kept(trained: GreedyTrainer) -> None:
    for number, shape in ((1, (6, 6, 3, 3)), (2, (16, 16))):
        record = trained.run.record(number)
        assert record.metrics.test_error_percent < 33  # chance is 67
        heads = load_file(trained.run.stage_dir(number) / "heads.safetensors")
        assert heads["prediction.hidden1.weight"].shape == shape
        assert heads["prediction.hidden2.weight"].shape == shape


@pytest.mark.parametrize("number", [1, 2])
def test_early_exit_does_as_well_as_the_stage_did(trained: GreedyTrainer, number: int) -> None:
    figures = evaluate(trained.run, trained.assemble(number), "test", CPU)
    expected = trained.run.record(number).metrics.test_error_percent
    assert figures.error_percent == pytest.approx(expected, abs=3)  # in other batches


@pytest.mark.parametrize("suffix", [".safetensors", ".pt2", ".onnx"])
def test_early_exit_is_exported(trained: GreedyTrainer, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"network{suffix}"
    export(trained.run, trained.loss, convolutional(), path, format_of(path), until_stage=1)
    store = Store(trained.run.store_path(0) / "test")
    images = raw_to_float(next(store.batches(0, 8)), CPU)
    with torch.no_grad():
        logits = loaded(path, images)
        torch.testing.assert_close(logits, trained.assemble(1)(images), atol=1e-3, rtol=0)
    assert logits.std(dim=0).min() > 1e-3  # it has learned something to compare


def loaded(path: Path, images: Tensor) -> Tensor:
    """Returns the logits of an exported network, loaded without this package."""
    if path.suffix == ".onnx":
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        return torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])
    if path.suffix == ".pt2":
        return torch.export.load(path).module()(images)
    with safetensors.safe_open(path, "pt") as file:
        modules = json.loads(file.metadata()["modules"])
    network = nn.Sequential(*(getattr(nn, name)(**arguments) for name, arguments in modules))
    network.load_state_dict(load_file(path))
    return network.eval()(images)
