"""Training in a run directory that has files already, and what is refused."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

import numpy as np
import pytest
import torch
from small_training import (
    CLASSES,
    SIDE,
    TEST,
    TRAIN,
    files,
    network,
    new_trainer,
    samples,
    states,
)
from torch import nn
from torch.utils.data import TensorDataset

from greedy import Reporter, RunDirectory, TrainingError, UserError
from greedy.base.files import with_digest
from greedy.losses import Pred
from greedy.models import mlp
from greedy.recipes import load
from greedy.runs.integrity import verify_run
from greedy.runs.plan_basis import disk_room
from greedy.runs.state import RunState


class NotANumber(Pred):
    def __call__(self, features, y):
        return super().__call__(features, y) * float("nan")


def test_a_finished_stage_is_trained_again_only_when_asked(run: Path) -> None:
    before = files(run)
    new_trainer(run).fit(TRAIN, TEST)
    assert files(run) == before
    new_trainer(run).train(retrain_from=3)
    after = files(run)
    assert after["stage3/encoder.safetensors"] == before["stage3/encoder.safetensors"]
    assert after["stage3/stage.json"] != before["stage3/stage.json"]  # it took its own time
    assert after["stage2/stage.json"] == before["stage2/stage.json"]


def test_a_retraining_that_fails_leaves_the_old_stage(run: Path) -> None:
    before = files(run / "stage2")
    trainer = new_trainer(run)
    trainer._planner.loss = NotANumber()
    with pytest.raises(TrainingError, match="stage 2 is not finite in epoch 1"):
        trainer.train_stage(2, again=True)
    left = files(run / "stage2")
    assert {k: v for k, v in left.items() if not k.startswith("training/")} == before
    assert RunState.read(new_trainer(run).run).stage_state(2) == "complete"


def test_stages_after_a_retrained_one_are_stale(run: Path, tmp_path: Path) -> None:
    trainer = new_trainer(run)
    first = trainer.run.path / "stage1"
    other = tmp_path / "other"
    new_trainer(other, seed=1).fit(TRAIN, TEST)
    shutil.rmtree(first)
    shutil.copytree(other / "stage1", first)  # not what stage 2 was trained from
    assert states(trainer.run, (1, 2, 3)) == ["stale", "stale", "stale"]
    with pytest.raises(UserError, match="stage 1 .* is stale .*--retrain 1"):
        trainer.train()
    trainer.train(retrain_from=1)
    assert states(trainer.run, (1, 2, 3)) == ["complete"] * 3


def test_an_exchange_of_stages_is_completed_after_a_crash(run: Path) -> None:
    before = files(run / "stage1")
    (run / "stage1").rename(run / ".stage1.new")  # between the two renames
    new_trainer(run).train()
    assert files(run / "stage1") == before
    shutil.copytree(run / "stage1", run / ".stage1.old")  # after the second
    new_trainer(run).train()
    assert files(run / "stage1") == before
    assert not list(run.glob(".stage*"))


def test_a_run_is_read_while_its_stages_are_exchanged(run: Path) -> None:
    new_trainer(run.with_name("other")).fit(samples(400, 2), TEST)
    shutil.copytree(run.with_name("other") / "stage1", run / ".stage1.new")
    done = Event()

    def exchange() -> None:
        while not done.wait(0.02):
            (run / "stage1").rename(run / ".stage1.old")
            (run / ".stage1.new").rename(run / "stage1")
            (run / ".stage1.old").rename(run / ".stage1.new")

    with ThreadPoolExecutor() as threads:
        exchanging = threads.submit(exchange)
        try:
            for _ in range(50):
                assert not verify_run(run)
                assert disk_room(RunDirectory.open(run)) > 0
        finally:
            done.set()
        exchanging.result()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epoch": 3}, "unknown setting 'epoch': did you mean epochs"),
        ({"views": 0}, "store.views"),
        (
            {"mean": [0.5] * 3, "std": [0.5] * 3},
            "data.mean has 3 entries and the images 1 channels",
        ),
        ({"device": "gpu"}, "'gpu' is not a device"),
        ({"model": mlp(1, SIDE, 7)}, "ends in 7 values and the data have 3 classes"),
        ({"model": mlp(1, 9, CLASSES)}, r"stage 1 \(linear1024\) cannot take an input of shape"),
    ],
)
def test_what_cannot_be_trained_is_refused(tmp_path: Path, change: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        new_trainer(tmp_path / "run", **change).fit(TRAIN, TEST)
    assert not (tmp_path / "run/stage1/stage.json").exists()


def test_a_run_starts_where_one_was_killed_at_its_start(tmp_path: Path) -> None:
    for name in (".lock", ".lock.json.part", "run.toml.part"):
        (tmp_path / name).touch()
    new_trainer(tmp_path, epochs=1)
    (tmp_path / "mine").touch()
    with pytest.raises(UserError, match="is not empty and not a run directory"):
        new_trainer(tmp_path, epochs=1)


def test_images_too_small_for_their_augmentation_leave_no_trace(tmp_path: Path) -> None:
    images, labels = TRAIN.tensors
    small = TensorDataset(images[:, :, :4, :4], labels)
    with pytest.raises(UserError, match="4x4 are too small to be shifted by 4 pixels"):
        new_trainer(tmp_path / "run", mlp(1, 4, CLASSES), augmentation="crop4").fit(small, small)
    assert not (tmp_path / "run").exists()


def test_other_settings_are_refused_in_a_run(run: Path) -> None:
    with pytest.raises(UserError, match=r"training.epochs is 2 there, 5 here"):
        new_trainer(run, epochs=5)
    new_trainer(run, ram_budget="1GiB")  # a machine field


def test_another_network_is_refused_in_a_run(run: Path) -> None:
    for other in (nn.Tanh(), nn.LeakyReLU(0.5)):
        model = network()
        assert isinstance(model[3], nn.LeakyReLU)
        model[3] = other
        with pytest.raises(UserError, match="holds other layers than stage 1 of this network"):
            new_trainer(run, model).assemble()


def test_a_stage_begun_with_other_layers_is_set_aside(tmp_path: Path) -> None:
    class Stopping(Reporter):
        def epoch_started(self, epoch: int, rows: int) -> None:
            if epoch == 2:
                raise ZeroDivisionError

    class Told(Reporter):
        aside: Path | None = None

        def training_set_aside(self, number: int, path: Path, progress: str) -> None:
            self.aside = path

    with pytest.raises(ZeroDivisionError):
        new_trainer(tmp_path / "run", reporter=Stopping()).fit(TRAIN, TEST)
    shutil.copytree(tmp_path / "run", tmp_path / "older")
    model, told = network(), Told()
    model[3] = nn.LeakyReLU(0.5)
    new_trainer(tmp_path / "run", model, reporter=told).train()
    assert told.aside is not None and told.aside.exists()

    # Another release of torch may write them in another way.
    start = tmp_path / "older/stage1/training/checkpoint/start.json"
    document = json.loads(start.read_text())
    layers = [layer.replace("affine=True", "affine=True, new=True") for layer in document["layers"]]
    assert layers != document["layers"]
    del document["digest"]
    document |= {"layers": layers, "torch": "2.0.0"}
    start.write_bytes(with_digest(document))
    told = Told()
    new_trainer(tmp_path / "older", reporter=told).train()
    assert told.aside is None


def test_numbers_far_from_zero_have_their_own_deviation(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    values = random.normal(0, 1, (400, 2, 4, 4))
    values[:, 0] = 1.7e9 + 1000 * values[:, 0]  # as times are
    values[:, 1] = 0.1  # not exactly a float
    images = torch.from_numpy(values.astype(np.float32))
    data = TensorDataset(images, torch.arange(400) % CLASSES)
    new_trainer(tmp_path / "run", mlp(2, 4, CLASSES), augmentation="none", epochs=1).fit(data, data)
    found = RunDirectory.open(tmp_path / "run").record(0).data_choices
    exact = images[:, 0].double()
    assert found.mean[0] == pytest.approx(float(exact.mean()), rel=1e-12)
    assert found.std[0] == pytest.approx(float(exact.std(correction=0)), rel=1e-9)
    assert found.std[1] == 1.0


@pytest.mark.parametrize(
    ("hidden_layers", "differs"),
    [(1, "stage 2 is output in this network and linear16"), (3, "stage 3 is linear16 .* output")],
)
def test_a_network_of_other_stages_is_refused_in_a_run(
    run: Path, hidden_layers: int, differs: str
) -> None:
    changed = new_trainer(run, network(hidden_layers=hidden_layers))
    with pytest.raises(UserError, match=f"{differs}.*give the network .--model. that the run"):
        changed.assemble()


def test_other_data_are_refused_in_a_run(run: Path) -> None:
    with pytest.raises(UserError, match=r"\(there were 400 \+ 100 rows of 1x8x8\)"):
        new_trainer(run).fit(samples(300, 0), TEST)
    images, labels = TRAIN.tensors
    for other in (TensorDataset(images.flip(3), labels), TensorDataset(images, labels.flip(0))):
        with pytest.raises(UserError, match="(images|labels) of the train split"):
            new_trainer(run).fit(other, TEST)
    with pytest.raises(UserError, match="other data than .* of the test split"):
        new_trainer(run).fit(TRAIN, samples(100, 2))


def test_images_transformed_at_random_are_the_same_data(tmp_path: Path) -> None:
    class Noisy(TensorDataset):
        def __getitem__(self, index):
            image, label = super().__getitem__(index)
            return image + torch.randint(0, 20, image.shape, dtype=torch.uint8), label

    images, labels = TRAIN.tensors
    frozen = {"epochs": 1, "transforms": "frozen"}
    for _ in range(2):
        new_trainer(tmp_path / "run", **frozen).fit(Noisy(images, labels), TEST)
    others = Noisy(images, (labels + 1) % CLASSES)
    with pytest.raises(UserError, match="other data than .* labels of the train split"):
        new_trainer(tmp_path / "run", **frozen).fit(others, TEST)


def test_a_class_without_images_is_named(tmp_path: Path) -> None:
    class Named(TensorDataset):
        classes = ("dark", "left", "middle", "right")

    model = mlp(1, SIDE, CLASSES + 1, hidden_layers=1)
    with pytest.raises(UserError, match=r"ends in 4 values .* 3 classes: .* attribute `classes`"):
        new_trainer(tmp_path / "run", model).fit(TRAIN, TEST)
    assert RunDirectory.open(tmp_path / "run").record(0) is None
    new_trainer(tmp_path / "run", model).fit(Named(*TRAIN.tensors), TEST)


def test_a_stage_is_not_written_into_a_run_from_outside(run: Path) -> None:
    for place in (run / "mine", run / "stage2/mine"):
        with pytest.raises(UserError, match="is inside the run directory"):
            new_trainer(run).train_stage(1, to=place)
        assert not place.exists()


def test_a_run_may_share_the_source_folder_cache_of_a_checkout() -> None:
    cache = Path(__file__).parents[1] / "cache"
    assert RunDirectory.create(cache, load("demo")).path == cache


def test_settings_are_free_until_there_are_data(tmp_path: Path) -> None:
    bad = TensorDataset(TRAIN.tensors[0], TRAIN.tensors[1] - 1)
    with pytest.raises(UserError, match="number the classes from 0"):
        new_trainer(tmp_path / "run").fit(bad, TEST)
    new_trainer(tmp_path / "run", epochs=1).fit(TRAIN, TEST)


def test_reading_a_run_changes_nothing(run: Path) -> None:
    (run / "stage2").rename(run / ".stage2.new")
    before = files(run)
    RunDirectory.open(run)
    assert files(run) == before


def test_a_damaged_weight_file_is_named(run: Path) -> None:
    path = run / "stage1/encoder.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="stage1/encoder.safetensors is not the file"):
        new_trainer(run).assemble()


def test_data_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    images = torch.rand(64, 2, SIDE, SIDE)
    images[7, 1, 0, 0] = float("nan")
    data = TensorDataset(images, torch.arange(64) % CLASSES)
    with pytest.raises(UserError, match=r"not finite .* in 1 of 64 samples looked at \(7\)"):
        new_trainer(tmp_path / "run", mlp(2, SIDE, CLASSES, hidden_layers=1)).fit(data, data)
