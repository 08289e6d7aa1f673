"""What is asked for wrongly gets one sentence and exit code 2, and leaves no trace."""

import subprocess
import sys

import pytest
from command_line import greedy, refused, small_recipe
from pictures import write_classes

RECIPE = small_recipe(model={"hidden_layers": 1})


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Makes a folder with a recipe in it the current directory."""
    (tmp_path / "tiny.toml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


TINY = "train --recipe tiny.toml --run new"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("train", "give --recipe to begin a run, or --run to resume one"),
        ("train --recipe dmo", "there is no recipe dmo; did you mean demo"),
        ("train --recipe cifar10/vgg11b-3-predsim", "did you mean cifar10/vgg11b-3x-predsim"),
        ("train --recipe absent.toml", "absent.toml cannot be read: No such file"),
        (f"{TINY} --set training.epoch=3", "did you mean training.epochs?"),
        (f"{TINY} --set epochs=3", "did you mean training.epochs?"),
        (f"{TINY} --set training.epochs", "must have the form section.field=value"),
        (f"{TINY} --set training.epochs=many", "must be a whole number of at least 1"),
        (f"{TINY} --set training.batch_size=1", "must be a whole number of at least 2"),
        (f"{TINY} --reuse often", 'is "often" but must be a whole number of at least 0 or auto'),
        (
            f"{TINY} --views 0",
            "must be a whole number of at least 1 and at most 65536 or one of auto, live",
        ),
        (f"{TINY} --views live --reuse 3", "must be 0 or auto where store.views is live"),
        (f"{TINY} --set training.epochs=[1,2,3]", "training.epochs has 3 entries"),
        (f"{TINY} --seed x", 'seed is "x" but must be a whole number'),
        (f"{TINY} --memory-budget 2", "memory.budget is 2 but must be auto, or a size such"),
        (f"{TINY} --disk-budget 40", "store.disk_budget is 40 but must be auto, or a size"),
        (f"{TINY} --encoding unit8", "did you mean uint8?"),
        (f"{TINY} --precision float", "training.precision"),
        (f"{TINY} --patience -1", "training.patience"),
        (f"{TINY} --data cifar", "did you mean cifar10"),
        (f"{TINY} --data mnist --data-dir .", "mnist is not in .: allow the download"),
        (f"{TINY} --data folder:absent", "absent is missing"),
        (f"{TINY} --data .", "'.' is a folder and no name of a data set: say folder:."),
        (f"{TINY} --epochs 3", "there is no option --epochs; did you mean --set training.epochs="),
        ("export --beta 1", "there is no option --beta; did you mean --to?"),
        (f"{TINY} --data absent_module:sets", "cannot import the module"),
        (f"{TINY} --device gpu", "'gpu' is not a device: use one of auto, cpu, cuda, mps"),
        (f"{TINY} --model m:f", "cannot import the module of m:f"),
        (f"{TINY} --model torchvision:resnet81", "did you mean resnet18"),
        (f"{TINY} --model torchvision:resnet18", "images of 3 channels and the data have 1"),
        (f"{TINY} --set model.network=m:f", "code is only run if you name it: add --model m:f"),
        (f"{TINY} --retrain x", "'x' is not a valid integer"),
        ("train --run .", ". is not a run directory"),
        ("train --run absent", "absent is not a run directory"),
        ("status --run .", ". is not a run directory (it has no run.toml)"),
        ("evaluate --run .", ". is not a run directory"),
        ("export --run . --to net.pt2", ". is not a run directory"),
        ("train-stage --stage 1 --from-cache absent/stage0", "absent/stage0 does not exist"),
        ("status", "Missing option '--run'"),
        ("trian", "unknown command 'trian': did you mean train?"),
        ("recipes lst", "unknown command 'lst': did you mean list?"),
        ("recipes show dmo", "did you mean demo"),
        ("recipes list --table 99", "there are no recipes of a table 99: choose from "),
        ("train --recpie demo", "there is no option --recpie; did you mean --recipe?"),
        ("data prepare mnits", "did you mean mnist"),
        ("data prepare mnist --data-dir .", "allow the download with --download"),
    ],
)
def test_a_mistake_gets_a_sentence_and_leaves_no_trace(folder, line, message):
    told = refused(*line.split())
    assert message in told
    complaint = told.splitlines()[-1]
    assert complaint.startswith("Error: ") and "Traceback" not in told
    assert [path.name for path in folder.iterdir()] == ["tiny.toml"]


def test_a_stage_to_retrain_must_exist(folder):
    assert greedy(*TINY.split()).exit_code == 0
    told = refused("train", "--run", "new", "--retrain", "3")
    assert "there is no stage 3: this network has stages 1 to 2" in told


def test_a_network_too_deep_for_the_images_is_refused_before_anything_is_written(folder):
    for split in ("train", "test"):
        write_classes(folder / "images" / split, 1)
    deep = ["--set", "model.network=vgg8b", "--data", "folder:images"]
    told = refused(*TINY.split(), *deep)
    assert "images of side 8 are too small for this network's 4 poolings" in told
    assert not (folder / "new").exists()


def test_nothing_of_the_users_is_touched(folder):
    (folder / "mine").mkdir()
    (folder / "mine/thesis.tex").write_text("mine")
    (folder / "file").write_text("mine")
    for place in ("mine", "file"):
        assert "choose another --run" in refused("train", "--recipe", "tiny.toml", "--run", place)
    assert [path.name for path in (folder / "mine").iterdir()] == ["thesis.tex"]
    assert (folder / "mine/thesis.tex").read_text() == (folder / "file").read_text() == "mine"


def test_an_empty_directory_becomes_a_run(folder):
    (folder / "new").mkdir()
    assert greedy(*TINY.split()).exit_code == 0
    assert (folder / "new/run.toml").is_file()


def test_failures_that_are_nobodys_mistake_exit_with_1(folder):
    diverging = ["--set", "training.learning_rate=1e30"]
    result = greedy(*TINY.split(), *diverging)
    assert result.exit_code == 1
    assert "Error: the loss of stage 1 is not finite in epoch 1" in result.output
    blocked = greedy("train", "--recipe", "tiny.toml", "--run", "tiny.toml/new")
    assert blocked.exit_code == 1
    assert "the run directory tiny.toml/new cannot be made in " in blocked.output
    assert blocked.output.endswith("(Not a directory): choose another place with --run\n")


def test_debug_shows_a_traceback(folder):
    for debug in (["--debug", "status"], ["status", "--debug"]):
        told = refused(*debug, "--run", "absent")
        assert "Traceback (most recent call last)" in told
        assert told.splitlines()[-1].startswith("Error: absent is not a run directory")


def test_the_sentence_goes_to_standard_error(folder):
    command = [sys.executable, "-m", "greedy.cli.main", "recipes", "list", "--json"]
    command += ["--table", "99"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import absent_module", "cannot import the module of mine1:sets (No module named"),
        ("def f(:", "cannot import the module of mine2:sets (invalid syntax (mine2.py, line 1))"),
        ("\nraise KeyError('a')", "(KeyError: 'a', {folder}/mine3.py, line 2): mend it"),
        (
            "def sets():\n    raise OSError('no disk\\nat all')",
            "mine4:sets fails (OSError: no disk, {folder}/mine4.py, line 2): mend it",
        ),
        ("sets = 3", "mine5:sets is not a function: define sets in"),
    ],
)
def test_what_a_users_own_code_raises_says_where(folder, code, message, request):
    number = request.node.callspec.indices["code"] + 1
    (folder / f"mine{number}.py").write_text(code)
    assert message.format(folder=folder) in refused(*TINY.split(), "--data", f"mine{number}:sets")
    assert not (folder / "new").exists()


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (b"[data]\nname = \n", "bad.toml is not valid TOML: Invalid value (at line 2, column"),
        (b"[data]\n# caf\xe9\n", "bad.toml is not UTF-8 in line 2, as TOML must be"),
    ],
)
def test_a_recipe_that_is_no_toml_says_the_line(folder, recipe, message):
    (folder / "bad.toml").write_bytes(recipe)
    for command in ("train --recipe bad.toml", "recipes show bad.toml", "plan --recipe bad.toml"):
        assert message in refused(*command.split())


def test_files_that_cannot_be_written_are_named_with_the_option(folder):
    assert greedy(*TINY.split()).exit_code == 0
    commands = {
        "report new --to": "html",
        "export --run new --to": "pt2",
        "plot new --to": "svg",
    }
    for command, suffix in commands.items():
        for place, reason in {
            "tiny.toml": "tiny.toml is no folder: choose another --to",
            "absent": "the folder absent does not exist: create it first",
            "/proc": "/proc",  # of which only the kernel's own user learns when it is too late
        }.items():
            told = refused(*command.split(), f"{place}/net.{suffix}")
            assert reason in told
            assert place != "/proc" or "cannot be written" in told
    tuned = greedy(*["finetune", "--run", "new", "--to", "tiny.toml/tuned"])
    assert tuned.output.endswith("(Not a directory): choose another place with --to\n")
