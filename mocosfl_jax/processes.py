"""What JAX is told before a run: the processes that run it together, where programs are cached."""

import os
import re
from pathlib import Path

import jax

from mocosfl_jax.errors import InputError


def initialize(
    multihost: bool, coordinator: str | None, num_processes: int | None, process_id: int | None
) -> None:
    """Joins the processes of a run; must come before any other use of JAX. No argument: alone.

    Args:
      multihost: everything from the environment: Slurm, Kubernetes, TPU pod or Open MPI.
      coordinator: host:port of process 0, reachable from all; the other two go with it.
      num_processes: of the run.
      process_id: of this one, from 0.
    Raises: InputError: an incomplete set of arguments, or no such environment.
    """
    explicit = {
        "--coordinator": coordinator,
        "--num_processes": num_processes,
        "--process_id": process_id,
    }
    missing = [name for name, value in explicit.items() if value is None]
    if len(missing) == len(explicit):
        if multihost:
            _from_environment()
        return
    if missing:
        given = next(name for name in explicit if name not in missing)
        raise InputError(missing[0], None, f"needed together with {given}")
    assert coordinator is not None and num_processes is not None and process_id is not None
    if not re.fullmatch(r".+:\d+", coordinator):
        raise InputError("--coordinator", coordinator, "HOST:PORT is needed")
    if not 0 <= process_id < num_processes:
        raise InputError("--process_id", process_id, f"from 0 to {num_processes - 1}")
    jax.distributed.initialize(coordinator, num_processes, process_id)


def _from_environment() -> None:
    try:
        jax.distributed.initialize()
    except ValueError as error:  # what JAX raises where it recognises no cluster
        raise InputError(
            "--multihost", True, f"no Slurm, Kubernetes, TPU or Open MPI environment: {error}"
        ) from None


def is_primary() -> bool:
    """Whether this process writes logs and files."""
    return jax.process_index() == 0


def use_compilation_cache(folder: str) -> None:
    """Keeps compiled programs in a folder, unless the environment names another one or it is
    `none`; one that cannot be written is left alone by JAX, with a warning."""
    if folder != "none" and "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(Path(folder).expanduser()))
