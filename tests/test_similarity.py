"""Similarity matrices of the stages of real runs."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pytest
import safetensors.torch
import torch
from small_training import convolutional, new_trainer
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from greedy import GreedyTrainer, UserError
from greedy.cache import Store
from greedy.losses import LocalHeads, LocalLoss, Pred, PredSim, Sim, SimilarityHead, similarity_loss
from greedy.results.evaluation import raw_to_float
from greedy.results.similarity import BatchSimilarity, similarity_by_stage

CLASSES = 4
SETTINGS = {"epochs": 5, "views": 1, "encoding": "float32"}


class OwnLoss:
    """A loss that greedy does not know, with a similarity head."""

    output_scale = 1.0

    def heads(self, shape: Sequence[int], num_classes: int) -> LocalHeads:
        return LocalHeads(similarity=SimilarityHead(tuple(shape)))

    def __call__(self, features: tuple[Tensor, Tensor], y: Tensor) -> Tensor:
        return similarity_loss(features[0], y)


class Trained(NamedTuple):
    trainer: GreedyTrainer
    model: nn.Sequential

    def similarity(self, loss: LocalLoss | None = None, **options: int) -> BatchSimilarity:
        return similarity_by_stage(self.trainer.run, loss, self.model, **options)

    def images(self, batch: BatchSimilarity) -> Tensor:
        store = Store(self.trainer.run.store_path(0) / "test")
        return raw_to_float(store.read_rows(0, 0, store.rows)[batch.rows], torch.device("cpu"))


def images(rows: int, classes: int = CLASSES) -> TensorDataset:
    """Returns noise over a pattern for each class."""
    generator = torch.Generator().manual_seed(1)
    patterns = torch.rand(classes, 1, 8, 8, generator=generator)
    labels = torch.randint(classes, (rows,), generator=generator)
    noise = torch.rand(rows, 1, 8, 8, generator=generator)
    data = TensorDataset((255 * (0.5 * patterns[labels] + 0.5 * noise)).byte(), labels)
    data.classes = [f"class {number}" for number in range(classes)]
    return data


def trained(directory, loss: LocalLoss, classes: int = CLASSES) -> Trained:
    model = convolutional(classes)
    trainer = new_trainer(directory, model, loss=loss, **SETTINGS)
    trainer.fit(images(400, classes), images(150, classes))
    return Trained(trainer, model)


@pytest.fixture(scope="module")
def sim(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("sim") / "run", Sim())


@pytest.fixture(scope="module")
def pred(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("pred") / "run", Pred())


def assert_correlations(matrix: np.ndarray, features: Tensor) -> None:
    np.testing.assert_allclose(matrix, np.corrcoef(features.numpy()), atol=1e-3)


def test_the_batch_is_sorted_by_class_and_its_target_follows(sim):
    batch = sim.similarity()
    store = Store(sim.trainer.run.store_path(0) / "test")
    assert sorted(batch.rows) == list(range(100))
    assert batch.labels.tolist() == store.labels[batch.rows].tolist() == sorted(batch.labels)
    assert batch.class_names == ["class 0", "class 1", "class 2", "class 3"]
    same = batch.labels[:, None] == batch.labels
    np.testing.assert_allclose(batch.target, np.where(same, 1, -1 / 3), atol=1e-6)


def test_a_stage_trained_with_sim_is_nearer_to_the_target_than_the_images(sim):
    images, first, second, _ = sim.similarity().stages
    assert second.difference < first.difference
    assert second.difference < 0.5 * images.difference


def test_differences_are_those_of_the_matrices(sim):
    batch = sim.similarity()
    for each in batch.stages:
        assert each.matrix.shape == (100, 100) and np.abs(each.matrix).max() <= 1
        expected = np.square(each.matrix - batch.target).mean()
        assert each.difference == pytest.approx(expected, rel=1e-3)


def test_with_a_similarity_head_its_features_are_compared(sim):
    batch = sim.similarity()
    assert [(each.stage, each.name, each.features) for each in batch.stages] == [
        (0, "images", "pixels"),
        (1, "conv6", "similarity head"),
        (2, "linear16", "similarity head"),
        (3, "output", "logits"),
    ]
    run, net = sim.trainer.run, sim.trainer.assemble()
    raw = sim.images(batch)
    heads = [safetensors.torch.load_file(run.stage_dir(n) / "heads.safetensors") for n in (1, 2)]
    (kernel,), (weight,) = (each.values() for each in heads)
    h = net[:4](raw)  # normalisation, convolution, batch norm, activation
    z = nn.functional.conv2d(h, kernel, padding=1).flatten(2).std(dim=2)
    assert_correlations(batch.stages[0].matrix, net[0](raw).flatten(1))
    assert_correlations(batch.stages[1].matrix, z)
    assert_correlations(batch.stages[2].matrix, net[:-1](raw) @ weight.T)
    assert_correlations(batch.stages[3].matrix, net(raw))


def test_without_one_the_activation_is_compared(pred):
    batch = pred.similarity()
    assert [each.features for each in batch.stages] == [
        "pixels",
        "activation",
        "activation",
        "logits",
    ]
    net, raw = pred.trainer.assemble(), pred.images(batch)
    assert_correlations(batch.stages[1].matrix, net[:4](raw).flatten(2).std(dim=2))
    assert_correlations(batch.stages[2].matrix, net[:-1](raw))


def test_a_loss_of_ones_own_is_given_or_its_heads_are_not_known(tmp_path):
    done = trained(tmp_path / "run", OwnLoss())
    features = [each.features for each in done.similarity(OwnLoss()).stages]
    assert features == ["pixels", "similarity head", "similarity head", "logits"]
    features = [each.features for each in done.similarity().stages]
    assert features == ["pixels", "activation", "activation", "logits"]


def test_the_stages_that_are_there(tmp_path):
    model = convolutional(CLASSES)
    trainer = new_trainer(tmp_path / "run", model, loss=PredSim(), **SETTINGS)
    with pytest.raises(UserError, match="is not finished"):
        Trained(trainer, model).similarity()
    trainer.fit(images(400), images(30))
    whole = Trained(trainer, model).similarity()
    assert len(whole.rows) == 30  # all there are
    trainer.run.stage_dir(2).rename(tmp_path / "stage2")
    batch = Trained(trainer, model).similarity()
    assert [each.stage for each in batch.stages] == [0, 1]
    np.testing.assert_array_equal(batch.stages[1].matrix, whole.stages[1].matrix)


def test_of_many_classes_a_batch_has_ten(tmp_path):
    done = trained(tmp_path / "run", Sim(), classes=15)
    batch = done.similarity(rows=60)
    assert len(np.unique(batch.labels)) == 10
    assert len(batch.rows) == len(np.unique(batch.rows)) == 60
    store = Store(done.trainer.run.store_path(0) / "test")
    assert batch.labels.tolist() == store.labels[batch.rows].tolist() == sorted(batch.labels)


def test_the_network_is_asked_for(sim):
    other = nn.Sequential(*convolutional(CLASSES), nn.ReLU(), nn.Linear(CLASSES, CLASSES))
    with pytest.raises(UserError, match="--model"):
        similarity_by_stage(sim.trainer.run)
    with pytest.raises(UserError, match="stage 3 is linear4 in this network and output .*--model"):
        similarity_by_stage(sim.trainer.run, model=other)
