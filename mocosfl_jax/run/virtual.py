"""Two virtual devices for a run on a CPU.

XLA runs the operations of a program one after the other, and many leave a core idle. Two devices,
with half of the clients each, share the same cores and fill them: a step takes three quarters of
the time (docs/results/step.md).
"""

import dataclasses
import os

import jax

from mocosfl_jax.config import Resolved
from mocosfl_jax.config.rich import groups_of
from mocosfl_jax.federated.slots import Slots
from mocosfl_jax.run.workdir import Stored

_FLAG = "xla_force_host_platform_device_count"


def with_devices(config: Resolved, stored: Stored | None) -> Resolved:
    """Has JAX start with what suits a run, if that is on a CPU; the config with their number.

    Args: config: `devices` is what it asks for. stored: the run that goes on, on as many devices as
      it started with unless the config says otherwise.
    """
    if config.devices:
        use_virtual_devices(config.devices)
    elif use_virtual_devices(_suitable(config, stored)) and jax.default_backend() == "cpu":
        return dataclasses.replace(config, devices=jax.device_count())
    return config


def use_virtual_devices(number: int) -> bool:
    """Has JAX start with so many devices of the CPU, at most one a core.

    Returns: False where nothing changes: JAX has started, several processes take part, or the
      user's XLA_FLAGS give a number.
    """
    if jax.distributed.is_initialized() or _FLAG in os.environ.get("XLA_FLAGS", ""):
        return False
    try:
        jax.config.update("jax_num_cpu_devices", min(number, _cores()))
    except RuntimeError:  # JAX has started
        return False
    return True


def _suitable(config: Resolved, stored: Stored | None) -> int:
    """Two, unless one of them would have a slot more than it has clients."""
    if stored is not None:
        return stored.config.devices or 1
    slots = Slots(groups_of(config), parts=2)
    return 2 if slots.number == config.cohort_size else 1


def _cores() -> int:
    """That this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
