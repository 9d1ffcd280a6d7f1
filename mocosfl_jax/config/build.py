"""From a resolved config to the objects of a run."""

import dataclasses

import jax
import numpy as np
from numpy.typing import NDArray

from mocosfl_jax.config import Config
from mocosfl_jax.config.resolve import largest_divisor, resolve
from mocosfl_jax.data.augment import AugmentConfig
from mocosfl_jax.data.dataset import Prepared
from mocosfl_jax.data.partition import ClientImages, SharedImages, by_classes, dirichlet, iid
from mocosfl_jax.data.sources import Options
from mocosfl_jax.federated.axes import NO_MESH, Axes
from mocosfl_jax.federated.dispatch import Program, rate_schedule
from mocosfl_jax.federated.state import TrainState, create_state
from mocosfl_jax.learning.queue import init_private_queues, init_queue
from mocosfl_jax.learning.sgd import sgd
from mocosfl_jax.methods.mocosfl.step import Method
from mocosfl_jax.models.heads import HEADS
from mocosfl_jax.models.resnet import STEMS
from mocosfl_jax.models.split import SplitModel, build_model
from mocosfl_jax.randomness import Stream, device_key

CPU_PART = 25_000_000
"""Images of a part, times (width x side of the first features)^2, that a CPU runs at full speed:
more leave the cache and fault pages, fewer leave threads idle (docs/results/step.md)."""


def model_of(config: Config, row_axes: tuple[str, ...] = ()) -> SplitModel:
    """The split network; `row_axes`: mesh axes over which server rows are spread."""
    return build_model(
        backbone=config.backbone,
        blocks_per_stage=config.blocks_per_stage,
        width=config.width,
        stem=config.stem,
        cut=config.cut,
        bottleneck=config.bottleneck_shape,
        head=config.head,
        head_width=config.head_width,
        image_size=config.image_size,
        compute_dtype=config.compute_dtype,
        row_axes=row_axes,
    )


def data_options(config: Config) -> Options:
    """How the data set of a config, resolved or not, is read."""
    return {
        "data_dir": config.data_dir,
        "train_split": config.train_split,
        "test_split": config.test_split,
        "image_size": config.image_size,
        "holdout_fraction": config.holdout_fraction,
        "seed": config.seed,
    }


def program_of(config: Config, axes: Axes = NO_MESH, devices: int = 1) -> Program:
    """What a dispatch computes on a mesh of so many `devices` with these `axes`."""
    method = Method(
        model=model_of(config, axes.rows),
        optimizer=sgd(config.momentum, config.weight_decay),
        loss=config.loss,
        temperature=config.temperature,
        ema=config.ema,
        align_momentum=config.align_momentum,
        frozen_clients=config.client_learning_rate == 0,
        cohort_chunks=config.cohort_chunks or _cohort_chunks(config, devices),
        axes=axes,
    )
    augment = dataclasses.replace(
        AugmentConfig.for_version(config.augmentation, config.image_size),
        min_scale=config.crop_min_scale,
        blur_kernel_size=config.blur_kernel_size,
    )
    schedule = rate_schedule(config.schedule, config.total_steps)
    return Program(method, augment, config.learning_rate, config.client_learning_rate, schedule)


def _cohort_chunks(config: Config, devices: int) -> int:
    """Parts of a device's cohort that suit it; they divide its slots."""
    if jax.default_backend() != "cpu" or HEADS[config.head].batch_norm:
        return 1
    slots = -(-config.cohort_size // devices)
    side = -(-config.image_size // STEMS[config.stem].stride)
    parts = slots * config.batch_size * (config.width * side) ** 2 // CPU_PART
    return largest_divisor(slots, max(1, parts))


def initial_state(config: Config, method: Method) -> TrainState:
    """State before the first step, from the seed; pure."""
    variables = method.model.init(device_key(config.seed, Stream.INIT))
    key, length = device_key(config.seed, Stream.QUEUE), config.queue_length
    if config.feature_sharing:
        queue = init_queue(key, length, config.head_width)
    else:
        queue = init_private_queues(key, config.num_clients, length, config.head_width)
    return create_state(
        *variables,
        queue,
        optimizer=method.optimizer,
        num_clients=config.num_clients,
        cohort_size=config.cohort_size,
        feature_sharing=config.feature_sharing,
        align_momentum=config.align_momentum,
        stateless=config.client_state == "stateless",
    )


def deal(config: Config, prepared: Prepared) -> tuple[Config, ClientImages]:
    """Deals the images to the clients and fills the config, after all checks that need no pixels.

    Args:
      config: passed by `check_fields`, its unset fields not filled.
      prepared: the data set that it names.
    Returns: the resolved config, and who holds which images.
    Raises: InputError: as `partition_of` and `resolve`.
    """
    iid_only = config.classes_per_client is None and config.dirichlet_alpha is None
    labels = None if iid_only else prepared.train_labels()
    partition = partition_of(config, prepared.info.num_train, labels)
    return resolve(config, prepared.info, partition), partition


def partition_of(
    config: Config, num_images: int, labels: NDArray[np.integer] | None
) -> ClientImages:
    """Which client holds which training images; fields that a rule fills may be unset.

    Args:
      config: passed by `check_fields`.
      num_images: of the train split.
      labels: (num_images,) integers of the train split, or None.
    Raises: InputError: the data set cannot be dealt to the clients in this way.
    """
    if config.images_per_client is not None:
        return SharedImages(
            num_images=num_images,
            labels=labels,
            num_clients=config.num_clients,
            images_per_client=config.images_per_client,
            classes_per_client=config.classes_per_client,
            alpha=config.dirichlet_alpha,
            seed=config.seed,
        )
    if config.classes_per_client is not None:
        return by_classes(labels, config.num_clients, config.classes_per_client, config.seed)
    if config.dirichlet_alpha is not None:
        return dirichlet(labels, config.num_clients, config.dirichlet_alpha, config.seed)
    return iid(num_images, config.num_clients, config.seed)
