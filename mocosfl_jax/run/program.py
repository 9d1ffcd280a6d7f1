"""From a resolved config to what its dispatches compute."""

import dataclasses

from mocosfl_jax.config import Resolved
from mocosfl_jax.config.recipe import find_recipe
from mocosfl_jax.data.augment import AugmentConfig
from mocosfl_jax.data.dataset import DatasetInfo
from mocosfl_jax.errors import InputError
from mocosfl_jax.federated.axes import NO_MESH
from mocosfl_jax.federated.dispatch import Program
from mocosfl_jax.federated.placement import Placement
from mocosfl_jax.learning.schedule import rate_schedule


def program_of(config: Resolved, placement: Placement | None = None) -> Program:
    """What a dispatch computes on a mesh; None: on one device, without a mesh."""
    axes, devices = (placement.axes, placement.devices) if placement else (NO_MESH, 1)
    augment = dataclasses.replace(
        AugmentConfig.for_version(config.augmentation, config.image_size),
        min_scale=config.crop_min_scale,
        blur_kernel_size=config.blur_kernel_size,
    )
    recipe = find_recipe(config.method)
    hold = config.steps_per_round if recipe.rate_by_round else 1
    return Program(
        method=recipe.build(config, axes, devices),
        augment=augment,
        learning_rate=config.learning_rate,
        schedule=rate_schedule(config.schedule, config.total_steps, hold),
        total_steps=config.total_steps,
    )


def check_labels(config: Resolved, program: Program, info: DatasetInfo) -> None:
    """Raises: InputError: the method takes labels, and the data set, or a second one, has none.

    Args: config: of the program. info: of its data set.
    """
    if program.method.labels and not info.labelled:
        allowed = f"it takes labels, which the images of {config.dataset} do not have"
        raise InputError("config.method", config.method, allowed)
    if program.method.labels and config.mix_dataset is not None:
        allowed = f"labels of a second data set are not used, and {config.method!r} takes labels"
        raise InputError("config.mix_dataset", config.mix_dataset, allowed)
