"""Winograd's form against the definition of a convolution in float64, and where it is used."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mocosfl_jax.models import conv as conv_module
from mocosfl_jax.models import winograd
from mocosfl_jax.models.conv import conv

# batch, H, W, input channels, output channels
SHAPES = [(7, 8, 5, 3, 4), (1, 7, 7, 4, 3), (2, 3, 17, 2, 2), (5, 13, 6, 3, 3)]
CLIENTS = 2


@pytest.fixture
def any_shape(monkeypatch):
    """The form for a CPU, whatever the channels and the size."""
    monkeypatch.setattr(conv_module, "on_cpu", lambda: True)
    monkeypatch.setattr(conv_module, "_WINOGRAD_CHANNELS", 1)
    monkeypatch.setattr(conv_module, "_WINOGRAD_GRADIENT_CHANNELS", 1)
    monkeypatch.setattr(conv_module, "_WINOGRAD_VALUES", 1)
    jax.clear_caches()  # of programs that other tests traced


def arrays(shape, clients=()):
    """Images, kernel and gradient of the output, float32."""
    batch, h, w, i, o = shape
    rng = np.random.default_rng(sum(shape))
    sizes = [(batch, h, w, i), (3, 3, i, o), (batch, h, w, o)]
    return [rng.normal(size=(*clients, *size)).astype(np.float32) for size in sizes]


def by_definition(x, kernel, g):
    """Value and both gradients in float64."""
    x, kernel, g = (np.asarray(a, np.float64) for a in (x, kernel, g))
    _, h, w, _ = x.shape
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    out, dpadded, dkernel = np.zeros_like(g), np.zeros_like(padded), np.zeros_like(kernel)
    for i, j in np.ndindex(3, 3):
        window = padded[:, i : i + h, j : j + w]
        out += window @ kernel[i, j]
        dpadded[:, i : i + h, j : j + w] += g @ kernel[i, j].T
        dkernel[i, j] = np.einsum("bhwi,bhwo->io", window, g)
    return out, dpadded[:, 1:-1, 1:-1], dkernel


def with_gradients():
    """A new function each time, which JAX has not traced under another rule."""

    def run(x, kernel, g):
        out, pull = jax.vjp(conv, x, kernel)
        return out, *pull(g)

    return run


def assert_close(actual, expected) -> None:
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())


def test_the_three_transforms_make_a_correlation():
    out, kernel, image = winograd.OUTPUT, winograd.KERNEL, winograd.IMAGE
    sums = np.einsum("pa,pk,pi->aki", out, kernel, image)
    a, k, i = np.indices(sums.shape)
    np.testing.assert_allclose(sums, i == a + k, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("limits", [(2**21, 1024, 128), (260, 50, 1)])
def test_value_and_gradients_are_those_of_the_definition(shape, limits, any_shape, monkeypatch):
    monkeypatch.setattr(winograd, "_GROUP_VALUES", limits[0])
    monkeypatch.setattr(conv_module, "_WINOGRAD_CHUNK_PIXELS", limits[1])
    monkeypatch.setattr(winograd, "_LOOP_CHANNELS", limits[2])
    args = arrays(shape)
    assert_close(jax.jit(with_gradients())(*args), by_definition(*args))


@pytest.mark.parametrize("shape", SHAPES[:2])
def test_own_kernels_are_a_loop_over_clients(shape, any_shape):
    args = arrays(shape, (CLIENTS,))
    loop = [by_definition(*(a[c] for a in args)) for c in range(CLIENTS)]
    expected = [np.stack(parts) for parts in zip(*loop, strict=True)]
    assert_close(jax.jit(jax.vmap(with_gradients()))(*args), expected)


def lowered(x, kernel) -> str:
    jax.clear_caches()  # JAX 0.12 keeps what it has traced of the convolution
    g = jnp.ones((*x.shape[:-1], kernel.shape[-1]), x.dtype)
    return jax.jit(with_gradients()).lower(x, kernel, g).as_text()


@pytest.mark.parametrize(
    ("on_cpu", "dtype"), [(False, jnp.float32), (False, jnp.bfloat16), (True, jnp.bfloat16)]
)
def test_accelerators_and_bfloat16_keep_their_program(on_cpu, dtype, monkeypatch):
    monkeypatch.setattr(conv_module, "on_cpu", lambda: on_cpu)
    x, kernel = jnp.ones((2, 16, 16, 64), dtype), jnp.ones((3, 3, 64, 64), dtype)
    text = lowered(x, kernel)
    monkeypatch.setattr(conv_module, "_suits_winograd", lambda *args: False)
    assert lowered(x, kernel) == text


@pytest.mark.parametrize(
    ("size", "channels", "kernel", "used"),
    [
        ((16, 16), (64, 64), 3, True),
        ((7, 7), (256, 256), 3, True),
        ((8, 8), (64, 64), 3, False),  # too few values
        ((4, 4), (512, 512), 3, False),
        ((5, 64), (64, 64), 3, False),  # eight rows would be computed
        ((16, 16), (64, 32), 3, False),
        ((16, 16), (64, 64), 1, False),
    ],
)
def test_it_is_used_where_it_is_faster(size, channels, kernel, used, monkeypatch):
    monkeypatch.setattr(conv_module, "on_cpu", lambda: True)
    args = jnp.ones((1, *size, channels[0])), jnp.ones((kernel, kernel, *channels))
    text = lowered(*args)
    monkeypatch.setattr(conv_module, "_suits_winograd", lambda *args: False)
    assert (lowered(*args) != text) == used
