"""The page: one HTML file with everything in it. It needs the extra ``report``, which is imported
only when used."""

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
from greedy.base.sizes import duration, percent, size
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
LIBRARY = "window.vegaEmbed = vegaEmbed;"  # makes it visible to the page's script
SUFFIXES = (".html", ".htm")


def require_report(to: Path, overwrite: bool = False) -> None:
    """Checks, before anything is computed, that ``write_report`` can write to a file.

    Raises:
        UserError: the suffix is not that of a page, the extra ``report`` is missing, the file
            exists and ``overwrite`` is false, or its folder does not exist.
    """
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
    model: nn.Module | None = None,
    loss: LocalLoss | None = None,
    overwrite: bool = False,
) -> Path:
    """Writes the page about some runs to a file and returns its path. ``device``, ``model`` and
    ``loss`` are those of ``facts_of``.

    Raises ``UserError`` as ``facts_of`` and ``require_report`` do.
    """
    require_report(to, overwrite)
    page = render(facts_of(runs, pick_device(device), model, loss))
    write_output(to, legible(page).encode())
    return to


def render(runs: Sequence[RunFacts]) -> str:
    """Returns the page as text; equal facts give equal text."""
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
    environment.filters |= {"size": size, "percent": percent, "duration": duration}
    environment.filters["rgb"] = lambda colour: "rgb({},{},{})".format(*colour)
    sections = [_Section.of(number, run) for number, run in enumerate(runs, start=1)]
    shared = _comparison(runs) if len(runs) > 1 else {}
    specs = shared | {key: spec for section in sections for key, spec in section.charts.items()}
    return environment.get_template("page.html").render(
        title=", ".join(run.name for run in runs),
        sections=sections,
        shared=shared,
        scale=palette()[::127],  # its two ends and the middle
        # In a script element only its end tag is markup.
        specs=Markup(json.dumps(specs, allow_nan=False).replace("<", "\\u003c")),
        library=Markup(vl_convert.javascript_bundle(LIBRARY).replace("</script", "<\\/script")),
    )


@dataclass(frozen=True)
class _Section:
    """One run for the template. The keys of ``charts`` are ids on the page."""

    facts: RunFacts
    key: str
    charts: dict[str, Spec]
    matrices: list[dict[str, Any]]
    mistakes: list[dict[str, Any]]

    @classmethod
    def of(cls, number: int, run: RunFacts) -> "_Section":
        key = f"run{number}"
        specs: dict[str, Spec | None] = {
            "errors": charts.errors_by_stage([run]),
            "curves": charts.curves(run.curves, by_depth=True) if run.curves else None,
            "memory": charts.memory(run),
            "disk": charts.disk(run),
            "time": charts.time(run),
        }
        if run.test is not None:
            specs["confusion"] = charts.confusion(run.test.confusion, run.class_names)
        drawn = {f"{key}-{name}": spec for name, spec in specs.items() if spec is not None}
        return cls(run, key, drawn, _matrices(run), _mistakes(run))

    def has(self, name: str) -> bool:
        """Returns whether the run has a chart of that name."""
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
        """The number of rows of each class in the similarity matrices, in words."""
        batch = self.facts.similarity
        if batch is None:
            return ""
        labels, counts = np.unique(batch.labels, return_counts=True)
        pairs = zip(labels.tolist(), counts.tolist(), strict=True)
        return ", ".join(f"{count} {batch.class_names[label]}" for label, count in pairs)


def _comparison(runs: Sequence[RunFacts]) -> dict[str, Spec]:
    specs = {"all-errors": charts.errors_by_stage(runs)}
    lines = [network_curve(run.curves, run.name, len(run.stages)) for run in runs if run.curves]
    if lines:
        specs["all-curves"] = charts.curves(lines, by_depth=False)
    return {key: spec for key, spec in specs.items() if spec is not None}


def _matrices(run: RunFacts) -> list[dict[str, Any]]:
    batch = run.similarity
    if batch is None:
        return []
    matrices = [
        {
            "name": f"stage {stage.stage}, {stage.name}" if stage.stage else stage.name,
            "note": f"{stage.features}, difference {stage.difference:.3f}",
            "picture": matrix_picture(stage.matrix),
        }
        for stage in batch.stages
    ]
    target = {
        "name": "target S(Y)",
        "note": "of the labels",
        "picture": matrix_picture(batch.target),
    }
    return [*matrices, target]


def _mistakes(run: RunFacts) -> list[dict[str, Any]]:
    if run.test is None:
        return []
    return [
        {
            "picture": picture(mistake.image),
            "predicted": run.class_names[mistake.predicted],
            "label": run.class_names[mistake.label],
            "confidence": f"{100 * mistake.confidence:.1f}\u00a0%",
            "index": mistake.index,
        }
        for mistake in run.test.mistakes
    ]
