"""The page itself: one HTML file with everything in it. Needs the extra ``report``, which is
imported only where it is used."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from greedy.base.devices import pick_device
from greedy.base.errors import UserError, missing_packages
from greedy.base.files import require_writable, write_output
from greedy.base.sizes import format_duration, format_size
from greedy.base.text import legible
from greedy.losses import LocalLoss
from greedy.recipes import loss_label, network_label, to_toml
from greedy.report import charts
from greedy.report.charts import Spec
from greedy.report.facts import RunFacts, facts_of
from greedy.report.pictures import matrix_picture, palette, picture
from greedy.results.curves import network_curve
from greedy.runs.directory import RunDirectory

MODULES = {"jinja2": "jinja2", "vl_convert": "vl-convert-python"}
LIBRARY = "window.vegaEmbed = vegaEmbed;"  # what the page's script finds of the bundle
SUFFIXES = (".html", ".htm")


def require_report(to: Path, overwrite: bool = False) -> None:
    """Refuses what ``write_report`` would refuse, before anything is computed. Raises
    ``UserError``: the suffix is not that of a page, the extra is missing, the file exists or its
    folder does not."""
    if to.suffix not in SUFFIXES:
        raise UserError(f"the suffix of {to} stands for no page: end it with .html")
    if missing := [package for name, package in MODULES.items() if find_spec(name) is None]:
        raise missing_packages("a report", missing, "report")
    require_writable(to, overwrite)


def write_report(
    runs: Sequence[RunDirectory],
    to: Path,
    *,
    device: str = "auto",
    model: nn.Sequential | None = None,
    loss: LocalLoss | None = None,
    overwrite: bool = False,
) -> Path:
    """Writes the page about some runs to a file, by default only to a new one, and returns its
    path. ``device``, ``model`` and ``loss`` are those of ``facts_of``.

    Raises ``UserError`` as that and ``require_report`` do.
    """
    require_report(to, overwrite)
    page = render(facts_of(runs, pick_device(device), model, loss))
    write_output(to, legible(page).encode())
    return to


def render(runs: Sequence[RunFacts]) -> str:
    """The page as text: the same text for the same facts."""
    import vl_convert  # noqa: PLC0415
    from jinja2 import Environment, FileSystemLoader, StrictUndefined  # noqa: PLC0415
    from markupsafe import Markup  # noqa: PLC0415

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"size": _size, "percent": _percent, "duration": _duration}
    environment.filters["rgb"] = lambda colour: "rgb({},{},{})".format(*colour)
    sections = [_Section.of(number, run) for number, run in enumerate(runs, start=1)]
    shared = _comparison(runs) if len(runs) > 1 else {}
    specs = shared | {key: spec for each in sections for key, spec in each.charts.items()}
    return environment.get_template("page.html").render(
        title=", ".join(run.name for run in runs),
        sections=sections,
        shared=shared,
        scale=palette()[::127],  # its two ends and the middle
        # Inside a script element nothing but its end tag is markup.
        specs=Markup(json.dumps(specs, allow_nan=False).replace("<", "\\u003c")),
        library=Markup(vl_convert.javascript_bundle(LIBRARY).replace("</script", "<\\/script")),
    )


@dataclass(frozen=True)
class _Section:
    """One run as the template takes it. The keys of ``charts`` are ids of the page."""

    facts: RunFacts
    key: str
    charts: dict[str, Spec]
    matrices: list[dict[str, Any]]
    mistakes: list[dict[str, Any]]

    @classmethod
    def of(cls, number: int, run: RunFacts) -> "_Section":
        key = f"run{number}"
        found: dict[str, Spec | None] = {
            "errors": charts.errors_by_stage([run]),
            "curves": charts.curves(run.curves, by_depth=True) if run.curves else None,
            "memory": charts.memory(run),
            "disk": charts.disk(run),
            "time": charts.time(run),
        }
        if run.test is not None:
            found["confusion"] = charts.confusion(run.test.confusion, run.class_names)
        drawn = {f"{key}-{name}": spec for name, spec in found.items() if spec is not None}
        return cls(run, key, drawn, _matrices(run), _mistakes(run))

    def has(self, name: str) -> bool:
        """Whether there is such a chart."""
        return f"{self.key}-{name}" in self.charts

    @property
    def network(self) -> str:
        return network_label(self.facts.recipe.model)

    @property
    def loss(self) -> str:
        return loss_label(self.facts.recipe)

    @property
    def toml(self) -> str:
        return to_toml(self.facts.recipe)

    @property
    def classes(self) -> str:
        """What the rows of the similarity matrices are."""
        batch = self.facts.similarity
        if batch is None:
            return ""
        labels, counts = np.unique(batch.labels, return_counts=True)
        pairs = zip(labels.tolist(), counts.tolist(), strict=True)
        return ", ".join(f"{count} {batch.class_names[label]}" for label, count in pairs)


def _comparison(runs: Sequence[RunFacts]) -> dict[str, Spec]:
    found = {"all-errors": charts.errors_by_stage(runs)}
    lines = [network_curve(run.curves, run.name, len(run.stages)) for run in runs if run.curves]
    if lines:
        found["all-curves"] = charts.curves(lines, by_depth=False)
    return {key: spec for key, spec in found.items() if spec is not None}


def _matrices(run: RunFacts) -> list[dict[str, Any]]:
    batch = run.similarity
    if batch is None:
        return []
    found = [
        {
            "name": f"stage {each.stage}, {each.name}" if each.stage else each.name,
            "note": f"{each.features}, difference {each.difference:.3f}",
            "picture": matrix_picture(each.matrix),
        }
        for each in batch.stages
    ]
    target = {
        "name": "target S(Y)",
        "note": "of the labels",
        "picture": matrix_picture(batch.target),
    }
    return [*found, target]


def _mistakes(run: RunFacts) -> list[dict[str, Any]]:
    if run.test is None:
        return []
    return [
        {
            "picture": picture(each.image),
            "said": run.class_names[each.said],
            "label": run.class_names[each.label],
            "confidence": f"{100 * each.confidence:.1f}\u00a0%",
            "index": each.index,
        }
        for each in run.test.mistakes
    ]


def _size(size_bytes: int | None) -> str:
    return "-" if size_bytes is None else format_size(size_bytes)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} %"


def _duration(seconds: float | None) -> str:
    return "-" if seconds is None else format_duration(seconds)
