"""The examples, run as a reader runs them, on little."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
ARGUMENTS = {
    "deployed": "--epochs 1",
    "exact_step": "",
    "own_images": "--epochs 1",
    "own_loss": "--epochs 1",
    "own_network": "--epochs 1",
    "strategies": "--epochs 1 --set model.network=mlp --set model.feature_multiplier=1",
    "vgg11b_3x_under_budgets": "1GiB 1MiB",
}
SAID = {
    "deployed": [
        r"network\.safetensors: the same logits, ",
        r"network\.pt2: the same logits, ",
        r"network\.onnx: the same logits, ",
    ],
    "exact_step": [rf"step {n}: loss \d\.\d+" for n in range(1, 6)],
    "own_images": [
        *(rf"stage {n}, .*: test error \d+\.\d %" for n in range(1, 9)),
        *[r"own-images/test/.+\.png: .+ \(\d+%\)"] * 5,
    ],
    "own_loss": [
        r"contrastive +test error of each stage: (\d+\.\d, ){2}\d+\.\d %",
        r"predsim +test error of each stage: (\d+\.\d, ){2}\d+\.\d %",
    ],
    "own_network": [
        r"stage 1, conv8 .* [0-9,]+ multiply-adds",
        r"stage 2, conv16\+conv16 .* multiply-adds",
        r"stage 3, conv32 .* multiply-adds",
        r"stage 4, output .* multiply-adds",
    ],
    "strategies": [
        r"strategy +test error +memory +time",
        r"greedy +\d+\.\d % .*iB +\d+\.\d s",
        r"joint +\d+\.\d % .*iB +\d+\.\d s",
        r"backprop +\d+\.\d % .*iB +\d+\.\d s",
    ],
    "vgg11b_3x_under_budgets": [
        r"cifar10/vgg11b-3x-predsim, a step on a GPU in float32:",
        r"budget .*",
        r" +1GiB +\d+\.\d MiB +from \d+ .*heads \d+.*",
        r" +1MiB  does not fit: stage \d+ .*",
        r"all at once by back-propagation: 5\.\d GiB",
    ],
}


def run(name, arguments, folder):
    command = [sys.executable, "-W", "error", EXAMPLES / f"{name}.py", *arguments.split()]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_every_example_is_run_short_and_says_how():
    names = {file.stem: file.read_text() for file in EXAMPLES.glob("*.py")}
    assert names.keys() == ARGUMENTS.keys() == SAID.keys()
    for name, text in names.items():
        assert len(text.splitlines()) < 80
        docstring = text.split('"""')[1]
        assert f"    python examples/{name}.py" in docstring


@pytest.mark.slow
@pytest.mark.parametrize("name", ARGUMENTS)
def test_it_runs_and_shows_what_it_says(name, tmp_path):
    result = run(name, ARGUMENTS[name], tmp_path)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    for line, expected in zip(lines, SAID[name], strict=True):
        assert re.fullmatch(rf"\s*{expected}.*", line), (line, expected)


def test_deployed_writes_into_no_folder_that_is_there(tmp_path):
    (tmp_path / "deployed").mkdir()
    result = run("deployed", "", tmp_path)
    assert result.returncode == 2
    assert "deployed exists already: give another --to" in result.stderr
    assert not list((tmp_path / "deployed").iterdir()) and not (tmp_path / "runs").exists()
