"""Similarity matrices of one test batch after each stage of a trained network."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from greedy.build.modules import build_loss
from greedy.losses import LocalLoss, feature_deviation, similarity_matrix
from greedy.losses.strategies import stage_losses
from greedy.models import Stage, shapes
from greedy.results.evaluation import raw_to_float
from greedy.runs.directory import RunDirectory
from greedy.runs.network import load_heads, load_stage, normalisation_module, stages_of
from greedy.runs.state import RunState

MOST_CLASSES = 10  # with more classes, a batch of 100 rows would have few rows of each
CPU = torch.device("cpu")

Matrix = NDArray[np.float32]


@dataclass(frozen=True)
class StageSimilarity:
    """The similarity matrix S of one stage, equation (5).

    Attributes:
        stage: the number of the stage; 0 stands for the images.
        name: the name of the stage.
        features: the features that are compared: ``pixels``; ``similarity head``, the output of
            that head; ``activation``, the standard deviation of each feature map of h, or h itself
            if it has no maps; ``logits`` of the output layer.
        matrix: S, (rows, rows) in [-1, 1].
        difference: the mean squared difference between S and the target, the sim loss of
            equation (4) over this batch.
    """

    stage: int
    name: str
    features: str
    matrix: Matrix
    difference: float


@dataclass(frozen=True)
class BatchSimilarity:
    """The similarity matrices of one batch.

    Attributes:
        rows: numbers of its rows in the test split of the run's stores, sorted by class.
        labels: their classes. The matrices have the same order.
        class_names: the names of all classes.
        target: S(Y) of the one-hot labels, (rows, rows).
        stages: the matrices of the images and of the trained stages, in order.
    """

    rows: NDArray[np.int64]
    labels: NDArray[np.int64]
    class_names: list[str]
    target: Matrix
    stages: list[StageSimilarity]


@torch.no_grad()
def similarity_by_stage(
    run: RunDirectory,
    loss: LocalLoss | None = None,
    model: nn.Module | None = None,
    *,
    rows: int = 100,
) -> BatchSimilarity:
    """Computes the similarity matrix of a test batch after each trained stage, in evaluation mode
    and float32 on the CPU. Activation stores are not read.

    Args:
        loss: the local loss, if it was written in Python. Without it, the similarity heads of such
            a run are not known, and activations are compared.
        model: the network, if it was built in Python.
        rows: the size of the batch: the first test images, in the order of the store, of at most
            ten classes.

    Raises:
        UserError: no stage is trained, one is damaged, or the network is not known.
    """
    return run.read_consistently(
        lambda: _similarity_by_stage(RunState.read(run), loss, model, rows)
    )


def _similarity_by_stage(
    state: RunState, loss: LocalLoss | None, model: nn.Module | None, rows: int
) -> BatchSimilarity:
    run, data = state.run, state.complete_record(0)
    state.complete_record(1)
    if loss is None and run.recipe.loss.name != "python":
        loss = build_loss(run.recipe.loss)
    chosen, labels, images = _batch(run, rows)
    target = similarity_matrix(F.one_hot(torch.from_numpy(labels), len(data.class_names)).float())

    def stage_similarity(number: int, name: str, features: str, x: Tensor) -> StageSimilarity:
        matrix = similarity_matrix(x)
        return StageSimilarity(
            number, name, features, matrix.numpy(), float(F.mse_loss(matrix, target))
        )

    x = normalisation_module(run.recipe, data)(raw_to_float(images, CPU))
    stages = stages_of(state, model)
    losses = _losses(state, loss, stages)
    similarities = [stage_similarity(0, "images", "pixels", x.flatten(1))]
    for stage, stage_loss in zip(stages, losses, strict=True):
        if state.stage_state(stage.number) != "complete":
            break
        load_stage(state, stage, CPU)
        h = stage.hidden(x)
        is_output = stage.number == len(data.network)
        features, z = ("logits", h) if is_output else _features(state, stage, stage_loss, h)
        name = data.network[stage.number - 1]
        similarities.append(stage_similarity(stage.number, name, features, z))
        x = stage.pool(h)
        stage.to("meta")  # one stage in memory at a time
    return BatchSimilarity(chosen, labels, data.class_names, target.numpy(), similarities)


def _batch(
    run: RunDirectory, count: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.generic]]:
    """Returns rows of the test split sorted by class, their labels and their raw images."""
    store = run.open_store(0, "test")
    classes = list(dict.fromkeys(store.labels.tolist()))[:MOST_CLASSES]
    first = np.flatnonzero(np.isin(store.labels, classes))[:count]
    rows = first[np.argsort(store.labels[first], kind="stable")]
    images = np.concatenate([store.read_rows(0, row, row + 1) for row in rows.tolist()])
    return rows, store.labels[rows], images


def _losses(
    state: RunState, loss: LocalLoss | None, stages: Sequence[Stage]
) -> Sequence[LocalLoss | None]:
    """Returns the loss of each stage, ``None`` where the run's is not known."""
    if loss is None:
        return [None] * len(stages)
    hidden = [shape.hidden for shape in shapes(stages, state.complete_record(0).row_shape)]
    return stage_losses(state.run.recipe.training.strategy, loss, hidden)


def _features(
    state: RunState, stage: Stage, loss: LocalLoss | None, h: Tensor
) -> tuple[str, Tensor]:
    """Returns the features of each row of an activation h that are compared, and their name.
    ``loss`` is the stage's."""
    if loss is not None:
        heads = load_heads(state, loss, stage.number, tuple(h.shape[1:]))
        if heads.similarity is not None:
            return "similarity head", heads.similarity(h)
    return "activation", feature_deviation(h)
