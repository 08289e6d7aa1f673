"""The views of stores, as `greedy plan`, `status`, `cache info` and `report` show them."""

import re

import pytest
from command_line import answer, said, small_recipe, train

from greedy.runs.directory import RunDirectory
from greedy.runs.record import UNKNOWN_VIEW

RECIPE = small_recipe(
    data={"augmentation": "hflip"},
    training={"epochs": [1, 4, 1]},
    store={"views": 2, "reuse": 1},
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return train(tmp_path_factory.mktemp("finished"), RECIPE)


def line(output: str, table: str, stage: int) -> list[str]:
    """Returns the cells of a stage in the table whose second column is ``table``."""
    lines = output[re.search(rf"stage +{table}", output).start() :].splitlines()
    return re.split(r"  +", next(each for each in lines if each.startswith(f"{stage} ")).strip())


def test_status_and_cache_info_show_what_a_store_holds(run):
    document = answer("status", "--run", run)
    first, second, output = (stage["store"] for stage in document["stages"])
    assert (first["views"], first["reuse"], first["view_numbers"]) == (2, 1, [3, 4])
    assert (second["views"], second["reuse"], second["view_numbers"]) == (2, 0, [0, 1])
    assert output is None
    images, *stores = answer("cache", "info", run)["stores"]
    assert (images["reuse"], images["view_numbers"]) == (0, [0])
    for store, stage in zip(stores, (first, second), strict=True):
        assert {key: store[key] for key in stage} == stage
    written = images["bytes_written"] + first["bytes_written"] + second["bytes_written"]
    assert written == document["bytes_written"]
    # Three views were drawn besides the first two.
    assert 2 < first["bytes_written"] / second["bytes_written"] < 3
    for output in (said("status", "--run", run), said("cache", "info", run)):
        assert line(output, "views", 1)[:4] == ["1", "2", "1", "3 to 4"]
        assert line(output, "views", 2)[:4] == ["2", "2", "0", "0 to 1"]
        assert max(map(len, output.splitlines()[1:])) <= 80


def test_of_a_deleted_store_the_bytes_written_stay(run):
    before = answer("status", "--run", run)["stages"][0]["store"]
    said("cache", "drop", run / "stage1")
    after = answer("status", "--run", run)["stages"][0]["store"]
    assert after == before | {"view_numbers": None}
    assert line(said("status", "--run", run), "views", 1)[:4] == ["1", "2", "1", "-"]
    assert [store["stage"] for store in answer("cache", "info", run)["stores"]] == [0, 2]


def test_a_view_that_is_exchanged_is_not_held(run):
    record = RunDirectory.open(run).record(1)
    ring = record.store.ring.with_view(0, UNKNOWN_VIEW)
    record.update_store(run / "stage1", ring=ring)
    assert answer("status", "--run", run)["stages"][0]["store"]["view_numbers"] == [3]
    assert line(said("cache", "info", run / "stage1"), "views", 1)[3] == "3"


def test_a_plan_shows_views_and_what_drawing_them_takes(tmp_path):
    (tmp_path / "tiny.toml").write_text(RECIPE)
    plan = ("plan", "--recipe", tmp_path / "tiny.toml", "--device", "cpu")
    document = answer(*plan)
    first, second, output = document["stages"]
    assert (first["views"], first["reuse"], second["reuse"]) == (2, 1, 0)
    assert 2 < first["bytes_written"] / second["bytes_written"] < 3
    assert document["disk"]["bytes_written"] == first["bytes_written"] + second["bytes_written"]
    # Three passes of the rows through stage 1, while stage 2 trains.
    drawing = 3 * 5000 * 2 * 784 * 16
    assert second["drawing_share"] == pytest.approx(drawing / (drawing + second["flops"]))
    assert first["drawing_share"] == output["drawing_share"] == 0
    shown = said(*plan)
    assert line(shown, "views", 1)[:3] == ["1", "2", "1"]
    assert line(shown, "views", 2)[-1] == f"{second['drawing_share']:.1%}"
    assert line(shown, "views", 3) == ["3", *"-----"]


@pytest.mark.parametrize(
    "settings",
    [("--views", "live", "--reuse", "0"), ("--strategy", "joint", "--set", "training.epochs=1")],
    ids=["live", "joint"],
)
def test_a_plan_without_stores_has_no_table_of_them(tmp_path, settings):
    (tmp_path / "tiny.toml").write_text(RECIPE)
    shown = said("plan", "--recipe", tmp_path / "tiny.toml", "--device", "cpu", *settings)
    assert "written" not in shown


@pytest.mark.usefixtures("script")
def test_a_report_shows_them(run):
    said("report", run, "--to", run / "report.html")
    page = (run / "report.html").read_text()
    written = said("status", "--run", run).splitlines()
    size = next(each for each in written if re.match("1 +2 +1 ", each)).rsplit("  ", 1)[1]
    assert f"<td>2</td><td>1</td><td>3 to 4</td><td>{size}</td>" in page
    assert "<td>2</td><td>0</td><td>0 to 1</td>" in page
