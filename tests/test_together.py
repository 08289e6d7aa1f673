"""Runs that several processes train, and what ends them."""

from pathlib import Path

from command_line import small_recipe
from ranked import together
from shared_runs import count, fill


def test_the_plan_knows_that_each_computes_a_share_and_all_see_the_run(tmp_path: Path) -> None:
    together(2, count, tmp_path)


def test_a_disk_that_is_full_for_one_ends_all_with_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(small_recipe(store={"views": 3}))
    together(2, fill, tmp_path)
    assert (tmp_path / "1.txt").read_text() == ""
    sentence = (tmp_path / "0.txt").read_text()
    assert sentence.startswith(f"Error: process 1 has ended: {tmp_path / 'run/stage1'}")
    assert "(File too large): raise the limit" in sentence and sentence.count("\n") == 1
