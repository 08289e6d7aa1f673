"""The errors of runs over their epochs."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from interrupting import interrupt
from small_training import new_trainer
from torch.utils.data import TensorDataset

from greedy import Reporter, RunDirectory, UserError
from greedy.base.errors import Interrupted
from greedy.losses import LocalLoss, Pred, Sim
from greedy.models import mlp
from greedy.results.curves import run_curves, run_names, stage_curves
from greedy.runs.record import StageRecord

EPOCHS = 3


class Stop(Reporter):
    """Interrupts the last epoch of stage 1."""

    def epoch_started(self, epoch: int, rows: int) -> None:
        if epoch == EPOCHS:
            interrupt()


def trained(
    directory: Path,
    loss: LocalLoss,
    rate: float = 0.01,
    reporter: Reporter | None = None,
    strategy: str = "greedy",
):
    torch.manual_seed(0)
    model = mlp(1, 6, 3, hidden_layers=1, hidden_width=8)
    data = TensorDataset(torch.rand(90, 1, 6, 6), torch.arange(90) % 3)
    known = {"epochs": EPOCHS, "learning_rate": rate, "views": 1, "strategy": strategy}
    new_trainer(directory, model, loss=loss, reporter=reporter, **known).fit(data, data)
    return directory


@pytest.fixture(scope="module")
def pred(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("runs") / "pred", Pred())


@pytest.fixture(scope="module")
def sim(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("runs") / "sim", Sim())


@pytest.fixture
def run(pred, tmp_path):
    return RunDirectory.open(shutil.copytree(pred, tmp_path / "run"))


def history(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def rewrite(run: RunDirectory, stage: int, text: str) -> None:
    """Writes other epochs for a stage, and their digest into its record."""
    (run.stage_dir(stage) / "history.jsonl").write_text(text)
    StageRecord.read(run.stage_dir(stage)).write(run.stage_dir(stage))


def test_every_stage_with_a_local_classifier_has_a_curve(run):
    curves = stage_curves(run)
    assert [(each.name, each.stage) for each in curves] == [
        ("stage 1, linear8", 1),
        ("stage 2, output", 2),
    ]
    for curve in curves:
        lines = history(run.stage_dir(curve.stage) / "history.jsonl")
        expected = [(epoch, lines[epoch - 1]["train_error_percent"]) for epoch in (1, 2, 3)]
        assert curve.train == expected


def test_a_loss_without_local_classifier_leaves_the_output_layer(sim):
    assert [each.stage for each in stage_curves(RunDirectory.open(sim))] == [2]


@pytest.mark.parametrize("absent", ["null", "missing"])
def test_only_what_was_measured_is_a_point(run, absent):
    lines = history(run.stage_dir(2) / "history.jsonl")
    for line in lines:
        if absent == "null":
            line["test_error_percent"] = None
        else:
            line.pop("test_error_percent", None)
    lines[1]["test_error_percent"] = 12.5
    rewrite(run, 2, "".join(json.dumps(line) + "\n" for line in lines))
    curve = stage_curves(run)[1]
    assert curve.test == [(2, 12.5)]
    assert len(curve.train) == EPOCHS


def test_runs_are_compared_by_their_output_layers(run, sim):
    curves = run_curves([run, RunDirectory.open(sim)])
    assert [(each.name, each.stage) for each in curves] == [("run", 2), ("sim", 2)]
    assert curves[0].train == stage_curves(run)[1].train


def test_the_stage_in_training_is_as_far_as_it_is(tmp_path):
    with pytest.raises(Interrupted):
        trained(tmp_path / "begun", Pred(), reporter=Stop())
    run = RunDirectory.open(tmp_path / "begun")
    (curve,) = stage_curves(run)
    assert [epoch for epoch, _ in curve.train] == [1, 2]
    assert [each.name for each in run_curves([run])] == ["begun (stage 1 of 2)"]


def test_so_are_all_stages_that_train_at_once(tmp_path):
    with pytest.raises(Interrupted):
        trained(tmp_path / "begun", Pred(), reporter=Stop(), strategy="joint")
    run = RunDirectory.open(tmp_path / "begun")
    curves = stage_curves(run)
    assert [(each.stage, [epoch for epoch, _ in each.train]) for each in curves] == [
        (1, [1, 2]),
        (2, [1, 2]),
    ]
    trained(tmp_path / "begun", Pred(), strategy="joint")
    whole = stage_curves(run)
    assert [each.train[:2] for each in whole] == [each.train for each in curves]


def test_stale_stages_have_no_curve(run, tmp_path):
    other = trained(tmp_path / "other", Pred(), rate=0.02)
    shutil.rmtree(run.stage_dir(1))
    shutil.copytree(other / "stage1", run.stage_dir(1))
    with pytest.raises(UserError, match=rf"no stage of {run.path} has errors to draw yet: resume"):
        stage_curves(run)


def test_runs_of_one_name_are_told_apart_by_their_paths(run, pred, tmp_path, monkeypatch):
    twin = RunDirectory.open(shutil.copytree(pred, tmp_path / "elsewhere" / "run"))
    assert run_names([run, twin]) == [str(run.path), str(twin.path)]
    monkeypatch.chdir(run.path)
    assert run_names([RunDirectory.open(Path()), RunDirectory.open(pred)]) == ["run", "pred"]


@pytest.mark.parametrize(
    "line",
    [
        "not a document",
        '{"epoch": 1}',
        '{"epoch": 0, "train_error_percent": 1}',
        '{"epoch": "1", "train_error_percent": 1}',
        '{"epoch": 1, "train_error_percent": 101}',
        '{"epoch": 1, "train_error_percent": NaN}',
        '{"epoch": 1, "train_error_percent": 1, "test_error_percent": -1}',
    ],
)
def test_a_history_that_is_none_is_refused(run, line):
    rewrite(run, 1, line + "\n")
    with pytest.raises(UserError, match=r"stage1/history.jsonl is not a history .*--retrain"):
        stage_curves(run)


def test_a_changed_history_is_refused(run):
    path = run.stage_dir(1) / "history.jsonl"
    path.write_text(path.read_text().replace('"epoch": 1', '"epoch": 7'))
    with pytest.raises(UserError, match="its digest differs"):
        stage_curves(run)
