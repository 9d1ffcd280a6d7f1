"""The client that is attacked, from a checkpoint of its run; the run may go on meanwhile."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from mocosfl_jax.config import Resolved
from mocosfl_jax.errors import InputError
from mocosfl_jax.federated.contract import Method, Tree
from mocosfl_jax.federated.placement import single_device
from mocosfl_jax.federated.state import TrainState
from mocosfl_jax.models.decoder import doublings
from mocosfl_jax.run.checkpoint import Identity, Restored, data_digest, find_newest, saved_steps
from mocosfl_jax.run.program import program_of
from mocosfl_jax.run.rounds import Rounds
from mocosfl_jax.run.workdir import Stored

_TRIES = 5
"""Reads of a folder whose checkpoints are replaced while they are read."""


class Victim(NamedTuple):
    """config: of the run. run: what tells it from others. step: of the checkpoint. client: whose
    state `participant` is, for `method.sent`. latent_shape: (h, w, c) of an image."""

    config: Resolved
    run: str
    step: int
    client: int
    method: Method
    participant: Tree
    latent_shape: tuple[int, ...]


def read_victim(workdir: Path, stored: Stored, step: int | None, client: int | None) -> Victim:
    """Restores one client as it is at a checkpoint.

    Args:
      stored: of `read_run`.
      step: of the checkpoint; None: the newest that is complete.
      client: its id; None: the first of the cohort in the middle of a round, else client 0.
    Raises: InputError: no such checkpoint or client, or latents that no decoder can invert.
    """
    config = stored.config
    assert isinstance(config, Resolved), "of read_run"
    identity = Identity(config, data_digest(stored.data or {}))
    program = program_of(config)
    rounds = Rounds(config, single_device(), program)
    restored = _restore(workdir / "checkpoints", rounds.abstract_unpadded(), identity, step)
    method, state = program.method, restored.state
    cohort = [] if restored.step % config.steps_per_round == 0 else state.cohort_ids.tolist()
    if client is None:
        client = cohort[0] if cohort else 0
    if client >= config.num_clients:
        allowed = f"the run has {config.num_clients} clients, with ids from 0"
        raise InputError("--targets", f"client:{client}", allowed)
    participant = _participant(method, state, cohort, client)
    shape = _latent_shape(config, method, participant)
    return Victim(config, identity.digest, restored.step, client, method, participant, shape)


def _restore(folder: Path, shapes: Any, identity: Identity, step: int | None) -> Restored:
    """Raises: InputError: no checkpoint, none of this step, or none that can be used."""
    for _ in range(_TRIES):
        steps = saved_steps(folder)
        if not steps:
            raise InputError("--workdir", str(folder.parent), "no checkpoint lies there yet")
        if step is not None:
            check_saved(step, steps)
        found = find_newest(folder, shapes, identity, only=step)
        if found.restored is not None:
            return found.restored
        if saved_steps(folder) == steps:
            break
    reasons = "; ".join(f"{step}: {why}" for step, why in found.bad.items())
    raise InputError(str(folder), sorted(found.bad), f"none can be used ({reasons})")


def check_saved(step: int, steps: Sequence[int]) -> None:
    """Raises: InputError: there is no checkpoint of the step. Args: steps: of those there are."""
    if step not in steps:
        allowed = f"one of the saved steps {', '.join(map(str, sorted(steps)))} is needed"
        raise InputError("--step", step, allowed)


def _participant(method: Method, state: TrainState, cohort: list[int], client: int) -> Tree:
    """A client in the middle of a round, or as it would start the next one."""
    if client in cohort:
        return _row(state.cohort, cohort.index(client))
    return method.join(state.server, _row(state.population, client))


def _row(tree: Tree, index: int) -> Tree:
    return jax.tree.map(lambda x: np.asarray(x[index]), tree)


def _latent_shape(config: Resolved, method: Method, participant: Tree) -> tuple[int, ...]:
    """Raises: InputError: the method sends no latents, or no decoder can invert them."""
    size = config.image_size
    image = jax.ShapeDtypeStruct((1, size, size, 3), np.float32)
    latents = jax.eval_shape(method.sent, participant, image, jax.random.key(0))
    if latents is None:
        allowed = "its clients send no latents: there is nothing to attack"
        raise InputError("config.method", config.method, allowed)
    shape = latents.shape[1:]
    if len(shape) != 3 or shape[0] != shape[1]:
        raise InputError("config.method", config.method, f"its latents {shape} are no square maps")
    try:
        doublings(shape[0], size)
    except ValueError as error:
        raise InputError("config.cut", config.cut, str(error)) from None
    return tuple(shape)
