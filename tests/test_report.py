"""`greedy report`: what its page says of real runs."""

import json
import re
import shlex
import shutil
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
import vl_convert
from command_line import BUILT_IN_PYTHON, NETWORKS, refused, said, small_recipe, train
from reported import RUNS
from torch import nn

from greedy import GreedyTrainer
from greedy.base.files import bytes_below
from greedy.build.modules import build_loss
from greedy.cache import Store
from greedy.losses import Pred
from greedy.memory.baselines import BASELINES
from greedy.recipes import from_document
from greedy.report import charts, facts_of
from greedy.report.page import render
from greedy.results.curves import Curve
from greedy.results.evaluation import evaluate
from greedy.runs.directory import RunDirectory
from greedy.runs.network import assemble
from greedy.runs.state import RunState
from greedy.runs.status import status

pytestmark = pytest.mark.usefixtures("script")

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def facts(runs):
    names = [*RUNS, "partial"]
    all_facts = facts_of([RunDirectory.open(runs / name) for name in names], CPU)
    return dict(zip(names, all_facts, strict=True))


# What the page says


def test_errors_by_stage_are_those_of_status(runs, facts):
    for name, run_facts in facts.items():
        assert list(run_facts.stages) == status(RunState.read(RunDirectory.open(runs / name)))
        spec = charts.errors_by_stage([run_facts])
        drawn = {
            (row["stage"], row["split"]): row["error"] for row in spec["layer"][0]["data"]["values"]
        }
        charted = {
            (each.stage, split): error
            for each in run_facts.stages
            for split in ("train", "test")
            if (error := getattr(each, f"{split}_error_percent")) is not None
        }
        assert drawn == charted
    assert {stage for stage, _ in drawn} == {1, 2}  # of the partial run, the last
    assert facts["sim"].stages[0].test_error_percent is None
    assert [each["error"] for each in spec["layer"][1]["data"]["values"]] == [8.5]


@pytest.mark.parametrize("name", RUNS)
def test_the_confusion_matrix_is_that_of_the_assembled_network(runs, facts, name):
    run, result = RunDirectory.open(runs / name), facts[name].test
    network = assemble(run, build_loss(run.recipe.loss))
    evaluation = evaluate(run, network, "test", CPU)
    store = Store(run.store_path(0) / "test")
    assert result.confusion.sum(axis=1).tolist() == np.bincount(store.labels).tolist()
    wrong = int(result.confusion.sum() - np.trace(result.confusion))
    assert wrong == result.wrong == round(result.error_percent * evaluation.samples / 100)
    assert result.error_percent == pytest.approx(evaluation.error_percent, abs=0.5)


def test_the_wrong_images_are_the_most_confident_mistakes(runs, facts):
    run = RunDirectory.open(runs / "predsim")
    store = Store(run.store_path(0) / "test")
    images = np.concatenate(list(store.batches(0, 500)))
    network = assemble(run, build_loss(run.recipe.loss))
    probabilities = network(torch.from_numpy(images).float() / 255).softmax(dim=1).numpy()
    said = probabilities.argmax(axis=1)
    wrong = {int(row): probabilities[row].max() for row in np.flatnonzero(said != store.labels)}
    shown = facts["predsim"].test.mistakes
    assert len(shown) == 20
    assert [each.confidence for each in shown] == sorted(
        (each.confidence for each in shown), reverse=True
    )
    hidden = wrong.keys() - {each.row for each in shown}
    assert max(wrong[row] for row in hidden) <= shown[-1].confidence + 1e-4
    for each in shown:
        assert (each.predicted, each.label) == (said[each.row], store.labels[each.row])
        assert each.index == store.index[each.row]
        assert np.array_equal(each.image, images[each.row])


def test_memory_and_disk_are_those_of_the_records(runs, facts):
    run_facts = facts["predsim"]
    run = RunDirectory.open(runs / "predsim")
    assert run_facts.baselines.keys() == BASELINES.keys()
    assert run_facts.step_memory_bytes == max(
        run.record(n).choices.planned_peak_bytes for n in (1, 2, 3)
    )
    for each in run_facts.stores:
        arrays = [run.store_path(each.stage) / split for split in ("train", "test")]
        assert each.kept and each.bytes <= sum(map(bytes_below, arrays))
        assert each.encoding == Store(arrays[0]).encoding.name
    assert [each.stage for each in run_facts.stores] == [0, 1, 2]
    assert run_facts.seconds == sum(run.record(n).seconds for n in (1, 2, 3))


def test_of_a_network_trained_at_once_memory_and_time_are_counted_once(facts):
    joint = facts["joint"]
    bars = charts.memory(joint)["data"]["values"]
    assert [each["name"] for each in bars if each["kind"] == "this run"] == ["this run, joint"]
    assert joint.step_memory_bytes == joint.stages[0].step_memory_bytes
    assert joint.seconds == joint.stages[0].seconds
    assert charts.time(joint) is None
    assert [each.stage for each in joint.stores] == [0]


def test_a_dropped_store_is_told(runs, tmp_path):
    path = shutil.copytree(runs / "predsim", tmp_path / "run")
    said("cache", "drop", path / "stage1")
    run_facts = facts_of([RunDirectory.open(path)], CPU)[0]
    assert [each.kept for each in run_facts.stores] == [True, False, True]
    labels = [each["label"] for each in charts.disk(run_facts)["data"]["values"]]
    assert [label.endswith(", deleted") for label in labels] == [False, True, False]


def test_what_a_partial_run_lacks_is_said(facts, runs, tmp_path):
    run_facts = facts["partial"]
    assert run_facts.test is None
    assert [each.stage for each in run_facts.similarity.stages] == [0, 1, 2]
    assert run_facts.missing[0] == "Stage 3 is not begun."
    assert f"`greedy train --run {runs / 'partial'}` resumes it" in run_facts.missing[1]
    assert facts["predsim"].missing == []
    path = shutil.copytree(runs / "predsim", tmp_path / "empty")
    for number in range(4):
        shutil.rmtree(path / f"stage{number}")
    nothing = facts_of([RunDirectory.open(path)], CPU)[0]
    assert "no data yet" in nothing.missing[0]
    assert "no data yet" in render([nothing])


def test_the_commands_make_the_same_weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = ["data.name=fashion-mnist-sample", "model.hidden_width=8", "training.epochs=1"]
    options = [option for each in settings for option in ("--set", each)]
    said("train", "--recipe", "fashion-mnist/mlp-pred", "--run", "first/it is", *options)
    run_facts = facts_of([RunDirectory.open(Path("first/it is"))], CPU)[0]
    for line in run_facts.commands:
        said(*shlex.split(line)[1:])
    for stage in ("stage1", "stage2", "stage3", "stage4"):
        first, again = (
            Path(run, "it is", stage, "encoder.safetensors") for run in ("first", "runs")
        )
        assert first.read_bytes() == again.read_bytes()


def test_a_recipe_that_does_not_ship_is_in_the_page(runs, facts):
    run_facts = facts["predsim"]
    assert run_facts.commands[0] == "greedy train --recipe recipe.toml --run runs/predsim"
    page = render([run_facts])
    shown = re.search(r"The whole recipe</summary><pre>(.*?)</pre>", page, re.DOTALL)[1]
    document = tomllib.loads(shown.replace("&#34;", '"'))
    assert from_document(document) == RunDirectory.open(runs / "predsim").recipe


def test_the_same_facts_give_the_same_page(facts, script, monkeypatch):
    page = render([facts["predsim"]])
    monkeypatch.setattr(vl_convert, "javascript_bundle", script)
    assert render([facts["predsim"]]) == page


def test_a_loss_of_ones_own_is_shown_as_far_as_it_is_known(tmp_path):
    class Own(Pred):
        pass

    images = torch.rand(300, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    samples = [(image, number % 3) for number, image in enumerate(images)]
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 3))
    trainer = GreedyTrainer(model, loss=Own(), run_dir=tmp_path / "run", epochs=1, device="cpu")
    trainer.fit(samples, samples)
    run = RunDirectory.open(tmp_path / "run")
    unknown = facts_of([run], CPU, model)[0]
    assert not unknown.baselines and not unknown.commands
    assert "written in Python" in unknown.missing[0]
    known = facts_of([run], CPU, model, Own())[0]
    assert known.baselines.keys() == BASELINES.keys() and not known.missing
    assert known.test.wrong == unknown.test.wrong
    assert "data:image/png" in render([unknown])


@pytest.mark.parametrize("errors", [[0, 0], [12.0, 11.9], [50.0, 0, 0.2], [100.0], [0]])
def test_any_errors_can_be_drawn(errors):
    points = list(enumerate(errors, start=1))
    curves = [Curve("a.b[0] 'x'", 1, points, []), Curve("b", 2, points, points[:1])]
    svg = vl_convert.vegalite_to_svg(charts.curves(curves, by_depth=False) | {"width": 400})
    assert svg.count('aria-roledescription="line mark"') >= 3
    assert "NaN" not in svg


def test_a_confusion_matrix_of_many_classes_shows_the_worst():
    matrix = np.diag(np.full(150, 9))
    matrix[3, 140], matrix[149, 0] = 5, 2
    spec = charts.confusion(matrix, [f"class {n}" for n in range(150)])
    domain = spec["encoding"]["x"]["scale"]["domain"]
    assert len(domain) == 100
    assert {"class 0", "class 3", "class 140", "class 149"} < set(domain)
    assert {"is": "class 3", "predicted": "class 140", "images": 5} in spec["data"]["values"]


# The command


def test_the_page_is_report_html_and_overwritten_only_when_forced(runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert said("report", runs / "predsim").startswith("wrote report.html (")
    written = Path("report.html").read_bytes()
    Path("report.html").write_text("mine")
    assert "choose another --to, or add --force" in refused("report", runs / "predsim")
    assert Path("report.html").read_text() == "mine"
    said("report", runs / "predsim", "--force")
    assert Path("report.html").read_bytes() == written


def test_a_network_built_in_python_is_named(runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("reported_network.py").write_text(NETWORKS)
    named = ("--model", "reported_network:network")
    train(tmp_path, small_recipe(model=BUILT_IN_PYTHON), *named, run="own")
    assert "--model module:function" in refused("report", "own")
    assert not Path("report.html").exists()
    said("report", runs / "predsim", "own", *named)
    page = Path("report.html").read_text()
    assert "greedy train --recipe recipe.toml --run runs/own --model module:function" in page
    specs = json.loads(re.search(r'id="charts">(.*?)</script>', page)[1])
    assert {"run1-confusion", "run2-confusion", "all-errors"} < specs.keys()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("predsim --to report.pdf", "the suffix of report.pdf stands for no page"),
        ("predsim --to absent/report.html", "the folder absent does not exist: create it first"),
        ("predsim absent", "absent is not a run directory"),
        ("predsim --model m:f", "leave out --model"),
        ("predsim --device gpu", "'gpu' is not a device"),
        ("", "Missing argument 'RUN...'"),
    ],
)
def test_mistakes_are_told_and_nothing_is_written(runs, monkeypatch, line, message):
    monkeypatch.chdir(runs)
    before = sorted(runs.iterdir())
    told = refused("report", *line.split())
    assert re.search(message, told)
    assert sorted(runs.iterdir()) == before


@pytest.mark.parametrize("module", ["jinja2", "vl_convert"])
def test_without_the_extra_it_is_named(runs, tmp_path, monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    page = tmp_path / "report.html"
    assert "pip install '.[report]'" in refused("report", runs / "predsim", "--to", page)
    assert not page.exists()
