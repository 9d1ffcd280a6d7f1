"""GroupNorm: the form that a CPU runs fast against Flax's."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mocosfl_jax.models.units import group_norm


class Ours(nn.Module):
    @nn.compact
    def __call__(self, x):
        return group_norm(x, "norm")


class Flax(nn.Module):
    @nn.compact
    def __call__(self, x):
        norm = nn.GroupNorm(None, group_size=4, use_fast_variance=False, epsilon=1e-5, name="norm")
        return norm(x)


def inputs(shape: tuple[int, ...]) -> tuple[dict, jax.Array, jax.Array]:
    """Parameters, images far from 0 and a gradient of the output, no two channels alike."""
    rng = np.random.default_rng(len(shape))
    channels = shape[-1]
    params = {"scale": rng.normal(1, 0.3, channels), "bias": rng.normal(size=channels)}
    x = rng.normal(3, 1 + np.arange(channels), shape)
    return (
        {"params": {"norm": jax.tree.map(jnp.float32, params)}},
        jnp.float32(x),
        jnp.float32(rng.normal(size=shape)),
    )


def moments(x_BHWC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    grouped = x_BHWC.reshape(*x_BHWC.shape[:3], -1, 4)
    mean, var = (f(grouped, axis=(1, 2, 4), keepdims=True) for f in (np.mean, np.var))
    return tuple(np.broadcast_to(m, grouped.shape).reshape(x_BHWC.shape) for m in (mean, var))


@pytest.mark.parametrize("shape", [(3, 5, 7, 8), (1, 1, 1, 4), (2, 4, 4, 64)], ids=str)
def test_values_and_gradients_are_those_of_the_definition(shape):
    """Values in float64; gradients as Flax's, in float32."""
    variables, x, g = inputs(shape)
    found, pull = jax.vjp(lambda v, x: Ours().apply(v, x), variables, x)
    mean, var = moments(np.float64(x))
    norm = jax.tree.map(np.asarray, variables["params"]["norm"])
    expected = (np.float64(x) - mean) / np.sqrt(var + 1e-5) * norm["scale"] + norm["bias"]
    np.testing.assert_allclose(found, expected, atol=3e-6 * np.abs(expected).max())
    _, pull_flax = jax.vjp(lambda v, x: Flax().apply(v, x), variables, x)
    for ours, flax in zip(jax.tree.leaves(pull(g)), jax.tree.leaves(pull_flax(g)), strict=True):
        np.testing.assert_allclose(ours, flax, atol=1e-5 * max(1, np.abs(flax).max()))


def test_parameters_are_those_of_flax():
    x = jnp.zeros((1, 2, 2, 8))
    for ours, flax in zip(
        *(jax.tree.leaves_with_path(m().init(jax.random.key(0), x)) for m in (Ours, Flax)),
        strict=True,
    ):
        assert ours[0] == flax[0]
        np.testing.assert_array_equal(ours[1], flax[1])


def lowered(module: type[nn.Module], dtype: jnp.dtype) -> str:
    variables, x, _ = inputs((2, 4, 4, 8))
    x = x.astype(dtype)
    return jax.jit(lambda v, x: module().apply(v, x)).lower(variables, x).as_text()


def test_other_dtypes_and_backends_keep_the_form_of_flax(monkeypatch):
    class Cast(nn.Module):
        @nn.compact
        def __call__(self, x):
            norm = nn.GroupNorm(
                None,
                group_size=4,
                use_fast_variance=False,
                epsilon=1e-5,
                dtype=jnp.float32,
                name="norm",
            )
            return norm(x.astype(jnp.float32)).astype(x.dtype)

    assert lowered(Ours, jnp.bfloat16) == lowered(Cast, jnp.bfloat16)
    assert lowered(Ours, jnp.float32) != lowered(Cast, jnp.float32)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert lowered(Ours, jnp.float32) == lowered(Cast, jnp.float32)
