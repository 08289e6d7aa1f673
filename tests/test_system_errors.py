"""Errors of the operating system are one sentence with the path and what to do."""

import errno
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from command_line import greedy, said, small_recipe, train
from small_training import TEST, TRAIN, new_trainer
from torch.utils.data import Dataset

from greedy import RunDirectory, TrainingError, UserError
from greedy.cache import DamagedStore, verify
from greedy.data import dataset_from_torch
from greedy.runs.network import assemble

AGAIN = "give the same command again, all that is finished is kept"


@contextmanager
def limited(what: int, most: int) -> Iterator[None]:
    """Lowers one of this process's limits inside the block."""
    before = resource.getrlimit(what)
    resource.setrlimit(what, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(what, before)


def test_a_limit_on_the_size_of_files(tmp_path: Path) -> None:
    """Stage 0's shard, the first file that is too large, is written by a thread."""
    with limited(resource.RLIMIT_FSIZE, 8192), pytest.raises(TrainingError) as caught:
        new_trainer(tmp_path / "run").fit(TRAIN, TEST)
    message = str(caught.value)
    assert str(tmp_path / "run/stage0/training/activations.zarr/train/activations/c.0.0") in message
    assert (
        "(File too large): raise the limit on the size of a file (ulimit -f unlimited)" in message
    )
    assert message.endswith(AGAIN)
    new_trainer(tmp_path / "run").fit(TRAIN, TEST)


def test_a_limit_on_the_size_of_a_checkpoint_keeps_what_is_finished(tmp_path: Path) -> None:
    run = tmp_path / "run"
    new_trainer(run).prepare(dataset_from_torch(TRAIN, TEST))
    with limited(resource.RLIMIT_FSIZE, 6000), pytest.raises(TrainingError, match="ulimit -f"):
        new_trainer(run).train()
    records = new_trainer(run).train()
    assert len(records) == 3


def test_a_limit_on_open_files_is_no_damage(tmp_path: Path) -> None:
    run = train(tmp_path, small_recipe())
    with Path(os.devnull).open() as file:
        lowest = file.fileno()
    for store in ("stage0", "stage1"):
        with limited(resource.RLIMIT_NOFILE, lowest), pytest.raises(OSError) as caught:
            verify(run / store / "activations.zarr/train")
        assert caught.value.errno == errno.EMFILE
    said("cache", "verify", run)


CODES = {
    errno.EDQUOT: "free some of your disk quota",
    errno.EROFS: "choose a place where you may write",
    errno.EACCES: "choose a place where you may write",
    errno.EIO: "look at the system's log",
    errno.EMFILE: "ulimit -n",
    errno.ENAMETOOLONG: "choose a shorter name",
}


@pytest.mark.skipif(
    not Path("/proc/self/fd").is_dir(), reason="tells files by their descriptors, as Linux can"
)
@pytest.mark.parametrize("code", CODES, ids=errno.errorcode.get)
def test_what_a_write_is_refused_for(
    tmp_path: Path, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first write fails in a thread that writes stage 1's store; the error names no file."""
    run = tmp_path / "run"
    new_trainer(run).prepare(dataset_from_torch(TRAIN, TEST))
    original = os.fsync

    def refused(descriptor: int) -> None:
        if "c.0.0" in str(Path(f"/proc/self/fd/{descriptor}").readlink()):
            raise OSError(code, os.strerror(code))
        original(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", refused)
        with pytest.raises(TrainingError) as caught:
            new_trainer(run).train()
    message = str(caught.value)
    assert str(run / "stage1/training/activations.zarr/train/activations/c.0.0") in message
    assert CODES[code] in message
    assert message.endswith(AGAIN)
    assert len(new_trainer(run).train()) == 3


class Photos(Dataset):
    """Samples of which one's file is missing, though not one that is read to check the set."""

    def __len__(self) -> int:
        return len(TRAIN)

    def __getitem__(self, row: int) -> object:
        if row == 50:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "photos/50.png")
        return TRAIN[row]


def test_a_file_that_a_data_set_misses_is_not_said_to_be_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="sample 50 .*photos/50.png") as caught:
        new_trainer(tmp_path / "run").fit(Photos(), TEST)
    assert "writ" not in str(caught.value)


def test_no_locks_on_the_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = train(tmp_path, small_recipe())

    remedies = {
        errno.ENOLCK: "choose a place on a local disk, and give that as --run",
        errno.EDQUOT: "or have it raised, and give the same command again",
    }
    for code, remedy in remedies.items():

        def refused(*rest: object, code: int = code) -> None:
            raise OSError(code, os.strerror(code))

        with monkeypatch.context() as patch:
            patch.setattr("fcntl.flock", refused)
            result = greedy("train", "--run", run)
        assert result.exit_code == 2
        message = f"{run} cannot be locked against other processes ({os.strerror(code)}): "
        assert message in result.output
        assert remedy in result.output
    said("status", "--run", run)


def test_a_place_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.toml").write_text(small_recipe())
    original = os.mkdir

    def refused(path: str, *rest: object, **named: object) -> None:
        if str(path) == "runs":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "runs")
        original(path, *rest, **named)

    with monkeypatch.context() as patch:
        patch.setattr("os.mkdir", refused)
        result = greedy("train", "--recipe", "tiny.toml")
    assert result.exit_code == 1
    message = f"the run directory runs/tiny cannot be made in {tmp_path} (Permission denied): "
    assert message + "choose another place with --run" in result.output
    (tmp_path / "runs").touch()
    result = greedy("train", "--recipe", "tiny.toml", "--run", "runs/other")
    assert result.exit_code == 1
    assert "runs/other cannot be made in" in result.output
    assert "choose another place with --run" in result.output


def spoil(store: Path) -> None:
    for path in store.rglob("c.*"):
        if path.parent.name == "activations":
            data = bytearray(path.read_bytes())
            data[0 : len(data) // 2] = bytes(len(data) // 2)
            path.write_bytes(data)


def test_damage_met_while_training_names_the_repair(tmp_path: Path) -> None:
    run = tmp_path / "run"
    new_trainer(run).fit(TRAIN, TEST)
    spoil(run / "stage1/activations.zarr/train")
    for settings in ({}, {"ram_budget": "1B"}):
        with pytest.raises(DamagedStore) as caught:
            new_trainer(run, **settings).train_stage(2, again=True)
        message = str(caught.value)
        assert "does not match its checksum; `greedy cache repair " in message
        assert f"{run}/stage1` writes it as it was, then the same command resumes" in message
        assert "write the store again" not in message


@pytest.mark.parametrize("words", [["evaluate"], ["evaluate", "--by-stage"]])
def test_damaged_images_name_what_is_left_to_do(tmp_path: Path, words: list[str]) -> None:
    run = train(tmp_path, small_recipe())
    spoil(run / "stage0/activations.zarr/test")
    result = greedy(*words, "--run", run)
    assert result.exit_code == 1
    assert "images cannot be computed again: begin another run from the data" in result.output


def test_a_file_too_large_to_export_and_one_missing_are_told(tmp_path: Path) -> None:
    run = train(tmp_path, small_recipe())
    with limited(resource.RLIMIT_FSIZE, 100):
        result = greedy("export", "--run", run, "--to", tmp_path / "net.safetensors")
    assert result.exit_code == 1
    assert "net.safetensors: File too large: raise the limit" in result.output
    with pytest.raises(UserError, match="is missing: train the stage again with `greedy train"):
        (run / "stage1/encoder.safetensors").unlink()
        assemble(RunDirectory.open(run), None)
