"""Training stages, through the Python API."""

import json
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from small_training import (
    CLASSES,
    SIDE,
    TEST,
    TRAIN,
    files,
    learned,
    network,
    new_trainer,
    same,
    samples,
    weights,
)
from torch import nn
from torch.utils.data import TensorDataset

from greedy import UserError, evaluate
from greedy.cache import Store
from greedy.data import dataset_from_torch
from greedy.losses import LocalHeads, PredSim, Sim
from greedy.models import mlp, vgg8b

# Adam makes a whole step of a gradient that is rounding alone; what this one does is as small.
STEADY = {"optimizer": partial(torch.optim.SGD, lr=0.05), "learning_rate": 0.05}


def test_every_stage_learns(tmp_path: Path) -> None:
    records = new_trainer(tmp_path / "run", epochs=6).fit(TRAIN, TEST)
    assert [r.name for r in records] == ["linear16", "linear16", "output"]
    for record in records:
        assert record.metrics.test_error_percent < 33  # chance is 67
        lines = (tmp_path / f"run/stage{record.stage}/history.jsonl").read_text().splitlines()
        assert [json.loads(line)["epoch"] for line in lines] == [1, 2, 3, 4, 5, 6]


def test_the_same_seed_gives_the_same_bytes(finished: Path, tmp_path: Path) -> None:
    new_trainer(tmp_path / "again").fit(TRAIN, TEST)
    new_trainer(tmp_path / "other", seed=1).fit(TRAIN, TEST)
    for stage in (1, 2, 3):
        assert same(weights(finished, stage), weights(tmp_path / "again", stage))
        assert not same(weights(finished, stage), weights(tmp_path / "other", stage))
    for stage in (0, 1, 2):
        name = f"stage{stage}/activations.zarr"
        assert files(finished / name) == files(tmp_path / "again" / name)


def test_the_users_network_is_not_changed(finished: Path, run: Path) -> None:
    model = network()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    trainer = new_trainer(run, model)
    trainer.train(retrain_from=1)
    trainer.assemble()
    assert same(before, model.state_dict())
    assert model.training


def test_any_ancestor_is_a_source(tmp_path: Path) -> None:
    trainer = new_trainer(tmp_path / "run", encoding="float32", **STEADY)
    trainer.fit(TRAIN, TEST)
    replayed = trainer.train_stage(3, source=1, to=tmp_path / "replayed")
    assert replayed.source == 1
    a, b = weights(tmp_path / "run", 3), load_file(tmp_path / "replayed/encoder.safetensors")
    for name, value in a.items():
        torch.testing.assert_close(b[name], value, rtol=1e-3, atol=1e-4)
    with pytest.raises(UserError, match="cannot train from stage 3"):
        trainer.train_stage(2, source=3, again=True)


def test_views_are_the_stage_applied_to_augmented_images(tmp_path: Path) -> None:
    trainer = new_trainer(tmp_path / "run", augmentation="hflip", encoding="float32", views=3)
    trainer.fit(TRAIN, TEST)
    images, store = (Store(tmp_path / f"run/stage{n}/activations.zarr/train") for n in (0, 1))
    assert store.views == 3
    raw = torch.from_numpy(images.load()[0]).float() / 255
    first_stage = trainer.assemble()[:4]  # normalisation, flatten, linear, norm
    plain, flipped = (
        nn.functional.leaky_relu(first_stage(x), 0.01).numpy() for x in (raw, raw.flip(3))
    )
    views = store.load()
    is_plain = np.isclose(views, plain, rtol=1e-4, atol=1e-4).all(axis=2)
    is_flipped = np.isclose(views, flipped, rtol=1e-4, atol=1e-4).all(axis=2)
    assert (is_plain | is_flipped).all()
    assert 0.4 < is_plain.mean() < 0.6
    assert (is_plain[0] != is_plain[1]).any()
    test_rows = Store(tmp_path / "run/stage1/activations.zarr/test").load()
    assert test_rows.shape[0] == 1


def test_live_views_write_no_store_and_are_new_in_every_epoch(tmp_path: Path) -> None:
    trainer = new_trainer(tmp_path / "run", views="live", augmentation="hflip", epochs=4)
    records = trainer.fit(TRAIN, TEST)
    assert [r.source for r in records] == [0, 0, 0]
    assert [r.store for r in records] == [None] * 3
    assert not list((tmp_path / "run").glob("stage[123]/activations.zarr"))
    assert learned(tmp_path / "run", 3)
    before = weights(tmp_path / "run", 3)
    trainer.train_stage(3, source=2, again=True)
    assert same(before, weights(tmp_path / "run", 3))


def test_live_and_stored_views_agree_without_augmentation(tmp_path: Path) -> None:
    """What is replayed is what was stored: only the order of summation may differ."""
    for name, views in (("live", "live"), ("stored", 1)):
        new_trainer(tmp_path / name, views=views, encoding="float32", **STEADY).fit(TRAIN, TEST)
    for stage in (1, 2, 3):
        live, stored = weights(tmp_path / "live", stage), weights(tmp_path / "stored", stage)
        for key, value in stored.items():
            torch.testing.assert_close(live[key], value, rtol=1e-3, atol=1e-4)


def test_rows_are_the_same_samples_in_every_store(finished: Path) -> None:
    for split in ("train", "test"):
        stores = [Store(finished / f"stage{n}/activations.zarr/{split}") for n in (0, 1, 2)]
        for store in stores[1:]:
            np.testing.assert_array_equal(store.labels, stores[0].labels)
            np.testing.assert_array_equal(store.index, stores[0].index)
    store = Store(finished / "stage0/activations.zarr/train")
    original = TRAIN.tensors[0].numpy()[store.index]
    np.testing.assert_array_equal(store.load()[0], original)
    assert (store.index != np.arange(store.rows)).any()


def test_settings_may_be_lists_with_an_entry_a_stage(tmp_path: Path) -> None:
    new_trainer(tmp_path / "run", epochs=[1, 3, 2], learning_rate=[0.01, 0.02, 0.03]).fit(
        TRAIN, TEST
    )
    for stage, (epochs, rate) in enumerate([(1, 0.01), (3, 0.02), (2, 0.03)], start=1):
        history = (tmp_path / f"run/stage{stage}/history.jsonl").read_text().splitlines()
        assert len(history) == epochs
        assert json.loads(history[0])["learning_rate"] == rate
    with pytest.raises(UserError, match=r"training.epochs has 2 entries and the network 3 stages"):
        new_trainer(tmp_path / "other", epochs=[1, 2]).fit(TRAIN, TEST)


def test_patience_drops_the_rate_and_ends_the_stage(tmp_path: Path) -> None:
    settings = {"patience": 1, "epochs": 60, "learning_rate": 0.01}
    trainer = new_trainer(tmp_path / "run", **settings)
    trainer.prepare(dataset_from_torch(TRAIN, TEST))
    trainer.train_stage(1)
    history = [
        json.loads(line)
        for line in (tmp_path / "run/stage1/history.jsonl").read_text().splitlines()
    ]
    rates = [line["learning_rate"] for line in history]
    assert len(history) < 60
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] == pytest.approx(0.01 * 0.25**3)  # the fourth drop ends the stage
    best = float("inf")
    for line, following in pairwise(history):
        improved = line["holdout_loss"] < best * 0.999
        best = line["holdout_loss"] if improved else best
        assert (following["learning_rate"] == line["learning_rate"]) == improved


@pytest.mark.parametrize("unit", [1e-26, 1e-7, 1e22])
def test_images_of_any_unit_are_normalised(tmp_path: Path, unit: float) -> None:
    """One channel is in that unit, one is constant but for rounding."""
    images = np.random.default_rng(0).normal(3, 2, (60, 2, 8, 8)).astype(np.float32)
    images[:, 0] += 20 * (np.arange(60) % 3)[:, None, None]
    images[:, 0] *= np.float32(unit)
    images[:, 1] = 0.1
    data = TensorDataset(torch.from_numpy(images), torch.arange(60) % 3)
    model = mlp(2, 8, 3, hidden_layers=1, hidden_width=8)
    trainer = new_trainer(tmp_path / "run", model, epochs=3, views="live")
    trainer.fit(data, data)
    found = trainer.run.record(0).data_choices
    np.testing.assert_allclose(found.std, (images[:, 0].std(dtype=np.float64), 1), rtol=1e-3)
    np.testing.assert_allclose(found.mean, (images[:, 0].mean(dtype=np.float64), 0.1), rtol=1e-3)
    tested = evaluate(trainer.run, trainer.assemble(), "test", trainer.device)
    assert np.isfinite(tested.loss)
    recorded = trainer.run.record(2).metrics.test_error_percent
    assert tested.error_percent == pytest.approx(recorded, abs=4)  # two images, by rounding


def test_an_image_size_is_for_folders(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data.image_size is 4, .* are 8x8: resize them"):
        new_trainer(tmp_path / "run", image_size=4).fit(TRAIN, TEST)
    assert not (tmp_path / "run/stage0").exists()
    new_trainer(tmp_path / "run", image_size=8, epochs=1).fit(TRAIN, TEST)


def test_held_out_rows_are_never_trained_on(tmp_path: Path) -> None:
    settings = {"patience": 9, "epochs": 1, "mean": [0.4], "std": [0.2]}
    new_trainer(tmp_path / "plain", **settings).fit(TRAIN, TEST)
    index = Store(tmp_path / "plain/stage0/activations.zarr/train").index
    images, labels = (t.clone() for t in TRAIN.tensors)
    images[index[-40:]] = 0  # the last tenth of the rows as stored
    new_trainer(tmp_path / "spoilt", **settings).fit(TensorDataset(images, labels), TEST)
    assert same(weights(tmp_path / "plain", 1), weights(tmp_path / "spoilt", 1))
    images[index[-41]] = 0
    new_trainer(tmp_path / "more", **settings).fit(TensorDataset(images, labels), TEST)
    assert not same(weights(tmp_path / "plain", 1), weights(tmp_path / "more", 1))


class Quarrel:
    """A local loss of the user's own: the mean square of what a linear head makes of h."""

    output_scale = 1.0

    def heads(self, shape, num_classes):
        return LocalHeads(prediction=nn.Linear(shape[0], num_classes))

    def __call__(self, features, y):
        return (features.p - y).square().mean()


def test_loss_and_optimiser_may_be_ones_own(tmp_path: Path) -> None:
    trainer = new_trainer(
        tmp_path / "run",
        loss=Quarrel(),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1.0, momentum=0.9),
        learning_rate=0.1,
        epochs=5,
    )
    records = trainer.fit(TRAIN, TEST)
    assert records[0].metrics.test_error_percent < 33
    assert trainer.assemble(until_stage=1)(torch.rand(2, 1, SIDE, SIDE)).shape == (2, CLASSES)


def test_a_sim_stage_has_no_local_error_and_no_early_exit(tmp_path: Path) -> None:
    trainer = new_trainer(tmp_path / "run", loss=Sim(), epochs=4)
    first, _, last = trainer.fit(TRAIN, TEST)
    assert first.metrics.train_error_percent is None
    assert first.metrics.test_error_percent is None
    assert last.metrics.test_error_percent < 33
    with pytest.raises(UserError, match="stage 1 has no local classifier"):
        trainer.assemble(until_stage=1)


def test_convolutional_stages_with_large_maps_and_odd_batches(tmp_path: Path) -> None:
    torch.manual_seed(0)
    images = torch.randint(0, 255, (65, 3, 32, 32), dtype=torch.uint8)  # 64 + 1 in a batch
    data = TensorDataset(images, torch.arange(65) % CLASSES)
    model = vgg8b(3, 32, CLASSES, feature_multiplier=0.05, hidden_width=8, dropout=0.1)
    trainer = new_trainer(
        tmp_path / "run", model, epochs=1, batch_size=64, augmentation="crop4+hflip"
    )
    records = trainer.fit(data, data)
    assert [r.row_shape for r in records[:2]] == [(6, 32, 32), (12, 16, 16)]
    result = evaluate(trainer.run, trainer.assemble(), "test", torch.device("cpu"))
    assert result.samples == 65
    assert np.isfinite(result.loss)


def test_vectors_are_data_too(tmp_path: Path) -> None:
    images, labels = samples(300, 2).tensors
    vectors = TensorDataset(images.flatten(1).float() * 3 - 100, labels)
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, CLASSES)
    )
    trainer = new_trainer(tmp_path / "run", model, loss=PredSim(), epochs=5)
    records = trainer.fit(vectors, vectors)
    assert records[-1].metrics.test_error_percent < 33
    assert evaluate(trainer.run, trainer.assemble(), "test", torch.device("cpu")).error_percent < 33


def test_an_assembled_network_is_torch_alone(finished: Path) -> None:
    net = new_trainer(finished).assemble()
    assert type(net) is nn.Sequential
    assert all(type(m).__module__.startswith("torch.nn") for m in net.modules())
    assert not net.training
    exit_ = new_trainer(finished).assemble(until_stage=1)
    assert len(exit_) < len(net)


def test_layers_that_draw_numbers_draw_the_same_ones_again(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 8), nn.AlphaDropout(0.3), nn.SELU(), nn.Linear(8, CLASSES)
    )
    for name in ("one", "two"):
        new_trainer(tmp_path / name, model, epochs=1).fit(TRAIN, TEST)  # torch's state differs
    assert same(weights(tmp_path / "one", 1), weights(tmp_path / "two", 1))


def test_precision_is_that_of_the_layer_alone(finished: Path, tmp_path: Path) -> None:
    trainer = new_trainer(tmp_path / "run", precision="bfloat16", epochs=6)
    first, *_, last = trainer.fit(TRAIN, TEST)
    assert first.choices.precision == "bfloat16"
    assert last.metrics.test_error_percent < 33
    assert {v.dtype for k, v in weights(tmp_path / "run", 1).items() if "weight" in k} == {
        torch.float32
    }
    new_trainer(tmp_path / "short", precision="bfloat16").fit(TRAIN, TEST)
    assert not same(weights(finished, 1), weights(tmp_path / "short", 1))


class Watching(PredSim):
    """Keeps the number of classes of every batch."""

    seen: ClassVar[list[int]] = []

    def __call__(self, features, y):
        self.seen.append(int((y.sum(dim=0) > 0).sum()))
        return super().__call__(features, y)


@pytest.mark.parametrize("ram_budget", ["1GiB", "1B"], ids=["in memory", "from disk"])
def test_classes_in_a_batch_are_limited_until_the_first_drop(
    tmp_path: Path, ram_budget: str
) -> None:
    random = np.random.default_rng(0)
    images = torch.from_numpy(random.integers(0, 255, (3000, 1, 4, 4)).astype(np.uint8))
    data = TensorDataset(images, torch.from_numpy(random.integers(0, 60, 3000)))
    few = TensorDataset(*(t[:60] for t in data.tensors))
    Watching.seen.clear()
    model = mlp(1, 4, 60, hidden_layers=1, hidden_width=8)
    trainer = new_trainer(
        tmp_path / "run",
        model,
        loss=Watching(),
        classes_per_batch=20,
        batch_size=64,
        epochs=2,
        milestones=[1],
        ram_budget=ram_budget,
    )
    trainer.prepare(dataset_from_torch(data, few))
    trainer.train_stage(1)
    batches = -(-3000 // 64)
    limited, plain = Watching.seen[:batches], Watching.seen[batches : 2 * batches]
    assert np.mean(limited) < 25
    assert np.mean(plain) > 35
