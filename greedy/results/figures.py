"""Figures of runs. They need matplotlib, the extra ``plot``, which is imported only when used."""

import io
import math
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from greedy.base.errors import UserError, missing_packages
from greedy.base.files import require_writable, write_output
from greedy.results.curves import Curve
from greedy.results.similarity import BatchSimilarity, StageSimilarity

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Formats, and the dates to leave out so that equal pictures are equal files.
FORMATS: Final[dict[str, dict[str, Any]]] = {
    "svg": {"Date": None},
    "png": {},
    "pdf": {"CreationDate": None},
}
COLUMNS: Final = 4  # matrices side by side
SMALL: Final = 8  # the font size in points
# In names that users chose, a dollar sign begins no formula.
NAME: Final[dict[str, Any]] = {"parse_math": False}


def require_picture(to: Path, overwrite: bool = False) -> None:
    """Checks, before anything is computed, that ``save`` can write to a file.

    Raises:
        UserError: the suffix is not that of a picture, matplotlib is missing, the file exists and
            ``overwrite`` is false, or its folder does not exist.
    """
    if to.suffix.removeprefix(".") not in FORMATS:
        choices = ", ".join(f".{name}" for name in FORMATS)
        raise UserError(f"the suffix of {to} stands for no picture: end it with one of {choices}")
    if find_spec("matplotlib") is None:
        raise missing_packages("a picture", ["matplotlib"], "plot")
    require_writable(to, overwrite)


def save(figure: "Figure", to: Path, *, overwrite: bool = False) -> Path:
    """Writes a figure to a file and returns its path. Raises ``UserError`` as ``require_picture``
    does."""
    require_picture(to, overwrite)
    write_output(to, render(figure, to.suffix.removeprefix(".")))
    return to


def render(figure: "Figure", format: str) -> bytes:
    """Returns a figure as ``svg``, ``png`` or ``pdf``; equal figures give equal bytes. Texts of an
    SVG stay texts, not outlines."""
    import matplotlib as mpl  # noqa: PLC0415

    contents = io.BytesIO()
    with mpl.rc_context({"svg.hashsalt": "greedy", "svg.fonttype": "none"}):
        figure.savefig(
            contents, format=format, dpi=150, bbox_inches="tight", metadata=FORMATS[format]
        )
    return contents.getvalue()


def curves_figure(curves: Sequence[Curve], title: str = "", *, by_depth: bool = False) -> "Figure":
    """Draws training (dashed) and test errors (solid) over epochs, one colour for each curve, and
    the paper's test error as a dotted horizontal line. With ``by_depth`` colours go from dark to
    light, for stages.

    The scale is logarithmic, so that small training errors can be read next to large test errors.
    Lines have the ids ``curve1-training``, ``curve1-test``, ``curve1-paper`` and so on.
    """
    from matplotlib.figure import Figure  # noqa: PLC0415

    figure = Figure(figsize=(7, 4.5))
    axes = figure.subplots()
    colours = _colours(len(curves), by_depth)
    styles: dict[str, Any] = {}
    for number, (curve, colour) in enumerate(zip(curves, colours, strict=True), start=1):
        for kind, points, style in (("training", curve.train, "--"), ("test", curve.test, "-")):
            if points:
                (line,) = axes.plot(*zip(*points, strict=True), style, color=colour)
                line.set_marker("o" if len(points) == 1 else "")
                line.set_gid(f"curve{number}-{kind}")
                styles[f"{kind} error"] = style
        if curve.published is not None:
            line = axes.axhline(curve.published, color=colour, linestyle=":", linewidth=1)
            line.set_gid(f"curve{number}-paper")
            styles["test error, paper"] = ":"
    _scale_errors(axes)
    axes.set_title(title, **NAME)
    _legend(axes, [curve.name for curve in curves], colours, styles)
    return figure


def similarity_figure(batch: BatchSimilarity, title: str) -> "Figure":
    """Draws the similarity matrices of the images and of each stage, and last their target S(Y).
    Headings name the features that are compared and the mean squared difference to the target.
    Matrices have the ids ``similarity-0`` (the images), ``similarity-1`` and so on, and
    ``similarity-target``."""
    from matplotlib.figure import Figure  # noqa: PLC0415

    panels = [(str(stage.stage), _heading(stage), stage.matrix) for stage in batch.stages]
    panels.append(("target", "target S(Y)\n", batch.target))
    columns = min(len(panels), COLUMNS)
    lines = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(1.5 + 2.3 * columns, 0.5 + 2.6 * lines), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False)
    classes = np.unique(batch.labels)
    middles = [np.flatnonzero(batch.labels == label).mean() for label in classes]
    names = [batch.class_names[label] for label in classes]
    for axes in grid.flat[len(panels) :]:
        axes.remove()
    for axes, (key, heading, matrix) in zip(grid.flat, panels, strict=False):
        image = axes.imshow(matrix, "RdBu_r", vmin=-1, vmax=1, interpolation="none")
        image.set_gid(f"similarity-{key}")
        axes.set_title(heading, fontsize=SMALL, **NAME)
        axes.set_xticks([])
        axes.set_yticks([])
    for axes in grid[:, 0]:
        axes.set_yticks(middles, names, fontsize=SMALL - 2, **NAME)
    figure.colorbar(image, ax=figure.axes, label="correlation", aspect=40)
    figure.suptitle(title, **NAME)
    return figure


def _heading(stage: StageSimilarity) -> str:
    name = f"stage {stage.stage}, {stage.name}" if stage.stage else stage.name
    return f"{name}\n{stage.features}, difference {stage.difference:.3f}"


def _colours(count: int, by_depth: bool) -> list[Any]:
    import matplotlib as mpl  # noqa: PLC0415

    if by_depth:
        return list(mpl.colormaps["viridis"](np.linspace(0, 0.9, count)))
    if count <= 10:
        return list(mpl.colormaps["tab10"](range(count)))
    return list(mpl.colormaps["turbo"](np.linspace(0, 1, count)))


def _scale_errors(axes: "Axes") -> None:
    """Makes the axis of errors logarithmic. Where an error is zero, the axis is linear from zero to
    the smallest other error."""
    from matplotlib import ticker  # noqa: PLC0415

    if axes.dataLim.ymin > 0:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    else:
        smallest = min(axes.dataLim.minposy, 100)
        marks = ticker.SymmetricalLogLocator(base=10, linthresh=smallest, subs=[1, 2, 5])
        axes.set_yscale("symlog", linthresh=smallest, linscale=0.3)
        axes.yaxis.set_major_locator(marks)
        axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(ticker.NullLocator())
    axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.set_xlabel("epoch")
    axes.set_ylabel("classification error, %")


def _legend(
    axes: "Axes", names: Sequence[str], colours: Sequence[Any], styles: Mapping[str, Any]
) -> None:
    """Adds a legend of colours and line styles to the right of the axes."""
    from matplotlib.lines import Line2D  # noqa: PLC0415

    lines = [Line2D([], [], color=colour) for colour in colours]
    lines += [Line2D([], [], color="grey", linestyle=style) for style in styles.values()]
    position: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (1, 1), "frameon": False}
    legend = axes.legend(lines, ["?"] * len(lines), fontsize=SMALL, **position)
    for text, name in zip(legend.get_texts(), [*names, *styles], strict=True):
        text.set(text=name, **NAME)  # set afterwards, since a legend drops labels that begin with _
