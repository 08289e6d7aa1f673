"""The charts of a report as Vega-Lite specifications. The page sets colours and fonts."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from textwrap import fill
from typing import Any

import numpy as np
from numpy.typing import NDArray

from greedy.base.sizes import format_duration, format_size
from greedy.memory.baselines import BASELINES
from greedy.report.facts import RunFacts
from greedy.results.curves import Curve

Spec = dict[str, Any]

FEW_EPOCHS = 30  # with more, curves have no points
FEW_TICKS = 10  # with more, not every epoch has a tick
FEW_CLASSES = 12  # with more, the confusion matrix has no numbers
MOST_CLASSES = 100  # in a confusion matrix
LABEL = 24  # characters in a line of a bar's name
SPLITS = ("test", "train")
DASHES: Spec = {"domain": SPLITS, "range": [[1, 0], [5, 4]]}
NARROW = 300  # width of a chart on a phone in pixels
TIMES = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))
BYTES = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10), ("B", 1))


@dataclass(frozen=True)
class Bar:
    """One bar: its name, its length in bytes or seconds, the text at its end, and the kind that
    decides its colour."""

    name: str
    length: float
    label: str
    kind: str


def errors_by_stage(runs: Sequence[RunFacts]) -> Spec | None:
    """Draws training and test error after each stage, for one run or several, and the paper's test
    errors; returns ``None`` if no stage has an error."""
    single = len(runs) == 1
    rows = [
        {"run": run.name, "stage": stage.stage, "name": stage.name, "split": split, "error": error}
        for run in runs
        for stage in run.stages
        for split in SPLITS
        if (error := getattr(stage, f"{split}_error_percent")) is not None
    ]
    if not rows:
        return None
    colour = {"field": "split", "sort": SPLITS} if single else {"field": "run", "sort": None}
    encoding = {
        "x": {"field": "stage", "type": "ordinal", "title": "stage", "axis": {"labelAngle": 0}},
        "y": _error_axis([*(row["error"] for row in rows), *_paper_errors(runs)]),
        "color": {
            **colour,
            "type": "nominal",
            "title": None,
            "legend": _legend(SPLITS if single else [run.name for run in runs]),
        },
        "strokeDash": {
            "field": "split",
            "scale": DASHES,
            "title": None,
            "legend": None if single else _legend(SPLITS),
        },
        "detail": [{"field": "run"}, {"field": "split"}],
        "tooltip": [
            *([] if single else [{"field": "run"}]),
            {"field": "stage"},
            {"field": "name"},
            {"field": "split"},
            {"field": "error", "format": ".2f", "title": "error, %"},
        ],
    }
    line: Spec = {
        "data": {"values": rows},
        "mark": {"type": "line", "point": {"size": 60, "filled": True}},
        "encoding": encoding,
    }
    return _chart(240, [line, *_published(runs)])


def curves(shown: Sequence[Curve], *, by_depth: bool) -> Spec:
    """Draws training and test errors over epochs, one colour for each curve. A click on a name in
    the legend highlights its curve, and the pointer shows the errors of an epoch. With
    ``by_depth`` colours go from light to dark, for stages."""
    names = [curve.name.removeprefix("stage ") if by_depth else curve.name for curve in shown]
    keys = {
        f"{split}{n}": (name, split, dict(getattr(curve, split)))
        for n, (name, curve) in enumerate(zip(names, shown, strict=True))
        for split in SPLITS
    }
    epochs = sorted({epoch for _, _, points in keys.values() for epoch in points})
    rows = [
        {"epoch": epoch}
        | {key: round(points[epoch], 4) for key, (_, _, points) in keys.items() if epoch in points}
        for epoch in epochs
    ]
    series = [{"key": key, "name": name, "split": split} for key, (name, split, _) in keys.items()]
    errors = [error for _, _, points in keys.values() for error in points.values()]
    axis: Spec = {"format": "d"} | ({"values": epochs} if len(epochs) <= FEW_TICKS else {})
    x = {"field": "epoch", "type": "quantitative", "scale": {"nice": False}, "axis": axis}
    lines: Spec = {
        "transform": [
            {"fold": list(keys), "as": ["key", "error"]},
            {"filter": "isValid(datum.error)"},
            {
                "lookup": "key",
                "from": {"data": {"values": series}, "key": "key", "fields": ["name", "split"]},
            },
        ],
        "params": [
            {"name": "selected", "select": {"type": "point", "fields": ["name"]}, "bind": "legend"}
        ],
        "mark": {"type": "line", "strokeWidth": 1.6, "point": len(epochs) <= FEW_EPOCHS},
        "encoding": {
            "x": x,
            "y": _error_axis(errors),
            "color": {
                "field": "name",
                "type": "ordinal" if by_depth else "nominal",
                "scale": {"domain": names},
                "title": None,
                "legend": _legend(names),
            },
            "strokeDash": {
                "field": "split",
                "scale": DASHES,
                "title": None,
                "legend": _legend(SPLITS),
            },
            "detail": {"field": "key"},
            "opacity": {"condition": {"param": "selected", "value": 1}, "value": 0.1},
        },
    }
    titles = {key: f"{name}, {split}" for key, (name, split, _) in keys.items()}
    return _chart(300, [lines, _pointer(x, titles)]) | {"data": {"values": rows}}


def _pointer(x: Spec, titles: Mapping[str, str]) -> Spec:
    """Draws a line at the epoch nearest to the pointer, which shows the fields in ``titles``."""
    return {
        "params": [
            {
                "name": "near",
                "select": {
                    "type": "point",
                    "fields": ["epoch"],
                    "nearest": True,
                    "on": "pointermove",
                    "clear": "pointerout",
                },
            }
        ],
        "mark": {"type": "rule", "strokeWidth": 1, "aria": False},
        "encoding": {
            "x": x,
            "opacity": {"condition": {"param": "near", "empty": False, "value": 0.5}, "value": 0},
            "tooltip": [
                # Vega-Lite finds the nearest epoch's fields only if they are formatted.
                {"field": "epoch", "format": "d"},
                *({"field": k, "format": ".2f", "title": title} for k, title in titles.items()),
            ],
        },
    }


def memory(run: RunFacts) -> Spec | None:
    """Draws the memory of a step of each stage, and that of other ways to train the whole network;
    returns ``None`` if none of it is known."""
    if run.at_once:
        this_run = [(f"this run, {run.recipe.training.strategy}", run.step_memory_bytes)]
    else:
        this_run = [
            (f"stage {stage.stage}, {stage.name}", stage.step_memory_bytes) for stage in run.stages
        ]
    others = [(BASELINES[name].partition(" (")[0], size) for name, size in run.baselines.items()]
    bars = [
        Bar(name, size, format_size(size), kind)
        for kind, sizes in (("this run", this_run), ("other ways of training", others))
        for name, size in sizes
        if size is not None
    ]
    return _bars(bars, "memory of a training step", BYTES)


def disk(run: RunFacts) -> Spec | None:
    """Draws the size of each store, in the colour of its encoding."""
    bars = [
        Bar(
            f"stage {store.stage}, {store.name}",
            store.bytes,
            format_size(store.bytes) + ("" if store.kept else ", deleted"),
            store.encoding,
        )
        for store in run.stores
    ]
    return _bars(bars, "disk", BYTES, explained=True)


def time(run: RunFacts) -> Spec | None:
    """Draws the time of each stage; returns ``None`` if all stages were trained at once."""
    if run.at_once:
        return None
    bars = [
        Bar(f"stage {stage.stage}, {stage.name}", stage.seconds, format_duration(stage.seconds), "")
        for stage in run.stages
        if stage.seconds is not None
    ]
    return _bars(bars, "time", TIMES)


def confusion(matrix: NDArray[np.int64], class_names: Sequence[str]) -> Spec:
    """Draws the confusion matrix, of at most ``MOST_CLASSES`` classes, those with most mistakes."""
    wrong = matrix.sum(axis=1) + matrix.sum(axis=0) - 2 * matrix.diagonal()
    shown = np.sort(np.argsort(-wrong, kind="stable")[:MOST_CLASSES]).tolist()
    few = len(shown) <= FEW_CLASSES
    rows = [
        {"is": class_names[i], "predicted": class_names[j], "images": int(matrix[i, j])}
        for i in shown
        for j in shown
        if few or matrix[i, j]
    ]
    names = [class_names[i] for i in shown]
    largest = int(matrix.max())
    axis: Spec = {"type": "nominal", "scale": {"domain": names}}
    cells: Spec = {
        "mark": {"type": "rect"},
        "encoding": {
            "color": {
                "field": "images",
                "type": "quantitative",
                "scale": {"type": "sqrt", "domain": [0, largest]},
                "legend": None,
            },
            "tooltip": [
                {"field": "is", "title": "class"},
                {"field": "predicted", "title": "predicted class"},
                {"field": "images"},
            ],
        },
    }
    dark = {"test": f"datum.images > {largest / 2}", "value": "white"}
    numbers: Spec = {
        "transform": [{"filter": "datum.images > 0"}],
        "mark": {"type": "text", "tooltip": None},
        "encoding": {"text": {"field": "images"}, "color": {"condition": dark}},
    }
    spec = _chart(max(220, (42 if few else 7) * len(shown)), [cells, *([numbers] if few else [])])
    spec["data"] = {"values": rows}
    spec["encoding"] = {
        "x": axis | {"field": "predicted", "title": "predicted class", "axis": {"labelAngle": -45}},
        "y": axis | {"field": "is", "title": "class"},
    }
    return spec


def _bars(
    bars: Sequence[Bar], title: str, units: Iterable[tuple[str, int]], *, explained: bool = False
) -> Spec | None:
    """Draws horizontal bars in the given order, in the largest unit of which the longest has at
    least one. With ``explained`` there is a legend even if all bars have one colour."""
    if not bars:
        return None
    longest = max(bar.length for bar in bars)
    unit, size = next((unit for unit in units if longest >= unit[1]), ("s", 1))
    kinds = list(dict.fromkeys(bar.kind for bar in bars))
    names = [fill(bar.name, LABEL) for bar in bars]
    rows = [
        {"name": name, "length": bar.length / size, "label": bar.label, "kind": bar.kind}
        for name, bar in zip(names, bars, strict=True)
    ]
    length: Spec = {
        "mark": {"type": "bar", "cornerRadiusEnd": 2},
        "encoding": {
            "color": {
                "field": "kind",
                "type": "nominal",
                "sort": kinds,
                "title": None,
                "legend": _legend(kinds) if explained or len(kinds) > 1 else None,
            },
            "tooltip": [{"field": "name", "title": title}, {"field": "label", "title": "takes"}],
        },
    }
    label: Spec = {
        "mark": {"type": "text", "align": "left", "dx": 5},
        "encoding": {"text": {"field": "label"}},
    }
    height = 32 if any("\n" in name for name in names) else 24
    return _chart(height * len(bars), [length, label]) | {
        "data": {"values": rows},
        "encoding": {
            "y": {
                "field": "name",
                "type": "nominal",
                "sort": None,
                "title": None,
                "axis": {"labelExpr": "split(datum.label, '\\n')", "labelLimit": 190},
            },
            "x": {
                "field": "length",
                "type": "quantitative",
                "title": f"{title}, {unit}",
                # Room for the text at the longest bar.
                "scale": {"domain": [0, 1.6 * longest / size], "nice": False},
            },
        },
    }


def _error_axis(errors: Sequence[float]) -> Spec:
    """Makes a logarithmic axis for errors in percent, so that small errors can be read next to
    large ones. If an error is zero, the axis is linear near zero."""
    low, high = min(errors), max(errors)
    scale: Spec = {"type": "log", "domain": [low / 1.15, high * 1.15], "nice": False}
    if low == 0:
        smallest = min((error for error in errors if error > 0), default=1)
        scale = {"type": "symlog", "constant": smallest, "domain": [0, max(high * 1.15, 1)]}
    return {
        "field": "error",
        "type": "quantitative",
        "title": "classification error, %",
        "scale": scale,
        "axis": {"format": "~g", "tickCount": 6},
    }


def _legend(labels: Sequence[str]) -> Spec:
    """Puts a legend above the chart, in as many columns as fit on a phone."""
    column = 30 + 7 * max(map(len, labels))
    return {"orient": "top", "columns": max(1, NARROW // column)}


def _published(runs: Sequence[RunFacts]) -> list[Spec]:
    """Draws a dotted line at each of the paper's test errors."""
    errors = _paper_errors(runs)
    if not errors:
        return []
    data = {"values": [{"error": error, "label": f"the paper: {error:g} %"} for error in errors]}
    y = {"field": "error", "type": "quantitative"}
    rule: Spec = {
        "data": data,
        "mark": {"type": "rule", "strokeDash": [2, 3]},
        "encoding": {"y": y},
    }
    text: Spec = {
        "data": data,
        "mark": {"type": "text", "align": "left", "baseline": "bottom", "dy": -3},
        "encoding": {"y": y, "x": {"value": 4}, "text": {"field": "label"}},
    }
    return [rule, text]


def _paper_errors(runs: Sequence[RunFacts]) -> list[float]:
    papers = [run.recipe.paper for run in runs if run.recipe.paper is not None]
    return list(dict.fromkeys(paper.test_error_percent for paper in papers))


def _chart(height: int, layers: list[Spec]) -> Spec:
    """Makes a chart of layers, as wide as its place on the page."""
    fit = {"type": "fit-x", "contains": "padding"}
    return {"width": "container", "height": height, "autosize": fit, "layer": layers}
