"""`greedy reproduce`: the paper's rows made again, and put beside the published figures."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import answer, greedy, refused, written

from greedy.recipes import of_table
from greedy.results.reproduction import rows

SMALL = ["--data", "fashion-mnist-sample", "--set", "model.hidden_width=16", "--views", "1"]
SMALL += ["--set", "training.batch_size=256", "--precision", "float32"]
ROWS = ["fashion-mnist/mlp-pred", "mnist/mlp-sim"]
COMMAND = ["reproduce", *ROWS, *SMALL, "--epochs-scale", "0.01", "--seeds", "2"]
OWN = """
extends = "fashion-mnist/mlp-predsim"
[data]
name = "fashion-mnist-sample"
[model]
hidden_layers = 1
hidden_width = 8
[training]
epochs = 1
batch_size = 500
precision = "float32"
[store]
views = 1
"""


def table(output):
    """Returns the lines of the printed table by the recipe's name, in words, and the notes below
    it."""
    lines = output.splitlines()
    head = max(i for i, line in enumerate(lines) if line.startswith("recipe "))
    assert lines[head].split() == ["recipe", "network", "loss", "paper", "ours", "range", "seeds"]
    words = [line.split() for line in lines[head + 1 :]]
    rows = {each[0]: each[1:] for each in words if len(each) == 7}
    return rows, lines[head + 1 + len(rows) :]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        result = greedy(*COMMAND)
    assert result.exit_code == 0, result.output
    return folder, result.output


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Makes a folder with a recipe in it the current directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.toml").write_text(OWN)
    return tmp_path


@pytest.fixture
def done(finished, folder):
    """Copies the folder with finished rows."""
    shutil.copytree(finished[0], folder, dirs_exist_ok=True)
    return folder


def test_our_figures_stand_beside_the_papers(done, finished):
    lines, notes = table(finished[1])
    assert list(lines) == ROWS
    others = "model.hidden_width, training.epochs, training.batch_size, training.milestones"
    assert notes == [
        f"fashion-mnist/mlp-pred: not as published in data.name, {others}, training.precision",
        f"mnist/mlp-sim: not as published in data.name, data.mean, data.std, {others}, "
        "training.precision",
        "the paper trained local losses jointly, as --strategy joint does",
    ]
    for row in answer(*COMMAND)["rows"]:
        errors = []
        for run in row["runs"]:
            evaluated = answer("evaluate", "--run", run["run"])
            assert run["test_error_percent"] == pytest.approx(evaluated["error_percent"], abs=0.5)
            errors.append(run["test_error_percent"])
        mean, span = sum(errors) / 2, max(errors) - min(errors)
        shown = ["mlp", row["loss"], row["paper_test_error_percent"], mean, span, "2/2"]
        texts = [f"{each:.2f}" if isinstance(each, float) else each for each in shown]
        assert lines[row["name"]] == texts
        weights = [Path(run["run"], "stage1/encoder.safetensors") for run in row["runs"]]
        assert weights[0].read_bytes() != weights[1].read_bytes()


def test_the_document_says_what_was_run(done):
    first, second = answer(*COMMAND)["rows"]
    assert (first["name"], second["name"]) == (*ROWS,)
    about = {key: first[key] for key in ("table", "dataset", "network", "loss", "strategy")}
    assert about == {
        "table": 2,
        "dataset": "fashion-mnist-sample",
        "network": "mlp",
        "loss": "pred",
        "strategy": "greedy",
    }
    assert first["paper_test_error_percent"] == 8.6
    assert first["finished"] and "training.epochs" in first["departures"]
    assert [run["seed"] for run in first["runs"]] == [0, 1]
    assert [run["failure"] for run in first["runs"]] == [None, None]


def test_a_finished_run_keeps_weights_and_records_but_no_stores(done):
    runs = [Path(run["run"]) for row in answer(*COMMAND)["rows"] for run in row["runs"]]
    assert len(set(runs)) == 4
    for run in runs:
        stages = sorted(path.name for path in run.glob("stage*"))
        assert stages == [f"stage{number}" for number in range(5)]
        assert [path.parent.name for path in run.glob("*/activations.zarr")] == ["stage0"]
        assert len(list(run.glob("stage*/encoder.safetensors"))) == 4
        assert answer("status", "--run", run)["stages"]


def test_given_again_it_trains_nothing(done, finished):
    before = written(done)
    result = greedy(*COMMAND)
    assert result.exit_code == 0
    assert table(result.output) == table(finished[1])
    assert "training, " not in result.output
    assert written(done) == before


def test_what_decides_a_result_has_its_own_run(done):
    before = written(done / "runs")
    command = ["reproduce", ROWS[0], *SMALL, "--epochs-scale", "0.005", "--seeds", "1"]
    (row,) = answer(*command)["rows"]
    assert not any(Path(row["runs"][0]["run"]) in path.parents for path in before)
    after = written(done / "runs")
    assert {path: after[path] for path in before} == before
    known = ["fashion-mnist/mlp-pred"]
    many = [
        rows(known, ["store.ram_budget=1GiB"], seeds=2),
        rows(known, seeds=3),
        rows(known, epochs_scale=0.5),
        rows(known, ["training.batch_size=64"]),
        rows(known, ["training.strategy=joint"]),
        rows(known, ["seed=3"], seeds=2),
    ]
    paths = [[run.path for run in row.runs] for (row,) in many]
    assert paths[0] == paths[1][:2]
    assert len({path for each in paths for path in each}) == 3 + 3 + 2
    assert [run.recipe.seed for run in many[5][0].runs] == [3, 4]


def test_rows_are_asked_for_by_table_name_pattern_or_file(folder):
    wanted = ["5", "mnist/mlp-pred", "own.toml", "mnist/mlp-*", "cifar10/vgg8b-sim-bio"]
    names = [row.name for row in rows(wanted)]
    rest = ["mnist/mlp-glob", "mnist/mlp-predsim", "mnist/mlp-sim"]
    assert names == [*of_table(5), "mnist/mlp-pred", "own.toml", *rest]
    measured = [row for row in rows(["*"]) if not row.recipe.paper.cited]
    assert len(measured) == 93
    (row,) = rows(["own.toml"], to=Path("there"))
    assert row.runs[0].path.parent == Path("there/own")


def test_a_figure_of_another_work_is_said_to_be_one(folder):
    names = ["cifar10/wrn-40-10-glob", "cifar10/wrn-40-10-glob-cutout"]
    result = greedy("reproduce", *names, "--data-dir", folder / "none")
    assert result.exit_code == 1
    assert "3.87" in result.output
    assert (
        f"{', '.join(names)}: the paper cites this figure from DeVries & Taylor 2017, "
        f"arXiv 1708.04552" in result.output.replace("\n", " ")
    )


def test_epochs_are_scaled_with_their_milestones():
    (row,) = rows(["mnist/mlp-pred"], epochs_scale=0.1)
    training = row.recipe.training
    assert (training.epochs, training.milestones) == (10, [5, 8, 9])
    (row,) = rows(["mnist/mlp-pred"], epochs_scale=0.001)
    assert row.recipe.training.epochs == 1


def test_a_strategy_is_for_local_losses():
    joint = rows(["4", "9"], ["training.strategy=joint", "training.epochs=3"])
    strategies = {row.name: row.recipe.training.strategy for row in joint}
    others = {name: each for name, each in strategies.items() if each != "joint"}
    assert set(others.values()) == {"backprop", "glob+sim"}
    assert all("-glob" in name for name in others)
    assert len(others) == 5 + 2 + 7  # of table 4 its own and cited ones, of table 9 all
    assert all(row.recipe.training.epochs == 3 for row in joint)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "Missing argument 'TABLE|RECIPE...'"),
        ("10", "there are no recipes of a table 10: choose from 1, 2, 3"),
        ("mnist/mlp", "loss.name is not set"),
        ("mnist/mlp-prd", "there is no recipe mnist/mlp-prd; did you mean mnist/mlp-pred"),
        ("svnh/*", "no recipe with a published error matches svnh/*"),
        ("1 --epochs-scale 0", "epochs cannot be multiplied by 0: give a number above 0"),
        ("1 --device gpu", "'gpu' is not a device: use one of auto, cpu, cuda, mps"),
        ("1 --seeds 0", "0 is not in the range x>=1"),
        ("1 --set training.epoch=3", "did you mean training.epochs?"),
    ],
)
def test_a_mistake_gets_a_sentence_and_leaves_no_trace(folder, line, message):
    told = refused("reproduce", *line.split())
    assert message in told.replace("\n", " ")
    assert [path.name for path in folder.iterdir()] == ["own.toml"]


def test_a_row_that_fails_is_told_and_the_others_go_on(folder):
    command = ["reproduce", "kmnist/mlp-pred", "own.toml", "--data-dir", "nothing", "--seeds", "2"]
    result = greedy(*command)
    assert result.exit_code == 1
    reason = "kmnist is not in nothing: allow the download with --download, or fetch it with "
    assert f"row 1/2, kmnist/mlp-pred, seed 1: {reason}" in result.output
    lines, notes = table(result.output)
    assert lines["kmnist/mlp-pred"] == ["mlp", "pred", "7.26", "-", "-", "0/2"]
    assert lines["own.toml"][-1] == "2/2" and float(lines["own.toml"][3])
    assert notes[-1].startswith(f"unfinished: kmnist/mlp-pred, seed 0, 1: {reason}")
    assert not (folder / "runs/reproduce/kmnist").exists()
    again = greedy(*command, "--json")
    assert again.exit_code == 1
    failed, own = json.loads(again.stdout)["rows"]
    assert (failed["finished"], own["finished"]) == (False, True)
    assert failed["runs"][0]["failure"].startswith(reason)
    assert failed["test_error_percent"] is None


def test_a_row_that_diverges_is_told_too(folder):
    result = greedy("reproduce", "own.toml", "--set", "training.learning_rate=1e30")
    assert result.exit_code == 1
    assert "unfinished: own.toml, seed 0: the loss of stage 1 is not finite" in result.output


# Ends itself when it has reported epoch 4 of stage 2.
KILLED = """
import os, signal, sys
from greedy.cli.main import main
from greedy.cli.progress import Lines
epoch_finished = Lines.epoch_finished
def finished(self, report):
    epoch_finished(self, report)
    if report.epoch == 4 and (next(Path("runs/reproduce/own").iterdir()) / "stage2").exists():
        os.kill(os.getpid(), signal.SIGKILL)
from pathlib import Path
Lines.epoch_finished = finished
sys.argv = ["greedy", "reproduce", *sys.argv[1:]]
main()
"""


def start(*arguments):
    command = [sys.executable, "-m", "greedy.cli.main", "reproduce", *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, **pipes)


def test_killed_and_given_again_it_goes_on(folder):
    many = ["own.toml", "--set", "training.epochs=6"]
    process = subprocess.run([sys.executable, "-c", KILLED, *many], check=False)
    assert process.returncode == -signal.SIGKILL
    (run,) = Path("runs/reproduce/own").iterdir()
    assert (run / "stage2/training/checkpoint/progress.json").is_file()
    before = written(run / "stage1")
    (row,) = answer("reproduce", *many)["rows"]
    weights = run / "stage1/encoder.safetensors"
    assert written(run / "stage1")[weights] == before[weights]
    (whole,) = answer("reproduce", *many, "--to", "whole")["rows"]
    assert row["test_error_percent"] == whole["test_error_percent"]


def test_ctrl_c_prints_what_there_is_and_what_is_not_finished(folder):
    long = OWN.replace("epochs = 1", "epochs = 3000")
    for name in ("long.toml", "longer.toml"):
        (folder / name).write_text(long)
    with start("own.toml", "long.toml", "longer.toml") as process:
        lines = []
        for line in process.stdout:
            lines.append(line)
            if "epoch 1/3000" in line:
                process.send_signal(signal.SIGINT)
        complaint = process.stderr.read()
    assert process.returncode == 130
    assert complaint.startswith("Error: interrupted") and "Traceback" not in complaint
    assert "the same command resumes" in complaint
    shown, notes = table("".join(lines))
    assert [words[-1] for words in shown.values()] == ["1/1", "0/1", "0/1"]
    assert notes[-1] == "unfinished: long.toml, longer.toml"


def test_stores_that_a_kill_left_behind_go(done):
    (row, _) = answer(*COMMAND)["rows"]
    run = Path(row["runs"][0]["run"])
    shutil.copytree(run / "stage0/activations.zarr", run / "stage1/activations.zarr")
    assert greedy(*COMMAND).exit_code == 0
    assert not (run / "stage1/activations.zarr").exists()


def test_a_damaged_figure_is_named(done):
    (row, _) = answer(*COMMAND)["rows"]
    document = Path(row["runs"][0]["run"] + ".json")
    document.write_text(document.read_text().replace('"error_percent": ', '"error_percent": 1'))
    assert f"{document} is damaged (its digest does not match): delete it" in refused(*COMMAND)
    document.unlink()
    (again, _) = answer(*COMMAND)["rows"]
    assert again == row
