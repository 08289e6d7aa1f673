"""Runs that several processes train, and what ends them."""

from pathlib import Path

from ranked import together
from shared_runs import count


def test_the_plan_knows_that_each_computes_a_share_and_all_see_the_run(tmp_path: Path) -> None:
    together(2, count, tmp_path)
