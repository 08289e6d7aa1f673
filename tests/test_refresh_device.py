"""New views that another device, or another thread, draws beside the steps of training."""

import threading
from pathlib import Path

import pytest
import torch
from command_line import answer, refused, said, small_recipe
from interrupting import StopAfter
from small_training import CLASSES, SIDE, TEST, TRAIN, files, new_trainer
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from greedy import Reporter, RunDirectory, UserError
from greedy.base.errors import Interrupted
from greedy.base.torch_private import keep_casts
from greedy.memory.choice import FRAGMENTATION
from greedy.memory.drawing import DrawingDevice

RING = {"augmentation": "hflip", "views": 2, "reuse": 1, "epochs": [1, 4, 1]}
RECIPE = small_recipe(
    data={"augmentation": "hflip"},
    training={"epochs": [1, 4, 1]},
    store={"views": 2, "reuse": 1},
)


class Watched(nn.Module):
    """Passes its input on; notes the threads in which it is called while it is frozen, and raises
    an error in those that do not train."""

    def __init__(self) -> None:
        super().__init__()
        self.threads: set[str] = set()
        self.error: Exception | None = None

    def __deepcopy__(self, memo: object) -> "Watched":
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if threading.current_thread() is not threading.main_thread():
            self.threads.add(threading.current_thread().name)
            if self.error:
                raise self.error
        return x


def network(watched: Watched) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Flatten(), nn.Linear(SIDE**2, 16), nn.ReLU(), watched]
    return nn.Sequential(*layers, nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, CLASSES))


def learned(run: Path) -> dict[str, bytes]:
    """Returns the weights and stores of a run."""
    kinds = ("safetensors", "activations.zarr")
    return {name: content for name, content in files(run).items() if any(k in name for k in kinds)}


@pytest.fixture(scope="module")
def in_turn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run, watched = tmp_path_factory.mktemp("turn") / "run", Watched()
    new_trainer(run, network(watched), **RING).fit(TRAIN, TEST)
    assert not watched.threads
    return run


def test_what_is_drawn_beside_the_steps_has_the_same_bytes(tmp_path: Path, in_turn: Path) -> None:
    run, watched = tmp_path / "run", Watched()
    settings = RING | {"refresh_device": "cpu", "reporter": StopAfter(60)}
    with pytest.raises(Interrupted, match="stage 2 after"):
        new_trainer(run, network(watched), **settings).fit(TRAIN, TEST)
    assert len(watched.threads) == 1
    new_trainer(run, network(watched), **settings).train()
    assert learned(run) == learned(in_turn)
    assert RunDirectory.open(run).record(1).store.view_numbers == [4, 3]


def test_without_memory_for_both_they_take_turns(tmp_path: Path, in_turn: Path) -> None:
    records = [RunDirectory.open(in_turn).record(number) for number in (1, 2, 3)]
    most = max(record.choices.planned_peak_bytes for record in records)
    settings = RING | {"refresh_device": "cpu", "memory_budget": f"{most}B"}
    watched = Watched()
    new_trainer(tmp_path, network(watched), **settings).fit(TRAIN, TEST)
    assert not watched.threads
    assert learned(tmp_path) == learned(in_turn)


def test_what_fails_there_ends_the_training(tmp_path: Path) -> None:
    watched = Watched()
    watched.error = RuntimeError("no more memory there")
    trainer = new_trainer(tmp_path / "run", network(watched), **RING, refresh_device="cpu")
    with pytest.raises(RuntimeError, match="no more memory there"):
        trainer.fit(TRAIN, TEST)
    assert not any(thread.name.startswith("greedy-ring") for thread in threading.enumerate())


def test_a_device_without_use_is_noted(tmp_path: Path) -> None:
    heard: list[str] = []

    class Notes(Reporter):
        def noted(self, note: str) -> None:
            heard.append(note)

    trainer = new_trainer(tmp_path, epochs=1, refresh_device="cpu", reporter=Notes())
    trainer.fit(TRAIN, TEST)
    trainer.train_stage(2, again=True)
    assert heard == ["no views are replaced, so --refresh-device is not used"] * 2


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("meta", "'meta' is no device to draw views on: use cpu, mps, cuda"),
        ("gpu:1", "'gpu:1' is no device"),
        ("cuda:99", "no usable cuda:99 device: give --refresh-device another"),
    ],
)
def test_a_device_that_is_not_there_is_refused(tmp_path: Path, name: str, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        new_trainer(tmp_path / "run", refresh_device=name)
    assert not (tmp_path / "run").exists()


def test_a_plan_counts_what_another_device_takes(tmp_path: Path) -> None:
    (tmp_path / "tiny.toml").write_text(RECIPE)
    plan = ("plan", "--recipe", tmp_path / "tiny.toml", "--memory-budget", "1GiB")
    alone = answer(*plan, "--device", "cuda")
    for device, kernels in (("cpu", 0), ("cuda:1", 2**25)):
        beside = answer(*plan, "--device", "cuda", "--refresh-device", device)
        assert [stage["drawing_bytes"] > kernels for stage in beside["stages"]] == [0, 1, 0]
        second = [document["stages"][1]["peak_memory_bytes"] for document in (alone, beside)]
        frozen = FRAGMENTATION * 4 * (784 + 1 + 2) * 16  # stage 1: its weights, in 32 bits
        assert second[0] - second[1] == pytest.approx(frozen, abs=2)
    told = refused(*plan, "--device", "cuda", "--refresh-device", "cuda")
    assert "cuda is the device that trains: give --refresh-device another" in told


def test_a_device_that_is_too_small_for_drawing_is_refused() -> None:
    small = DrawingDevice("cuda:1", 2**26, apart=True)
    assert small.taken(small.usable, "stage 1 (linear16)") <= 2**26
    with pytest.raises(UserError, match=r"stage 1 \(linear16\) takes .* on cuda:1 .* 64.0 MiB"):
        small.taken(2**26, "stage 1 (linear16)")


def test_a_plan_tells_where_views_are_drawn_in_turn(tmp_path: Path) -> None:
    (tmp_path / "tiny.toml").write_text(RECIPE)
    plan = (
        "plan",
        "--recipe",
        tmp_path / "tiny.toml",
        "--device",
        "cpu",
        "--refresh-device",
        "cpu",
    )
    assert "drawn on cpu beside the steps, in" in said(*plan)
    least = max(stage["peak_memory_bytes"] for stage in answer(*plan)["stages"])
    assert "drawn between the steps" in said(*plan, "--memory-budget", f"{least}B")
    assert "is not used" in said(*plan, "--reuse", "0")


class Casts(TorchDispatchMode):
    """Counts the casts to bfloat16."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._to_copy.default
        return func(*args, **(kwargs or {}))


def test_another_thread_leaves_the_weights_that_were_cast() -> None:
    """Else how often weights are cast, and so gradients' rounding, would depend on timing."""
    layer, x = nn.Linear(2, 2), torch.ones(1, 2, dtype=torch.bfloat16)

    def other() -> None:
        keep_casts()
        with torch.autocast("cpu", torch.bfloat16):
            nn.functional.linear(torch.ones(1, 2), torch.ones(2, 2))

    with torch.autocast("cpu", torch.bfloat16):
        layer(x)
        (thread := threading.Thread(target=other)).start()
        thread.join()
        with Casts() as casts:
            layer(x)
    assert casts.count == 0
