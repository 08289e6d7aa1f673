"""Train deep classifiers one layer at a time, from disk, on a GPU that is too small for them."""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if not (Path(__file__).parent / "cache").is_dir():  # in a checkout it stands beside, as `cli/` does
    __path__.append(str(Path(__file__).parents[1]))

if TYPE_CHECKING:
    from greedy import cache, curves, data, figures, losses, models, recipes, report, similarity
    from greedy.errors import TrainingError, UserError
    from greedy.evaluation import Evaluation, evaluate
    from greedy.manifest import StageRecord
    from greedy.prediction import Prediction, predict
    from greedy.reporting import EpochReport, Reporter, Reporters
    from greedy.runs import RunDirectory
    from greedy.tensorboard import TensorBoard
    from greedy.trainer import GreedyTrainer

__all__ = [
    "GreedyTrainer",
    "RunDirectory",
    "StageRecord",
    "Reporter",
    "Reporters",
    "TensorBoard",
    "EpochReport",
    "Evaluation",
    "evaluate",
    "Prediction",
    "predict",
    "UserError",
    "TrainingError",
    "cache",
    "curves",
    "data",
    "figures",
    "losses",
    "models",
    "recipes",
    "report",
    "similarity",
]

_HOME = {
    "GreedyTrainer": "trainer",
    "RunDirectory": "runs",
    "StageRecord": "manifest",
    "Reporter": "reporting",
    "Reporters": "reporting",
    "TensorBoard": "tensorboard",
    "EpochReport": "reporting",
    "Evaluation": "evaluation",
    "evaluate": "evaluation",
    "Prediction": "prediction",
    "predict": "prediction",
    "UserError": "errors",
    "TrainingError": "errors",
}


def __getattr__(name: str) -> Any:
    """Imports on first use, so that the command line answers before torch has loaded."""
    if name not in __all__:
        raise AttributeError(f"module 'greedy' has no attribute {name!r}")
    if name in _HOME:
        return getattr(import_module(f"greedy.{_HOME[name]}"), name)
    return import_module(f"greedy.{name}")
