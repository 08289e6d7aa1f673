"""A user without a name or a writable home, as in a container: real processes of such a user."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from command_line import small_recipe

UID = 54321
# May read all that root may, so that it finds this Python, and write nothing.
STRANGER = [
    "setpriv",
    *(f"--reuid={UID}", f"--regid={UID}", "--clear-groups"),
    *("--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"),
    sys.executable,
]
NAMED = ("HOME", "USER", "LOGNAME", "LNAME", "USERNAME", "TORCHINDUCTOR_CACHE_DIR")
FOLDERS = (
    "from greedy.base.user_folders import *; print(data_sets_dir(), measurements_dir(), sep='\\n')"
)
GREEDY = "-m", "greedy.cli.main"


def can_be_a_stranger() -> bool:
    if os.geteuid() or shutil.which("setpriv") is None:
        return False
    return subprocess.run([*STRANGER, "-c", ""], capture_output=True, check=False).returncode == 0


pytestmark = pytest.mark.skipif(
    not can_be_a_stranger(), reason="needs root's rights and setpriv, to be another user"
)


@pytest.fixture
def outside() -> Iterator[Path]:
    """Returns a folder that every user may read, unlike pytest's."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.fixture
def temporary(outside: Path) -> Path:
    """Returns the user's folder for temporary files."""
    folder = outside / "temporary"
    folder.mkdir()
    os.chown(folder, UID, UID)
    return folder


def as_stranger(temporary: Path, *arguments: object, **more: str) -> subprocess.CompletedProcess:
    environment = {
        k: v for k, v in os.environ.items() if k not in NAMED and not k.startswith("XDG_")
    }
    return subprocess.run(
        [*STRANGER, *map(str, arguments)],
        cwd=temporary,
        env=environment | {"TMPDIR": str(temporary)} | more,
        capture_output=True,
        text=True,
        check=False,
    )


def places(temporary: Path, **more: str) -> tuple[list[Path], list[str]]:
    """Returns the folders of data sets and of measurements, and the lines that were logged."""
    done = as_stranger(temporary, "-c", FOLDERS, **more)
    assert done.returncode == 0, done.stderr
    return [Path(line) for line in done.stdout.splitlines()], done.stderr.splitlines()


def test_without_a_home_they_are_among_temporary_files(temporary: Path) -> None:
    own = temporary / f"greedy-{UID}"
    for _ in range(2):  # made, and found again
        folders, said = places(temporary)
        assert folders == [own / "data", own / "calibration"]
        (line,) = said
        assert line.startswith("no writable home directory: ") and str(own) in line
    assert (own.stat().st_uid, own.stat().st_mode & 0o777) == (UID, 0o700)


def test_a_home_that_can_be_written_is_used(temporary: Path) -> None:
    folders, said = places(temporary, HOME=str(temporary))
    assert [path.is_relative_to(temporary / f"greedy-{UID}") for path in folders] == [False, False]
    assert all(path.is_relative_to(temporary) for path in folders) and said == []


def test_a_home_for_reading_lends_what_it_has(temporary: Path, outside: Path) -> None:
    home = outside / "home"
    home.mkdir()
    for where in (home, Path("/")):  # `/` is what containers say
        folders, said = places(temporary, HOME=str(where))
        assert all(path.is_relative_to(temporary) for path in folders) and len(said) == 1
    filled = home / ".cache/greedy/data"
    filled.mkdir(parents=True)
    folders, said = places(temporary, HOME=str(home))
    assert folders == [filled, temporary / f"greedy-{UID}/calibration"] and len(said) == 1


@pytest.mark.parametrize("kind", ["another's", "for all to write", "a link", "a file"])
def test_what_a_stranger_may_have_put_there_is_not_used(temporary: Path, kind: str) -> None:
    laid = temporary / f"greedy-{UID}"
    if kind == "a link":
        laid.symlink_to(temporary, target_is_directory=True)
    elif kind == "a file":
        laid.touch()
    else:
        laid.mkdir()
    if kind == "for all to write":
        os.chown(laid, UID, UID)
        laid.chmod(0o777)
    folders, _ = places(temporary)
    (own,) = {path.parent for path in folders}
    assert own != laid and own.parent == temporary
    assert (own.stat().st_uid, own.stat().st_mode & 0o777) == (UID, 0o700)


def test_compiled_code_has_a_folder(temporary: Path) -> None:
    """Older versions of torch find none themselves."""
    code = "import os; from greedy.base import user_folders as folders; folders.prepare_compiling()"
    code += "; print(os.environ[folders.COMPILED])"
    done = as_stranger(temporary, "-c", code)
    assert done.stdout.strip() == str(temporary / f"greedy-{UID}/compiled"), done.stderr
    done = as_stranger(temporary, "-c", code, TORCHINDUCTOR_CACHE_DIR="/elsewhere")
    assert done.stdout.strip() == "/elsewhere" and done.stderr == ""


@pytest.mark.slow
def test_training_compiles_and_plans(temporary: Path) -> None:
    recipe = small_recipe(model={"hidden_layers": 1}, training={"compile": "on"})
    (temporary / "tiny.toml").write_text(recipe)
    done = as_stranger(temporary, *GREEDY, "train", "--recipe", "tiny.toml", "--run", "run")
    assert done.returncode == 0, done.stderr
    assert "compile" not in done.stdout  # nothing failed
    assert sum(line.startswith("no writable home") for line in done.stderr.splitlines()) == 1
    done = as_stranger(temporary, *GREEDY, "plan", "--run", "run")
    assert done.returncode == 0, done.stderr
    assert "times are unknown until" in done.stdout


def test_a_tilde_that_stands_for_nothing_is_told(temporary: Path) -> None:
    done = as_stranger(temporary, *GREEDY, "data", "prepare", "folder:~/photos")
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]
    assert last == "Error: ~/photos: there is no such home directory, give the whole path"
