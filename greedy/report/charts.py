"""The charts of a report as Vega-Lite specifications. Colours and fonts are the page's."""

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

FEW_EPOCHS = 30  # up to which each has a point on its curve
FEW_TICKS = 10  # up to which each has a number below
FEW_CLASSES = 12  # up to which the confusion matrix has numbers in it
MOST_CLASSES = 100  # that a confusion matrix shows
LABEL = 24  # characters of a line beside a bar
SPLITS = ("test", "train")
DASHES: Spec = {"domain": SPLITS, "range": [[1, 0], [5, 4]]}
NARROW = 300  # pixels of a chart on a phone
TIMES = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))
BYTES = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10), ("B", 1))


@dataclass(frozen=True)
class Bar:
    """One bar: what it stands for, how long it is, how that is written, and its colour's name."""

    name: str
    length: float
    label: str
    kind: str


def errors_by_stage(runs: Sequence[RunFacts]) -> Spec | None:
    """Training and test error after each stage, of one run or several, and the paper's figures;
    ``None`` where no stage has an error."""
    alone = len(runs) == 1
    rows = [
        {"run": run.name, "stage": stage.stage, "name": stage.name, "split": split, "error": error}
        for run in runs
        for stage in run.stages
        for split in SPLITS
        if (error := getattr(stage, f"{split}_error_percent")) is not None
    ]
    if not rows:
        return None
    colour = {"field": "split", "sort": SPLITS} if alone else {"field": "run", "sort": None}
    encoding = {
        "x": {"field": "stage", "type": "ordinal", "title": "stage", "axis": {"labelAngle": 0}},
        "y": _error_axis([*(row["error"] for row in rows), *_figures(runs)]),
        "color": {
            **colour,
            "type": "nominal",
            "title": None,
            "legend": _legend(SPLITS if alone else [run.name for run in runs]),
        },
        "strokeDash": {
            "field": "split",
            "scale": DASHES,
            "title": None,
            "legend": None if alone else _legend(SPLITS),
        },
        "detail": [{"field": "run"}, {"field": "split"}],
        "tooltip": [
            *([] if alone else [{"field": "run"}]),
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


def curves(found: Sequence[Curve], *, by_depth: bool) -> Spec:
    """Training and test errors over epochs, one colour a curve; a click on a name in the legend
    brings its curve forward, and the pointer shows the errors of an epoch. ``by_depth``: colours
    go from light to dark, for stages."""
    names = [curve.name.removeprefix("stage ") if by_depth else curve.name for curve in found]
    keys = {
        f"{split}{n}": (name, split, dict(getattr(curve, split)))
        for n, (name, curve) in enumerate(zip(names, found, strict=True))
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
            {"name": "picked", "select": {"type": "point", "fields": ["name"]}, "bind": "legend"}
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
            "opacity": {"condition": {"param": "picked", "value": 1}, "value": 0.1},
        },
    }
    titles = {key: f"{name}, {split}" for key, (name, split, _) in keys.items()}
    return _chart(300, [lines, _pointer(x, titles)]) | {"data": {"values": rows}}


def _pointer(x: Spec, titles: Mapping[str, str]) -> Spec:
    """A line at the epoch nearest to the pointer, which shows the fields of these titles."""
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
    """What the step of each stage takes, and what one of the whole network would by other means;
    ``None`` where nothing is known."""
    counted = [each for each in run.stages if each.step_memory_bytes is not None]
    if run.at_once:
        own = [(f"this run, {run.recipe.training.strategy}", run.step_memory_bytes)]
    else:
        own = [(f"stage {each.stage}, {each.name}", each.step_memory_bytes) for each in counted]
    others = [(BASELINES[name].partition(" (")[0], size) for name, size in run.baselines.items()]
    bars = [
        Bar(name, size, format_size(size), kind)
        for kind, sizes in (("this run", own), ("by other means", others))
        for name, size in sizes
        if size is not None
    ]
    return _bars(bars, "memory of a training step", BYTES)


def disk(run: RunFacts) -> Spec | None:
    """The stores by stage, in the colour of their encoding."""
    bars = [
        Bar(
            f"stage {each.stage}, {each.name}",
            each.bytes,
            format_size(each.bytes) + ("" if each.kept else ", deleted"),
            each.encoding,
        )
        for each in run.stores
    ]
    return _bars(bars, "disk", BYTES, explained=True)


def time(run: RunFacts) -> Spec | None:
    """What each stage took to train and to write."""
    if run.at_once:
        return None
    bars = [
        Bar(f"stage {each.stage}, {each.name}", each.seconds, format_duration(each.seconds), "")
        for each in run.stages
        if each.seconds is not None
    ]
    return _bars(bars, "time", TIMES)


def confusion(matrix: NDArray[np.int64], class_names: Sequence[str]) -> Spec:
    """The confusion matrix; of more than a hundred classes those of which most is mistaken."""
    wrong = matrix.sum(axis=1) + matrix.sum(axis=0) - 2 * matrix.diagonal()
    shown = np.sort(np.argsort(-wrong, kind="stable")[:MOST_CLASSES]).tolist()
    few = len(shown) <= FEW_CLASSES
    rows = [
        {"is": class_names[i], "said": class_names[j], "images": int(matrix[i, j])}
        for i in shown
        for j in shown
        if few or matrix[i, j]
    ]
    names = [class_names[i] for i in shown]
    most = int(matrix.max())
    axis: Spec = {"type": "nominal", "scale": {"domain": names}}
    cells: Spec = {
        "mark": {"type": "rect"},
        "encoding": {
            "color": {
                "field": "images",
                "type": "quantitative",
                "scale": {"type": "sqrt", "domain": [0, most]},
                "legend": None,
            },
            "tooltip": [
                {"field": "is", "title": "class"},
                {"field": "said", "title": "network says"},
                {"field": "images"},
            ],
        },
    }
    deep = {"test": f"datum.images > {most / 2}", "value": "white"}
    numbers: Spec = {
        "transform": [{"filter": "datum.images > 0"}],
        "mark": {"type": "text", "tooltip": None},
        "encoding": {"text": {"field": "images"}, "color": {"condition": deep}},
    }
    spec = _chart(max(220, (42 if few else 7) * len(shown)), [cells, *([numbers] if few else [])])
    spec["data"] = {"values": rows}
    spec["encoding"] = {
        "x": axis | {"field": "said", "title": "the network says", "axis": {"labelAngle": -45}},
        "y": axis | {"field": "is", "title": "class"},
    }
    return spec


def _bars(
    bars: Sequence[Bar], title: str, units: Iterable[tuple[str, int]], *, explained: bool = False
) -> Spec | None:
    """Horizontal bars in the given order, measured in the largest unit that the longest fills;
    ``explained``: with a legend even if all have one colour."""
    if not bars:
        return None
    longest = max(bar.length for bar in bars)
    unit, size = next((each for each in units if longest >= each[1]), ("s", 1))
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
                # Room for the label of the longest.
                "scale": {"domain": [0, 1.6 * longest / size], "nice": False},
            },
        },
    }


def _error_axis(errors: Sequence[float]) -> Spec:
    """A logarithmic axis for errors in percent: those of a fraction of a percent can be told apart
    beside those of many. Where there are errors of zero it goes on to zero linearly."""
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
    """Above the chart, in as many columns as a phone has room for."""
    column = 30 + 7 * max(map(len, labels))
    return {"orient": "top", "columns": max(1, NARROW // column)}


def _published(runs: Sequence[RunFacts]) -> list[Spec]:
    """A dotted line at each of the paper's figures."""
    figures = _figures(runs)
    if not figures:
        return []
    data = {"values": [{"error": each, "label": f"the paper: {each:g} %"} for each in figures]}
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


def _figures(runs: Sequence[RunFacts]) -> list[float]:
    papers = [run.recipe.paper for run in runs if run.recipe.paper is not None]
    return list(dict.fromkeys(paper.test_error_percent for paper in papers))


def _chart(height: int, layers: list[Spec]) -> Spec:
    """A chart as wide as the page has room."""
    fit = {"type": "fit-x", "contains": "padding"}
    return {"width": "container", "height": height, "autosize": fit, "layer": layers}
