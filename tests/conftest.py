"""What all tests share: threads, signals, how patient hypothesis is, and finished runs."""

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

# One thread a process, here and in those that tests start: networks are tiny, and the other cores
# belong to other workers. Before torch is imported, which looks at this once.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from filelock import FileLock
from hypothesis import HealthCheck, settings
from reported import all_trained
from small_training import TEST, TRAIN, new_trainer

from greedy.base.devices import pick_device

# A shell that starts tests in the background lets them ignore Ctrl-C, and nohup a terminal that is
# closed. Tests send themselves both.
for number, handler in (
    (signal.SIGINT, signal.default_int_handler),
    (signal.SIGHUP, signal.SIG_DFL),
):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, handler)

settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")


def pytest_configure(config: pytest.Config) -> None:
    """Tests that name no device compute on the CPU, where a GPU is there too: it is for those that
    need one, when they are asked for."""
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    # cuBLAS looks at it once in a process, where some tests need it to be deterministic.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    pick_device("auto")  # which also says how memory is to be taken


# The files that take longest. A worker that took one of them last would keep the others waiting.
LONG = (
    *("torchrun", "parallel_stages", "refresh_device", "ranks", "every_recipe", "examples"),
    *("cli_bench", "memory_budget", "cli_reproduce", "elsewhere", "resume", "faults", "docs"),
    *("object_storage", "cli_plan", "any_model", "imagenet", "auxiliary", "user_folders"),
    *("compiled", "report_browser", "changed_data", "exits", "makefile", "install"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Moves the tests of ``LONG`` to the front."""
    place = {f"test_{name}": number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path.stem, len(LONG)))


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str], Path]:
    """Writes a text file below the test's own folder, given its name and its text."""

    def write_file(name: str, text: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    return write_file


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trains the small network. Modules whose tests need another run have a fixture of this name,
    which ``run`` copies then."""
    run = tmp_path_factory.mktemp("finished") / "run"
    new_trainer(run).fit(TRAIN, TEST)
    return run


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """Copies the finished run for a test that may change it."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the folder of ``reported.all_trained``, which tests leave as it is. All workers share
    it: the first that asks trains the runs."""
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "reported"
    done = folder / "done"
    with FileLock(f"{folder}.lock"):
        if not done.exists():
            folder.mkdir(exist_ok=True)
            all_trained(folder)
            done.touch()
    return folder


@pytest.fixture(scope="session")
def script() -> Iterator[Callable[[str], str]]:
    """Puts the script that reports embed together once, which takes seconds. Returns the function
    that gives it."""
    import vl_convert

    bundle = vl_convert.javascript_bundle
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vl_convert, "javascript_bundle", cache(bundle))
        yield bundle
