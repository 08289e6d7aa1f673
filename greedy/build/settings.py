"""The settings of a network given in Python."""

from collections.abc import Sequence
from typing import Literal, TypedDict


class TrainerSettings(TypedDict, total=False):
    """Fields of a recipe that ``GreedyTrainer`` takes as keywords, under their names without the
    sections. The recipe's schema describes them; each has the recipe's default but ``epochs``, 100,
    and ``learning_rate``, 5e-4."""

    seed: int
    stage_layers: int
    stages: Literal["auto"] | int | Sequence[str]

    augmentation: str
    cutout_length: int
    mixup: Literal["none", "input", "manifold"]
    mixup_alpha: float
    classes_per_batch: int
    image_size: int | None
    mean: Sequence[float] | None
    std: Sequence[float] | None
    holdout: float
    background: str
    broken: Literal["refuse", "skip"]
    max_pixels: int
    transforms: Literal["fresh", "frozen"]
    num_workers: int | None

    label_smoothing: float
    class_weights: Literal["balanced"] | Sequence[float] | None

    strategy: Literal["greedy", "joint", "backprop", "glob+sim"]
    accumulate: int
    exact: bool
    momentum: float
    nesterov: bool
    weight_decay: float
    epochs: int | Sequence[int]
    batch_size: int
    learning_rate: float | Sequence[float]
    schedule: Literal["steps", "cosine"]
    warmup_epochs: int
    gradient_clip: float
    milestones: Sequence[int] | Sequence[list[int]] | None
    lr_decay: float
    patience: int
    precision: Literal["auto", "float32", "bfloat16", "float16"]
    compile: Literal["auto", "on", "off"]
    deterministic: bool
    test_every: int
    checkpoint_minutes: float

    memory_budget: str
    micro_batch: int | None
    optimizer_state: Literal["device", "host", "sharded"]

    views: int | Literal["auto", "live"]
    reuse: int | Literal["auto"]
    encoding: Literal["auto", "float32", "float16", "bfloat16", "uint8", "uint4"]
    compressor: Literal["none", "lz4", "zstd"]
    ram_budget: str | None
    disk_budget: str
    keep: Literal["auto", "all"]
    stores: str | None
    store_cache: str | None
