"""`greedy bench`, and the times that `greedy plan` tells after it."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from command_line import NETWORKS, answer, greedy, refused, small_recipe

MLP = small_recipe(
    data={"augmentation": "jitter2+hflip"},
    model={"dropout": 0.1},
    training={"epochs": 2, "batch_size": 32},
    store={"views": 2, "reuse": 0, "encoding": "uint4"},
)
CONVOLUTIONAL = (
    *("--recipe", "mine.toml", "--data", "cifar10", "--model", "mine:convolutional"),
    *("--set", "training.batch_size=256", "--memory-budget", "40MiB", "--device", "cpu"),
    *("--views", "1", "--reuse", "0"),
)
PLAN = ("plan", "--recipe", "mlp.toml", "--device", "cpu", "--memory-budget", "1GiB")
BENCH = ("bench", "--seconds", "0.05", "--device", "cpu")
KEYS = {"recipe", "device", "threads", "peak_gflops", "stages", "calibration"}
STAGE_KEYS = {
    *("stage", "name", "precision", "mode"),
    *("images_per_second", "share_of_peak", "wait_share"),
}


@contextmanager
def living_in(folder):
    """Makes a folder the home of the user, temporary files included, inside the ``with``."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("XDG_DATA_HOME", str(folder / "home"))
        patch.setattr(tempfile, "tempdir", str(folder / "tmp"))
        yield folder


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Measures the machine. Returns a folder with recipes, what `plan` printed before that, and
    what `bench` printed."""
    folder = tmp_path_factory.mktemp("measured")
    (folder / "mlp.toml").write_text(MLP)
    (folder / "mine.toml").write_text(MLP.replace('"mlp"', '"python"'))
    (folder / "mine.py").write_text(NETWORKS)
    (folder / "tmp").mkdir()
    with living_in(folder):
        before = greedy(*PLAN).output, answer(*PLAN)
        return folder, before, answer(*BENCH, "--recipe", "mlp.toml")


@pytest.fixture
def folder(measured):
    with living_in(measured[0]) as folder:
        yield folder


def test_every_stage_is_measured(measured):
    folder, _, measurements = measured
    assert measurements.keys() == KEYS
    assert measurements["recipe"] == "mlp"
    assert measurements["threads"] == torch.get_num_threads()
    assert measurements["peak_gflops"] > 0
    stages = measurements["stages"]
    assert [(each["stage"], each["name"]) for each in stages] == [
        *((1, "linear16"), (2, "linear16"), (3, "output"))
    ]
    for each in stages:
        assert each.keys() == STAGE_KEYS
        assert (each["precision"], each["mode"]) == ("float32", "plain")
        assert each["images_per_second"] > 0
        assert each["share_of_peak"] > 0  # a busy machine has no peak
        assert 0 <= each["wait_share"] <= 1
    rate = stages[2]["share_of_peak"] * measurements["peak_gflops"] * 1e9
    assert rate == pytest.approx(stages[2]["images_per_second"] * 2 * 2 * 16 * 10)
    assert Path(measurements["calibration"]).is_relative_to(folder / "home")
    assert not any((folder / "tmp").glob("greedy-bench-*"))


def test_times_are_unknown_before(measured):
    _, (text, plan), _ = measured
    assert plan["seconds"] is None
    assert {stage["seconds"] for stage in plan["stages"]} == {None}
    assert "times are unknown" in text
    assert "`greedy bench --device cpu`" in text


def test_times_are_told_after(folder):
    plan = answer(*PLAN)
    seconds = [stage["seconds"] for stage in plan["stages"]]
    assert min(seconds) > 0
    assert plan["seconds"] == pytest.approx(sum(seconds))
    text = greedy(*PLAN).output
    assert "unknown" not in text
    assert max(map(len, text.splitlines())) <= 80


def test_the_time_of_training_follows_the_epochs(folder):
    """What is left is the time of writing stores, however many epochs there are."""
    times = {}
    for epochs in (2, 4, 6):
        settings = ("--set", f"training.epochs={epochs}", "--set", "training.test_every=0")
        plan = answer(*PLAN, *settings)
        times[epochs] = [stage["seconds"] for stage in plan["stages"]]
    for two, four, six in zip(*times.values(), strict=True):
        assert four - two == pytest.approx(six - four)
        assert 0 < two - (four - two) < two


def test_the_measured_rates_are_those_of_the_plan(measured, folder):
    """The output layer writes no store: its time is that of its steps and of the test rows that it
    sees."""
    stage = measured[2]["stages"][2]
    settings = ("--set", "training.test_every=0", "--set", "training.epochs=1000")
    planned = answer(*PLAN, *settings)["stages"][2]["seconds"]
    assert planned == pytest.approx(1000 * 5000 / stage["images_per_second"], rel=0.05)


def test_what_was_not_measured_is_not_told(folder):
    result = greedy(*PLAN, "--precision", "bfloat16")
    assert result.exit_code == 0
    assert "`greedy bench` with the same recipe" in result.output.replace("\n", " ")
    convolutional = answer("plan", *CONVOLUTIONAL)
    known = [stage["seconds"] is not None for stage in convolutional["stages"]]
    assert known == [False, False, True]
    assert convolutional["seconds"] is None


def test_other_threads_or_another_device_make_times_unknown(folder):
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        result = greedy(*PLAN)
    finally:
        torch.set_num_threads(threads)
    assert result.exit_code == 0
    assert f"with {threads} threads" in result.output.replace("\n", " ")
    assert answer(*PLAN, "--device", "cuda")["seconds"] is None


def test_a_damaged_calibration_is_told_and_left_to_bench(measured, folder, monkeypatch, tmp_path):
    path = Path(measured[2]["calibration"])
    damaged = tmp_path / path.relative_to(folder / "home")
    damaged.parent.mkdir(parents=True)
    damaged.write_bytes(path.read_bytes()[:-10])
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    result = greedy(*PLAN)
    assert result.exit_code == 0
    assert "is damaged" in result.output
    assert answer(*PLAN)["seconds"] is None
    assert damaged.read_bytes() == path.read_bytes()[:-10]


@pytest.mark.slow
def test_stages_are_measured_in_the_modes_of_a_budget(folder, monkeypatch, tmp_path):
    """And in a table, a line for each stage as it begins."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    planned = answer("plan", *CONVOLUTIONAL)
    result = greedy(*BENCH, *CONVOLUTIONAL)
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert max(len(line) for line in lines if "kept in" not in line) <= 80
    assert [line for line in lines if line.startswith("stage ") and "/" in line.split()[1]] == [
        *("stage 1/3 conv32", "stage 2/3 conv32", "stage 3/3 output")
    ]
    modes = [stage["mode"] for stage in planned["stages"]]
    assert len(set(modes)) > 1
    table = [line.split() for line in lines if line[:1].isdigit()]
    assert [row[3] for row in table] == modes
    assert answer("plan", *CONVOLUTIONAL)["seconds"] > 0
    assert not any((folder / "tmp").glob("greedy-bench-*"))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--recipe", "mpl.toml"), "mpl.toml"),
        (("--seconds", "-1"), "--seconds"),
        (("--recipe", "mlp.toml", "--memory-budget", "1KiB"), "--memory-budget"),
        (
            ("--recipe", "mlp.toml", "--set", "training.strategy=joint"),
            "training.strategy=greedy",
        ),
    ],
)
def test_a_mistake_is_one_sentence(folder, arguments, sentence):
    told = refused("bench", *arguments)
    assert "Error: " in told
    assert sentence in told.replace("\n", " ")


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGINT,
        pytest.param(signal.SIGTERM, marks=SLOW),
        pytest.param(signal.SIGHUP, marks=SLOW),
    ],
)
def test_a_signal_leaves_no_temporary_files(folder, tmp_path, number):
    """A signal to a process of its own, while the first stage trains."""
    home = {"XDG_DATA_HOME": str(tmp_path), "TMPDIR": str(folder / "tmp")}
    command = [sys.executable, "-u", "-m", "greedy.cli.main", "bench", "--recipe", "mlp.toml"]
    with subprocess.Popen(
        [*command, "--seconds", "600", "--device", "cpu"],
        env=os.environ | home,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        while not any((folder / "tmp").glob("greedy-bench-*/source/train/zarr.json")):
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.05)
        process.send_signal(number)
        _, errors = process.communicate()
    assert process.returncode == 128 + number
    assert "interrupted" in errors
    assert "Traceback" not in errors
    assert not any((folder / "tmp").glob("greedy-bench-*"))
