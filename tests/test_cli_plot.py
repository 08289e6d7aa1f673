"""`greedy plot`: pictures of real runs."""

import re
import shutil
import sys
from xml.etree import ElementTree

import pytest
from command_line import BUILT_IN_PYTHON, NETWORKS, refused, said, small_recipe, train
from PIL import Image

from greedy.results.curves import Curve
from greedy.results.figures import curves_figure, render

RECIPE = small_recipe(
    model={"hidden_layers": 1},
    training={"epochs": 2},
    store={"views": 1},
    paper={"table": 1, "test_error_percent": 8.5},
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Trains a run for each of two losses. Returns their folder."""
    folder = tmp_path_factory.mktemp("runs")
    for loss in ("pred", "predsim"):
        of_loss = ("--set", f"loss.name={loss}", "--set", "training.test_every=2")
        train(folder, RECIPE, *of_loss, run=loss)
    return folder


def drawn(svg, prefix):
    """Returns the picture's elements whose ids begin with ``prefix``, each with the number of
    points on its path."""
    lines = {}
    for group in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}g"):
        if group.get("id", "").startswith(prefix):
            paths = group.iter("{http://www.w3.org/2000/svg}path")
            lines[group.get("id")] = sum(len(re.findall("[ML]", each.get("d"))) for each in paths)
    return lines


def texts(svg):
    root = ElementTree.fromstring(svg)
    return ["".join(each.itertext()) for each in root.iter("{http://www.w3.org/2000/svg}text")]


def test_several_runs_are_compared_in_one_picture(runs, tmp_path):
    picture = tmp_path / "curves.svg"
    assert f"wrote {picture} (" in said("plot", runs / "pred", runs / "predsim", "--to", picture)
    svg = picture.read_text()
    lines = drawn(svg, "curve")
    assert lines.keys() == {
        f"curve{n}-{kind}" for n in (1, 2) for kind in ("training", "test", "paper")
    }
    assert lines["curve1-training"] == lines["curve1-paper"] == 2
    legend = ["pred", "predsim", "training error", "test error", "test error, paper"]
    assert [each for each in texts(svg) if each in legend] == legend
    assert {"epoch", "classification error, %"} < set(texts(svg))


def test_one_run_is_shown_by_its_stages(runs, tmp_path):
    said("plot", runs / "pred", "--to", tmp_path / "stages.svg")
    svg = (tmp_path / "stages.svg").read_text()
    assert drawn(svg, "curve").keys() == {
        "curve1-training",
        "curve1-test",
        "curve2-training",
        "curve2-test",
        "curve2-paper",
    }
    assert {"pred", "stage 1, linear16", "stage 2, output"} < set(texts(svg))


@pytest.mark.parametrize("options", [(), ("--similarity",)])
@pytest.mark.parametrize("suffix", ["svg", "png", "pdf"])
def test_the_same_runs_give_the_same_bytes(runs, tmp_path, suffix, options):
    first, second = tmp_path / f"first.{suffix}", tmp_path / f"second.{suffix}"
    for each in (first, second):
        said("plot", runs / "predsim", "--to", each, *options)
    assert first.read_bytes() == second.read_bytes()
    assert b"date>" not in first.read_bytes() and b"CreationDate" not in first.read_bytes()
    assert sorted(tmp_path.iterdir()) == [first, second]


def test_similarity_matrices_stand_beside_their_target(runs, tmp_path):
    for loss, features in (("pred", "activation"), ("predsim", "similarity head")):
        picture = tmp_path / f"{loss}.svg"
        said("plot", runs / loss, "--similarity", "--to", picture)
        svg = picture.read_text()
        matrices = [f"similarity-{key}" for key in ("0", "1", "2", "target")]
        assert re.findall('<image [^>]*id="(similarity-[^"]*)"', svg) == matrices
        headings = texts(svg)
        assert {loss, "images", "stage 1, linear16", "stage 2, output", "target S(Y)"} < {*headings}
        assert [each.split(",")[0] for each in headings if ", difference" in each] == [
            "pixels",
            features,
            "logits",
        ]
        assert headings.count("Ankle boot") == 1


def test_pictures_can_be_opened(runs, tmp_path):
    said("plot", runs / "pred", "--to", tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as picture:
        assert min(picture.size) > 400
    said("plot", runs / "pred", "--to", tmp_path / "curves.pdf")
    assert (tmp_path / "curves.pdf").read_bytes().startswith(b"%PDF-")


def test_a_network_built_in_python_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plotted_network.py").write_text(NETWORKS)
    named = ("--model", "plotted_network:network")
    train(tmp_path, small_recipe(model=BUILT_IN_PYTHON), *named)
    said("plot", "run", "--to", "curves.svg")
    told = refused("plot", "run", "--similarity", "--to", "matrices.svg")
    assert "--model module:function" in told
    said("plot", "run", "--similarity", "--to", "matrices.svg", *named)
    assert "stage 1, linear16" in texts((tmp_path / "matrices.svg").read_text())


def test_a_picture_is_overwritten_only_when_forced(runs, tmp_path):
    picture = tmp_path / "mine.svg"
    picture.write_text("mine")
    assert "choose another --to, or add --force" in refused("plot", runs / "pred", "--to", picture)
    assert picture.read_text() == "mine"
    said("plot", runs / "pred", "--to", picture, "--force")
    assert drawn(picture.read_text(), "curve")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("pred --to curves.gif", "suffix of curves.gif stands for no picture: .* .svg, .png, .pdf"),
        ("pred --to curves", "the suffix of curves stands for no picture"),
        ("pred --to absent/curves.svg", "the folder absent does not exist: create it first"),
        ("pred absent --to curves.svg", "absent is not a run directory"),
        ("pred predsim --similarity --to m.svg", "draws one run, not 2: call it once for each"),
        ("pred --similarity --model m:f --to m.svg", "leave out --model"),
        ("--to curves.svg", "Missing argument 'RUN...'"),
        ("pred", "Missing option '--to'"),
    ],
)
def test_mistakes_are_told_and_nothing_is_written(runs, monkeypatch, line, message):
    monkeypatch.chdir(runs)
    before = sorted(runs.iterdir())
    told = refused("plot", *line.split())
    assert re.search(message, told)
    assert sorted(runs.iterdir()) == before


@pytest.mark.parametrize("options", [(), ("--similarity",)])
def test_a_run_without_a_trained_stage_is_refused(runs, tmp_path, options):
    run = shutil.copytree(runs / "pred", tmp_path / "run")
    shutil.rmtree(run / "stage1")
    shutil.rmtree(run / "stage2")
    told = refused("plot", run, "--to", tmp_path / "x.svg", *options)
    assert f"`greedy train --run {run}`" in told


def test_without_matplotlib_the_extra_is_named(runs, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    told = refused("plot", runs / "pred", "--to", tmp_path / "curves.svg")
    assert "pip install '.[plot]'" in told
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("errors", [[0, 0], [12.0, 11.9], [50.0, 0, 0.2], [100.0, 0.02]])
def test_any_errors_can_be_drawn(errors):
    points = list(enumerate(errors, start=1))
    svg = render(curves_figure([Curve("run", 1, points, points)]), "svg").decode()
    count = len(errors)
    assert drawn(svg, "curve") == {"curve1-training": count, "curve1-test": count}


def test_a_single_epoch_is_a_point():
    figure = curves_figure([Curve("run", 1, [(1, 3.0)], [(1, 2.0), (2, 1.5)])])
    training, test = figure.axes[0].lines
    assert (training.get_marker(), test.get_marker()) == ("o", "")


def test_many_runs_have_a_colour_and_their_own_names():
    names = ["_hidden", "$a$ & <b>", *(f"run {number}" for number in range(20))]
    curves = [Curve(name, 1, [(1, 10.0), (2, 5.0)], []) for name in names]
    svg = render(curves_figure(curves), "svg").decode()
    assert set(names) < set(texts(svg))
    assert len(drawn(svg, "curve")) == len(names)
    lines = re.findall(r'<g id="curve\d+-training">\s*<path[^>]*stroke: (#\w+)', svg)
    assert len(set(lines)) == len(names)
