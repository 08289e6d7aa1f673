"""One HTML page about runs: its facts, its charts, and the page."""

from greedy.report.facts import RunFacts, facts_of
from greedy.report.page import require_report, write_report

__all__ = ["RunFacts", "facts_of", "require_report", "write_report"]
