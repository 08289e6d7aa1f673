"""What training on ImageNet with many GPUs would take, on paper: nothing is trained.

Operations, parameters and activations of each stage are counted as `greedy plan` counts them; the
hardware is that of ``scale_counts.Assumptions``. Five ways to train a network for so many epochs,
a stage where stages train one after the other:

- `backprop`: end to end, data parallel; gradients are exchanged while others are computed.
- `joint`: all stages at once, each with its local loss, data parallel.
- `stages`: the same, but consecutive stages on a GPU each, which sends detached activations on.
- `live`: one stage after the other, data parallel, from augmented images through frozen stages.
- `stores`: the same from stores whose views are a ring, where the disk plan finds that they pay.

Every step is that of the whole batch. On a single GPU `joint` and `stages` are the same. The parts
of a time add up to it: what is done in the background counts where it is waited for.
"""

import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from operator import truediv
from typing import Any

import click
from scale_counts import (
    IMAGE,
    RECIPES,
    Assumptions,
    Cluster,
    Counted,
    Counts,
    chunk_rows,
    counted,
)

from greedy.base.sizes import format_duration, format_size
from greedy.models import Shape
from greedy.runs.disk_plan import DiskPlan
from greedy.runs.views import views_drawn

DATA = {"imagenet-1k": (1_281_167, 1000), "imagenet-21k": (14_197_122, 21_841)}
HALF = 0.5  # of linear, below which more GPUs no longer pay
FLOAT, HALF_FLOAT, DOUBLE = 4, 2, 8  # bytes: gradients and features, activations, statistics
SHARD = 2**27  # bytes of an object
MONTH = 30 * 24 * 3600


@dataclass
class Tally:
    """The time and the bytes of a run as they add up.

    Attributes:
        parts: seconds by what they are spent on.
        read, written, sent: bytes, of all GPUs together.
        held: most bytes in stores at a time.
        dollars: of requests and storage.
        ranks: numbers of the first and last stage on each GPU, for ``stages``.
    """

    parts: Counter[str] = field(default_factory=Counter)
    read: float = 0
    written: float = 0
    sent: float = 0
    held: float = 0
    dollars: float = 0
    ranks: list[list[int]] = field(default_factory=list)

    def spend(self, busy: dict[str, float], **waits: float) -> float:
        """Adds the seconds of what is done one after the other, and what is waited for of that
        which takes ``waits`` seconds beside it. Returns the sum."""
        done = sum(busy.values())
        last = max(waits, key=waits.__getitem__)
        waited = max(0.0, waits[last] - done)
        self.parts.update({**busy, last.replace("_", " "): waited})
        return done + waited

    def take(self, cluster: Cluster, rows: int, shape: Shape, *, images: bool = False) -> None:
        """Adds the bytes and requests of reading rows of a store."""
        self.read += rows * math.prod(shape) * (1 if images else cluster.assumed.value_bytes)
        if cluster.storage == "object":
            gets = rows / chunk_rows(cluster.rows, shape)
            self.dollars += gets * cluster.assumed.get_price

    def put(self, cluster: Cluster, size: float) -> None:
        """Adds the bytes and requests of writing into a store."""
        self.written += size
        if cluster.storage == "object":
            self.dollars += size / SHARD * cluster.assumed.put_price

    def hold(self, cluster: Cluster, size: float, seconds: float) -> None:
        """Adds the price of so many bytes in stores for so long."""
        self.held = max(self.held, size)
        if cluster.storage == "object":
            self.dollars += size / 1e9 * cluster.assumed.gb_price * seconds / MONTH


def train(
    tally: Tally, cluster: Cluster, stages: Sequence[Counts], epochs: int, *, local: bool = True
) -> dict[str, float]:
    """Adds the bytes that GPUs send each other in epochs of data-parallel training of some stages
    at once, and returns its seconds. Gradients of one stage are exchanged while the next computes;
    without local losses batch norms see the rows of their GPU, and one graph is launched."""
    a, gpus, steps = cluster.assumed, cluster.gpus, cluster.steps * epochs
    norms = [channels for stage in stages for channels in stage.channels] if local else []
    gradients = FLOAT * sum(stage.parameters for stage in stages)
    sums = DOUBLE * 4 * sum(norms)  # two a channel in each direction
    gathered = FLOAT * cluster.batch * sum(stage.features for stage in stages) if local else 0
    meetings = 2 * len(norms) + (len(stages) if local else 0)
    passed = (gpus - 1) / gpus
    busy = {
        "launching": a.step_seconds * (len(stages) if local else 1),
        "compute": cluster.rows_each * sum(map(a.row_seconds, stages)),
    }
    exchange = (gpus > 1) * a.latency * len(stages) + 2 * passed * gradients / cluster.bus
    hidden = sum(busy.values()) if len(stages) > 1 else 0.0
    busy["gradients"] = max(0.0, exchange - hidden)
    meeting = (gpus > 1) * a.latency * meetings
    busy["statistics"] = meeting + passed * (2 * sums + gathered) / cluster.bus
    tally.sent += steps * (gpus - 1) * (2 * (gradients + sums) + gathered)
    return {part: steps * seconds for part, seconds in busy.items()}


def at_once(cluster: Cluster, counts: Counted, epochs: int, *, local: bool) -> Tally:
    """Returns what training all stages at once takes, data parallel."""
    tally, rows = Tally(), cluster.rows * epochs
    busy = train(tally, cluster, counts.stages, epochs, local=local)
    tally.take(cluster, rows, IMAGE, images=True)
    reading = cluster.reading(rows, IMAGE, cluster.gpus, images=True)
    seconds = tally.spend(busy, store_reads=reading)
    tally.hold(cluster, cluster.rows * math.prod(IMAGE), seconds)
    return tally


def balanced(seconds: Sequence[float], ranks: int) -> list[list[int]]:
    """Returns the first and last stage, from 1 on, of each of so many ranks of consecutive stages,
    such that the slowest rank takes least."""
    ends = range(len(seconds) + 1)
    best: list[tuple[float, tuple[int, ...]]]
    best = [(sum(seconds[:end]) if end else math.inf, (0, end)) for end in ends]
    for _ in range(ranks - 1):
        best = [
            min(
                (
                    (max(best[start][0], sum(seconds[start:end])), (*best[start][1], end))
                    for start in range(end)
                ),
                default=(math.inf, (0,)),
            )
            for end in ends
        ]
    cuts = best[-1][1]
    return [[first + 1, last] for first, last in pairwise(cuts)]


def spread(cluster: Cluster, counts: Counted, epochs: int) -> Tally:
    """Returns what joint training takes with consecutive stages on a GPU each. Nothing comes back
    from a later stage, so the slowest GPU alone decides; GPUs beyond the stages have no work."""
    a, tally, rows = cluster.assumed, Tally(), cluster.rows * epochs
    costs = [a.step_seconds + cluster.batch * a.row_seconds(stage) for stage in counts.stages]
    ranks = tally.ranks = balanced(costs, min(cluster.gpus, len(costs)))
    slowest = max(sum(costs[first - 1 : last]) for first, last in ranks)
    steps = cluster.steps * epochs
    launching = steps * a.step_seconds * len(costs) / cluster.gpus
    compute = steps * cluster.batch * sum(map(a.row_seconds, counts.stages)) / cluster.gpus
    whole = (steps + len(ranks) - 1) * slowest  # the last rank starts when the others have
    busy = {"launching": launching, "compute": compute}
    busy["imbalance"] = max(0.0, whole - launching - compute)
    sizes = [HALF_FLOAT * math.prod(counts.stages[last - 1].output) for _, last in ranks[:-1]]
    tally.sent = rows * sum(sizes)
    links = (a.bus if rank % a.node else a.link for rank in range(1, len(ranks)))
    tally.take(cluster, rows, IMAGE, images=True)
    seconds = tally.spend(
        busy,
        store_reads=cluster.reading(rows, IMAGE, 1, images=True),
        activations=rows * max(map(truediv, sizes, links), default=0),
    )
    tally.hold(cluster, cluster.rows * math.prod(IMAGE), seconds)
    return tally


@dataclass(frozen=True)
class OneByOne:
    """Training one stage after the other, data parallel, each from the store that the disk plan
    gives it."""

    cluster: Cluster
    counts: Counted
    epochs: int
    disk: DiskPlan

    def tally(self) -> Tally:
        """Returns what it takes."""
        tally = Tally()
        for number in range(1, len(self.counts.stages) + 1):
            seconds, source = self._train(tally, number)
            writing, store = self._write(tally, number)
            held = self.cluster.rows * math.prod(IMAGE) + source + store
            tally.hold(self.cluster, held, seconds + writing)
        return tally

    def _train(self, tally: Tally, number: int) -> tuple[float, float]:
        """Adds the training of a stage, during which views of its source are drawn. Returns its
        seconds, and the bytes of its source and of a view that is drawn."""
        cluster, epochs, source = self.cluster, self.epochs, self.disk.source(number)
        shape = self._shape(source)
        drawn = views_drawn(epochs, self.disk.reuse(source))
        view = cluster.rows * math.prod(shape)
        busy = train(tally, cluster, [self.counts.stages[number - 1]], epochs)
        passes = epochs * self._passes(source, number - 1) + drawn * self._passes(0, source)
        busy["frozen passes"] = cluster.rows * passes / cluster.gpus
        reading = self._read(tally, epochs, source) + self._read(tally, drawn, 0)
        tally.put(cluster, drawn * view * cluster.assumed.value_bytes)
        seconds = tally.spend(busy, store_reads=reading, store_writes=cluster.writing(drawn * view))
        views = self.disk.views(source) if source else 0
        assert views != "live"
        return seconds, (views + (drawn > 0)) * view * cluster.assumed.value_bytes

    def _write(self, tally: Tally, number: int) -> tuple[float, float]:
        """Adds the writing of a stage's store, if it has one. Returns its seconds and bytes."""
        cluster, views = self.cluster, self.disk.views(number)
        if views == "live":
            return 0.0, 0.0
        start = 0 if self.disk.is_written_from_images(number) else self.disk.source(number)
        values = views * cluster.rows * math.prod(self._shape(number))
        size = values * cluster.assumed.value_bytes
        tally.put(cluster, size)
        passing = views * cluster.rows * self._passes(start, number) / cluster.gpus
        seconds = tally.spend(
            {"frozen passes": passing},
            store_reads=self._read(tally, views, start),
            store_writes=cluster.writing(values),
        )
        return seconds, size

    def _read(self, tally: Tally, times: int, source: int) -> float:
        """Adds the bytes of reading all rows of a store so many times. Returns its seconds."""
        rows, shape = times * self.cluster.rows, self._shape(source)
        tally.take(self.cluster, rows, shape, images=source == 0)
        return self.cluster.reading(rows, shape, self.cluster.gpus, images=source == 0)

    def _shape(self, number: int) -> Shape:
        return self.counts.stages[number - 1].output if number else IMAGE

    def _passes(self, start: int, end: int) -> float:
        """Returns the seconds of a row from the output of stage ``start`` to that of ``end``."""
        return sum(map(self.cluster.assumed.frozen_seconds, self.counts.stages[start:end]))


def simulated(
    assumed: Assumptions,
    network: str,
    data: str,
    loss: str,
    storage: str,
    batch: int,
    epochs: int,
    numbers: Sequence[int],
    store: Sequence[str],
) -> list[dict[str, Any]]:
    """Returns an entry of the document to print for each way."""
    rows, classes = DATA[data]
    local = counted(network, classes, loss, "greedy")
    whole = counted(network, classes, loss, "backprop")
    pace = assumed.byte_operations(local.stages, storage)
    live, kept = (
        local.disk(rows, pace, [f"training.epochs={epochs}", *settings])
        for settings in (["store.views='live'"], store)
    )
    ways: dict[str, Callable[[Cluster], Tally]] = {
        "backprop": lambda cluster: at_once(cluster, whole, epochs, local=False),
        "joint": lambda cluster: at_once(cluster, local, epochs, local=True),
        "stages": lambda cluster: spread(cluster, local, epochs),
        "live": lambda cluster: OneByOne(cluster, local, epochs, live).tally(),
        "stores": lambda cluster: OneByOne(cluster, local, epochs, kept).tally(),
    }
    found = []
    for way, run in ways.items():
        alone = run(Cluster(assumed, 1, storage, rows, batch))
        tallies = {n: run(Cluster(assumed, n, storage, rows, batch)) for n in numbers}
        found.append({"way": way, **_entry(assumed, storage, alone, tallies)})
    return found


def _entry(
    assumed: Assumptions, storage: str, alone: Tally, tallies: dict[int, Tally]
) -> dict[str, Any]:
    outcomes: list[dict[str, Any]] = []
    for gpus, tally in tallies.items():
        seconds, one = tally.parts.total(), alone.parts.total()
        lost = {part: tally.parts[part] - alone.parts[part] / gpus for part in tally.parts}
        dollars = tally.dollars + gpus * seconds / 3600 * assumed.gpu_price
        outcomes.append(
            {
                "gpus": gpus,
                "seconds": seconds,
                "parts": {part: spent for part, spent in tally.parts.items() if spent},
                "bound": max(tally.parts, key=tally.parts.__getitem__),
                "efficiency": one / (gpus * seconds),
                "lost_to": max(lost, key=lost.__getitem__) if gpus > 1 else None,
                "read_bytes": tally.read,
                "written_bytes": tally.written,
                "sent_bytes": tally.sent,
                "held_bytes": tally.held,
                "fits": storage == "object" or tally.held <= gpus * assumed.nvme_bytes,
                "dollars": dollars,
                **({"ranks": tally.ranks} if tally.ranks else {}),
            }
        )
    stop = next((o for o in outcomes if o["efficiency"] < HALF), None)
    stops = {"gpus": stop["gpus"], "limit": stop["lost_to"]} if stop else None
    return {"outcomes": outcomes, "stops_paying": stops}


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.option("--network", type=click.Choice(list(RECIPES)), default="resnet50", show_default=True)
@click.option("--data", type=click.Choice(list(DATA)), default="imagenet-1k", show_default=True)
@click.option("--loss", type=click.Choice(["pred", "predsim"]), default="pred", show_default=True)
@click.option("--storage", type=click.Choice(["nvme", "object"]), default="nvme", show_default=True)
@click.option("--gpus", default="1,2,4,8,16,32,64,128,256", show_default=True)
@click.option("--batch", default=1024, show_default=True, help="Rows of all GPUs together.")
@click.option("--epochs", default=90, show_default=True, help="Of all stages, or of each.")
@click.option("--views", default="auto", show_default=True, help="Of a store.")
@click.option("--reuse", default="auto", show_default=True, help="Epochs a view is used.")
@click.option("--gpu-rate", type=float, help="Operations a second.")
@click.option("--link", type=float, help="Bytes a second from a GPU to another node.")
@click.option("--write-rate", type=float, help="Values a second that a GPU's process writes.")
@click.option("--gets", type=float, help="Requests a second that a store answers.")
@click.option("--gpu-price", type=float, help="Dollars for a GPU and hour.")
def main(
    as_json: bool,
    network: str,
    data: str,
    loss: str,
    storage: str,
    gpus: str,
    batch: int,
    epochs: int,
    views: str,
    reuse: str,
    **assumed: float | None,
) -> None:
    """Print the time, bytes and cost of each way to train, and where more GPUs stop paying."""
    given = {name: value for name, value in assumed.items() if value is not None}
    assumptions = replace(Assumptions(), **given)
    numbers = [int(number) for number in gpus.split(",")]
    store = tuple(
        f"store.{name}={value if value.isdigit() else repr(value)}"
        for name, value in (("views", views), ("reuse", reuse))
    )
    what = network, data, loss, storage, batch, epochs, numbers, store
    found = simulated(assumptions, *what)
    if as_json:
        click.echo(json.dumps({"assumptions": asdict(assumptions), "ways": found}))
        return
    for way in found:
        for outcome in way["outcomes"]:
            click.echo(f"{way['way']:8} {_line(outcome)}")
        stops = way["stops_paying"]
        last = f"from {stops['gpus']} GPUs: {stops['limit']}" if stops else "not within these"
        click.echo(f"{way['way']:8} gains less than half of linear {last}\n")


def _line(outcome: dict[str, Any]) -> str:
    sizes = (
        f"{format_size(outcome[f'{what}_bytes'])} {what}" for what in ("read", "written", "sent")
    )
    return (
        f"{outcome['gpus']:3} GPUs {format_duration(outcome['seconds']):>8}, "
        f"{outcome['efficiency']:4.0%} of linear, {', '.join(sizes)}, ${outcome['dollars']:,.0f}, "
        f"bound by {outcome['bound']}{'' if outcome['fits'] else ', more than the disks hold'}"
    )


if __name__ == "__main__":
    main()
