"""Hardness of negatives by the age of their keys (MocoSFL, section 4.3, equation 2).

The paper's heuristic: a step writes b keys, whose mean similarity to a query is eta * gamma^i when
they are i steps old. The hardness of a queue is the sum of the similarities of its keys.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mocosfl_jax.learning.queue import Queue


def similarity_by_age(
    queries_GD: jax.Array, rows_G: jax.Array, queues_G: Queue, ages: int
) -> tuple[jax.Array, jax.Array]:
    """Similarities of queries and keys, added up by the age of the key.

    Args:
      queries_GD: sums of the unit queries that meet each of G queues, float32.
      rows_G: how many each is the sum of, float32.
      queues_G: with `age`, (G, K).
      ages: A; keys that are older, or whose age is 0, are left out.
    Returns: the sums for the ages 1 to A, and how many pairs they add up, (A,) float32 each.
    """
    assert queues_G.age is not None, "a queue with ages"
    # Summed in full float32: a backend's short products would blur small similarities.
    similarity_GK = jnp.einsum(
        "gd,gkd->gk", queries_GD, queues_G.keys, precision=jax.lax.Precision.HIGHEST
    )
    of_age_AGK = queues_G.age[None] == jnp.arange(1, ages + 1).reshape(-1, 1, 1)
    total_A = jnp.sum(jnp.where(of_age_AGK, similarity_GK[None], 0.0), axis=(1, 2))
    keys_AG = jnp.sum(of_age_AGK, axis=2, dtype=jnp.float32)
    return total_A, jnp.sum(keys_AG * rows_G[None], axis=1)


class Decay(NamedTuple):
    """eta: similarity at age 0, extrapolated. gamma: what is left of it after a step, in [0, 1]."""

    eta: float
    gamma: float

    def similarity(self, age: np.ndarray) -> np.ndarray:
        """eta * gamma^age."""
        return np.asarray(self.eta * np.power(self.gamma, age))

    def hardness(self, keys: int, first: int, last: int) -> float:
        """Sum over the ages first to last of keys * eta * gamma^age, in closed form.

        Equation 2 has first = 1. Args: keys: b, that a step writes.
        """
        count = last - first + 1
        if self.gamma == 1:
            return keys * self.eta * count
        power = self.gamma**first
        return keys * self.eta * power * (1 - self.gamma**count) / (1 - self.gamma)


def fit_decay(similarity: np.ndarray) -> Decay:
    """eta and gamma by least squares over the similarities at the ages 1, 2, ...

    For each gamma the best eta has a closed form, and gamma is searched for on ever finer grids.
    Similarities may be negative.

    Args: similarity: (n,), n at least 2.
    Raises: ValueError: fewer than two ages, which would not determine both.
    """
    values = np.asarray(similarity, np.float64)
    if len(values) < 2:
        raise ValueError(f"{len(values)} ages: at least 2 are needed for eta and gamma")
    age = np.arange(1, len(values) + 1)

    def best_eta(gamma: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The best eta for each gamma, and the squared error that is left."""
        powers = gamma[:, None] ** age
        squares = (powers**2).sum(axis=1)
        eta = powers @ values / np.where(squares > 0, squares, 1)
        return eta, ((values - eta[:, None] * powers) ** 2).sum(axis=1)

    low, high = 0.0, 1.0
    for _ in range(8):  # each grid is 50 times as fine as the one before
        gamma = np.linspace(low, high, 101)
        eta, error = best_eta(gamma)
        best = int(error.argmin())
        low, high = gamma[max(best - 1, 0)], gamma[min(best + 1, 100)]
    return Decay(float(eta[best]), float(gamma[best]))


class Extrapolation(NamedTuple):
    """What the young keys say of the old ones.

    fitted: ages that eta and gamma were fitted on, the youngest third. predicted, measured: the
    hardness of all older ages, equation 2 and its sum of similarities.
    """

    decay: Decay
    fitted: int
    predicted: float
    measured: float


def extrapolate(similarity: np.ndarray, keys: int) -> Extrapolation:
    """Fits the youngest third of the ages, at least two, and predicts the rest.

    Args: similarity: (A,), mean by age, 1 first. keys: b, that a step writes.
    Raises: ValueError: fewer than three ages.
    """
    ages = len(similarity)
    if ages < 3:
        raise ValueError(f"{ages} ages: at least 3 are needed, two to fit and one to predict")
    fitted = max(2, ages // 3)
    decay = fit_decay(similarity[:fitted])
    predicted = decay.hardness(keys, fitted + 1, ages)
    return Extrapolation(decay, fitted, predicted, float(keys * np.sum(similarity[fitted:])))
