"""Averaging client models, against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mocosfl_jax.federated.average import average, hand_out
from tests.tiny_method import assert_equal, at

SLOTS = 3
SHAPES = {"conv": {"kernel": (2, 1, 4)}, "norm": {"scale": (4,), "scalar": ()}}


def tree(seed: int, *lead: int):
    rng = np.random.default_rng(seed)
    shape = lambda x: isinstance(x, tuple)  # noqa: E731
    return jax.tree.map(
        lambda s: jnp.asarray(rng.normal(size=(*lead, *s)), jnp.float32), SHAPES, is_leaf=shape
    )


def weighted(x: jax.Array, weights: list[float]) -> np.ndarray:
    """The mean over the first axis in float64."""
    x = np.asarray(x, np.float64)
    return sum(w * row for w, row in zip(weights, x, strict=True)) / sum(weights)


@pytest.mark.parametrize("weights", [[1, 1, 1], [7, 1, 4], [0, 5, 0], [3, 2, 0]])
def test_average_weighs_by_size(weights):
    start = tree(0, SLOTS)
    averaged = jax.jit(average)(start, jnp.asarray(weights, jnp.float32))
    for a, s in zip(jax.tree.leaves(averaged), jax.tree.leaves(start), strict=True):
        assert a.shape == s.shape[1:] and a.dtype == jnp.float32
        np.testing.assert_allclose(a, weighted(s, weights), rtol=1e-5, atol=1e-6)


def test_every_slot_is_handed_the_average():
    mean = tree(1)
    handed = hand_out(mean, tree(0, SLOTS))
    for slot in range(SLOTS):
        assert_equal(at(handed, slot), mean)


def test_a_padding_slot_does_not_enter_the_average():
    start, weights = tree(0, SLOTS), jnp.asarray([2.0, 1.0, 0.0])
    changed = jax.tree.map(lambda x: x.at[2].set(1e6), start)
    assert_equal(average(changed, weights), average(start, weights))


def test_no_backend_may_average_in_fewer_bits():
    lowered = jax.jit(average).lower(tree(0, SLOTS), jnp.ones(SLOTS)).as_text()
    products = [line for line in lowered.splitlines() if "dot_general" in line]
    assert len(products) == len(jax.tree.leaves(tree(0)))
    assert all("HIGHEST" in line and "DEFAULT" not in line for line in products)
