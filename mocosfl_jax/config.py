"""Every field of a run: what it means, its default, the rule that fills it when unset, its check.

A config file (`configs/*.py`) starts from `default_config()` and changes fields. `check_types`
turns it into a frozen `Config`, and `resolve` fills the unset fields from the data set and the
paper's rules. A field that is set is never overridden; a set field that cannot hold is an
`InputError`.
"""

import dataclasses
import math
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from mocosfl_jax.core.step import LOSSES
from mocosfl_jax.data.dataset import DatasetInfo
from mocosfl_jax.errors import InputError
from mocosfl_jax.models.bottleneck import BottleneckShape, parse_bottleneck
from mocosfl_jax.models.heads import HEADS
from mocosfl_jax.models.resnet import ARCHITECTURES, CHANNELS_PER_GROUP, STEMS

RULE: Any = None
"""Default of a field that `resolve` fills."""


@dataclass(frozen=True)
class Config:
    """The fields of a run. `= RULE` means: unset, filled as the comment says."""

    # ---------------------------------------------------------------------------------- data
    # `synthetic` (procedural, no download), a TFDS name (`cifar10`, `cifar100`, `svhn_cropped`,
    # `stl10`, any image classification set), `folder:PATH`, or `npz:PATH`.
    dataset: str = "cifar10"
    # Folder of prepared TFDS data sets. Rule: the TFDS default, ~/tensorflow_datasets.
    data_dir: str | None = None
    # TFDS split to train on, TFDS slicing allowed (`train[:5000]`). Rule: `train`.
    train_split: str | None = None
    # TFDS split to test on. Rule: `test`, or `validation` where there is none.
    test_split: str | None = None
    # Side of the square that images are stored and trained at, pixels. Rule: the data set's own;
    # a folder has none, so it must be set there.
    image_size: int = RULE
    # Part of a folder or npz that is held out as a test set where it brings none, in [0, 1).
    holdout_fraction: float = 0.1
    # Mean and deviation of each channel, of pixels in [0, 1], three numbers each. Rule: computed
    # from the train split.
    mean: tuple[float, ...] = RULE
    std: tuple[float, ...] = RULE

    # ------------------------------------------------------------------------------- clients
    # N, registered clients.
    num_clients: int = 100
    # Non-IID by shards: classes that each client is dealt (paper: 2 on CIFAR-10, 20 on CIFAR-100).
    # None: IID, unless dirichlet_alpha is set.
    classes_per_client: int | None = None
    # Non-IID by Dirichlet proportions: concentration, > 0; small is more skewed. None: not used.
    dirichlet_alpha: float | None = None
    # C, clients drawn each round. Rule: all up to 100 clients, else 100 (paper, appendix).
    cohort_size: int = RULE
    # B, images a client a step. Rule: total_batch // C, at least 1.
    batch_size: int = RULE
    # R, server rows a step that the rule for batch_size aims at (paper: 100).
    total_batch: int = 100

    # ------------------------------------------------------------------------------ schedule
    # Passes over the data that the rule for rounds aims at (paper: 200).
    epochs: int = 200
    # Steps in a round, the same for every client. Rule: images // (N * B), at least 1.
    steps_per_round: int = RULE
    # Rounds. Rule: epochs * N / C, so that total work does not depend on the cohort; epochs *
    # images / (steps_per_round * C * B) where steps_per_round is set.
    rounds: int = RULE
    # Averagings of the client models a round, the last at its end. Rule: 1000 // (B * N), at least
    # 1 and at most steps_per_round (paper, appendix).
    syncs_per_round: int = RULE
    # Weights of a sync: `equal`, or `size` for the number of a client's images.
    sync_weights: str = "equal"

    # --------------------------------------------------------------------------------- model
    # `resnet18`, `resnet34`, `resnet50`, `resnet101`, `resnet152`.
    backbone: str = "resnet18"
    # Channels of the stem, a multiple of 4; stage s has width * 2**s (64 in ResNets).
    width: int = 64
    # Residual blocks of each stage, e.g. (1, 1, 1, 1) for a shallow member. Rule: the backbone's.
    blocks_per_stage: tuple[int, ...] = RULE
    # First convolution: `3x3s1`, `3x3s2`, `7x7s2` (kernel and stride). Rule, by image_size: 3x3s2
    # at 64, 7x7s2 from 128 on, else 3x3s1.
    stem: str = RULE
    # Units on the client, 1 (the stem; MocoSFL-1) to all of them; 2 is the paper's MocoSFL-3.
    cut: int = 1
    # Pair of convolutions that narrows the transmitted latents: `C{channels}S{stride}` with stride
    # 1, 2 or 4, or `none`.
    bottleneck: str = "none"
    # Projection head: `V1`, `smallV2`, `V2`, `largeV2`.
    head: str = "V2"
    # D, width of the embedding. Rule: 128, 512, 1024, 2048 for the four heads.
    head_width: int = RULE
    # `float32`, or `bfloat16` for computing on GPU and TPU; parameters are float32 either way.
    compute_dtype: str = "float32"

    # -------------------------------------------------------------------------- contrastive loss
    # `one_way`, `server` (the public code: the swapped direction trains the server only) or
    # `client` (MonAcoSFL: both views through both client models). Rule: `one_way` for head V1, else
    # `server`.
    loss: str = RULE
    # True: one queue shared by all clients. False: private queues, queue_length // N rows each.
    feature_sharing: bool = True
    # K, rows of the queue, or of all private queues together.
    queue_length: int = 6000
    # T, divides cosine similarities.
    temperature: float = 0.1
    # Decay of the momentum models, client and server, in [0, 1).
    ema: float = 0.99
    # Whether a sync averages the momentum client models too (MonAcoSFL; matters at deep cuts).
    align_momentum: bool = False

    # ------------------------------------------------------------------------------ optimisation
    # Server rate of SGD at the start.
    learning_rate: float = 0.06
    # Client rate; 0 freezes the client models. Rule: learning_rate.
    client_learning_rate: float = RULE
    # Both rates over the run: `cosine` to 0, `step` (x0.1 at 60 % and 80 %) or `constant`.
    # Rule: `step` for head V1, else `cosine`.
    schedule: str = RULE
    # SGD momentum (no Nesterov).
    momentum: float = 0.9
    # Weight decay, on every parameter.
    weight_decay: float = 5e-4

    # ------------------------------------------------------------------------------ augmentation
    # `v2` (MoCo v2) or `v1` (the same without blur). Rule: `v1` for head V1, else `v2`.
    augmentation: str = RULE
    # Smallest part of an image's area that a crop keeps, in (0, 1].
    crop_min_scale: float = 0.08
    # Side of the blur kernel, odd, pixels. Rule: a tenth of image_size, at least 9 (two deviations
    # of the widest blur to each side).
    blur_kernel_size: int = RULE

    # -------------------------------------------------------------------------------- evaluation
    # Rounds between kNN monitors; 0 leaves only those at start and end. Rule: a tenth of the run.
    knn_every: int = RULE
    # Neighbours of the kNN monitor (at most the size of the train split).
    knn_k: int = 200
    # Temperature of its weights exp(similarity / temperature).
    knn_temperature: float = 0.1
    # Epochs of the linear probe at the end; 0 skips it.
    probe_epochs: int = 100
    # Its batch size and Adam rate.
    probe_batch_size: int = 128
    probe_learning_rate: float = 1e-3

    # --------------------------------------------------------------------------------------- run
    # Everything random derives from it.
    seed: int = 0
    # Steps compiled into one dispatch; divides steps_per_round. Rule: its largest divisor up to 10.
    steps_per_dispatch: int = RULE
    # Rounds between checkpoints. Rule: a twentieth of the run.
    checkpoint_every: int = RULE
    # Checkpoints that are kept, the latest ones.
    keep_checkpoints: int = 2
    # Images encoded at once in evaluation.
    eval_batch_size: int = 500
    # Whether TensorBoard files are written beside metrics.jsonl.
    tensorboard: bool = True
    # Whether a progress bar is drawn; it also needs a terminal.
    progress: bool = True

    @property
    def total_steps(self) -> int:
        return self.rounds * self.steps_per_round

    @property
    def sync_steps(self) -> tuple[bool, ...]:
        """Which steps of a round end with a sync: evenly spread, the last one among them."""
        steps, syncs = self.steps_per_round, self.syncs_per_round
        return tuple((s + 1) * syncs // steps > s * syncs // steps for s in range(steps))

    @property
    def bottleneck_shape(self) -> BottleneckShape | None:
        return parse_bottleneck(self.bottleneck)

    @property
    def keys_per_step(self) -> int:
        """Rows that one step writes to the queue, or to each private queue."""
        rows = self.batch_size * (self.cohort_size if self.feature_sharing else 1)
        return rows if self.loss == "one_way" else 2 * rows


# Fields that say only how a run is carried out: a run may be resumed with other values.
EXECUTION_FIELDS = frozenset(
    {
        "data_dir",
        "knn_every",
        "steps_per_dispatch",
        "checkpoint_every",
        "keep_checkpoints",
        "eval_batch_size",
        "tensorboard",
        "progress",
    }
)

_TYPES = typing.get_type_hints(Config)


def _basic_type(name: str) -> type:
    """int, float, str, bool or tuple: the type of a field's set values."""
    options = typing.get_args(_TYPES[name])
    union = type(None) in options
    kind = options[0] if union else _TYPES[name]
    return typing.get_origin(kind) or kind


def default_config() -> ConfigDict:
    """A locked ConfigDict with every field of `Config`; unset fields know their type."""
    config = ConfigDict()
    for field in dataclasses.fields(Config):
        kind = _basic_type(field.name)
        config[field.name] = placeholder(kind) if field.default is None else field.default
    return config.lock()


def check_types(raw: ConfigDict) -> Config:
    """The raw config as a `Config` whose unset fields are still None.

    Raises: InputError: an unknown field, or a value of another type.
    """
    known = {field.name for field in dataclasses.fields(Config)}
    for name in raw:
        if name not in known:
            raise InputError(
                f"config.{name}", raw[name], "no such field; see mocosfl_jax/config.py"
            )
    values: dict[str, Any] = {name: raw[name] for name in raw if raw[name] is not None}
    for name in values:
        kind = _basic_type(name)
        if kind is float and type(values[name]) is int:
            values[name] = float(values[name])
        if kind is tuple and type(values[name]) is list:
            values[name] = tuple(values[name])
        value = values[name]
        if type(value) is not kind:
            raise InputError(f"config.{name}", value, f"a {kind.__name__} is needed")
        if isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"config.{name}", value, "a finite number is needed")
    missing = [f.name for f in dataclasses.fields(Config) if f.default is not None]
    for name in missing:
        if name not in values:
            raise InputError(f"config.{name}", None, f"a {_basic_type(name).__name__} is needed")
    return Config(**values)


def config_from_json(values: dict[str, Any]) -> Config:
    """The config of a run's config.json, where tuples have become lists."""
    fields: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
    }
    return Config(**fields)


def resolve(config: Config, info: DatasetInfo) -> Config:
    """Fills every unset field and checks all of them together.

    Args:
      config: from `check_types`.
      info: of the data set that the config names.
    Raises: InputError: a value that cannot hold, alone or beside the others.
    """
    _check_ranges(config)
    _check_model(config)
    filled = _fill(config, info)
    _check_ranges(filled)
    _check_clients(filled, info)
    _check_schedule(filled)
    _check_images(filled)
    _check_queue(filled)
    return filled


# ---------------------------------------------------------------------------------------- rules


def _fill(config: Config, info: DatasetInfo) -> Config:
    """One rule an unset field, in the order in which they depend on each other."""

    def fill(name: str, value: Any) -> None:
        nonlocal config
        if getattr(config, name) is None:
            config = dataclasses.replace(config, **{name: value})

    v1 = config.head == "V1"
    fill("image_size", info.image_size)
    fill("cohort_size", min(config.num_clients, 100))
    fill("batch_size", max(1, config.total_batch // max(1, config.cohort_size)))
    rows = config.cohort_size * config.batch_size
    if config.steps_per_round is None:
        fill("rounds", math.ceil(config.epochs * config.num_clients / max(1, config.cohort_size)))
        steps = info.num_train // max(1, config.num_clients * config.batch_size)
        fill("steps_per_round", max(1, steps))
    images_a_round = max(1, config.steps_per_round * rows)
    fill("rounds", max(1, round(config.epochs * info.num_train / images_a_round)))
    syncs = 1000 // max(1, config.batch_size * config.num_clients)
    fill("syncs_per_round", min(max(1, syncs), config.steps_per_round))
    fill("blocks_per_stage", ARCHITECTURES[config.backbone].blocks_per_stage)
    fill("stem", _stem(config.image_size))
    fill("head_width", HEADS[config.head].width)
    fill("loss", "one_way" if v1 else "server")
    fill("client_learning_rate", config.learning_rate)
    fill("schedule", "step" if v1 else "cosine")
    fill("augmentation", "v1" if v1 else "v2")
    taps = max(9, config.image_size // 10 // 2 * 2 + 1)
    fill("blur_kernel_size", min(taps, 2 * config.image_size - 1))
    fill("knn_every", max(1, config.rounds // 10))
    fill("steps_per_dispatch", _largest_divisor(config.steps_per_round, 10))
    fill("checkpoint_every", max(1, config.rounds // 20))
    return config


def _stem(image_size: int) -> str:
    if image_size >= 128:
        return "7x7s2"
    return "3x3s2" if image_size == 64 else "3x3s1"


def _largest_divisor(number: int, limit: int) -> int:
    return next(d for d in range(min(number, limit), 0, -1) if number % d == 0) if number > 0 else 1


# --------------------------------------------------------------------------------------- checks

_CHOICES = {
    "sync_weights": ("equal", "size"),
    "backbone": tuple(ARCHITECTURES),
    "stem": tuple(STEMS),
    "head": tuple(HEADS),
    "compute_dtype": ("float32", "bfloat16"),
    "loss": LOSSES,
    "schedule": ("cosine", "step", "constant"),
    "augmentation": ("v1", "v2"),
}

_AT_LEAST_1 = (
    "image_size",
    "num_clients",
    "classes_per_client",
    "cohort_size",
    "batch_size",
    "total_batch",
    "epochs",
    "steps_per_round",
    "rounds",
    "syncs_per_round",
    "width",
    "cut",
    "head_width",
    "queue_length",
    "blur_kernel_size",
    "knn_k",
    "probe_batch_size",
    "steps_per_dispatch",
    "checkpoint_every",
    "keep_checkpoints",
    "eval_batch_size",
)
_AT_LEAST_0 = (
    "learning_rate",
    "client_learning_rate",
    "weight_decay",
    "knn_every",
    "probe_epochs",
    "seed",
)
_ABOVE_0 = ("dirichlet_alpha", "temperature", "probe_learning_rate")
_FROM_0_BELOW_1 = ("holdout_fraction", "ema", "momentum")


def _check_ranges(config: Config) -> None:
    """Each set field by itself."""

    def check(name: str, passes: bool, allowed: str) -> None:
        if not passes:
            raise InputError(f"config.{name}", getattr(config, name), allowed)

    values = {name: value for name, value in vars(config).items() if value is not None}
    for name, choices in _CHOICES.items():
        if name in values:
            check(name, values[name] in choices, f"one of {', '.join(choices)} is needed")
    rules: tuple[tuple[tuple[str, ...], Callable[[Any], bool], str], ...] = (
        (_AT_LEAST_1, lambda x: x >= 1, "at least 1 is needed"),
        (_AT_LEAST_0, lambda x: x >= 0, "at least 0 is needed"),
        (_ABOVE_0, lambda x: x > 0, "a number above 0 is needed"),
        (_FROM_0_BELOW_1, lambda x: 0 <= x < 1, "a number in [0, 1) is needed"),
        (("crop_min_scale",), lambda x: 0 < x <= 1, "a number in (0, 1] is needed"),
        (("blur_kernel_size",), lambda x: x % 2 == 1, "an odd number is needed"),
        (("knn_temperature",), lambda x: x >= 0.02, "at least 0.02 is needed: float32 overflows"),
        (("seed",), lambda x: x < 2**32, "a number below 2**32 is needed"),
    )
    for names, holds, allowed in rules:
        for name in names:
            if name in values:
                check(name, holds(values[name]), allowed)
    for name in ("mean", "std"):
        if name in values:
            numbers = all(isinstance(x, int | float) for x in values[name])
            check(name, len(values[name]) == 3 and numbers, "three numbers are needed")
    if config.std is not None:
        check("std", min(config.std) > 0, "numbers above 0 are needed")
    if config.blocks_per_stage is not None:
        counts = config.blocks_per_stage
        passes = len(counts) > 0 and all(isinstance(x, int) and x >= 1 for x in counts)
        check("blocks_per_stage", passes, "one count of at least 1 a stage is needed")


def _check_model(config: Config) -> None:
    if config.width % CHANNELS_PER_GROUP:
        raise InputError(
            "config.width", config.width, f"a multiple of {CHANNELS_PER_GROUP} is needed"
        )
    blocks = config.blocks_per_stage or ARCHITECTURES[config.backbone].blocks_per_stage
    units = 1 + sum(blocks)
    if config.cut > units:
        raise InputError("config.cut", config.cut, f"the network has {units} units: 1 to {units}")
    try:
        parse_bottleneck(config.bottleneck)
    except ValueError as error:
        raise InputError("config.bottleneck", config.bottleneck, str(error)) from None


def _check_clients(config: Config, info: DatasetInfo) -> None:
    clients = config.num_clients
    if clients > info.num_train:
        raise InputError(
            "config.num_clients", clients, f"at most one client an image: 1 to {info.num_train}"
        )
    if config.cohort_size > clients:
        raise InputError(
            "config.cohort_size", config.cohort_size, f"at most config.num_clients: 1 to {clients}"
        )
    if config.classes_per_client is not None and config.dirichlet_alpha is not None:
        raise InputError(
            "config.dirichlet_alpha",
            config.dirichlet_alpha,
            "set this or config.classes_per_client, not both",
        )
    for name in ("classes_per_client", "dirichlet_alpha"):
        value = getattr(config, name)
        if value is not None and info.num_classes is None:
            raise InputError(
                f"config.{name}", value, "images without labels can only be IID: unset"
            )
    classes = config.classes_per_client
    if classes is not None and info.num_classes is not None and classes > info.num_classes:
        raise InputError(
            "config.classes_per_client", classes, f"the data set has {info.num_classes} classes"
        )
    if classes is not None and clients * classes > info.num_train:
        raise InputError(
            "config.classes_per_client",
            classes,
            f"{clients} clients * {classes} shards exceed {info.num_train} images",
        )


def _check_schedule(config: Config) -> None:
    steps = config.steps_per_round
    if config.syncs_per_round > steps:
        raise InputError(
            "config.syncs_per_round", config.syncs_per_round, f"at most one a step: 1 to {steps}"
        )
    if steps % config.steps_per_dispatch:
        raise InputError(
            "config.steps_per_dispatch",
            config.steps_per_dispatch,
            f"a divisor of config.steps_per_round = {steps} is needed",
        )


def _check_images(config: Config) -> None:
    """What depends on the size of images: the blur's reflect padding, and the bottleneck."""
    if config.blur_kernel_size >= 2 * config.image_size:
        raise InputError(
            "config.blur_kernel_size",
            config.blur_kernel_size,
            f"below twice config.image_size = {config.image_size} is needed",
        )
    shape = config.bottleneck_shape
    if shape is None:
        return
    size = math.ceil(config.image_size / STEMS[config.stem].stride)
    for stage in range(1, len(config.blocks_per_stage)):
        if config.cut > 1 + sum(config.blocks_per_stage[:stage]):  # the stage's first block halves
            size = math.ceil(size / 2)
    if size % shape.stride:
        raise InputError(
            "config.bottleneck",
            config.bottleneck,
            f"latents at cut {config.cut} are {size} pixels wide, no multiple of {shape.stride}",
        )


def _check_queue(config: Config) -> None:
    length, owner = config.queue_length, "step"
    if not config.feature_sharing:
        length, owner = config.queue_length // config.num_clients, "step and client"
    if config.keys_per_step > length:
        raise InputError(
            "config.queue_length",
            config.queue_length,
            f"the queue has {length} rows but one {owner} brings {config.keys_per_step} keys",
        )
