"""Every field of a run: what it means, its default, the rule that fills it when unset.

A config file (`configs/*.py`) starts from `default_config()` and changes fields. `check_types`
turns it into a frozen `Config`, and `resolve` fills the unset fields and checks all.
"""

import dataclasses
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from mocosfl_jax.errors import InputError
from mocosfl_jax.models.bottleneck import BottleneckShape, parse_bottleneck

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
    # Part of a folder or npz that is held out as a test set where it brings none, in [0, 1). Rule:
    # 0.1 of images with labels; 0 without, as only labels can be tested on.
    holdout_fraction: float = RULE
    # Mean and deviation of each channel, of pixels in [0, 1], three numbers each. Rule: computed
    # from the train split.
    mean: tuple[float, ...] = RULE
    std: tuple[float, ...] = RULE

    # ------------------------------------------------------------------------------- clients
    # N, registered clients.
    num_clients: int = 100
    # Images of each client, drawn by it alone, so that clients share images: with this there may be
    # more clients than images. None: every image belongs to exactly one client.
    images_per_client: int | None = None
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
    # Steps in a round, the same for every client. Rule: images of a client // B, at least 1; it
    # holds images_per_client, or the N-th part of all.
    steps_per_round: int = RULE
    # Rounds. Rule: epochs * N / C, so that total work does not depend on the cohort; epochs *
    # images / (steps_per_round * C * B) where steps_per_round is set.
    rounds: int = RULE
    # Averagings of the client models a round, the last at its end. Rule: 1000 // (B * N), at least
    # 1 and at most steps_per_round (paper, appendix).
    syncs_per_round: int = RULE
    # What a client keeps between rounds. `persistent`: its SGD buffers and, unless aligned, its
    # momentum model, as the public code does; memory grows with N. `stateless`: nothing, buffers
    # start a round at zero; memory grows with C only. It takes align_momentum and a shared queue.
    client_state: str = "persistent"
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
    # Devices of the run, the first so many; clients are spread over them. None: all there are.
    devices: int | None = None
    # Devices that share one copy of the server's parameters, a divisor of their number.
    server_shards: int = 1
    # Parts of a device's cohort that a step runs one after the other, with summed gradients, where
    # the activations of all at once exceed the device; 1 with head largeV2 (BatchNorm sees all
    # rows). None: 1; on a CPU parts that stay in its cache, 10 images of the paper's network.
    cohort_chunks: int | None = None
    # Folder of compiled programs, which later runs reuse; `none` for none. The environment variable
    # JAX_COMPILATION_CACHE_DIR goes before it.
    compilation_cache: str = "~/.cache/mocosfl_jax"
    # Steps compiled into one dispatch; divides steps_per_round. Rule: its largest divisor up to 10.
    steps_per_dispatch: int = RULE
    # Rounds between checkpoints. Rule: a twentieth of the run.
    checkpoint_every: int = RULE
    # Checkpoints that are kept, the latest ones.
    keep_checkpoints: int = 2
    # Images encoded at once in evaluation.
    eval_batch_size: int = 200
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
        "devices",
        "server_shards",
        "cohort_chunks",
        "compilation_cache",
        "knn_every",
        "steps_per_dispatch",
        "checkpoint_every",
        "keep_checkpoints",
        "eval_batch_size",
        "tensorboard",
        "progress",
    }
)

# What a field means in a stored config that was written before the field existed, where that is not
# today's default. A new field whose default changes what a run does needs an entry.
_MEANING_WITHOUT_FIELD: dict[str, Any] = {"holdout_fraction": 0.1}

_TYPES = typing.get_type_hints(Config)
_KINDS = {
    int: "an integer",
    float: "a number",
    str: "a string",
    bool: "True or False",
    tuple: "a tuple",
}
_SMALLEST, _LARGEST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
"""Sizes between which float32 has its full precision."""


def default_config() -> ConfigDict:
    """A locked ConfigDict with every field of `Config`; unset fields know their type."""
    config = ConfigDict()
    for field in dataclasses.fields(Config):
        kind, _ = _value_types(field.name)
        config[field.name] = placeholder(kind) if field.default is None else field.default
    return config.lock()


def check_types(raw: Mapping[str, Any], where: str = "config") -> Config:
    """The raw config as a `Config` whose unset fields are still None.

    Args:
      raw: a ConfigDict from a config file, or a dict.
      where: what errors put before `.FIELD`.
    Raises: InputError: an unknown field, a value of another type, no value where one is needed, an
    integer beyond int64, or a number too large or too close to 0 for float32.
    """
    for name in raw:
        if name not in _TYPES:
            raise InputError(
                f"{where}.{name}", raw[name], "no such field; see mocosfl_jax/config.py"
            )
    values = {
        name: _typed(f"{where}.{name}", name, raw[name]) for name in raw if raw[name] is not None
    }
    for field in dataclasses.fields(Config):
        if field.default is not None and field.name not in values:
            kind, _ = _value_types(field.name)
            raise InputError(f"{where}.{field.name}", None, f"{_KINDS[kind]} is needed")
    return Config(**values)


def config_from_json(values: Any, where: str) -> Config:
    """The stored config of a run of this version or of an earlier one.

    Args:
      values: fields and their values as JSON has them: tuples have become lists. A field that is
        missing gets the value that stands for what versions without it did.
      where: the file that holds them, which errors name.
    Raises: InputError: fields that this version does not know, or values of another type.
    """
    if not isinstance(values, dict):
        raise InputError(where, values, "fields and their values are needed")
    unknown = sorted(values.keys() - _TYPES.keys())
    if unknown:
        allowed = "fields that this version does not know; a newer one wrote them"
        raise InputError(where, ", ".join(unknown), allowed)
    defaults = {field.name: field.default for field in dataclasses.fields(Config)}
    return check_types({**defaults, **_MEANING_WITHOUT_FIELD, **values}, f"{where}: config")


def differences(stored: Config, found: Config) -> list[str]:
    """Texts like `temperature 0.1 -> 0.2` of the fields, but for execution fields, that differ."""
    return [
        f"{name} {old!r} -> {getattr(found, name)!r}"
        for name, old in vars(stored).items()
        if name not in EXECUTION_FIELDS and old != getattr(found, name)
    ]


def _value_types(name: str) -> tuple[type, type | None]:
    """The type of a field's set values, and of their members if they are tuples."""
    hint = _TYPES[name]
    if type(None) in typing.get_args(hint):
        hint = typing.get_args(hint)[0]
    if typing.get_origin(hint) is tuple:
        return tuple, typing.get_args(hint)[0]
    return hint, None


def _typed(where: str, name: str, value: Any) -> Any:
    """A set value as the type of its field.

    Raises: InputError: it is of another type, or a number that cannot be held.
    """
    kind, member = _value_types(name)
    if member is None:
        return _scalar(where, kind, value)
    if type(value) not in (tuple, list):
        raise InputError(where, value, f"a tuple, each member {_KINDS[member]}, is needed")
    return tuple(_scalar(where, member, x) for x in value)


def _scalar(where: str, kind: type, value: Any) -> Any:
    """Raises: InputError: as `_typed`."""
    if type(value) is int and not -(2**63) <= value < 2**63:
        found = f"an integer of {value.bit_length()} bits"  # very long ones cannot be printed
        raise InputError(where, found, "an integer from -2**63 to 2**63 - 1 is needed")
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise InputError(where, value, f"{_KINDS[kind]} is needed")
    if isinstance(value, str) and "\0" in value:
        raise InputError(where, value, "a string without null bytes is needed")
    if isinstance(value, float) and value != 0 and not _SMALLEST <= abs(value) <= _LARGEST:
        allowed = f"0 or a finite number of a size from {_SMALLEST:.3g} to {_LARGEST:.3g} is needed"
        raise InputError(where, value, f"{allowed} (float32)")
    return value
