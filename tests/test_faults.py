"""A short form of `benchmarks/faults.py`: real processes, real files, real disks."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import small_recipe, train
from PIL import Image

FAULTS = Path(__file__).parents[1] / "benchmarks/faults.py"
NAMESPACE = ["unshare", "--user", "--map-root-user", "--mount"]


def struck(**counts: int) -> dict[str, int]:
    options = {"kills": 0, "flips": 0, "disk-full": 0} | counts
    command = [sys.executable, str(FAULTS), "--json", "--no-overhead"]
    command += [f"--{name}={count}" for name, count in options.items()]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return json.loads(done.stdout)


@pytest.mark.slow
def test_killed_and_rotten_runs() -> None:
    counts = struck(kills=2, flips=2)
    assert counts["identical"] == 2
    assert counts["silent"] == 0
    assert counts["detected"] + counts["harmless"] == 2


mounting = pytest.mark.skipif(
    not shutil.which("unshare") or subprocess.run([*NAMESPACE, "true"], check=False).returncode,
    reason="a file system of its own takes a mount namespace, which this system does not give",
)


@mounting
@pytest.mark.slow
def test_full_disks() -> None:
    assert struck(**{"disk-full": 2}) == {"disk_full": 2, "clean_stops": 2, "continued": 2}


READ_ONLY = """
mkdir there
mount -t tmpfs none there
cp -r run there
mount -o remount,ro there
exec "$@"
"""
READ = """
from command_line import greedy, said
for words in (
    "train --run there/run",
    "status --run there/run",
    "evaluate --run there/run --by-stage",
    "plan --run there/run",
    "predict --run there/run image.png",
    "report there/run --to report.html",
    "plot there/run --to curves.svg",
    "export --run there/run --to network.safetensors",
    "cache info there/run",
    "cache verify there/run",
):
    assert said(*words.split()), words
for words in ("train --run there/run --retrain", "cache drop there/run", "cache repair there/run"):
    refused = greedy(*words.split())
    assert refused.exit_code == 2, refused.output
    assert "run is read-only: copy the run to where you may write" in refused.output
"""


@mounting
def test_what_only_reads_works_on_a_read_only_run(tmp_path: Path) -> None:
    train(tmp_path, small_recipe())
    Image.new("L", (28, 28)).save(tmp_path / "image.png")
    command = [*NAMESPACE, "sh", "-ec", READ_ONLY, "sh", sys.executable, "-c", READ]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run(command, check=False, cwd=tmp_path, env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


RECIPE = """
[data]
name = "fashion-mnist-sample"
[model]
network = "mlp"
hidden_width = 16
[loss]
name = "predsim"
[training]
epochs = 3000
batch_size = 64
learning_rate = 0.002
precision = "float32"
"""


def test_sigterm_keeps_what_was_done_and_a_second_process_is_told(tmp_path: Path) -> None:
    (tmp_path / "tiny.toml").write_text(RECIPE)
    command = [sys.executable, "-m", "greedy.cli.main", "train", "--recipe", "tiny.toml"]
    command += ["--run", "run"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": tmp_path}
    with subprocess.Popen(command, **pipes) as process:
        for line in process.stdout:
            if "epoch 1/" in line:
                break
        process.send_signal(signal.SIGSTOP)  # it holds the run, and others have the processor
        second = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
        drop = [*command[:3], "cache", "drop", "run"]
        dropped = subprocess.run(drop, capture_output=True, text=True, check=False, cwd=tmp_path)
        status = [*command[:3], "status", "--run", "run"]
        subprocess.run(status, capture_output=True, check=True, cwd=tmp_path)
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGCONT)
        process.stdout.read()
        complaint = process.stderr.read()
    for refused in (second, dropped):
        assert refused.returncode == 2
        assert f"is in use by process {process.pid} on " in refused.stderr
    assert process.returncode == 143
    assert complaint.startswith("Error: interrupted")
    assert (tmp_path / "run/stage1/training/checkpoint/progress.json").is_file()
