"""`greedy predict`: image files through the trained network."""

import json
import shutil

import numpy as np
import pytest
import torch
from command_line import answer, greedy, refused, small_recipe, train
from PIL import Image
from torch import nn
from torch.utils.data import TensorDataset

from greedy import GreedyTrainer, RunDirectory, UserError, predict
from greedy.cache import Store
from greedy.memory.counting import Counter
from greedy.runs.network import assemble

RECIPE = small_recipe(
    model={"hidden_layers": 1, "hidden_width": 32}, training={"epochs": 2, "batch_size": 128}
)
CPU = torch.device("cpu")


def predictions(*arguments):
    return answer("predict", *arguments)["predictions"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return train(tmp_path_factory.mktemp("trained"), RECIPE)


def raw(run, rows):
    """Returns the first test images of a run, bytes (rows, C, H, W)."""
    return next(Store(run / "stage0/activations.zarr/test").batches(0, rows))


@pytest.fixture(scope="module")
def images(run, tmp_path_factory):
    """Writes the first 40 test images, more than one batch, as files."""
    folder = tmp_path_factory.mktemp("images")
    files = [folder / f"{number:02}.png" for number in range(40)]
    for file, (pixels,) in zip(files, raw(run, 40), strict=True):
        Image.fromarray(pixels).save(file)
    return files


def expected(run, rows, until_stage=None):
    trainer = GreedyTrainer.from_recipe(RunDirectory.open(run).recipe, run, device="cpu")
    network = trainer.assemble(until_stage=until_stage)
    return network(torch.from_numpy(rows).float() / 255).softmax(dim=1)


@pytest.mark.parametrize("until_stage", [None, 1])
def test_confidences_are_the_networks_own(run, images, until_stage):
    chosen = [] if until_stage is None else ["--until-stage", until_stage]
    results = predictions("--run", run, *images, "--top", 10, *chosen)
    assert [each["image"] for each in results] == [str(file) for file in images]
    names = RunDirectory.open(run).record(0).class_names
    for each, row in zip(results, expected(run, raw(run, 40), until_stage), strict=True):
        confidences = [entry["confidence"] for entry in each["classes"]]
        assert confidences == sorted(confidences, reverse=True)
        by_name = {entry["class"]: entry["confidence"] for entry in each["classes"]}
        assert [by_name[name] for name in names] == pytest.approx(row.tolist(), abs=1e-4)


def test_the_best_three_unless_told_otherwise(run, images):
    everything = predictions("--run", run, images[0], "--top", 99)[0]["classes"]
    assert len(everything) == 10
    for extra, count in (([], 3), (["--top", 1], 1)):
        results = predictions("--run", run, images[0], *extra)
        assert results[0]["classes"] == everything[:count]
    assert "ask for 1 or more" in refused("predict", "--run", run, images[0], "--top", 0)


def test_other_sizes_and_channels_are_brought_to_the_runs(run, images, tmp_path):
    small = Image.open(images[0])
    wide = Image.new("L", (56, 28))
    wide.paste(small, (14, 0))
    wide.convert("RGB").save(tmp_path / "wide.png")
    tall = Image.new("L", (28, 40))
    tall.paste(small, (0, 6))
    tall.convert("RGBA").save(tmp_path / "tall.webp", lossless=True)
    small.resize((84, 84), Image.Resampling.NEAREST).save(tmp_path / "large.png")
    alike = predictions("--run", run, images[0], *sorted(tmp_path.glob("*.[pw]*")))
    first, *others = (
        {each["class"]: each["confidence"] for each in alike[at]["classes"]} for at in (0, 2, 3)
    )
    assert others == [pytest.approx(first, abs=1e-4)] * 2  # of other rows of the batch
    near = predictions("--run", run, tmp_path / "large.png")
    assert near[0]["classes"][0]["class"] == alike[0]["classes"][0]["class"]


def test_what_cannot_be_read_is_named_and_the_others_are_predicted(run, images, tmp_path):
    text, cut = tmp_path / "notes.png", tmp_path / "cut.png"
    text.write_text("no image")
    cut.write_bytes(images[1].read_bytes()[:60])
    asked = [text, images[0], cut, tmp_path / "absent.png"]
    result = greedy("predict", "--run", run, *asked)
    assert result.exit_code == 1
    complaints = result.stderr.splitlines()
    assert len(complaints) == 3 and all(each.startswith("Error: ") for each in complaints)
    for complaint, file in zip(complaints, (text, cut, tmp_path / "absent.png"), strict=True):
        assert f"cannot read the image {file} (" in complaint
    assert str(images[0])[:40] in result.stdout and "%" in result.stdout
    as_json = greedy("predict", "--run", run, *asked, "--json")
    assert as_json.exit_code == 1
    document = json.loads(as_json.stdout)
    assert [each["image"] for each in document["predictions"]] == [str(images[0])]
    assert [each["image"] for each in document["unreadable"]] == [str(asked[i]) for i in (0, 2, 3)]
    nothing = greedy("predict", "--run", run, text)
    assert nothing.exit_code == 1 and nothing.stdout == ""


def test_a_table_of_at_most_80_columns(run, images):
    result = greedy("predict", "--run", run, *images[:3])
    lines = result.output.splitlines()
    assert lines[0].split() == ["image", "class", "confidence"]
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{folder}"], "is a folder: name the images in it"),
        (["{folder}/00.png", "{folder}"], "is a folder: name the images in it"),
        ([], "Missing argument 'IMAGE...'"),
        (["{folder}/00.png", "--until-stage", "5"], "there is no stage 5"),
        (["{folder}/00.png", "--device", "gpu"], "'gpu' is not a device"),
    ],
)
def test_mistakes(run, images, arguments, message):
    given = [each.format(folder=images[0].parent) for each in arguments]
    told = refused("predict", "--run", run, *given)
    assert message in told and "Traceback" not in told


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (torch.rand(40, 1, 6, 6), "was trained on floats"),
        (torch.randint(0, 256, (40, 2, 6, 6), dtype=torch.uint8), "the images of .* 2: give them"),
    ],
)
def test_runs_on_other_data_than_images_in_bytes_are_refused(tmp_path, images, rows, message):
    samples = TensorDataset(rows, torch.arange(40) % 2)
    network = nn.Sequential(nn.Flatten(), nn.Linear(rows[0].numel(), 2))
    settings = {"epochs": 1, "batch_size": 20, "device": "cpu"}
    trainer = GreedyTrainer(network, run_dir=tmp_path / "run", **settings)
    trainer.fit(samples, samples)
    with pytest.raises(UserError, match=message):
        predict(trainer.run, trainer.assemble(), images[:1], CPU)


def test_images_that_are_not_square(tmp_path):
    rows = torch.randint(0, 256, (40, 3, 6, 9), dtype=torch.uint8)
    samples = TensorDataset(rows, torch.arange(40) % 2)
    network = nn.Sequential(nn.Flatten(), nn.Linear(162, 2))
    trainer = GreedyTrainer(network, run_dir=tmp_path / "run", epochs=1, batch_size=20)
    trainer.fit(samples, samples)
    pixels = np.zeros((12, 9, 3), np.uint8)
    pixels[3:9] = rows[0].permute(1, 2, 0)
    Image.fromarray(pixels).save(tmp_path / "high.png")
    (prediction,) = predict(trainer.run, trainer.assemble(), [tmp_path / "high.png"], CPU)
    (alone,) = trainer.assemble()(rows[:1].float() / 255).softmax(dim=1)
    assert sorted(prediction.confidences) == pytest.approx(sorted(alone.tolist()), abs=1e-4)


OWN = """
from torch import nn
from greedy.losses import Pred

class Own(Pred):
    pass

def network():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 2))
"""


def test_only_early_exits_need_a_loss_written_in_python(tmp_path, monkeypatch):
    (tmp_path / "own_loss_module.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    from own_loss_module import Own, network

    rows = torch.randint(0, 256, (40, 1, 8, 8), dtype=torch.uint8)
    samples = TensorDataset(rows, torch.arange(40) % 2)
    settings = {"epochs": 1, "batch_size": 20, "device": "cpu"}
    trainer = GreedyTrainer(network(), loss=Own(), run_dir=tmp_path / "run", **settings)
    trainer.fit(samples, samples)
    Image.fromarray(rows[0, 0].numpy()).save(tmp_path / "first.png")
    where = ("--run", tmp_path / "run", "--model", "own_loss_module:network")
    (prediction,) = predictions(*where, tmp_path / "first.png")
    (alone,) = trainer.assemble()(rows[:1].float() / 255).softmax(dim=1)
    assert prediction["classes"][0]["confidence"] == pytest.approx(float(alone.max()), abs=1e-4)
    assert greedy("evaluate", *where).exit_code == 0
    assert greedy("export", *where, "--to", tmp_path / "net.safetensors").exit_code == 0
    early = "--until-stage", "1"
    for command in (
        ("predict", *where, tmp_path / "first.png", *early),
        ("export", *where, "--to", tmp_path / "early.safetensors", *early),
        ("evaluate", *where, "--by-stage"),
    ):
        assert "local loss was written in Python" in refused(*command)
    with pytest.raises(UserError, match="needs the run's local loss"):
        assemble(trainer.run, None, network(), until_stage=1)


def test_a_memory_budget_holds(run, images):
    directory, peaks = RunDirectory.open(run), []
    for budget in (2**30, 210 * 1024):
        net = assemble(directory, None)
        with Counter() as counter:
            counter.add(net.state_dict().values())
            results = predict(directory, net, images[:40], CPU, memory_budget=budget)
            counter.reset_peak()  # planning looks at tensors without contents
            list(results)
        peaks.append(counter.peak)
    assert peaks[1] <= 210 * 1024 < peaks[0]


def test_a_memory_budget_changes_no_class(run, images):
    tight = ("--run", run, *images[:40])
    within = predictions(*tight, "--top", 10, "--memory-budget", "300KiB")
    for one, other in zip(within, predictions(*tight, "--top", 10), strict=True):
        results, expected = (
            {each["class"]: each["confidence"] for each in which["classes"]}
            for which in (one, other)
        )
        assert results == pytest.approx(expected, abs=1e-4)
    assert "raise --memory-budget" in refused("predict", *tight, "--memory-budget", "10KiB")


def test_a_moved_run_predicts_the_same(run, images, tmp_path):
    moved = shutil.copytree(run, tmp_path / "moved")
    there = predictions("--run", moved, *images[:5])
    assert there == predictions("--run", run, *images[:5])
