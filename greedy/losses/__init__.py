"""The local losses of the paper (section 3)."""

from greedy.losses.local import Features, Glob, LocalHeads, LocalLoss, Output, Pred, PredSim, Sim
from greedy.losses.prediction import PredictionHead, pooling_kernel, prediction_loss
from greedy.losses.similarity import (
    SimilarityHead,
    feature_deviation,
    similarity_loss,
    similarity_matrix,
)

__all__ = [
    "Features",
    "Glob",
    "LocalHeads",
    "LocalLoss",
    "Output",
    "Pred",
    "PredSim",
    "PredictionHead",
    "Sim",
    "SimilarityHead",
    "feature_deviation",
    "pooling_kernel",
    "prediction_loss",
    "similarity_loss",
    "similarity_matrix",
]
