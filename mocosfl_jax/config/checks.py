"""What must hold of the fields that all methods share, alone and together."""

import dataclasses

from mocosfl_jax.config.fields import METHOD_FIELDS, Config, Resolved
from mocosfl_jax.config.network import network_of
from mocosfl_jax.config.ranges import LARGEST, check_ranges
from mocosfl_jax.config.recipe import find_recipe
from mocosfl_jax.config.rich import blocks_of, check_cohort, check_data, check_section, rich_of
from mocosfl_jax.data import partition
from mocosfl_jax.data.dataset import DatasetInfo
from mocosfl_jax.errors import InputError
from mocosfl_jax.models.backbones import check_network, latent_shape
from mocosfl_jax.models.bottleneck import parse_bottleneck
from mocosfl_jax.models.contract import NetworkError


def check_fields(config: Config) -> None:
    """Every check that needs neither data nor rules; unset fields pass.

    Args: config: from `check_types`.
    Raises: InputError: a value that is impossible whatever the data set is.
    """
    _check_read(config)
    check_ranges(config)
    for name, section in config.sections.items():
        check_ranges(section, f"config.{name}.")
    _check_network(config)
    _check_companions(config)
    check_section(config)
    if config.classes_per_client is not None and config.dirichlet_alpha is not None:
        raise InputError(
            "config.dirichlet_alpha",
            config.dirichlet_alpha,
            "set this or config.classes_per_client, not both",
        )


def check_clients(config: Config, info: DatasetInfo) -> None:
    """Whether the data set can be dealt to the clients, as far as its facts tell.

    Args: config: passes `check_fields`. info: of its data set.
    Raises: InputError.
    """
    held = config.images_per_client
    if held is None:
        partition.check_clients(config.num_clients, info.num_train)
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
                f"config.{name}", value, "images without labels can only be IID: leave it unset"
            )
    classes = config.classes_per_client
    if classes is not None and info.num_classes is not None and classes > info.num_classes:
        raise InputError(
            "config.classes_per_client", classes, f"the data set has {info.num_classes} classes"
        )
    if 0 < info.num_mixed < config.num_clients:
        few = f"{info.num_mixed} images are too few for {config.num_clients} clients"
        raise InputError("config.mix_fraction", config.mix_fraction, few)
    if classes is not None and held is None:
        partition.check_shards(config.num_clients, classes, info.num_train)
    check_data(config, info)


def check_resolved(config: Resolved, given: Config, holders: int) -> None:
    """The fields that all methods share, together.

    Args:
      given: the config before its unset fields were filled.
      holders: clients that have images.
    Raises: InputError: blames a field that was set, where one was.
    """
    _check_cohort(config, holders)
    check_cohort(config)
    _check_schedule(config, given)
    _check_images(config)


def _check_read(config: Config) -> None:
    """Raises: InputError: a field is set that the method does not read."""
    unread = METHOD_FIELDS - find_recipe(config.method).reads
    for name in sorted(unread):
        value = getattr(config, name)
        if value is not None:
            allowed = f"method {config.method!r} does not read it: leave it unset"
            raise InputError(f"config.{name}", value, allowed)


_MEANINGLESS_ALONE = {
    "mix_fraction": "mix_dataset",
    "mix_batch_size": "mix_dataset",
    "init_parts": "init_from",
    "init_digest": "init_from",
}
"""Fields that say more of another one, which must then be set."""


def _check_companions(config: Config) -> None:
    """Raises: InputError: a field is set that only counts with another one, which is unset or 0."""
    if config.semi_supervised and not config.probe_epochs:
        allowed = "config.probe_epochs is 0, which skips all probes: set it, or unset this"
        raise InputError("config.semi_supervised", config.semi_supervised, allowed)
    defaults = {field.name: field.default for field in dataclasses.fields(Config)}
    for name, other in _MEANINGLESS_ALONE.items():
        value = getattr(config, name)
        if value != defaults[name] and getattr(config, other) is None:
            allowed = f"config.{other} is unset: set it, or unset this"
            raise InputError(f"config.{name}", value, allowed)


def _check_network(config: Config) -> None:
    """The backbone, cut and bottleneck; unset fields pass."""
    try:
        check_network(network_of(config), 1 if config.cut is None else config.cut)
    except NetworkError as error:
        value = getattr(config, error.field)
        raise InputError(f"config.{error.field}", value, error.allowed) from None
    try:
        bottleneck = parse_bottleneck(config.bottleneck or "none")
    except ValueError as error:
        raise InputError("config.bottleneck", config.bottleneck, str(error)) from None
    if bottleneck is not None and bottleneck.channels > LARGEST:
        allowed = f"1 to {LARGEST} channels are needed"
        raise InputError("config.bottleneck", config.bottleneck, allowed)


def _check_cohort(config: Resolved, holders: int) -> None:
    size, clients = config.cohort_size, config.num_clients
    if size > clients:
        raise InputError("config.cohort_size", size, f"at most config.num_clients: 1 to {clients}")
    if size > holders:
        allowed = f"only {holders} of the {clients} clients have images: 1 to {holders}"
        raise InputError("config.cohort_size", size, allowed)
    if (config.cohort_chunks or 1) > size:
        allowed = f"at most one client a chunk: 1 to {size}"
        raise InputError("config.cohort_chunks", config.cohort_chunks, allowed)


def _check_schedule(config: Resolved, given: Config) -> None:
    """Args: given: the config before its unset fields were filled."""
    steps = config.steps_per_round
    _check_round(config, given)
    if config.total_steps > LARGEST:
        raise _too_many_steps(config, given)
    syncs = config.syncs_per_round or 1
    if syncs > steps:
        raise InputError("config.syncs_per_round", syncs, f"at most one a step: 1 to {steps}")
    if steps % config.steps_per_dispatch:
        raise InputError(
            "config.steps_per_dispatch",
            config.steps_per_dispatch,
            f"a divisor of config.steps_per_round = {steps} is needed",
        )


def _check_round(config: Resolved, given: Config) -> None:
    """The images of a round, which are drawn at its start, are numbered in 32 bits."""
    cohort, batch, steps = blocks_of(config), config.images_a_step, config.steps_per_round
    rich = rich_of(config)
    if rich is not None and cohort * batch > LARGEST >= config.cohort_size * batch:
        allowed = f"at most {LARGEST} images a step: a smaller one"
        raise InputError("config.rich.batch_factor", rich.batch_factor, allowed)
    if cohort * batch > LARGEST:
        name = "batch_size" if config.batch_size * 2 >= batch else "mix_batch_size"
        allowed = f"with {cohort} clients a round, 1 to {LARGEST // cohort} images each a step"
        raise InputError(f"config.{name}", getattr(config, name), allowed)
    if cohort * batch * steps <= LARGEST:
        return
    most = LARGEST * config.local_epochs // (cohort * batch * steps)
    if given.steps_per_round is None and most >= 1:
        allowed = f"with {cohort * batch * steps} images a round, 1 to {most}"
        raise InputError("config.local_epochs", config.local_epochs, allowed)
    if given.steps_per_round is None:
        allowed = f"with {steps} steps of {batch} images each, 1 to {LARGEST // (steps * batch)}"
        raise InputError("config.cohort_size", cohort, allowed)
    allowed = f"with {cohort * batch} images a step, 1 to {LARGEST // (cohort * batch)}"
    raise InputError("config.steps_per_round", steps, allowed)


def _too_many_steps(config: Resolved, given: Config) -> InputError:
    """Blames a field that was set: the rounds, or what their rule makes them from."""
    rounds, steps = config.rounds, config.steps_per_round
    if given.rounds is not None:
        allowed = f"fewer than 2**31 steps, {steps} a round: 1 to {LARGEST // steps}"
        return InputError("config.rounds", rounds, allowed)
    length = "1 step" if steps == 1 else f"{steps} steps"
    allowed = f"{rounds} rounds of {length} follow, and 2**31 - 1 steps are possible"
    return InputError("config.epochs", config.epochs, f"{allowed}: fewer, or set config.rounds")


def _check_images(config: Resolved) -> None:
    """What depends on the size of images: the blur's reflect padding, and the bottleneck."""
    if config.blur_kernel_size >= 2 * config.image_size:
        raise InputError(
            "config.blur_kernel_size",
            config.blur_kernel_size,
            f"below twice config.image_size = {config.image_size} is needed",
        )
    shape = parse_bottleneck(config.bottleneck)
    if shape is None:
        return
    size, *_ = latent_shape(network_of(config), config.image_size, config.cut)
    if size % shape.stride:
        raise InputError(
            "config.bottleneck",
            config.bottleneck,
            f"latents at cut {config.cut} are {size} pixels wide, no multiple of {shape.stride}",
        )
