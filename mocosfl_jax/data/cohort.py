"""Who takes part in a round, and with which images: functions of (seed, round, client) alone."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mocosfl_jax.data.partition import ClientImages
from mocosfl_jax.errors import InputError
from mocosfl_jax.randomness import Stream, host_rng


class Draw(NamedTuple):
    """How many clients a round draws.

    clients: C. rich: of them, that are rich, the first ones of the cohort. rich_ids: ids below it
    are those of rich clients.
    """

    clients: int
    rich: int = 0
    rich_ids: int = 0


class CohortSampler:
    """Draws the cohort of any round among the clients that have images."""

    def __init__(self, partition: ClientImages, draw: int | Draw, seed: int):
        """Args: partition: of N clients; draw: C, or as many of either kind; seed: of the run.

        Raises: InputError: fewer clients, of all or of a kind, have images.
        """
        draw = draw if isinstance(draw, Draw) else Draw(draw)
        eligible = np.flatnonzero(partition.sizes).astype(np.int32)
        if not 1 <= draw.clients <= len(eligible):
            raise InputError(
                "config.cohort_size",
                draw.clients,
                f"from 1 to the clients that have images, {len(eligible)}",
            )
        self._rich, self._others = np.split(eligible, [np.searchsorted(eligible, draw.rich_ids)])
        for kind, ids, drawn in (
            ("rich", self._rich, draw.rich),
            ("other", self._others, draw.clients - draw.rich),
        ):
            if drawn > len(ids):
                allowed = f"{drawn} {kind} clients are drawn, and {len(ids)} have images: fewer"
                raise InputError("config.cohort_size", draw.clients, allowed)
        self._draw = draw
        self._seed = seed

    def draw(self, round_: int) -> NDArray[np.int32]:
        """The cohort of a round, (C,) int32 distinct client ids, rich clients first; in id order if
        all take part."""
        number = self._draw.clients - self._draw.rich
        others = draw_cohort(self._others, number, self._seed, round_)
        if not self._draw.rich:
            return others
        rich = draw_cohort(self._rich, self._draw.rich, self._seed, round_, _RICH)
        return np.concatenate([rich, others])


_RICH = 0
"""Coordinate of the stream that rich clients are drawn with."""


def draw_cohort(
    eligible_ids: NDArray[np.int32], cohort_size: int, seed: int, round_: int, *kind: int
) -> NDArray[np.int32]:
    """Draws clients without replacement, in O(cohort_size) for cohorts small beside N.

    Args:
        eligible_ids: clients that have images, in id order.
        cohort_size: C, at most their number.
        seed: of the run.
        round_: index of the round.
        kind: of the clients, a further coordinate of the stream.

    Returns: (C,) int32 in random order; all of `eligible_ids` as they are where C is their number.
    """
    if cohort_size == len(eligible_ids):
        return eligible_ids.copy()
    rng = host_rng(seed, Stream.COHORT, round_, *kind)
    return eligible_ids[rng.choice(len(eligible_ids), cohort_size, replace=False)]


def client_order(
    partition: ClientImages,
    client: int,
    round_: int,
    seed: int,
    batch_size: int,
    steps: int,
    stream: Stream = Stream.ORDER,
) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    """Images of one client in one round.

    A client with at least B images walks through a random permutation of them, starts a new one
    when it is through, and cuts the walk into batches of B, which may straddle two permutations. A
    client with fewer takes all of them each step, in a fresh order, padded with its first image.
    More steps extend the walk and do not change its start.

    Args:
        partition: who holds what.
        client: a client id that has images.
        round_: index of the round.
        seed: of the run.
        batch_size: B.
        steps: steps of the round.
        stream: of the order; `MIXTURE_ORDER` for a second data set.

    Returns:
        Image ids (steps, B) int32, and a mask (steps, B) that is False on padding.

    Raises:
        InputError: the client has no images.
    """
    images = partition.client(client)
    if not len(images):
        raise InputError("client", client, "a client without images cannot take part")
    taken = min(len(images), batch_size)
    walks = -(-steps * taken // len(images))
    rng = host_rng(seed, stream, round_, client)
    walk = rng.permuted(np.broadcast_to(images, (walks, len(images))), axis=1)
    ids = np.full((steps, batch_size), images[0], np.int32)
    ids[:, :taken] = walk.reshape(-1)[: steps * taken].reshape(steps, taken)
    mask = np.zeros((steps, batch_size), bool)
    mask[:, :taken] = True
    return ids, mask


def round_batches(
    partition: ClientImages,
    cohort: NDArray[np.int32],
    round_: int,
    seed: int,
    batch_size: int,
    steps: int,
    stream: Stream = Stream.ORDER,
) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    """`client_order` of every member of a cohort.

    Args:
        partition: who holds what.
        cohort: (C,) client ids that have images.
        round_: index of the round.
        seed: of the run.
        batch_size: B.
        steps: steps of the round.
        stream: as for `client_order`.

    Returns:
        Image ids (steps, C, B) int32 and their mask, bool, False on padding.
    """
    ids = np.empty((steps, len(cohort), batch_size), np.int32)
    mask = np.empty(ids.shape, bool)
    for slot, client in enumerate(cohort):
        ids[:, slot], mask[:, slot] = client_order(
            partition, int(client), round_, seed, batch_size, steps, stream
        )
    return ids, mask
