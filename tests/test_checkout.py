"""The package as it lies in the checkout, where `cache/` and `cli/` stand beside `greedy/`."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_from_its_root_it_can_be_imported():
    code = "import greedy.cache, greedy.cli.main, greedy; print(greedy.__file__)"
    unsafe = {k: v for k, v in os.environ.items() if k != "PYTHONSAFEPATH"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=unsafe,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()) == ROOT / "greedy/__init__.py"
