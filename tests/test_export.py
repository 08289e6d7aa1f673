"""Exported networks, loaded as a stranger loads them."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import onnxruntime
import pytest
import safetensors
import torch
import torch.nn.functional as F
from small_training import new_trainer
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from greedy import GreedyTrainer
from greedy.base.errors import UserError
from greedy.cache import Store
from greedy.losses import LocalLoss, PredSim, Sim
from greedy.results.evaluation import evaluate, raw_to_float
from greedy.results.export import FORMATS, export, format_of

Loaded = tuple[Callable[[Tensor], Tensor], dict[str, str]]
CPU = torch.device("cpu")
CLASSES = ["cat", "dog", "hen", "zébu"]
SETTINGS = {"epochs": 1, "batch_size": 16, "views": 1, "encoding": "float32"}


class Trained(NamedTuple):
    trainer: GreedyTrainer
    model: nn.Sequential


def trained(directory: Path, model: nn.Sequential, images: Tensor, loss: LocalLoss) -> Trained:
    labels = torch.arange(len(images)) % len(CLASSES)
    train_set, test_set = TensorDataset(images, labels), TensorDataset(images[:40], labels[:40])
    train_set.classes = CLASSES
    trainer = new_trainer(directory, model, loss=loss, **SETTINGS)
    trainer.fit(train_set, test_set)
    return Trained(trainer, model)


@pytest.fixture(scope="module")
def of_images(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Trains four stages, with many modules that are not of the usual kind, on colour images in
    bytes."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Sequential(
            nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8, affine=False)),
            nn.LeakyReLU(0.1),
            nn.MaxPool2d(2),
            nn.Dropout2d(0.1),
        ),
        nn.Sequential(
            nn.Conv2d(8, 6, (3, 1), padding=(1, 0), padding_mode="reflect", bias=False),
            nn.BatchNorm2d(6, eps=1e-3),
            nn.ReLU(inplace=True),
            nn.AvgPool2d(2, padding=1, count_include_pad=False),
        ),
        nn.Flatten(),
        nn.Sequential(nn.Linear(54, 16), nn.BatchNorm1d(16), nn.GELU("tanh"), nn.Dropout(0.2)),
        nn.Linear(16, 4),
    )
    images = torch.randint(0, 256, (120, 3, 11, 9), dtype=torch.uint8)
    return trained(tmp_path_factory.mktemp("images"), network, images, PredSim(pool_target=50))


@pytest.fixture(scope="module")
def of_vectors(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Trains two stages on vectors of floats, without local classifiers."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Flatten(), nn.Linear(5, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 4)
    )
    vectors = 30 + 20 * torch.randn(120, 5)
    return trained(tmp_path_factory.mktemp("vectors"), network, vectors, Sim())


def written(
    done: Trained, to: Path, format: str | None = None, until: int | None = None, **options: Any
) -> Path:
    run, loss = done.trainer.run, done.trainer.loss
    return export(run, loss, done.model, to, format or format_of(to), until, **options)


def load_safetensors(path: Path) -> Loaded:
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    modules = json.loads(metadata["modules"])
    network = nn.Sequential(*(getattr(nn, name)(**arguments) for name, arguments in modules))
    network.load_state_dict(weights)
    return network.eval(), metadata


def load_torch_export(path: Path) -> Loaded:
    metadata = dict.fromkeys(("class_names", "input", "input_shape"), "")
    program = torch.export.load(path, extra_files=metadata)
    return program.module(), metadata


def load_onnx(path: Path) -> Loaded:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def logits(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])

    return logits, session.get_modelmeta().custom_metadata_map


LOADERS = {"safetensors": load_safetensors, "torch-export": load_torch_export, "onnx": load_onnx}


def assert_same_as_evaluate(done: Trained, path: Path, until: int | None = None) -> Loaded:
    trainer = done.trainer
    network, metadata = LOADERS[format_of(path)](path)
    reference = trainer.assemble(until)
    store = Store(trainer.run.store_path(0) / "test")
    images = raw_to_float(next(store.batches(0, store.rows)), CPU)
    labels = torch.from_numpy(store.labels[:])
    with torch.no_grad():
        for batch in (images[:1], images[1:8]):
            torch.testing.assert_close(network(batch), reference(batch), atol=1e-3, rtol=0)
        logits = network(images)
    figures = evaluate(trainer.run, reference, "test", CPU)
    wrong = (logits.argmax(1) != labels).float().mean()
    assert 100 * float(wrong) == pytest.approx(figures.error_percent, abs=5)  # of 40 rows
    assert float(F.cross_entropy(logits, labels)) == pytest.approx(figures.loss, abs=1e-3)
    assert logits.std(dim=0).min() > 1e-3  # it has learned something to compare
    return network, metadata


@pytest.mark.parametrize("until", [None, 1, 3])
@pytest.mark.parametrize("format", FORMATS)
def test_loaded_network_gives_the_logits_of_evaluate(of_images, tmp_path, capfd, format, until):
    path = tmp_path / f"network{FORMATS[format]}"
    assert written(of_images, path, until=until) == path
    assert capfd.readouterr().out == ""
    assert list(tmp_path.iterdir()) == [path]
    _, metadata = assert_same_as_evaluate(of_images, path, until)
    assert json.loads(metadata["class_names"]) == CLASSES
    assert json.loads(metadata["input_shape"]) == [3, 11, 9]
    assert metadata["input"] == "images (batch, 3, 11, 9), float32, in [0, 1]"
    assert b"site-packages" not in path.read_bytes()


@pytest.mark.parametrize("format", FORMATS)
def test_floats_go_in_as_they_are(of_vectors, tmp_path, format):
    path = written(of_vectors, tmp_path / f"network{FORMATS[format]}")
    _, metadata = assert_same_as_evaluate(of_vectors, path)
    assert json.loads(metadata["input_shape"]) == [5, 1, 1]
    assert metadata["input"].endswith("with the values they have in the data set")


def test_modules_are_named_with_what_is_not_default(of_vectors, tmp_path):
    _, metadata = load_safetensors(written(of_vectors, tmp_path / "network.safetensors"))
    assert json.loads(metadata["modules"]) == [
        ["BatchNorm2d", {"num_features": 5, "eps": 0.0, "affine": False}],
        ["Flatten", {}],
        ["Linear", {"in_features": 5, "out_features": 12}],
        ["BatchNorm1d", {"num_features": 12}],
        ["ReLU", {}],
        ["Linear", {"in_features": 12, "out_features": 4}],
    ]


@pytest.mark.parametrize("until", [None, 1, 2, 3])
def test_assembled_network_does_as_well_as_its_last_stage_did(of_images, until):
    trainer = of_images.trainer
    figures = evaluate(trainer.run, trainer.assemble(until), "test", CPU)
    record = trainer.run.record(until or 4)
    assert figures.error_percent == pytest.approx(record.metrics.test_error_percent, abs=5)


def test_given_network_keeps_its_first_weights(of_vectors):
    model = of_vectors.model
    first = {name: value.clone() for name, value in model.state_dict().items()}
    network = of_vectors.trainer.assemble()
    assert not torch.equal(network[2].weight, first["1.weight"])
    assert all(torch.equal(value, first[name]) for name, value in model.state_dict().items())
    assert model[1].weight.requires_grad


def test_format_is_named_or_follows_from_the_suffix(of_vectors, tmp_path):
    assert [format_of(Path(f"a.b{suffix}")) for suffix in FORMATS.values()] == list(FORMATS)
    with pytest.raises(UserError, match=r"net\.pth stands for no format.*\.pt2 \(torch-export\)"):
        format_of(tmp_path / "net.pth")
    assert load_safetensors(written(of_vectors, tmp_path / "net.pth", "safetensors"))


def test_own_modules_need_torch_export(tmp_path):
    class Double(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    network = nn.Sequential(nn.Flatten(), nn.Linear(5, 6), nn.ReLU(), Double(), nn.Linear(6, 4))
    done = trained(tmp_path / "run", network, torch.randn(40, 5), Sim())
    with pytest.raises(UserError, match=r"rebuild Double.*--format torch-export"):
        written(done, tmp_path / "net.safetensors")
    assert_same_as_evaluate(done, written(done, tmp_path / "net.pt2"))


@pytest.mark.parametrize("kind", ["hooked", "renamed"])
def test_a_file_that_would_be_rebuilt_otherwise_is_refused(tmp_path, kind):
    layer = nn.Linear(5, 6)
    if kind == "hooked":
        layer.register_forward_hook(lambda module, inputs, output: 2 * output)
    else:
        layer = nn.utils.spectral_norm(layer)
    network = nn.Sequential(nn.Flatten(), layer, nn.ReLU(), nn.Linear(6, 4))
    done = trained(tmp_path / "run", network, torch.randn(40, 5), Sim())
    with pytest.raises(UserError, match=r"rebuild Linear \(it.*--format torch-export"):
        written(done, tmp_path / "net.safetensors")


@pytest.mark.parametrize("name", ["net.pt2", "net.onnx"])
def test_a_network_that_torch_cannot_trace_is_told_in_a_sentence(tmp_path, name):
    class Rows(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([2 * row for row in x])

    network = nn.Sequential(nn.Flatten(), nn.Linear(5, 6), Rows(), nn.ReLU(), nn.Linear(6, 4))
    done = trained(tmp_path / "run", network, torch.randn(40, 5), Sim())
    with pytest.raises(UserError, match=r"cannot be exported \(torch says: .*any number of rows"):
        written(done, tmp_path / name)


def test_onnx_and_safetensors_say_what_they_cannot_do(tmp_path):
    network = nn.Sequential(
        nn.Flatten(), nn.Linear(5, 6), nn.Hardtanh(-2, 2), nn.RReLU(), nn.Linear(6, 4)
    )
    done = trained(tmp_path / "run", network, torch.randn(40, 5), Sim())
    message = r"cannot be written as ONNX \(torch says: .*rrelu.*export with --format torch-export"
    with pytest.raises(UserError, match=message) as told:
        written(done, tmp_path / "net.onnx")
    assert str(told.value).isprintable()
    assert_same_as_evaluate(done, written(done, tmp_path / "net.safetensors"))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("net.onnx", {"until": 1}, "stage 1 has no local classifier"),
        ("net.onnx", {"until": 3}, "there is no stage 3: this network has stages 1 to 2"),
        ("net.onnx", {"until": 0}, "there is no stage 0"),
        ("net.onnx", {"format": "onxn"}, "unknown format 'onxn': did you mean onnx"),
        ("taken.pt2", {}, "taken.pt2 exists already: .*--force"),
        ("", {"format": "onnx", "overwrite": True}, "is a folder: give the name of a file"),
        ("absent/net.pt2", {}, "absent does not exist: create it"),
    ],
)
def test_refusals_write_nothing(of_vectors, tmp_path, name, options, message):
    (tmp_path / "taken.pt2").write_text("mine")
    with pytest.raises(UserError, match=message):
        written(of_vectors, tmp_path / name, **options)
    assert [p.name for p in tmp_path.iterdir()] == ["taken.pt2"]
    assert (tmp_path / "taken.pt2").read_text() == "mine"


def test_overwriting_is_asked_for(of_vectors, tmp_path):
    path = tmp_path / "net.safetensors"
    path.write_text("an old one")
    written(of_vectors, path, overwrite=True)
    assert_same_as_evaluate(of_vectors, path)


def test_files_beside_it_stay(of_vectors, tmp_path):
    beside = tmp_path / "net.safetensors.part"
    beside.write_text("precious")
    written(of_vectors, tmp_path / "net.safetensors")
    assert beside.read_text() == "precious"
    assert {path.name for path in tmp_path.iterdir()} == {beside.name, "net.safetensors"}


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_missing_package_is_named_with_the_command(of_vectors, tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"needs {package}: .*pip install '\.\[onnx\]'"):
        written(of_vectors, tmp_path / "net.onnx")
    assert not list(tmp_path.iterdir())
