"""A run directory made by a stranger does no harm: at worst it is refused."""

import json
import shutil
import tomllib
from pathlib import Path

import pytest
import tomli_w
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from interrupting import Listener
from small_training import new_trainer as small_trainer
from small_training import noise

from greedy import GreedyTrainer, Reporter, RunDirectory, TrainingError, UserError, evaluate
from greedy.base.errors import Interrupted
from greedy.base.files import canonical_json, digest
from greedy.cache import StoreError
from greedy.runs.integrity import verify_run
from greedy.runs.state import RunState
from greedy.runs.status import disk_use, status

REFUSED = (UserError, StoreError, TrainingError)


def new_trainer(run: Path, reporter: Reporter | None = None) -> GreedyTrainer:
    return small_trainer(run, reporter=reporter, epochs=1, views=1, encoding="uint8")


@pytest.fixture(scope="module")
def half(tmp_path_factory) -> Path:
    """Returns a run whose second stage is being trained."""
    run = tmp_path_factory.mktemp("runs") / "run"
    with pytest.raises(Interrupted):
        new_trainer(run, Listener(interrupted=2)).fit(noise(64), noise(64))
    return run


def use(run: Path) -> None:
    """Does everything that users do with a run."""

    def read() -> None:
        directory = RunDirectory.open(run)
        status(RunState.read(directory))
        disk_use(RunState.read(directory))

    def look() -> None:
        trainer = new_trainer(run)
        evaluate(trainer.run, trainer.assemble(1), "test", torch.device("cpu"))

    verify_run(run)
    attempts = [
        read,
        look,
        lambda: new_trainer(run).train(),
        lambda: new_trainer(run).repair([0, 1, 2, 3]),
    ]
    for attempt in attempts:
        try:
            attempt()
        except REFUSED as error:
            assert str(error)


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([-1, 0, 1, 2, 3, 7, 2**31, 2**40, 2**63, 10**30]),
    st.sampled_from(["", "live", "../../outside", "/etc/passwd", "x" * 300, "train", "uint4"]),
    st.floats(allow_nan=False, allow_infinity=False),
    st.lists(st.integers(-1, 2**33), max_size=4),
    st.dictionaries(st.sampled_from(["train", "test", "a", ".."]), st.integers(-1, 9), max_size=3),
)


def places(document: object, path: tuple = ()) -> list[tuple]:
    inside: list[tuple] = []
    keys = document if isinstance(document, dict) else range(len(document))  # type: ignore[arg-type]
    for key in list(keys)[:20]:
        inside.append((*path, key))
        if isinstance(document[key], dict | list):  # type: ignore[index]
            inside += places(document[key], (*path, key))  # type: ignore[index]
    return inside


def mutate(path: Path, data: st.DataObject) -> None:
    """Changes bytes anywhere, or a value of a document and its digest."""
    if path.suffix in (".json", ".toml") and data.draw(st.integers(0, 3)):
        text = path.read_text()
        document = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
        signed = document.pop("digest", None)
        *above, key = data.draw(st.sampled_from(places(document)))
        holder = document
        for each in above:
            holder = holder[each]
        value = data.draw(VALUES)
        if value is None and isinstance(holder, dict):
            del holder[key]
        elif value is not None or path.suffix == ".json":
            holder[key] = value
        if path.suffix == ".toml":
            path.write_text(tomli_w.dumps(document))
            return
        if signed is not None:
            document["digest"] = digest(canonical_json(document))
        path.write_text(json.dumps(document))
        return
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        if content:
            place = data.draw(st.integers(0, len(content) - 1))
            content[place : place + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=3))
    path.write_bytes(content[: data.draw(st.integers(0, 2 * len(content)))])


@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_mutated_files_are_refused_or_without_effect(
    half: Path, tmp_path: Path, data: st.DataObject
) -> None:
    run = tmp_path / "run"
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(half, run)
    files = sorted(p for p in run.rglob("*") if p.is_file() and p.name != ".lock")
    documents = [p for p in files if p.suffix in (".json", ".toml")]
    mutate(data.draw(st.sampled_from(data.draw(st.sampled_from([files, documents])))), data)
    use(run)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run"]


@pytest.mark.parametrize(
    "name",
    [
        "stage1",
        "stage1/activations.zarr",
        "stage1/encoder.safetensors",
        "stage2/training",
        "stage2/training/checkpoint",
        ".stage1.new",
        ".stage1.old",
        "run.toml",
    ],
)
def test_links_are_not_followed(half: Path, tmp_path: Path, name: str) -> None:
    run, outside = shutil.copytree(half, tmp_path / "run"), tmp_path / "outside"
    path = run / name
    if path.exists():
        path.rename(outside)
    else:
        outside.mkdir()
        (outside / "precious").touch()
    path.symlink_to(outside)
    before = {p: p.is_file() and p.read_bytes() for p in sorted(outside.rglob("*"))}
    for attempt in (lambda: RunDirectory.open(run), lambda: new_trainer(run).train()):
        with pytest.raises(UserError, match=f"{path} is a link"):
            attempt()
    assert {p: p.is_file() and p.read_bytes() for p in sorted(outside.rglob("*"))} == before


@pytest.mark.parametrize("name", ["run.toml.part", "stage1/stage.json.part", ".lock.json.part"])
def test_nothing_is_written_through_a_link(half: Path, tmp_path: Path, name: str) -> None:
    run, outside = shutil.copytree(half, tmp_path / "run"), tmp_path / "precious"
    outside.write_text("mine")
    (run / name).symlink_to(outside)
    use(run)
    assert outside.read_text() == "mine"


def test_a_document_that_is_too_large_is_not_read(half: Path, tmp_path: Path) -> None:
    run = shutil.copytree(half, tmp_path / "run")
    with (run / "stage1/stage.json").open("r+b") as file:
        file.truncate(2**36)  # sparse
    with pytest.raises(UserError, match="too large"):
        new_trainer(run).train()


def test_documents_nested_too_deeply_are_refused(half: Path, tmp_path: Path) -> None:
    run = shutil.copytree(half, tmp_path / "run")
    (run / "stage1/stage.json").write_text("[" * 200_000)
    with pytest.raises(UserError, match="stage.json is damaged"):
        new_trainer(run).train()
