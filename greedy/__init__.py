"""Train deep classifiers one layer at a time, from disk, on a GPU that is too small for them."""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if not (Path(__file__).parent / "cache").is_dir():  # in a checkout it stands beside, as `cli/` does
    __path__.append(str(Path(__file__).parents[1]))

if TYPE_CHECKING:
    from greedy import cache, data, exact, losses, models, recipes, report
    from greedy.base.errors import TrainingError, UserError
    from greedy.forecasts import forecast
    from greedy.results import curves, exits, export, figures, similarity
    from greedy.results.evaluation import Evaluation, evaluate
    from greedy.results.prediction import Prediction, predict
    from greedy.results.tensorboard import TensorBoard
    from greedy.runs import status
    from greedy.runs.directory import RunDirectory
    from greedy.runs.events import EpochReport, Reporter, Reporters
    from greedy.runs.record import StageRecord
    from greedy.runs.state import RunState
    from greedy.trainer import GreedyTrainer


__all__ = [
    "GreedyTrainer",
    "RunDirectory",
    "RunState",
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
    "exact",
    "exits",
    "export",
    "figures",
    "forecast",
    "losses",
    "models",
    "recipes",
    "report",
    "similarity",
    "status",
]

# Where what is not a room of this name is found.
_HOME = {
    "GreedyTrainer": "trainer",
    "RunDirectory": "runs.directory",
    "RunState": "runs.state",
    "StageRecord": "runs.record",
    "Reporter": "runs.events",
    "Reporters": "runs.events",
    "TensorBoard": "results.tensorboard",
    "EpochReport": "runs.events",
    "Evaluation": "results.evaluation",
    "evaluate": "results.evaluation",
    "Prediction": "results.prediction",
    "predict": "results.prediction",
    "UserError": "base.errors",
    "TrainingError": "base.errors",
}
_MODULES = {
    "curves": "results",
    "exits": "results",
    "export": "results",
    "figures": "results",
    "forecast": "forecasts",
    "similarity": "results",
    "status": "runs",
}


def __getattr__(name: str) -> Any:
    """Imports on first use, so that the command line answers before torch has loaded."""
    if name not in __all__:
        raise AttributeError(f"module 'greedy' has no attribute {name!r}")
    if name in _HOME:
        return getattr(import_module(f"greedy.{_HOME[name]}"), name)
    room = f"{_MODULES[name]}." if name in _MODULES else ""
    return import_module(f"greedy.{room}{name}")
