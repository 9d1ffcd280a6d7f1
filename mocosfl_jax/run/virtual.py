"""Two virtual devices for a run, or an attack, on a CPU.

XLA runs the operations of a program one after the other, and many leave a core idle. Two devices,
with half of the clients each, share the same cores and fill them: a step of ResNet-18 takes three
quarters of the time (docs/results/step.md). An attack spreads the images of a batch.
"""

import dataclasses
import os

import jax

from mocosfl_jax.config import Config, Resolved
from mocosfl_jax.config.rich import groups_of
from mocosfl_jax.federated.slots import Slots
from mocosfl_jax.run.workdir import Stored

_FLAG = "xla_force_host_platform_device_count"


def offer_devices(config: Config, stored: Stored | None) -> bool:
    """Sets how many devices a CPU will have for a run, before anything starts JAX.

    Args: config: unresolved. stored: the run that goes on, or None.
    Returns: as `use_virtual_devices`.
    """
    return use_virtual_devices(config.devices or _stored_devices(stored) or 2)


def with_devices(config: Resolved, stored: Stored | None) -> Resolved:
    """The config with the number of devices that suits a run on a CPU, where it sets none.

    Starts JAX. Args: as `offer_devices`, which has set a number; config: resolved.
    """
    if config.devices or jax.default_backend() != "cpu":
        return config
    suitable = _stored_devices(stored) or _suitable(config)
    return dataclasses.replace(config, devices=min(suitable, jax.device_count()))


def use_virtual_devices(number: int) -> bool:
    """Makes JAX start with so many devices on a CPU, at most one a core.

    Returns: False where nothing changes: JAX has started, several processes take part, or the
      environment gives a number (XLA_FLAGS or JAX_NUM_CPU_DEVICES).
    """
    given = "JAX_NUM_CPU_DEVICES" in os.environ or _FLAG in os.environ.get("XLA_FLAGS", "")
    if given or jax.distributed.is_initialized():
        return False
    try:
        jax.config.update("jax_num_cpu_devices", min(number, _cores()))
    except RuntimeError:  # JAX has started
        return False
    return True


def _stored_devices(stored: Stored | None) -> int | None:
    """Those that a run started with; one, where its config does not say."""
    return None if stored is None else stored.config.devices or 1


def _suitable(config: Resolved) -> int:
    """Two, unless they would have more slots together than one device has."""
    chunks = config.cohort_chunks or 1
    one, two = (Slots(groups_of(config), devices * chunks).number for devices in (1, 2))
    return 2 if one == two else 1


def _cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
