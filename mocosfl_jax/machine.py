"""What this machine has, and what runs on it."""

import importlib.metadata
import os
import platform
import resource
import sys

import jax

from mocosfl_jax import __version__


def machine_memory_bytes() -> int:
    """Main memory of the machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def device_memory_bytes(devices: int) -> int:
    """Of a device where it reports it, else an equal part of the machine's.

    Args: devices: of this process, that are in use.
    """
    stats = jax.local_devices()[0].memory_stats() or {}
    return int(stats.get("bytes_limit", machine_memory_bytes() // devices))


def peak_memory_bytes() -> int:
    """Of the device where it reports it, else the resident size of this process."""
    stats = jax.local_devices()[0].memory_stats() or {}
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    unit = 1 if sys.platform == "darwin" else 1024
    return int(stats.get("peak_bytes_in_use", resident * unit))


def versions() -> dict[str, str]:
    """Of this package, of what it computes with, and of Python."""
    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    return {
        "mocosfl_jax": __version__,
        **{name: importlib.metadata.version(name) for name in names},
        "python": platform.python_version(),
    }
