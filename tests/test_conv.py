"""The convolution against JAX's own, its autodiff, and loops over clients."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from mocosfl_jax.models.conv import conv, conv_transpose2x

# width of kernel, stride, H, W, input channels, output channels
SHAPES = [
    (3, 1, 8, 6, 3, 5),
    (3, 1, 5, 4, 16, 16),
    (3, 2, 8, 6, 4, 3),
    (3, 2, 7, 5, 3, 16),
    (1, 1, 5, 6, 4, 2),
    (1, 2, 8, 6, 2, 3),
    (1, 2, 7, 5, 2, 3),
    (7, 1, 9, 8, 3, 2),
    (7, 2, 12, 9, 3, 4),
]


def reference(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    pad = (kernel.shape[0] // 2,) * 2
    return lax.conv_general_dilated(
        x, kernel, (stride, stride), [pad, pad], dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def arrays(shape: tuple[int, ...], batch: int = 3, lead: tuple[int, ...] = ()):
    k, stride, h, w, i, o = shape
    rng = np.random.default_rng(sum(shape))
    sizes = [
        (*lead, batch, h, w, i),
        (*lead, k, k, i, o),
        (*lead, batch, -(-h // stride), -(-w // stride), o),
    ]
    return [jnp.asarray(rng.normal(size=size), jnp.float32) for size in sizes]


def value_and_gradients(f: Callable, x: jax.Array, kernel: jax.Array, g: jax.Array, stride: int):
    out, pull = jax.vjp(lambda x, kernel: f(x, kernel, stride), x, kernel)
    return out, *pull(g)


def assert_close(actual, expected, tolerance: float = 1e-5) -> None:
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max())


@pytest.mark.parametrize("shape", SHAPES)
def test_value_and_gradients_are_those_of_autodiff(shape):
    x, kernel, g = arrays(shape)
    stride = shape[1]
    actual = value_and_gradients(conv, x, kernel, g, stride)
    assert_close(actual, value_and_gradients(reference, x, kernel, g, stride))
