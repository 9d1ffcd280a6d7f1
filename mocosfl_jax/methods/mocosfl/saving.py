"""Loss-based saving: which status a round has, and the latents that a round in C trains on.

All of it is state, so that a resumed run and every process decide alike (docs/method.md).
"""

from dataclasses import dataclass
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from mocosfl_jax.federated.contract import Batch, Status
from mocosfl_jax.learning.ema import ema_update
from mocosfl_jax.methods.mocosfl.messages import ClientModel, Latents
from mocosfl_jax.randomness import Stream, device_key

STATUSES = (
    Status("A", "full rounds"),
    Status("B", "latents up, no gradients down"),
    Status("C", "nothing is sent"),
)
FULL, LATENTS_ONLY, SILENT = range(3)
"""Indices of these."""


@dataclass(frozen=True)
class Saving:
    """What decides on a round, fixed for a run; hashable.

    threshold: fall of the mean loss below which the next round sends less. warmup: rounds at the
    start whose loss changes no status. steps: of a round. images: shape of those of one client in
    a step, (B, S, S, 3). seed: of the order of steps in C.
    hands_out: whether those who take part in a round in B must be sent the client model first, as
    the last sync may have been another cohort's.
    """

    threshold: float
    warmup: int
    steps: int
    images: tuple[int, ...]
    seed: int
    hands_out: bool = False


class SavingState(flax.struct.PyTreeNode):
    """Of the server; () each.

    status: int32, index of the round under way, of the next one between rounds. round: int32,
    rounds that have ended. step: int32, steps taken in the round under way. loss: float32, the sum
    of the mean losses of these steps. last_loss: float32, the mean loss of the round before; 0
    before there is one.
    """

    status: jax.Array
    round: jax.Array
    step: jax.Array
    loss: jax.Array
    last_loss: jax.Array


class StoredLatents(NamedTuple):
    """What a slot's client sent in each step of the last round in A or B.

    query, key: (steps, B', h, w, c), as `Latents`. mask: (steps, B) bool, images that count.
    """

    query: jax.Array
    key: jax.Array
    mask: jax.Array


def first_state() -> SavingState:
    """Before the first step."""
    none, nothing = jnp.zeros((), jnp.int32), jnp.zeros(())
    return SavingState(none, none, none, nothing, nothing)


def after_step(saving: Saving, state: SavingState, loss: jax.Array) -> SavingState:
    """Takes note of a step, and decides on the next round where it is the last of one.

    Args: loss: () float32, mean over the rows of the step, the same on every device.
    """
    step, total = state.step + 1, state.loss + loss
    mean, none = total / saving.steps, jnp.zeros((), jnp.int32)
    after = SavingState(
        status=_next_status(saving, state, mean),
        round=state.round + 1,
        step=none,
        loss=jnp.zeros(()),
        last_loss=mean,
    )
    within = state.replace(step=step, loss=total)
    return jax.tree.map(lambda x, y: jnp.where(step == saving.steps, x, y), after, within)


def _next_status(saving: Saving, state: SavingState, mean: jax.Array) -> jax.Array:
    """Index of the status after a round. mean: its mean loss. state: before its last step."""
    compared = state.round + 1 > max(saving.warmup, 1)  # the first has none to be compared with
    saves = compared & (state.last_loss - mean < saving.threshold)
    return jnp.where(saves, jnp.minimum(state.status + 1, SILENT), FULL).astype(jnp.int32)


def store(
    stored_C: StoredLatents, step: jax.Array, latents_C: Latents, mask_CB: jax.Array
) -> StoredLatents:
    """The stored latents with those of one step. step: () int32, its number in the round."""
    new = StoredLatents(latents_C.query, latents_C.key, mask_CB)
    return jax.tree.map(lambda all_CS, one_C: all_CS.at[:, step].set(one_C), stored_C, new)


def replay(
    saving: Saving, state: SavingState, stored_C: StoredLatents, batch: Batch, rows: int
) -> tuple[Batch, Latents]:
    """The step of a round in C: a stored one, each once a round and in random order.

    Args: rows: latents that a client sends for an image and view.
    Returns: the batch with that step's mask and without images; the latents (C, B', ...).
    """
    step = order(saving, state.round)[state.step]
    query, key, mask = jax.tree.map(lambda all_CS: all_CS[:, step], stored_C)
    latents = Latents(query, key, jnp.concatenate([mask] * rows, axis=1))
    return batch._replace(views=(), mask=mask), latents


def moved(common: ClientModel, ema: float) -> ClientModel:
    """What clients have in common after a step in B.

    Between syncs all aligned key encoders move towards models that stay, and so alike: a client
    that joins later, or keeps nothing, gets the one that it would have had.
    """
    if common.key_params is None:
        return common
    return ClientModel(common.params, ema_update(common.key_params, common.params, ema))


def order(saving: Saving, round_: jax.Array) -> jax.Array:
    """The stored steps in the order in which a round in C takes them, (steps,) int32."""
    key = jax.random.fold_in(device_key(saving.seed, Stream.SAVING), round_)
    return jax.random.permutation(key, saving.steps)
