"""What the Makefile calls can be started, in the environment that it gives."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# What made this environment, or is run before the tests are.
ALREADY_RUN = {"install", "wheel", "lint", "types", "test", "clean"}
(PHONY,) = re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.M)
TARGETS = [target for target in PHONY.split() if target not in ALREADY_RUN]

# As from a terminal: nothing of a make or a pytest that runs this test.
PLAIN = {
    name: value
    for name, value in os.environ.items()
    if not name.startswith(("MAKE", "MFLAGS", "PYTHON", "PYTEST"))
}


def lines(target: str) -> list[str]:
    """Returns the commands that a target runs with this Python, once everything is installed."""
    old = [option for name in (".wheel", ".installed") for option in ("-o", f".venv/{name}")]
    done = subprocess.run(
        ["make", "-n", *old, f"BIN={Path(sys.executable).parent}", target],
        cwd=ROOT,
        env=PLAIN,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.splitlines()


def test_targets_that_only_people_call_are_among_them() -> None:
    assert {"demo", "docs", "experiments", "gpu"} <= set(TARGETS)


@pytest.mark.parametrize("target", TARGETS)
def test_it_starts(target: str) -> None:
    assert lines(target)
    for line in lines(target):
        done = subprocess.run(
            ["bash", "-c", f"{line} --help"],
            cwd=ROOT,
            env=PLAIN,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{line}\n{done.stderr}"
        assert "usage" in done.stdout.lower(), line
