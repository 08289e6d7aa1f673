"""What pages and messages say of installing, run by pip in a copy of the checkout, without an
index: whatever they name is there already."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from greedy.base.errors import missing_packages

ROOT = Path(__file__).parents[1]
EXTRAS = "onnx", "plot", "report", "svhn", "tensorboard"
PARTS = "pyproject.toml", "README.md", "LICENSE", "greedy", "cache", "cli"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
SCRIPTS = [*(ROOT / "examples").glob("*.py"), *(ROOT / "benchmarks").glob("*.py")]
SOURCES = [path for part in ("greedy", "cache", "cli") for path in (ROOT / part).rglob("*.py")]


def installed(text: str) -> set[str]:
    """Returns the arguments of `pip install` in a text, as they are typed."""
    return set(re.findall(r"pip install ((?:-e )?(?:'[^']+'|\"[^\"]+\"|[^\s`'\"]+))", text))


def lines() -> list[str]:
    """Returns the arguments of every `pip install` in pages, scripts and messages."""
    extras = re.findall(
        r'missing_packages\(.*"(\w+)"\)$', "".join(map(Path.read_text, SOURCES)), re.M
    )
    texts = [
        *(path.read_text() for path in (*PAGES, *SCRIPTS)),
        *(str(missing_packages("it", ["them"], extra)) for extra in extras),
    ]
    return sorted({line.replace("'", '"') for text in texts for line in installed(text)})


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copies the checkout, with the wheel that `make wheel` puts into it."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in PARTS:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, copy / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, copy)
    pip(copy, "wheel --no-deps --wheel-dir dist .")
    return copy


def pip(folder: Path, arguments: str) -> str:
    """Runs pip with words of shell and returns its output."""
    command, _, words = arguments.partition(" ")
    script = f'"$0" -m pip {command} --no-index --no-build-isolation {words}'
    done = subprocess.run(
        ["bash", "-c", script, sys.executable],
        cwd=folder,
        env=os.environ | {"PIP_CONFIG_FILE": os.devnull, "PIP_DISABLE_PIP_VERSION_CHECK": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0 and "does not provide the extra" not in said, said
    return said


def test_every_extra_is_found_in_the_texts() -> None:
    assert {".", "dist/*.whl", *(f'".[{extra}]"' for extra in EXTRAS)} <= set(lines())


@pytest.mark.parametrize("line", lines())
def test_what_is_named_can_be_installed(checkout: Path, line: str) -> None:
    said = pip(checkout, f"install --dry-run {line}")
    there = "greedy-train is already installed with the same version as the provided wheel"
    assert re.search(r"^Would install greedy-train-", said, re.M) or there in said


def test_the_wheel_has_the_command(checkout: Path, tmp_path: Path) -> None:
    pip(checkout, f"install --no-deps --target {tmp_path} dist/*.whl")
    done = subprocess.run(
        [sys.executable, tmp_path / "bin" / "greedy", "--version"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path), "PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert re.fullmatch(r"greedy, version \d+\.\d+\.\d+\n", done.stdout)
