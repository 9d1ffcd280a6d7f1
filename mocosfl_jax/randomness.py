"""Randomness derived from integers: nothing is stored, so any round can be replayed alone.

Every draw of a run is a function of (seed, stream, further ids such as round, step or client).
On the host that is a NumPy generator, on the device a typed JAX key.
"""

import enum

import jax
import numpy as np

from mocosfl_jax.errors import InputError

MAX_SEED = 2**32 - 1


class Stream(enum.IntEnum):
    """What randomness is for. The numbers are part of every result: never renumber them."""

    PARTITION = 0  # images to clients
    COHORT = 1  # clients of a round
    ORDER = 2  # a client's images in a round
    AUGMENT = 3  # the two views
    INIT = 4  # parameters
    STATE = 5  # what is random at the start but no parameter, such as rows of a queue
    SPLIT = 6  # hold-out of a data set without a test split
    PROBE = 7  # heads and batches of the probes
    DATASET = 8  # pixels of the synthetic data set
    METHOD = 9  # what a method draws in a step
    MIXTURE = 10  # images of a second data set that are mixed in
    MIXTURE_ORDER = 11  # a client's images of a second data set in a round
    ATTACK = 12  # auxiliary images, decoder and noise of an attack
    RELEASE = 13  # what defences draw in evaluation
    SAVING = 14  # the order of stored steps in a round that sends nothing


def host_rng(seed: int, stream: Stream, *ids: int) -> np.random.Generator:
    """Returns the generator of one purpose.

    Distinct arguments give distinct entropy: `(1, s)` and `(1, s, 0)` differ too, which
    `np.random.SeedSequence` alone does not promise, as it pads short entropy with zeros.

    Args:
        seed: of the run, from 0 to 2**32 - 1.
        stream: the purpose.
        *ids: further coordinates from 0 to 2**64 - 1, such as (round, client).

    Raises:
        InputError: the seed is out of range.
    """
    words = [_checked(seed), int(stream), len(ids)]
    for value in ids:
        high, low = divmod(int(value), 2**32)
        words += [low, high]
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(words)))


def device_key(seed: int, stream: Stream) -> jax.Array:
    """Returns the typed key (scalar, `jax.random.key`) of one purpose; fold in further ids.

    Args:
        seed: of the run, from 0 to 2**32 - 1.
        stream: the purpose.

    Raises:
        InputError: the seed is out of range.
    """
    return jax.random.fold_in(jax.random.key(_checked(seed)), int(stream))


def _checked(seed: int) -> int:
    if not 0 <= seed <= MAX_SEED:
        raise InputError("config.seed", seed, f"an integer from 0 to {MAX_SEED}")
    return int(seed)
