"""`greedy doctor`: what the machine has, and what `auto` would come to."""

import json
import platform
import shutil
from importlib.metadata import version
from pathlib import Path

import psutil
import pytest
import torch
from command_line import answer, said, small_recipe

from greedy.forecasts import doctor
from greedy.forecasts.doctor import examine

RECIPE = small_recipe(model={"hidden_layers": 1}, training={"precision": None})


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_it_tells_what_is_here_and_leaves_nothing(here):
    facts = answer("doctor")
    assert facts["versions"]["python"] == platform.python_version()
    assert facts["versions"]["greedy"] == version("greedy-train")
    for name in ("torch", "torchvision", "zarr", "numcodecs"):
        assert facts["versions"][name] == version(name)
    assert facts["memory_total_bytes"] == psutil.virtual_memory().total
    assert 0 < facts["memory_free_bytes"] <= facts["memory_total_bytes"]
    cpu = facts["devices"][-1]
    assert cpu["type"] == "cpu" and cpu["total_bytes"] == facts["memory_total_bytes"]
    gpus = [each for each in facts["devices"] if each["type"] == "cuda"]
    assert len(gpus) == torch.cuda.device_count()
    disk = facts["disk"]
    assert disk["path"] == str(here)
    assert disk["total_bytes"] == psutil.disk_usage(str(here)).total
    assert disk["read_bytes_per_second"] > 0
    assert not list(here.iterdir())


def test_the_disk_is_that_of_the_runs(here):
    (here / "runs").mkdir()
    assert answer("doctor")["disk"]["path"] == str(here / "runs")


def test_the_choices_are_those_of_a_run_that_begins_now(here, monkeypatch):
    memory, disk = psutil.virtual_memory(), shutil.disk_usage(here)  # as if nobody else took any
    monkeypatch.setattr("psutil.virtual_memory", lambda: memory)
    monkeypatch.setattr("shutil.disk_usage", lambda path: disk)
    auto = answer("doctor")["automatic"]
    (here / "tiny.toml").write_text(RECIPE)
    planned = answer("plan", "--recipe", "tiny.toml")
    assert (auto["device"], auto["precision"]) == (planned["device"], planned["precision"])
    assert auto["memory_budget_bytes"] == pytest.approx(planned["memory_budget_bytes"], rel=0.3)
    assert auto["disk_budget_bytes"] == pytest.approx(planned["disk"]["budget_bytes"], rel=0.1)
    said("train", "--recipe", "tiny.toml")
    record = json.loads((here / "runs/tiny/stage1/stage.json").read_bytes())
    for choice in ("precision", "encoding", "threads"):
        assert auto[choice] == record["resolved"][choice]
    assert auto["ram_budget_bytes"] == pytest.approx(psutil.virtual_memory().available / 2, rel=0.3)


def test_text_for_people(here):
    lines = said("doctor").splitlines()
    assert max(len(line) for line in lines if not line.startswith("disk of")) <= 80
    by_word = {line.split()[0]: line for line in lines if line.strip()}
    assert version("zarr") in by_word["zarr"]
    assert by_word["--device"].split()[1] in ("cpu", "cuda", "mps")
    assert "/s " in by_word["read"]


def test_a_package_that_is_missing_has_no_version(here, monkeypatch):
    monkeypatch.setattr(doctor, "OPTIONAL", ("no-such-package",))
    assert answer("doctor")["versions"]["no-such-package"] is None
    (line,) = (each for each in said("doctor").splitlines() if each.startswith("no-such"))
    assert line.split(maxsplit=1)[1].strip() == "not installed"


@pytest.mark.skipif(platform.system() != "Linux", reason="/proc is Linux's")
def test_where_no_file_can_be_written_the_rest_is_told():
    facts = examine(Path("/proc"))
    assert facts.disk.read_bytes_per_second is None
    assert facts.versions["torch"] == version("torch")


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="needs a file system in memory")
def test_memory_is_not_passed_off_as_a_disk():
    assert examine(Path("/dev/shm")).disk.page_cache != "dropped"
