"""The recipe's schema: every section, field, type, range and default."""

from typing import Annotated, Any, Final, Literal

from pydantic import (
    BaseModel,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from greedy.recipes.auxiliary import downstream_layers
from greedy.recipes.colour import Colour
from greedy.recipes.limits import AutoLimit, Limit, StoresURL
from greedy.recipes.networks import Names, NetworkName
from greedy.recipes.section import Count, Rates, Section
from greedy.recipes.training import Training

MAX_VIEWS: Final = 2**16  # as in ``cache.metadata``, which takes long to import
CROPS: Final = {"jitter2", "crop4", "random-resized-crop"}
AUGMENTATIONS: Final = (
    "give none, or one of jitter2, crop4 and random-resized-crop, and any of hflip, randaugment, "
    "color-jitter and random-erasing, joined by +"
)


class Data(Section):
    """The data set and the processing of its images on reading."""

    name: str = Field(
        min_length=1,
        description="Data set: a name from `greedy data list`, folder:PATH or module:function.",
    )
    augmentation: str = Field(
        default="none",
        description="Augmentation of training rows: none, or jitter2, crop4, random-resized-crop, "
        "hflip, randaugment, color-jitter, random-erasing with +.",
    )
    cutout_length: int = Field(
        default=0, ge=0, description="Side of the cutout hole in pixels, 0: none."
    )
    mixup: Literal["none", "input", "manifold"] = Field(
        default="none",
        description="Mixing of each training row and its label with the next in its batch; input: "
        "the input of a stage, or of a network trained as a whole; manifold: that of a random "
        "stage in the network's first half.",
    )
    mixup_alpha: float = Field(
        default=1.0, gt=0, description="Shares of mixed rows are drawn from Beta(alpha, alpha)."
    )
    classes_per_batch: int = Field(
        default=0,
        ge=0,
        description="Classes in a batch until the learning rate first drops, 0: any.",
    )
    image_size: Count | None = Field(
        default=None, description="Side in pixels to resize and crop to; absent: as the images are."
    )
    mean: list[float] | None = Field(
        default=None,
        description="Mean of each channel in [0, 1]; absent: measured on the training rows.",
    )
    std: Rates | None = Field(
        default=None,
        validate_default=True,
        description="Standard deviation of each channel; absent: measured on the training rows.",
    )
    holdout: float = Field(
        default=0.1,
        gt=0,
        lt=1,
        description="Share of the training rows held out when patience is set.",
    )
    background: Colour = Field(
        default="white",
        description="Colour behind the transparent parts of images: a name such as black, or "
        "#rrggbb.",
    )
    broken: Literal["refuse", "skip"] = Field(
        default="refuse",
        description="Image files that cannot be read: refuse them all, or skip and record them.",
    )
    max_pixels: Count = Field(
        default=178_956_970, description="Most pixels of an image file, above which it is refused."
    )
    transforms: Literal["fresh", "frozen"] = Field(
        default="fresh",
        description="What a data set's own transforms draw at random; fresh: again for each view "
        "and live epoch; frozen: once.",
    )
    num_workers: Annotated[int, Field(ge=0)] | None = Field(
        default=None,
        description="Processes that read such a data set again, 0: none besides that which trains; "
        "absent: one less than cores.",
    )

    @model_validator(mode="before")
    @classmethod
    def _frozen_had_another_name(cls, values: Any) -> Any:
        if isinstance(values, dict) and "frozen_transforms" in values:
            values = dict(values)
            if values.pop("frozen_transforms"):
                values.setdefault("transforms", "frozen")
        return values

    @field_validator("mixup_alpha")
    @classmethod
    def _alpha_is_of_mixup(cls, value: float, info: ValidationInfo) -> float:
        if info.data.get("mixup") == "none" and value != cls.model_fields["mixup_alpha"].default:
            raise ValueError("be left out where data.mixup is none")
        return value

    @field_validator("augmentation")
    @classmethod
    def _augmentation_is_a_sum(cls, value: str) -> str:
        parts = value.split("+")
        once = len(set(parts)) == len(parts) and len(CROPS.intersection(parts)) <= 1
        known = {*CROPS, "hflip", "randaugment", "color-jitter", "random-erasing"}
        if value != "none" and (set(parts) - known or not once):
            raise ValueError(AUGMENTATIONS.replace("give none", "be none"))
        return value

    @property
    def is_augmented(self) -> bool:
        """Whether reading training rows draws at random."""
        return self.augmentation != "none" or self.cutout_length > 0

    @field_validator("std")
    @classmethod
    def _std_goes_with_mean(
        cls, value: list[float] | None, info: ValidationInfo
    ) -> list[float] | None:
        if "mean" in info.data and len(value or ()) != len(info.data["mean"] or ()):
            raise ValueError("have one entry for each entry of data.mean")
        return value


class Model(Section):
    """The network."""

    network: (
        NetworkName
        | Literal[
            "mlp",
            "vgg8b",
            "vgg11b",
            "resnet32",
            "resnet110",
            "preact-resnet18",
            "wrn-16-8",
            "wrn-28-10",
            "wrn-40-10",
            "python",
        ]
    ) = Field(
        description="Architecture; python: a network given in Python. A function is called only if "
        "--model names it too."
    )
    feature_multiplier: float = Field(
        default=1.0, gt=0, description="Factor on the channels of every convolution."
    )
    hidden_layers: int = Field(default=1, ge=0, description="Fully connected hidden layers.")
    hidden_width: Count = Field(
        default=1024, description="Features of a fully connected hidden layer."
    )
    dropout: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="Dropout on the input of every stage but the first; of wide residual networks "
        "(wrn): within their blocks.",
    )
    activation: Literal["relu", "leaky_relu"] = Field(
        default="leaky_relu", description="Activation; leaky_relu has slope 0.01."
    )
    initial_weights: str | None = Field(
        default=None,
        description="Digest of the weights that a run begins with; `greedy finetune` sets it.",
    )
    stage_layers: Count = Field(
        default=1, description="Layers of a stage; the output layer is a stage of its own."
    )
    stages: Literal["auto"] | Annotated[int, Field(ge=2)] | Names = Field(
        default="auto",
        description="Stages; auto: each child of the network with a convolution or linear layer; a "
        "number: with the output layer, of about as many operations each; names: of modules at "
        "which stages begin, e.g. layer1.0,layer2.0.",
    )

    @field_validator("stages", mode="before")
    @classmethod
    def _names_are_joined_by_commas(cls, value: Any) -> Any:
        return value.split(",") if isinstance(value, str) and value != "auto" else value

    @field_validator("stages")
    @classmethod
    def _one_of_two_rules(cls, value: Any, info: ValidationInfo) -> Any:
        if value != "auto" and info.data.get("stage_layers", 1) != 1:
            raise ValueError("be auto where model.stage_layers is not 1")
        return value


class Loss(Section):
    """The local loss."""

    name: Literal[
        "pred", "sim", "predsim", "pred-bio", "sim-bio", "predsim-bio", "glob", "python"
    ] = Field(
        description="Local loss; glob: none, the network is trained from its end; python: a loss "
        "given in Python."
    )
    beta: float = Field(
        default=0.99,
        ge=0,
        le=1,
        description="Weight of sim in predsim; pred has weight 1 - beta. Absent in predsim-bio: "
        "0.01.",
    )
    pred_pool_target: Count = Field(
        default=2048, description="Most features the prediction head pools a feature map down to."
    )
    pred_hidden_layers: int = Field(
        default=0, ge=0, description="Hidden layers of the prediction head."
    )
    auxiliary: str = Field(
        default="none",
        description="Layers of the prediction head of pred and predsim that stand for later "
        "stages: none, or downstream:d for up to d.",
    )
    target_projection: Count = Field(
        default=128, description="Width of the projected labels that the bio losses aim at."
    )
    label_smoothing: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="Share of a target spread over all classes, in the cross-entropies of pred and "
        "the output layer; sim's targets stay one-hot.",
    )
    class_weights: Literal["balanced"] | Rates | None = Field(
        default=None,
        description="Weights of the classes in these cross-entropies; balanced: inverse to their "
        "numbers of training rows; absent: equal.",
    )

    @model_validator(mode="before")
    @classmethod
    def _predsim_bio_has_another_beta(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("name") == "predsim-bio":
            return {"beta": 0.01, **values}
        return values

    @field_validator("pred_hidden_layers")
    @classmethod
    def _feedback_goes_through_one_layer(cls, value: int, info: ValidationInfo) -> int:
        if value and info.data.get("name") in ("pred-bio", "predsim-bio"):
            raise ValueError(f"be 0 where loss.name is {info.data['name']}")
        return value

    @field_validator("auxiliary")
    @classmethod
    def _auxiliary_layers_are_for_pred(cls, value: str, info: ValidationInfo) -> str:
        if downstream_layers(value) and info.data.get("name") not in ("pred", "predsim"):
            raise ValueError(f"be none where loss.name is {info.data.get('name')}")
        return value


class Memory(Section):
    """The device's memory while a stage trains. No setting of it changes the gradients, which are
    those of the whole batch."""

    budget: AutoLimit = Field(
        default="auto",
        description="Most memory on the device, e.g. 768MiB; auto: 85 % of what is free.",
    )
    micro_batch: Count | None = Field(
        default=None, description="Rows of a micro-batch; absent: as many as the budget allows."
    )
    optimizer_state: Literal["device", "host", "sharded"] = Field(
        default="device",
        description="Where the optimiser's moments are; sharded: on the device, each process of "
        "torchrun has a part.",
    )


class Store(Section):
    """The activation stores."""

    views: Annotated[int, Field(ge=1, le=MAX_VIEWS)] | Literal["auto", "live"] = Field(
        default="auto",
        description="Augmented copies of the training rows a store holds, 1 where nothing is drawn "
        "at random; auto: as few as cost no accuracy, and no store where computing is faster; "
        "live: no stores, the frozen stages are computed again in every epoch.",
    )
    reuse: Annotated[int, Field(ge=0)] | Literal["auto"] = Field(
        default="auto",
        description="Epochs after which the oldest view is replaced by a new one, and so about how "
        "often each copy of a row is used; 0: never; auto: as the number of epochs requires.",
    )
    encoding: Literal["auto", "float32", "float16", "bfloat16", "uint8", "uint4"] = Field(
        default="auto", description="How activations become stored numbers."
    )
    compressor: Literal["none", "lz4", "zstd"] = Field(
        default="lz4", description="Lossless compression of chunks; results do not depend on it."
    )
    ram_budget: Limit | None = Field(
        default=None, description="Most memory for holding a store, e.g. 4GiB; absent: automatic."
    )
    disk_budget: AutoLimit = Field(
        default="auto",
        description="Most disk for the run's images and stores, e.g. 40GiB; auto: 70 % of what is "
        "free without the run when it begins.",
    )
    keep: Literal["auto", "all"] = Field(
        default="auto",
        description="Stores that stay; auto: all if they fit, else those worth it; all: or refuse.",
    )
    stores: StoresURL | None = Field(
        default=None,
        description="Object storage for new stores, as in s3://bucket/prefix, gs://…, az://… or "
        "file:///path; absent: the run directory. disk_budget is then the bucket's, with no limit "
        "for auto.",
    )
    cache: Limit | None = Field(
        default=None,
        description="Most local disk for chunks read from object storage, e.g. 20GiB; absent: "
        "none.",
    )

    @model_validator(mode="before")
    @classmethod
    def _reuse_had_another_name(cls, values: Any) -> Any:
        if isinstance(values, dict) and "refresh_every" in values and "reuse" not in values:
            values = dict(values)
            values["reuse"] = values.pop("refresh_every")
        return values

    @field_validator("reuse")
    @classmethod
    def _live_views_are_always_new(cls, value: int | str, info: ValidationInfo) -> int | str:
        if value not in (0, "auto") and info.data.get("views") == "live":
            raise ValueError("be 0 or auto where store.views is live")
        return value


class Paper(Section):
    """The published figure that the recipe reproduces."""

    table: Count = Field(description="Number of the paper's table.")
    test_error_percent: float = Field(
        ge=0, le=100, description="Published test error in percent, last epoch of a single run."
    )
    cited: str | None = Field(
        default=None,
        description="Work from which the paper cites the figure, for comparison; absent: the paper "
        "has measured it.",
    )


class Recipe(Section):
    """One run, fully described."""

    name: str = Field(min_length=1, description="Name of the recipe; absent: from its file.")
    seed: int = Field(default=0, ge=0, description="Seed from which all random numbers follow.")
    data: Data
    model: Model
    loss: Loss
    training: Training
    memory: Memory = Field(default_factory=Memory)
    store: Store = Field(default_factory=Store)
    paper: Paper | None = None

    def held_out(self, rows: int) -> int:
        """Returns how many of ``rows`` training rows ``training.patience`` watches."""
        return max(1, round(self.data.holdout * rows)) if self.training.patience else 0


SECTIONS: Final[dict[str, type[BaseModel]]] = {
    "data": Data,
    "model": Model,
    "loss": Loss,
    "training": Training,
    "memory": Memory,
    "store": Store,
    "paper": Paper,
}
