"""Train deep classifiers one layer at a time, from disk, on a GPU that is too small for them."""

from greedy import cache, data, losses, models, recipes
from greedy.errors import TrainingError, UserError
from greedy.evaluation import Evaluation, evaluate
from greedy.manifest import StageRecord
from greedy.reporting import EpochReport, Reporter
from greedy.runs import RunDirectory
from greedy.trainer import GreedyTrainer

__all__ = [
    "GreedyTrainer",
    "RunDirectory",
    "StageRecord",
    "Reporter",
    "EpochReport",
    "Evaluation",
    "evaluate",
    "UserError",
    "TrainingError",
    "cache",
    "data",
    "losses",
    "models",
    "recipes",
]
