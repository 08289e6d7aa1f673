"""What all tests share: threads, signals, how patient hypothesis is, and runs for reports."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

# One thread a process, here and in those that tests start: networks are tiny, and the other cores
# belong to other workers. Before torch is imported, which looks at this once.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import HealthCheck, settings
from reported import all_trained

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
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See ``reported.all_trained``. Tests leave them as they are."""
    return all_trained(tmp_path_factory.mktemp("reported"))
