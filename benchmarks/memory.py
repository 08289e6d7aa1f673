"""The GPU memory that training VGG11B(3x) takes, compared with this project's targets.

CIFAR-10 shapes, a batch of 128 rows, as in recipe `cifar10/vgg11b-3x-predsim`. For each stage: the
memory mode chosen under a budget, its counted peak, and the peak planned for CUDA's allocator (2 %
and the libraries' workspaces more), which must not exceed the budget. Counting takes neither memory
nor a GPU; if there is one, steps in this mode are also run and measured. Also prints the counted
peaks of whole networks.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import click
import torch

from greedy.base.devices import (
    memory_limited,
    peak_memory,
    pick_device,
    preferred_layout,
    reset_peak_memory,
    set_determinism,
)
from greedy.base.errors import UserError
from greedy.base.sizes import format_size
from greedy.build.cut_network import CutNetwork
from greedy.build.modules import build_loss, build_network
from greedy.losses import LocalLoss, Output
from greedy.memory.baselines import baselines
from greedy.memory.choice import Choice, choose, fused_adam, stored_row_bytes
from greedy.memory.peaks import StepDemand
from greedy.models import Stage, StageShapes, cut, initialise, shapes
from greedy.models.memory_format import placed
from greedy.recipes import load
from greedy.runs.choices import StepMemory
from greedy.steps.guard import Guard
from greedy.steps.host_state import HostAdam
from greedy.steps.step import Learner, step
from greedy.stores.source import Batch

RECIPE = load("cifar10/vgg11b-3x-predsim")
IMAGES, CLASSES, BATCH = (3, 32, 32), 10, RECIPE.training.batch_size
MIB = 2**20


@dataclass(frozen=True)
class Target:
    """A memory budget that a stage has to keep, or all stages if ``stage`` is 0."""

    precision: str
    optimizer_state: str
    budget: int
    stage: int = 0


TARGETS = (
    Target("float32", "device", 768 * MIB),
    Target("bfloat16", "device", 768 * MIB),
    Target("bfloat16", "device", 400 * MIB, stage=4),
    Target("float32", "host", 512 * MIB),
    Target("bfloat16", "host", 512 * MIB),
)


def network() -> tuple[list[Stage], list[StageShapes], LocalLoss]:
    """Returns the stages on the meta device, their shapes, and the local loss."""
    stages = cut(build_network(RECIPE.model, IMAGES, CLASSES))
    return stages, shapes(stages, IMAGES), build_loss(RECIPE.loss)


def rows(target: Target) -> Iterator[dict[str, Any]]:
    """Yields the rows of the stages that a target is about."""
    stages, stage_shapes, loss = network()
    for stage, shape in zip(stages, stage_shapes, strict=True):
        if target.stage in {0, stage.number}:
            is_output = stage is stages[-1]
            local = Output(loss.output_scale) if is_output else loss
            yield row(target, stage, shape, local, "output" if is_output else stage.name)


def row(
    target: Target, stage: Stage, shape: StageShapes, loss: LocalLoss, name: str
) -> dict[str, Any]:
    """Returns the row of one stage under a target's budget."""
    row_bytes = stored_row_bytes(RECIPE.store.encoding, shape.input)
    adam = fused_adam if target.optimizer_state == "device" else None
    what = (stage, shape, loss, CLASSES, BATCH, target.precision)
    demand = StepDemand(*what, adam, "cuda", row_bytes)
    try:
        choice = choose(demand, target.budget)
    except UserError as error:
        return {"stage": stage.number, "name": name, "refused": str(error), "met": False}
    memory = StepMemory(choice.mode, choice.micro_batch)
    measured, as_planned = None, None
    if torch.cuda.is_available():
        measured, as_planned = reserved(target, stage, shape, loss, memory)
    return {
        "stage": stage.number,
        "name": name,
        "mode": choice.mode,
        "micro_batch": choice.micro_batch,
        "counted_peak_bytes": demand.peak(memory),
        "planned_peak_bytes": choice.peak_bytes,
        "measured_peak_bytes": measured,
        "as_planned": as_planned,
        "target_bytes": target.budget,
        "met": _met(choice, measured, target) and as_planned is not False,
    }


def _met(choice: Choice, measured: int | None, target: Target) -> bool:
    return choice.peak_bytes <= target.budget and (measured or 0) <= target.budget


def reserved(
    target: Target, stage: Stage, shape: StageShapes, loss: LocalLoss, memory: StepMemory
) -> tuple[int, bool]:
    """Returns the most bytes that CUDA's allocator, limited to the target, reserves in three real
    steps, and whether they ran in the planned memory mode."""
    device = pick_device("cuda")
    set_determinism(device, False)
    reset_peak_memory(device)
    with memory_limited(device, target.budget):
        as_planned = _steps(target, stage, shape, loss, memory)
    stage.to("meta")
    return peak_memory(device), as_planned


def _steps(
    target: Target, stage: Stage, shape: StageShapes, loss: LocalLoss, memory: StepMemory
) -> bool:
    initialise(stage, seed=0, zero=False)
    device = torch.device("cuda")
    heads = placed(loss.heads(shape.hidden, CLASSES), device)
    learner = Learner(placed(stage, device), heads, loss, CLASSES, target.precision, memory=memory)
    if target.optimizer_state == "host":
        learner.optimizer = HostAdam(learner.parameters(), lr=1e-4)
    else:
        learner.optimizer = fused_adam(learner.parameters())
    learner.train()
    stored = torch.randint(256, (BATCH, *shape.input), dtype=torch.uint8)
    mask = None
    if stage.dropout is not None:
        mask = stage.dropout.mask(BATCH, shape.input, torch.Generator()).cuda()
    labels = torch.arange(BATCH, device="cuda") % CLASSES
    batch = Batch(labels, lambda part: preferred_layout(stored[part].cuda()).float() / 255, mask)
    for position in range(3):
        step(learner, batch, Guard(), position)
    return learner.memory == memory


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def main(as_json: bool) -> None:
    """Count the memory of every stage under the budgets of all targets."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    document: dict[str, Any] = {"recipe": RECIPE.name, "batch_size": BATCH, "device": device}
    tables = []
    for target in TARGETS:
        heading = f"{target.precision}, Adam's moments on the {target.optimizer_state}"
        if not as_json:
            click.echo(f"{heading}, {format_size(target.budget)}")
        stages = []
        for stage in rows(target):
            stages.append(stage)
            if not as_json:
                click.echo(_line(stage))
        settings = {"precision": target.precision, "optimizer_state": target.optimizer_state}
        met = all(stage["met"] for stage in stages)
        tables.append({**settings, "target_bytes": target.budget, "met": met, "stages": stages})
    all_stages, stage_shapes, loss = network()
    others = baselines(CutNetwork(all_stages, stage_shapes, loss, CLASSES), BATCH)
    document |= {"budgets": tables, "baselines": others}
    if as_json:
        click.echo(json.dumps(document, indent=2))
        return
    click.echo("the whole network")
    for name, size in others.items():
        click.echo(f"  {name}: {format_size(size)}")


def _line(stage: dict[str, Any]) -> str:
    if "refused" in stage:
        return f"  {stage['stage']} {stage['name']}: {stage['refused']}: MISSED"
    planned, counted = (format_size(stage[f"{n}_peak_bytes"]) for n in ("planned", "counted"))
    measured = stage["measured_peak_bytes"]
    real = "" if measured is None else f", {format_size(measured)} measured"
    verdict = "" if stage["met"] else ": MISSED"
    verdict = ", in another mode than planned" * (stage["as_planned"] is False) + verdict
    return (
        f"  {stage['stage']} {stage['name']}: {stage['mode']} {stage['micro_batch']}, "
        f"{counted} counted, {planned} planned{real}{verdict}"
    )


if __name__ == "__main__":
    main()
