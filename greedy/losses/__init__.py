"""The local losses of the paper (section 3)."""

from greedy.losses.bio import (
    FeedbackHead,
    PooledDeviation,
    PredBio,
    PredSimBio,
    ProjectedHeads,
    SimBio,
    projected_prediction_loss,
)
from greedy.losses.layers import pooling_kernel
from greedy.losses.local import (
    Features,
    Glob,
    LocalHeads,
    LocalLoss,
    Output,
    Pred,
    PredSim,
    Sim,
    make_heads,
    require_local_loss,
)
from greedy.losses.prediction import PredictionHead, prediction_loss
from greedy.losses.similarity import (
    SimilarityHead,
    feature_deviation,
    similarity_loss,
    similarity_matrix,
)

__all__ = [
    "Features",
    "FeedbackHead",
    "Glob",
    "LocalHeads",
    "LocalLoss",
    "Output",
    "PooledDeviation",
    "Pred",
    "PredBio",
    "PredSim",
    "PredSimBio",
    "PredictionHead",
    "ProjectedHeads",
    "Sim",
    "SimBio",
    "SimilarityHead",
    "feature_deviation",
    "make_heads",
    "pooling_kernel",
    "prediction_loss",
    "projected_prediction_loss",
    "require_local_loss",
    "similarity_loss",
    "similarity_matrix",
]
