"""Views that are replaced one by one while the next stage trains."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch
from command_line import said
from hypothesis import given
from hypothesis import strategies as st
from small_training import CLASSES, SIDE, TEST, TRAIN, files, learned, new_trainer, same, weights
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from greedy import Reporter, RunDirectory, TrainingError, UserError
from greedy.base.files import read_tensors as load
from greedy.base.files import with_digest
from greedy.cache import DamagedStore, Store, row_order, verify
from greedy.data import dataset_from_torch
from greedy.losses import Pred
from greedy.runs.exchange import replacing
from greedy.runs.record import UNKNOWN_VIEW, RingRecord
from greedy.runs.views import (
    SPREAD,
    enough_views,
    harmless_uses,
    view_numbers,
    views_drawn,
)
from greedy.stores import streamed

RING = {"augmentation": "hflip", "views": 2, "reuse": 2, "epochs": 7}


def ring(run: Path, stage: int = 1) -> list[int]:
    return RunDirectory.open(run).record(stage).store.view_numbers


def train_split(run: Path, stage: int = 1) -> Path:
    return run / f"stage{stage}/activations.zarr/train"


@pytest.fixture(scope="module", params=[None, "1B"], ids=["in-memory", "from-disk"])
def finished(tmp_path_factory, request) -> Path:
    run = tmp_path_factory.mktemp("ring") / "run"
    new_trainer(run, **RING, ram_budget=request.param).fit(TRAIN, TEST)
    return run


def test_the_oldest_view_makes_room_for_the_next(finished: Path) -> None:
    assert ring(finished, 1) == ring(finished, 2) == [4, 3]
    for stage in (1, 2):
        store = RunDirectory.open(finished).record(stage).store
        drawn = store.bytes_written - store.bytes  # three views, each with labels and index
        assert 3 / 2 * store.split_bytes["train"] < drawn < 3 * store.split_bytes["train"]
        assert not verify(train_split(finished, stage))
        left = {path.name for path in train_split(finished, stage).parent.iterdir()}
        assert left == {"train", "test"}
    assert learned(finished, 2)


def test_a_view_is_what_its_number_says(finished: Path, tmp_path: Path) -> None:
    """Views 3 and 4 have the bytes that they have in a store of the first five."""
    settings = RING | {"views": 5, "reuse": 0, "epochs": [7, 1, 1]}
    new_trainer(tmp_path / "run", **settings).fit(TRAIN, TEST)
    assert same(weights(tmp_path / "run", 1), weights(finished, 1))
    five, two = Store(train_split(tmp_path / "run")).load(), Store(train_split(finished)).load()
    np.testing.assert_array_equal(two, five[[4, 3]])
    assert len({view.tobytes() for view in five}) == 5


def test_a_stage_that_is_trained_again_begins_with_the_first_views(finished: Path) -> None:
    trainer = new_trainer(finished, **RING)
    before = weights(finished, 2), files(finished / "stage2/activations.zarr")
    records = [trainer.run.record(n) for n in (1, 2)]
    again = trainer.train_stage(2, again=True)
    assert again.lineage == records[1].lineage
    assert same(before[0], weights(finished, 2))
    assert again.store.digests != records[1].store.digests  # of views 0 and 1, as it began
    trainer.train_stage(3, again=True)
    assert files(finished / "stage2/activations.zarr") == before[1]
    assert trainer.run.record(1).store.digests == records[0].store.digests
    assert trainer.run.record(2).store.digests == records[1].store.digests


def test_rows_are_drawn_little_by_little(tmp_path: Path) -> None:
    """After each step as many rows as its share of the epochs between two views."""

    class Watch(Reporter):
        def __init__(self) -> None:
            self.heard: list[str] = []

        def writing_started(self, stage: int, split: str, rows: int) -> None:
            self.heard.append(f"stage {stage}: {rows} rows of {split}")

    trainer = new_trainer(tmp_path / "run", **RING, reporter=(reporter := Watch()))
    records = trainer.fit(TRAIN, TEST)
    assert records == [trainer.run.record(number) for number in (1, 2, 3)]
    assert reporter.heard == [
        f"stage {n}: {rows}" for n in (1, 2) for rows in ("800 rows of train", "100 rows of test")
    ]  # no view was drawn at once


@pytest.mark.parametrize("place", [0, 1])
def test_a_damaged_view_is_computed_again(finished: Path, place: int) -> None:
    store = RunDirectory.open(finished).record(1).store
    (shard,) = (train_split(finished) / "activations").glob(f"c.{place}.*")
    before = shard.read_bytes()
    shard.write_bytes(before[:100] + b"\0" + before[101:])
    trainer = new_trainer(finished, **RING)
    (repair,), damages = trainer.repair([1])
    assert (repair.identical, damages) == (True, [])
    assert shard.read_bytes() == before
    assert trainer.run.record(1).store == store


def test_a_dropped_store_comes_back_with_its_views(finished: Path) -> None:
    trainer = new_trainer(finished, **RING)
    before, store = files(train_split(finished)), trainer.run.record(1).store
    trainer.run.drop_stores(1)
    repairs, damages = trainer.repair([1], dropped=True)
    assert all(repair.identical for repair in repairs) and not damages
    assert files(train_split(finished)) == before
    assert trainer.run.record(1).store.ring == store.ring


def killed_in_exchange(run: Path, patch: pytest.MonkeyPatch, *, exchanged: bool) -> None:
    """Trains until the first view of stage 1 is about to be exchanged, or is but not recorded."""

    @contextmanager
    def stop(*paths: Path) -> Iterator[Path]:
        with replacing(*paths) as new_path:
            yield new_path
            if not exchanged:
                raise KeyboardInterrupt
        raise KeyboardInterrupt

    with patch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("greedy.stores.ring.replacing", stop)
        new_trainer(run, **RING).fit(TRAIN, TEST)
    assert ring(run) == [UNKNOWN_VIEW, 1]


@pytest.mark.parametrize("finished", [None], ids=["in-memory"], indirect=True)
@pytest.mark.parametrize("exchanged", [False, True])
@pytest.mark.parametrize("place", [0, 1])
def test_damage_is_repaired_while_a_view_is_exchanged(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchanged: bool, place: int
) -> None:
    """Also in the views that are not exchanged, which training alone cannot write again."""
    run = tmp_path / "run"
    killed_in_exchange(run, monkeypatch, exchanged=exchanged)
    (shard,) = (train_split(run) / "activations").glob(f"c.{place}.*")
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(DamagedStore, match="cache repair"):
        new_trainer(run, **RING).train()
    (repair,), damages = new_trainer(run, **RING).repair([1])
    assert repair.identical and not damages
    assert ring(run) == [0, 1]
    new_trainer(run, **RING).train()
    assert files(train_split(run)) == files(train_split(finished))
    assert same(weights(run, 2), weights(finished, 2))


@pytest.mark.parametrize("finished", [None], ids=["in-memory"], indirect=True)
def test_a_store_that_is_dropped_while_a_view_is_exchanged_comes_back(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    killed_in_exchange(run, monkeypatch, exchanged=True)
    trainer = new_trainer(run, **RING)
    trainer.run.drop_stores(1)
    repairs, damages = trainer.repair([1], dropped=True)
    assert all(repair.identical for repair in repairs) and not damages
    trainer.train()
    assert files(train_split(run)) == files(train_split(finished))
    assert same(weights(run, 2), weights(finished, 2))


@given(st.integers(0, 200), st.integers(1, 9), st.integers(1, 9))
def test_an_unknown_view_is_taken_for_the_oldest(epoch: int, views: int, reuse: int) -> None:
    numbers = view_numbers(epoch, views, reuse)
    oldest = numbers.index(min(numbers))
    record = RingRecord(numbers=numbers, shards=[]).with_view(oldest, UNKNOWN_VIEW)
    assert record.known().numbers == (numbers if views > 1 else [0])


def test_views_of_an_older_version_are_not_trained_on(tmp_path: Path) -> None:
    run = tmp_path / "run"
    new_trainer(run, **RING).fit(TRAIN, TEST)
    for name in ("run.toml",):
        text = (run / name).read_text()
        (run / name).write_text(text.replace("reuse = 2", "refresh_every = 2"))
    record = RunDirectory.open(run).record(1)
    record.update_store(run / "stage1", ring=None, generation=3)
    assert "complete" in said("status", "--run", str(run))
    with pytest.raises(UserError, match=r"stage 1's store are of an older version.*--retrain 1"):
        new_trainer(run, **RING).train_stage(2, again=True)


def damage(run: Path, stage: int = 1) -> None:
    shard = next((train_split(run, stage) / "activations").glob("c.0.*"))
    content = shard.read_bytes()
    shard.write_bytes(content[:100] + b"\0" + content[101:])


def test_views_whose_numbers_are_not_known_are_not_repaired(finished: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    damage(run)
    trainer = new_trainer(run, **RING)
    trainer.run.record(1).update_store(run / "stage1", ring=None, generation=3)
    for _ in range(2):
        with pytest.raises(UserError, match=r"replaced by an older version.*--retrain 1"):
            trainer.repair([1], dropped=True)
        trainer.run.drop_stores(1)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"reuse": 0}, "its views cannot be replaced"),
        ({"source": 1}, "its views cannot be replaced"),
        ({"views": 2**40, "ring": None}, "it has other views|of an older version"),
        ({"views": 3, "numbers": [4, 3, 2], "shards": 3}, "it has other views"),
        ({"views": 1, "numbers": [4], "shards": 1}, "it has other views"),
        ({"shards": 4}, "it has other views"),
    ],
)
def test_records_that_disagree_with_their_store_are_refused(
    finished: Path, tmp_path: Path, change: dict, reason: str
) -> None:
    """Also those of strangers, who write what they like."""
    run, stage = Path(shutil.copytree(finished, tmp_path / "run")), 2
    path = run / f"stage{stage}/stage.json"
    document = json.loads(path.read_bytes())
    del document["digest"]
    store, ring = document["store"], document["store"]["ring"]
    document["resolved"] |= {k: change[k] for k in ("reuse",) if k in change}
    store |= {k: change[k] for k in ("source", "views", "ring") if k in change}
    ring |= {k: change[k] for k in ("numbers",) if k in change}
    if "shards" in change:
        ring["shards"] = ring["shards"][:1] * change["shards"]
    path.write_bytes(with_digest(document))
    damage(run, stage)
    for attempt in (
        lambda: new_trainer(run, **RING).repair([stage]),
        lambda: new_trainer(run, **RING).train_stage(stage + 1, again=True),
    ):
        with pytest.raises(UserError, match=reason):
            attempt()


def test_what_is_drawn_of_a_view_needs_no_more_room(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    with pytest.raises(TrainingError, match="stage 3 needs up to .* are free"):
        new_trainer(run, **RING).train_stage(3, again=True)
    drawn = train_split(run, 2).parent / ".view.0.part"
    drawn.mkdir()
    with (drawn / "shard").open("wb") as file:
        file.truncate(2**30)
    new_trainer(run, **RING).train_stage(3, again=True)
    assert not drawn.exists()


class Threads(nn.Module):
    """Passes its input on; notes the number of threads when it is frozen."""

    noted: ClassVar[set[int]] = set()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        counted = x.is_meta or isinstance(x, FakeTensor)
        if not self.training and not counted:
            self.noted.add(torch.get_num_threads())
        return x


def test_views_are_drawn_with_the_threads_that_the_first_were_written_with(tmp_path: Path) -> None:
    layers = [nn.Flatten(), nn.Linear(SIDE**2, 16), nn.ReLU(), Threads(), nn.Linear(16, CLASSES)]
    trainer = new_trainer(tmp_path / "run", nn.Sequential(*layers), **RING | {"epochs": 3})
    threads = torch.get_num_threads()
    try:
        trainer.prepare(dataset_from_torch(TRAIN, TEST))
        torch.set_num_threads(1)
        trainer.train_stage(1)
        torch.set_num_threads(2)
        Threads.noted.clear()
        assert trainer.train_stage(2).choices.threads == 2
    finally:
        torch.set_num_threads(threads)
    assert ring(tmp_path / "run") == [2, 1]
    assert Threads.noted == {1}


def test_what_a_crash_left_of_stores_is_deleted(finished: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    before = files(run)
    for left in ("stage1/.activations.zarr.part/train", "stage2/activations.zarr/.train.part"):
        shutil.copytree(train_split(run, 1), run / left)
    view = train_split(run, 2).parent / ".view.0.part"  # is needed if that training resumes
    shutil.copytree(train_split(run, 1), view)
    new_trainer(run, **RING).train()
    shutil.rmtree(view)
    assert files(run).keys() == before.keys()


def test_frozen_records_are_those_of_older_versions(tmp_path: Path) -> None:
    new_trainer(tmp_path / "run", augmentation="hflip", reuse=0).fit(TRAIN, TEST)
    document = json.loads((tmp_path / "run/stage1/stage.json").read_text())
    assert "ring" not in document["store"]
    assert "reuse" not in document["resolved"]


def test_frozen_stages_are_streamed_where_memory_has_no_room_for_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Views drawn so are those that a repair computes without streaming."""
    layers = [nn.Flatten(), nn.Linear(SIDE**2, 512), nn.ReLU(), nn.Linear(512, 256), nn.ReLU()]
    torch.manual_seed(0)
    network = nn.Sequential(*layers, nn.Linear(256, 1024), nn.ReLU(), nn.Linear(1024, CLASSES))
    settings = RING | {"reuse": 1, "epochs": 3, "loss": Pred()}
    read: list[Path] = []
    monkeypatch.setattr(streamed, "read_tensors", lambda path: (read.append(path), load(path))[1])
    trainer = new_trainer(tmp_path, network, **settings, memory_budget="4600KiB")  # stage 3's step
    trainer.fit(TRAIN, TEST)
    assert {path.parent for path in read} == {tmp_path / f"stage{n}" for n in (1, 2)}
    read.clear()
    before = [files(train_split(tmp_path, stage)) for stage in (1, 2, 3)]
    trainer.run.drop_stores(1, 2, 3)
    repairs, damages = trainer.repair([1, 2, 3], dropped=True)
    assert all(repair.identical for repair in repairs) and not damages and not read
    assert [files(train_split(tmp_path, stage)) for stage in (1, 2, 3)] == before


@given(st.integers(0, 200), st.integers(1, 9), st.integers(1, 9))
def test_a_ring_changes_one_view_at_a_time(epoch: int, views: int, reuse: int) -> None:
    now, then = (view_numbers(e, views, reuse) for e in (epoch, epoch + 1))
    changed = [place for place in range(views) if now[place] != then[place]]
    assert len(changed) == ((epoch + 1) % reuse == 0)
    for place in changed:
        assert now[place] == min(now)
        assert then[place] == max(now) + 1


@given(st.integers(1, 300), st.integers(1, 6), st.integers(1, 12))
def test_every_copy_is_used_about_as_often_as_asked(epochs: int, views: int, reuse: int) -> None:
    rows, used = 5, {}
    for epoch in range(epochs):
        order = row_order(seed=0, epoch=epoch, rows=rows, views=views)
        numbers = view_numbers(epoch, views, reuse)
        for row, view in zip(order.rows, order.views, strict=True):
            used[row, numbers[view]] = used.get((row, numbers[view]), 0) + 1
    assert max(used.values()) <= reuse + 2
    last = max(number for _, number in used)
    assert last <= views - 1 + views_drawn(epochs, reuse)


@given(st.integers(1, 1000))
def test_enough_views_are_few_uses_of_each_copy(epochs: int) -> None:
    views, reuse = enough_views(epochs)
    copies, uses = views + views_drawn(epochs, reuse), harmless_uses(epochs)
    assert epochs <= uses * copies
    assert views <= SPREAD
    assert (reuse == 0) == (epochs <= uses * SPREAD)
    assert enough_views(epochs, reuse=0) == (-(-epochs // uses), 0)
    assert enough_views(epochs, views=2)[0] == 2
    assert enough_views(epochs, reuse=epochs)[1] == 0


@pytest.mark.parametrize(
    ("epochs", "views", "reuse"),
    [(1, 1, 0), (10, 2, 0), (20, 4, 0), (30, 4, 4), (60, 4, 2), (200, 4, 2), (400, 4, 2)],
)
def test_a_copy_is_used_less_often_in_a_long_training(epochs: int, views: int, reuse: int) -> None:
    assert enough_views(epochs) == (views, reuse)


@given(st.integers(1, 1000))
def test_a_longer_training_sees_at_least_as_many_copies(epochs: int) -> None:
    def copies(length: int) -> int:
        views, reuse = enough_views(length)
        return views + views_drawn(length, reuse)

    assert copies(epochs) <= copies(epochs + 1)
