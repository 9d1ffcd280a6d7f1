"""From a typed config to one without gaps: the paper's rules for unset fields, and all checks.

A field that is set is never overridden; a set field that cannot hold is an `InputError`.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from mocosfl_jax.config import Config
from mocosfl_jax.data.dataset import HOLDOUT_FRACTION, DatasetInfo
from mocosfl_jax.data.partition import ClientImages, check_clients, check_shards
from mocosfl_jax.errors import InputError
from mocosfl_jax.methods.mocosfl.step import LOSSES
from mocosfl_jax.models.bottleneck import parse_bottleneck
from mocosfl_jax.models.heads import HEADS
from mocosfl_jax.models.resnet import ARCHITECTURES, CHANNELS_PER_GROUP, STEMS


def resolve(config: Config, info: DatasetInfo, partition: ClientImages | None = None) -> Config:
    """Fills every unset field and checks all of them together.

    Args:
      config: from `check_types`.
      info: of the data set that the config names.
      partition: who holds which images, from `partition_of`. None: every client is taken to have
        images, which holds but for Dirichlet clients.
    Raises: InputError: a value that cannot hold, alone or beside the others.
    """
    check_fields(config)
    _check_clients(config, info)
    holders = config.num_clients if partition is None else partition.num_holders
    filled = _fill(config, info, holders)
    _check_ranges(filled)
    _check_cohort(filled, holders)
    _check_schedule(filled, config)
    _check_images(filled)
    _check_queue(filled)
    _check_scale(filled)
    return filled


def check_fields(config: Config) -> None:
    """Every check that needs neither data nor rules; unset fields pass.

    Args: config: from `check_types`.
    Raises: InputError: a value that cannot hold whatever the data set is.
    """
    _check_ranges(config)
    _check_model(config)
    if config.classes_per_client is not None and config.dirichlet_alpha is not None:
        raise InputError(
            "config.dirichlet_alpha",
            config.dirichlet_alpha,
            "set this or config.classes_per_client, not both",
        )


# ---------------------------------------------------------------------------------------- rules


def _fill(config: Config, info: DatasetInfo, holders: int) -> Config:
    """One rule an unset field, in the order in which they depend on each other.

    Args: holders: clients that have images.
    """

    def fill(name: str, value: Any) -> None:
        nonlocal config
        if getattr(config, name) is None:
            config = dataclasses.replace(config, **{name: value})

    v1 = config.head == "V1"
    fill("image_size", info.image_size)
    fill("holdout_fraction", HOLDOUT_FRACTION if info.labelled else 0.0)
    fill("cohort_size", min(holders, 100))
    fill("batch_size", max(1, config.total_batch // config.cohort_size))
    rows = config.cohort_size * config.batch_size
    if config.steps_per_round is None:
        fill("rounds", math.ceil(config.epochs * config.num_clients / config.cohort_size))
        held = config.images_per_client or info.num_train / config.num_clients
        fill("steps_per_round", max(1, int(held / config.batch_size)))
    images_a_round = config.steps_per_round * rows
    fill("rounds", max(1, round(config.epochs * info.num_train / images_a_round)))
    syncs = 1000 // (config.batch_size * config.num_clients)
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
    fill("steps_per_dispatch", largest_divisor(config.steps_per_round, 10))
    fill("checkpoint_every", max(1, config.rounds // 20))
    return config


def _stem(image_size: int) -> str:
    if image_size >= 128:
        return "7x7s2"
    return "3x3s2" if image_size == 64 else "3x3s1"


def largest_divisor(number: int, limit: int) -> int:
    """The largest one up to `limit`; 1 of anything that is not positive."""
    return next(d for d in range(min(number, limit), 0, -1) if number % d == 0) if number > 0 else 1


# --------------------------------------------------------------------------------------- checks

_CHOICES = {
    "client_state": ("persistent", "stateless"),
    "sync_weights": ("equal", "size"),
    "backbone": tuple(ARCHITECTURES),
    "stem": tuple(STEMS),
    "head": tuple(HEADS),
    "compute_dtype": ("float32", "bfloat16"),
    "loss": LOSSES,
    "schedule": ("cosine", "step", "constant"),
    "augmentation": ("v1", "v2"),
}

_LARGEST = 2**31 - 1
"""Of the numbers that count something: the ids and counters of a run have 32 bits."""

_MOST_STAGES, _MOST_BLOCKS = 8, 100
"""ResNet-152 has 4 and 50; each stage halves the image, and each block takes time to compile."""

_FROM_1 = (
    "image_size",
    "num_clients",
    "images_per_client",
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
    "devices",
    "server_shards",
    "cohort_chunks",
    "steps_per_dispatch",
    "checkpoint_every",
    "keep_checkpoints",
    "eval_batch_size",
)
_FROM_0 = ("knn_every", "probe_epochs")
_AT_LEAST_0 = ("learning_rate", "client_learning_rate", "weight_decay", "seed")
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
        (_FROM_1, lambda x: 1 <= x <= _LARGEST, f"a number from 1 to {_LARGEST} is needed"),
        (_FROM_0, lambda x: 0 <= x <= _LARGEST, f"a number from 0 to {_LARGEST} is needed"),
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
            check(name, len(values[name]) == 3, "three numbers are needed")
    if config.std is not None:
        check("std", min(config.std) > 0, "numbers above 0 are needed")
    if config.blocks_per_stage is not None:
        counts = config.blocks_per_stage
        passes = len(counts) > 0 and min(counts) >= 1
        check("blocks_per_stage", passes, "one count of at least 1 a stage is needed")


def _check_model(config: Config) -> None:
    if config.width % CHANNELS_PER_GROUP:
        raise InputError(
            "config.width", config.width, f"a multiple of {CHANNELS_PER_GROUP} is needed"
        )
    architecture = ARCHITECTURES[config.backbone]
    blocks = config.blocks_per_stage or architecture.blocks_per_stage
    if len(blocks) > _MOST_STAGES or sum(blocks) > _MOST_BLOCKS:
        allowed = f"at most {_MOST_STAGES} stages with {_MOST_BLOCKS} blocks in all are needed"
        raise InputError("config.blocks_per_stage", blocks, allowed)
    growth = 2 ** (len(blocks) - 1) * architecture.expansion
    if config.width * growth > _LARGEST:
        allowed = f"the last stage is {growth} times as wide: 4 to {_LARGEST // growth}"
        raise InputError("config.width", config.width, allowed)
    units = 1 + sum(blocks)
    if config.cut > units:
        raise InputError("config.cut", config.cut, f"the network has {units} units: 1 to {units}")
    try:
        bottleneck = parse_bottleneck(config.bottleneck)
    except ValueError as error:
        raise InputError("config.bottleneck", config.bottleneck, str(error)) from None
    if bottleneck is not None and bottleneck.channels > _LARGEST:
        allowed = f"1 to {_LARGEST} channels are needed"
        raise InputError("config.bottleneck", config.bottleneck, allowed)


def _check_clients(config: Config, info: DatasetInfo) -> None:
    held = config.images_per_client
    if held is None:
        check_clients(config.num_clients, info.num_train)
    if held is not None and held > info.num_train:
        raise InputError(
            "config.images_per_client",
            held,
            f"the train split has {info.num_train} images",
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
    if classes is not None and held is None:
        check_shards(config.num_clients, classes, info.num_train)


def _check_cohort(config: Config, holders: int) -> None:
    size, clients = config.cohort_size, config.num_clients
    if size > clients:
        raise InputError("config.cohort_size", size, f"at most config.num_clients: 1 to {clients}")
    if size > holders:
        allowed = f"only {holders} of the {clients} clients have images: 1 to {holders}"
        raise InputError("config.cohort_size", size, allowed)


def _check_schedule(config: Config, given: Config) -> None:
    """Args: given: the config before its unset fields were filled."""
    steps = config.steps_per_round
    _check_round(config, given)
    if config.total_steps > _LARGEST:
        raise _too_many_steps(config, given)
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


def _check_round(config: Config, given: Config) -> None:
    """The images of a round, which are drawn at its start, are numbered in 32 bits."""
    cohort, batch, steps = config.cohort_size, config.batch_size, config.steps_per_round
    if cohort * batch > _LARGEST:
        allowed = f"with {cohort} clients a round, 1 to {_LARGEST // cohort}"
        raise InputError("config.batch_size", batch, allowed)
    if cohort * batch * steps <= _LARGEST:
        return
    if given.steps_per_round is None:
        allowed = f"with {steps} steps of {batch} images each, 1 to {_LARGEST // (steps * batch)}"
        raise InputError("config.cohort_size", cohort, allowed)
    allowed = f"with {cohort * batch} images a step, 1 to {_LARGEST // (cohort * batch)}"
    raise InputError("config.steps_per_round", steps, allowed)


def _too_many_steps(config: Config, given: Config) -> InputError:
    """Blames a field that was set: the rounds, or what their rule makes them from."""
    rounds, steps = config.rounds, config.steps_per_round
    if given.rounds is not None:
        allowed = f"fewer than 2**31 steps, {steps} a round: 1 to {_LARGEST // steps}"
        return InputError("config.rounds", rounds, allowed)
    allowed = f"{rounds} rounds of {steps} steps follow, and 2**31 - 1 steps are possible"
    return InputError("config.epochs", config.epochs, f"{allowed}: fewer, or set config.rounds")


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


def _check_scale(config: Config) -> None:
    """Which ways of carrying out a run its method allows."""
    stateless = config.client_state == "stateless"
    if stateless and not config.align_momentum:
        raise InputError(
            "config.client_state",
            config.client_state,
            "a client's own momentum model would be lost: set config.align_momentum",
        )
    if stateless and not config.feature_sharing:
        raise InputError(
            "config.client_state",
            config.client_state,
            "a client's private queue would be lost: persistent, or set config.feature_sharing",
        )
    chunks = config.cohort_chunks or 1
    if chunks > config.cohort_size:
        raise InputError(
            "config.cohort_chunks",
            chunks,
            f"at most one client a chunk: 1 to {config.cohort_size}",
        )
    if chunks > 1 and HEADS[config.head].batch_norm:
        raise InputError(
            "config.cohort_chunks",
            chunks,
            f"1 is needed with head {config.head}, whose BatchNorm sees all rows at once",
        )
