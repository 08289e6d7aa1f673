"""What `benchmarks/scale.py` says of many GPUs, and what must hold whatever is assumed."""

import json
from functools import cache
from typing import Any

import pytest
from click.testing import CliRunner
from scale import balanced, main

WAYS = "backprop", "joint", "stages", "live", "stores"
SHARED = "joint", "live", "stores"  # data parallel, with local losses
GPUS = 1, 2, 8, 64


@cache
def said(*options: str) -> dict[str, dict[int, dict[str, Any]]]:
    """Returns the outcomes of each way by the number of GPUs."""
    numbers = ",".join(map(str, GPUS))
    result = CliRunner().invoke(main, ["--json", "--gpus", numbers, *options])
    assert result.exit_code == 0, result.output
    return {
        entry["way"]: {outcome["gpus"]: outcome for outcome in entry["outcomes"]}
        for entry in json.loads(result.stdout)["ways"]
    }


@pytest.mark.parametrize("storage", ["nvme", "object"])
def test_parts_add_up_and_limits_are_named(storage: str) -> None:
    ways = said("--storage", storage)
    assert tuple(ways) == WAYS
    for outcomes in ways.values():
        for outcome in outcomes.values():
            assert outcome["seconds"] == pytest.approx(sum(outcome["parts"].values()))
            assert outcome["bound"] in outcome["parts"]
        assert outcomes[1]["efficiency"] == pytest.approx(1)
        assert outcomes[1]["sent_bytes"] == 0


def test_one_gpu_trains_all_stages_in_the_time_of_their_sum() -> None:
    ways = said("--views", "4", "--reuse", "0")
    own = {way: outcomes[1]["parts"] for way, outcomes in ways.items()}
    assert ways["stages"][1]["seconds"] == pytest.approx(ways["joint"][1]["seconds"])
    for part in ("compute", "launching"):
        assert own["live"][part] == pytest.approx(own["joint"][part])
        assert own["stores"][part] == pytest.approx(own["joint"][part])
    assert own["stores"]["frozen passes"] < own["live"]["frozen passes"]


def test_more_gpus_are_never_slower_where_computing_binds() -> None:
    ways = said("--batch", "16384", "--link", "1e15", "--gets", "1e12")
    for way in WAYS:
        seconds = [ways[way][number]["seconds"] for number in GPUS]
        assert seconds == sorted(seconds, reverse=True), way
    assert min(ways[way][64]["efficiency"] for way in SHARED) > 0.5
    assert ways["stages"][64]["bound"] == "imbalance"  # it has no more than 18 stages


def test_stores_have_the_same_bytes_however_many_gpus_share_them() -> None:
    ways = said("--views", "4")
    for what in ("read_bytes", "written_bytes", "held_bytes"):
        for outcomes in ways.values():
            assert len({outcome[what] for outcome in outcomes.values()}) == 1
    assert all(ways[way][1]["written_bytes"] == 0 for way in WAYS if way != "stores")
    assert not ways["stores"][1]["fits"]
    assert ways["stores"][64]["fits"]


def test_a_ring_writes_a_view_for_each_that_it_replaces() -> None:
    frozen, ring = (
        said("--views", "4", "--reuse", reuse)["stores"][1]["written_bytes"] for reuse in ("0", "5")
    )
    assert ring == pytest.approx(frozen * (4 + 17) / 4)  # of 90 epochs


def test_gpus_exchange_more_the_more_there_are_and_stages_only_send_on() -> None:
    ways = said()
    for way in SHARED:
        assert ways[way][64]["sent_bytes"] == pytest.approx(9 * ways[way][8]["sent_bytes"])
    assert ways["stages"][64]["sent_bytes"] < ways["joint"][64]["sent_bytes"]


def test_what_is_slow_is_what_more_gpus_are_lost_to() -> None:
    slow = said("--link", "1e8")
    assert slow["live"][64]["lost_to"] in {"gradients", "statistics"}
    asked = said("--storage", "object", "--gets", "50")
    assert asked["backprop"][64]["bound"] == "store reads"


def test_each_gpu_has_consecutive_stages_and_the_slowest_as_little_as_possible() -> None:
    assert balanced([1, 2, 3, 4, 5], 2) == [[1, 3], [4, 5]]
    assert balanced([9, 1, 1, 1, 9], 3) == [[1, 1], [2, 4], [5, 5]]
    ranks = said()["stages"][8]["ranks"]
    assert [number for first, last in ranks for number in range(first, last + 1)] == [*range(1, 19)]
