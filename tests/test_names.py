"""Names that users chose are displayed verbatim, never interpreted, and can be written into every
file."""

import io
import json
import os
import re
from pathlib import Path

import pytest
from command_line import answer, greedy, refused, said, small_recipe
from decided import choices
from pictures import write_classes
from PIL import Image
from rich.console import Console

from greedy import RunDirectory
from greedy.cli.dashboard import reporter
from greedy.runs.events import RunOutline

NAMES = [b"cat[a]", b"x]y[", b"[bold]", b":smile:", b"new\nline", b"\x1b[31mred", b"caf\xe9"]
SHOWN = ["cat[a]", "x]y[", "[bold]", ":smile:", r"new\nline", r"\x1b[31mred", r"caf\xe9"]
KEPT = ["cat[a]", "x]y[", "[bold]", ":smile:", "new\nline", "\x1b[31mred", r"caf\xe9"]


def photos(folder: Path) -> Path:
    """Writes a folder of images whose classes have such names, and a file with such a name."""
    return write_classes(folder, 5, map(os.fsdecode, NAMES))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a trained run in a directory with such a name."""
    place = tmp_path_factory.mktemp("names")
    recipe = place / "[red]tiny.toml"
    name = f"folder:{photos(place / 'photos')}"
    recipe.write_text(small_recipe(data={"name": name}, model={"hidden_layers": 1}))
    path = Path(os.fsdecode(os.fsencode(place) + b"/[b]run[c]\xe9"))
    said("train", "--recipe", recipe, "--run", path)
    return path


def test_every_command_shows_them(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = next(run.parent.glob("photos/*/0.png"))
    commands = [
        ("status", "--run", run),
        ("evaluate", "--run", run),
        ("predict", "--run", run, "--top", len(NAMES), *run.parent.glob("photos/*/0.png")),
        ("cache", "info", run),
        ("cache", "verify", run),
        ("cache", "repair", run),
        ("data", "prepare", f"folder:{run.parent / 'photos'}"),
        ("plan", "--run", run),
        ("train", "--run", run),
        ("report", run, "--to", run.parent / "page.html", "--force"),
        ("plot", run, "--to", run.parent / "curves.svg", "--force"),
        ("export", "--run", run, "--to", run.parent / "net.safetensors", "--force"),
        ("predict", "--run", run, file),
    ]
    monkeypatch.setenv("COLUMNS", "500")
    for colours in ("", "1"):
        monkeypatch.setenv("FORCE_COLOR", colours)
        for words in commands:
            text = said(*words)
            assert "\x1b[31m" not in text
            text.encode()
        text = re.sub("\x1b\\[[0-9;]*m", "", said(*commands[2]))
        assert all(name in text for name in SHOWN), text
        assert r"[b]run[c]\xe9" in said("status", "--run", run)


def test_json_has_them(run: Path) -> None:
    image = Path(os.fsdecode(os.fsencode(run.parent / "photos") + b"/caf\xe9/0.png"))
    (prediction,) = answer("predict", "--run", run, "--top", len(NAMES), image)["predictions"]
    assert sorted(each["class"] for each in prediction["classes"]) == sorted(KEPT)
    assert prediction["image"].endswith(r"caf\xe9/0.png")
    record = json.loads((run / "stage0/stage.json").read_text())
    assert sorted(record["class_names"]) == sorted(KEPT)
    assert sorted(RunDirectory.open(run).record(0).class_names) == sorted(KEPT)


def test_errors_show_them(run: Path) -> None:
    for name in (b"\x1b[31m[bold]", b"caf\xe9"):
        result = greedy("status", "--run", Path(os.fsdecode(os.fsencode(run.parent) + b"/" + name)))
        assert result.exit_code == 2
        assert "\x1b" not in result.output
        assert name.decode("utf-8", "backslashreplace").replace("\x1b", r"\x1b") in result.output


def test_the_dashboard_shows_them() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=100, color_system=None)
    with reporter(console) as shown:
        shown.run_started(RunOutline(["x[/y]", "[bold]:smile:"], {1: 1}, 1, 1))
        shown.stage_started(1, "x[/y]", 1, choices())
        shown.epoch_started(1, 10)
        shown.batch_finished(5)
        shown.compiling_failed(1, "list[int] is no [/b] \x1b[31mtype\x1b[0m :smile:")
    text = re.sub("\x1b\\[[0-9;?]*[a-zA-Z]", "", out.getvalue())
    assert "x[/y]: epoch 1/1" in text
    assert "[bold]:smile:" in text
    assert r"list[int] is no [/b] \x1b[31mtype\x1b[0m :smile:" in text


def test_names_that_are_no_utf_8_name_recipes_and_are_refused_in_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe, folder = (os.fsdecode(name) for name in (b"r\xe9c.toml", b"folder:caf\xe9"))
    Path(recipe).write_text(small_recipe(model={"hidden_layers": 1}))
    assert r'name = "r\\xe9c"' in said("recipes", "show", recipe)
    assert said("train", "--recipe", recipe, "--run", "run").startswith(r"r\xe9c in run on ")
    assert RunDirectory.open(Path("run")).recipe.name == r"r\xe9c"
    told = refused("train", "--recipe", recipe, "--run", "new", "--data", folder)
    assert r'data.name is "folder:caf\xe9", which is not UTF-8' in told


def test_classes_of_python_may_be_called_like_paths(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "paths.py").write_text(
        "import numpy as np\n"
        "class Images(list):\n"
        "    classes = ['a/b', '../c']\n"
        "def sets():\n"
        "    images = np.random.default_rng(0).integers(0, 255, (20, 1, 8, 8)).astype(np.uint8)\n"
        "    rows = Images((image, i % 2) for i, image in enumerate(images))\n"
        "    return rows, rows\n"
    )
    monkeypatch.chdir(tmp_path)
    Path("tiny.toml").write_text(
        small_recipe(model={"hidden_layers": 1}, training={"batch_size": 4})
    )
    said("train", "--recipe", "tiny.toml", "--run", "run", "--data", "paths:sets")
    Image.new("L", (8, 8)).save("new.png")
    assert {"a/b", "../c"} <= set(said("predict", "--run", "run", "new.png").split())
    assert answer("evaluate", "--run", "run")["samples"] == 20
    for command in (
        ("report", "run", "--to", "page.html"),
        ("export", "--run", "run", "--to", "net.onnx"),
        ("export", "--run", "run", "--to", "net.safetensors"),
        ("plot", "run", "--similarity", "--to", "matrices.svg"),
    ):
        said(*command)
    assert "../c" in Path("page.html").read_text()
    written = {"tiny.toml", "paths.py", "new.png", "page.html", "matrices.svg"}
    written |= {"run", "net.onnx", "net.safetensors", "__pycache__"}
    assert {path.name for path in tmp_path.iterdir()} <= written
