"""Clients of unequal resources: some hold more data and take larger batches; off by default."""

from dataclasses import dataclass
from typing import Annotated

from mocosfl_jax.config.fields import Config
from mocosfl_jax.config.ranges import FROM_0_BELOW_1, FROM_1
from mocosfl_jax.data.cohort import Draw
from mocosfl_jax.data.dataset import DatasetInfo
from mocosfl_jax.data.partition import RichShare, check_rich_share
from mocosfl_jax.errors import InputError
from mocosfl_jax.federated.slots import Group


@dataclass(frozen=True)
class Rich:
    """The fields `config.rich.NAME`; `C_D|F` in the scripts of the paper, 0.2_0.8|16 for example.

    Rich clients have the first ids. Each round draws as many of them as is their share of all.
    """

    # Share of the clients that are rich, in (0, 1), rounded to whole clients. 0: off.
    clients: Annotated[float, FROM_0_BELOW_1] = 0.0
    # Share of the training images that these hold together, in (0, 1), each as many as the others
    # of them, to within one. The other clients hold the rest alike.
    data: Annotated[float, FROM_0_BELOW_1] = 0.0
    # F, how many times as many images as another client a rich one takes a step.
    batch_factor: Annotated[int, FROM_1] = 1


def rich_of(config: Config) -> Rich | None:
    """The section; None: all clients are alike."""
    section = config.section_or_default(Rich)
    return section if section.clients else None


def rich_share(config: Config) -> RichShare | None:
    """The rich clients' number and their part of the data; None: there are none."""
    rich = rich_of(config)
    if rich is None:
        return None
    return RichShare(round(rich.clients * config.num_clients), rich.data)


def draw_of(config: Config) -> Draw:
    """How many clients of either kind a round draws. Args: config: its cohort_size is filled."""
    share = rich_share(config)
    if share is None:
        return Draw(config.cohort_size)
    rich = round(config.cohort_size * share.clients / config.num_clients)
    return Draw(config.cohort_size, rich, share.clients)


def groups_of(config: Config) -> tuple[Group, ...]:
    """The slots of a cohort by the size of their batches, the largest first. Args: as above."""
    rich, draw = rich_of(config), draw_of(config)
    if rich is None or rich.batch_factor == 1:
        return (Group(draw.clients),)
    return Group(draw.rich, rich.batch_factor), Group(draw.clients - draw.rich)


def blocks_of(config: Config) -> int:
    """Batches of `batch_size` that a step of the cohort has: C, where all clients are alike."""
    return sum(group.clients * group.blocks for group in groups_of(config))


def all_blocks(config: Config) -> int:
    """The same of all N clients."""
    rich, share = rich_of(config), rich_share(config)
    if rich is None or share is None:
        return config.num_clients
    return config.num_clients + share.clients * (rich.batch_factor - 1)


# ------------------------------------------------------------------------------------------ checks


def check_section(config: Config) -> None:
    """Raises: InputError: fields of the section that say nothing, or contradict each other."""
    rich, share = config.section_or_default(Rich), rich_share(config)
    if share is None:
        for name, value, off in (
            ("data", rich.data, 0.0),
            ("batch_factor", rich.batch_factor, 1),
        ):
            if value != off:
                allowed = "config.rich.clients is 0, so no client is rich: set it, or unset this"
                raise InputError(f"config.rich.{name}", value, allowed)
        return
    if not 0 < share.clients < config.num_clients:
        kind = "no client is rich" if share.clients == 0 else "all are rich"
        allowed = f"of {config.num_clients} clients {kind}: clients of both kinds are needed"
        raise InputError("config.rich.clients", rich.clients, allowed)
    if not rich.data:
        allowed = "rich clients without images: a number in (0, 1) is needed"
        raise InputError("config.rich.data", rich.data, allowed)
    if config.images_per_client is not None:
        allowed = "with config.images_per_client all clients hold as many images: unset either"
        raise InputError("config.rich.clients", rich.clients, allowed)


def check_data(config: Config, info: DatasetInfo) -> None:
    """Raises: InputError: a client would have no images, or too few for its classes."""
    share = rich_share(config)
    if share is not None:
        check_rich_share(share, info.num_train, config.num_clients, config.classes_per_client or 1)


def check_cohort(config: Config) -> None:
    """Raises: InputError: a cohort without clients of both kinds, or in too many chunks.

    Args: config: its cohort_size is filled.
    """
    share, draw = rich_share(config), draw_of(config)
    if share is None:
        return
    fewer = min(draw.rich, draw.clients - draw.rich)
    if fewer == 0:
        kind = "rich" if draw.rich == 0 else "other"
        allowed = f"{share.clients} of {config.num_clients} clients are rich, and a round would"
        allowed += f" draw no {kind} one: a larger cohort is needed"
        raise InputError("config.cohort_size", config.cohort_size, allowed)
    if (config.cohort_chunks or 1) > fewer:
        allowed = f"at least one client of either kind a chunk: 1 to {fewer}"
        raise InputError("config.cohort_chunks", config.cohort_chunks, allowed)
