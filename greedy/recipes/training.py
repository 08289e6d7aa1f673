"""The schema of a recipe's training section."""

from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from greedy.recipes import milestones as rule
from greedy.recipes.section import Count, Counts, Rate, Rates, Section


class Training(Section):
    """The training of the stages."""

    strategy: Literal["greedy", "joint", "backprop", "glob+sim"] = Field(
        default="greedy",
        description="One stage after the other; or all at once, each by its local loss; by "
        "back-propagation from the end; or by that and every layer's sim loss.",
    )
    accumulate: Count = Field(
        default=1,
        description="Micro-batches over which back-propagation adds up a step's gradients; batch "
        "norm then sees one at a time.",
    )
    exact: bool = Field(
        default=False,
        description="Let batch norm and losses see the whole batch where gradients are added up "
        "over micro-batches, for several times the operations.",
    )
    optimizer: Literal["adam", "adamw", "sgd"] = Field(
        default="adam", description="Optimiser of the stages; adamw: decay apart from the gradient."
    )
    momentum: float = Field(default=0.9, ge=0, lt=1, description="Momentum of sgd.")
    nesterov: bool = Field(default=False, description="Use Nesterov's momentum in sgd.")
    weight_decay: float = Field(
        default=0.0, ge=0, description="Weight decay, which norms and biases do not get; 0: none."
    )
    epochs: Count | Counts = Field(description="Epochs of every stage, or a list with one a stage.")
    batch_size: int = Field(default=128, ge=2, description="Rows in a batch.")
    learning_rate: Rate | Rates = Field(
        description="The optimiser's first learning rate, or a list with one a stage."
    )
    schedule: Literal["steps", "cosine"] = Field(
        default="steps",
        description="Learning rate over the epochs; steps: drops at milestones or by patience; "
        "cosine: half a cosine down to 0.",
    )
    warmup_epochs: int = Field(
        default=0,
        ge=0,
        description="First epochs, over which the learning rate rises evenly; 0: none.",
    )
    gradient_clip: float = Field(
        default=0.0,
        ge=0,
        description="Largest norm of the gradients of a stage, or of the network where one loss "
        "trains it, above which they are scaled down; 0: any.",
    )
    milestones: list[Count] | list[list[Count]] | None = Field(
        default=None,
        validate_default=True,
        description="Epochs after which the rate drops, or a list a stage; absent: as published.",
    )
    lr_decay: float = Field(
        default=0.25, gt=0, le=1, description="Factor on the learning rate at every drop."
    )
    patience: int = Field(
        default=0,
        ge=0,
        description="Epochs without improvement on held-out rows before a drop, 0: use milestones.",
    )
    precision: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto",
        description="Arithmetic of encoder and heads; weights, statistics and losses are always "
        "in float32, and float16's loss is scaled.",
    )
    compile: Literal["auto", "on", "off"] = Field(
        default="auto",
        description="Compile a stage's step; auto: of feature maps that train for 5,000 steps.",
    )
    deterministic: bool = Field(
        default=False,
        description="Use deterministic operators, no TF32 and, unless it is on, no compilation.",
    )
    test_every: int = Field(
        default=1, ge=0, description="Epochs between looks at the test split, 0: at the end alone."
    )
    checkpoint_minutes: float = Field(
        default=10, ge=0, description="Minutes between checkpoints within an epoch."
    )

    @field_validator("momentum", "nesterov")
    @classmethod
    def _momentum_is_of_sgd(cls, value: float | bool, info: ValidationInfo) -> float | bool:
        assert info.field_name is not None
        optimizer, default = info.data.get("optimizer"), cls.model_fields[info.field_name].default
        if optimizer in ("adam", "adamw") and value != default:
            raise ValueError(
                f"be left out where training.optimizer is {optimizer}, or set it to sgd"
            )
        if value is True and info.data.get("momentum") == 0:
            raise ValueError("be false where training.momentum is 0")
        return value

    @field_validator("accumulate")
    @classmethod
    def _local_training_needs_no_accumulation(cls, value: int, info: ValidationInfo) -> int:
        strategy = info.data.get("strategy")
        if value > 1 and strategy in ("greedy", "joint"):
            raise ValueError(f"be 1 where training.strategy is {strategy}")
        return value

    @field_validator("exact")
    @classmethod
    def _only_micro_batches_are_made_exact(cls, value: bool, info: ValidationInfo) -> bool:
        strategy = info.data.get("strategy")
        if value and strategy in ("greedy", "joint"):
            raise ValueError(
                f"be false where training.strategy is {strategy}, whose gradients are those of the "
                f"whole batch anyway"
            )
        if value and info.data.get("accumulate") == 1:
            raise ValueError(
                "be false where training.accumulate is 1, since the batch is not cut: give the "
                "number of micro-batches"
            )
        return value

    @field_validator("epochs", "learning_rate")
    @classmethod
    def _one_value_where_stages_train_together(cls, value: Any, info: ValidationInfo) -> Any:
        strategy = info.data.get("strategy")
        if isinstance(value, list) and strategy != "greedy":
            raise ValueError(
                f"be one number where training.strategy is {strategy}, as with "
                f"--set training.{info.field_name}={max(value)}"
            )
        return value

    @field_validator("learning_rate")
    @classmethod
    def _one_rate_a_stage(
        cls, value: float | list[float], info: ValidationInfo
    ) -> float | list[float]:
        epochs = info.data.get("epochs")
        if isinstance(value, list) and isinstance(epochs, list) and len(value) != len(epochs):
            raise ValueError(f"have {len(epochs)} entries, as training.epochs has")
        return value

    @field_validator("warmup_epochs")
    @classmethod
    def _warmup_ends_first(cls, value: int, info: ValidationInfo) -> int:
        epochs = info.data.get("epochs", value + 1)
        shortest = min(epochs) if isinstance(epochs, list) else epochs
        if value and value >= shortest:
            raise ValueError(f"be less than training.epochs, {shortest}")
        return value

    @field_validator("patience")
    @classmethod
    def _a_cosine_has_no_patience(cls, value: int, info: ValidationInfo) -> int:
        if value and info.data.get("schedule") == "cosine":
            raise ValueError("be 0 where training.schedule is cosine")
        return value

    @field_validator("milestones")
    @classmethod
    def _milestones_are_explicit(
        cls, value: rule.Milestones | None, info: ValidationInfo
    ) -> rule.Milestones | None:
        if "epochs" not in info.data:
            return value
        return rule.explicit(value, info.data["epochs"])
