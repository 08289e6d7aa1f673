"""Data sets, and the preparation of their images for the network."""

from greedy.data.augmentation import Augmentation, Draws, normalise, prepare
from greedy.data.catalogue import DATASETS, Entry
from greedy.data.checking import check_files
from greedy.data.images import Reading
from greedy.data.loading import find_dataset, is_available, load_dataset
from greedy.data.mapstyle import dataset_from_torch, draws_at_random, first_pass
from greedy.data.mixing import Mixture, Mixup
from greedy.data.splits import Dataset, Split

__all__ = [
    "DATASETS",
    "Entry",
    "Dataset",
    "Split",
    "load_dataset",
    "find_dataset",
    "Reading",
    "check_files",
    "dataset_from_torch",
    "draws_at_random",
    "first_pass",
    "is_available",
    "Augmentation",
    "Draws",
    "Mixture",
    "Mixup",
    "normalise",
    "prepare",
]
