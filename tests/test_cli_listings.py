"""`greedy recipes` and `greedy data`."""

import subprocess
import sys
import tomllib

import pytest
from command_line import answer, refused, said
from PIL import Image

from greedy.recipes import load, names


def test_version():
    output = said("--version")
    assert output.startswith("greedy") and output.strip()[-1].isdigit()


@pytest.mark.parametrize(
    "line",
    [
        "--help",
        "train --help",
        "recipes list",
        "recipes show demo",
        "--version",
        "status --run RUN",
        "cache info RUN/stage1",
        "cache verify RUN",
    ],
)
def test_answers_without_loading_torch(line, runs):
    words = line.replace("RUN", str(runs / "predsim")).split()
    code = (
        "import sys; from greedy.cli.main import cli\n"
        f"try: cli({words})\n"
        "except SystemExit as end: assert not end.code\n"
        "sys.exit('torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert result.returncode == 0, result.stderr


def test_recipes_list_as_json():
    rows = answer("recipes", "list")
    fields = {"name", "table", "dataset", "network", "loss", "paper_test_error_percent"}
    assert all(row.keys() == fields for row in rows)
    assert [row["name"] for row in rows] == names()
    assert {
        "name": "cifar10/vgg11b-3x-predsim-cutout",
        "table": 4,
        "dataset": "cifar10",
        "network": "vgg11b-3x",
        "loss": "predsim",
        "paper_test_error_percent": 3.6,
    } in rows
    assert answer("recipes", "list", "--table", "4") == [row for row in rows if row["table"] == 4]


def test_recipes_list_as_a_table():
    lines = said("recipes", "list").splitlines()
    assert max(map(len, lines)) <= 80
    (line,) = (each for each in lines if each.startswith("cifar10/vgg11b-3x-predsim-cutout "))
    assert line.split()[1:] == ["predsim", "4", "3.60", "%"]


def test_recipes_show_gives_the_recipe_in_full():
    shown = tomllib.loads(said("recipes", "show", "fashion-mnist/mlp-predsim"))
    recipe = load("fashion-mnist/mlp-predsim")
    assert shown == recipe.model_dump(exclude_none=True)
    assert shown["loss"]["beta"] == 0.99
    assert answer("recipes", "show", "fashion-mnist/mlp-predsim") == shown


def test_data_list(tmp_path):
    rows = answer("data", "list", "--data-dir", str(tmp_path))
    here = {row["name"]: row["available"] for row in rows}
    assert here["fashion-mnist-sample"] and not here["cifar10"]
    (cifar,) = (row for row in rows if row["name"] == "cifar10")
    assert (cifar["shape"], cifar["classes"], cifar["train"]) == ([3, 32, 32], 10, 50_000)
    lines = said("data", "list", "--data-dir", str(tmp_path)).splitlines()
    assert "cifar10               no    3x32x32       10   50,000  10,000" in lines
    assert max(map(len, lines)) <= 80


def test_data_prepare():
    output = said("data", "prepare", "fashion-mnist-sample")
    assert output == (
        "fashion-mnist-sample is ready: 5,000 training and 1,000 test images of 1x28x28\n"
    )
    assert answer("data", "prepare", "fashion-mnist-sample") == {
        "name": "fashion-mnist-sample",
        "shape": [1, 28, 28],
        "train": 5000,
        "test": 1000,
    }


def test_data_prepare_of_photographs_of_several_sizes(tmp_path):
    for number in range(20):
        path = tmp_path / f"photos/{'ab'[number % 2]}/{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (20 + number, 20)).save(path)
    prepare = ("data", "prepare", f"folder:{tmp_path / 'photos'}")
    assert "set data.image_size" in refused(*prepare)
    assert answer(*prepare, "--image-size", 16)["shape"] == [3, 16, 16]
