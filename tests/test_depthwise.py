"""The depthwise convolution against JAX's own and its autodiff, and against loops over clients."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from mocosfl_jax.models import depthwise
from mocosfl_jax.models.depthwise import depthwise_conv
from tests.test_conv import assert_close, looped, with_gradients

# width of kernel, stride, H, W, channels
SHAPES = [(3, 1, 6, 5, 4), (3, 2, 8, 6, 3), (3, 2, 7, 5, 3), (3, 2, 6, 7, 2), (5, 1, 4, 6, 2)]
CLIENTS = 3


@pytest.fixture(params=["cpu", "accelerator"])
def form(request, monkeypatch) -> str:
    """The form for a CPU, or the one for accelerators, whatever the tests run on."""
    monkeypatch.setattr(depthwise, "on_cpu", lambda: request.param == "cpu")
    depthwise._kernel_gradients.cache_clear()  # a function that was traced keeps its form
    return request.param


def reference(x: jax.Array, kernel: jax.Array, stride: int = 1) -> jax.Array:
    pad = (kernel.shape[0] // 2,) * 2
    return lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        [pad, pad],
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
    )


def arrays(shape: tuple[int, ...], clients: tuple[int, ...] = ()):
    """Two images, kernel and gradient of the output."""
    k, stride, h, w, c = shape
    rng = np.random.default_rng(sum(shape))
    sizes = [(2, h, w, c), (k, k, 1, c), (2, -(-h // stride), -(-w // stride), c)]
    return [jnp.asarray(rng.normal(size=clients + size), jnp.float32) for size in sizes]


@pytest.mark.parametrize("shape", SHAPES)
def test_value_and_gradients_are_those_of_autodiff(shape, form):
    x, kernel, g = arrays(shape)
    expected = jax.jit(with_gradients(reference, shape[1]))(x, kernel, g)
    assert_close(jax.jit(with_gradients(depthwise_conv, shape[1]))(x, kernel, g), expected)


@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[2]])
@pytest.mark.parametrize("shared", ["nothing", "kernel", "images"])
def test_vmap_is_a_loop_over_clients(shape, shared, form):
    stride = shape[1]
    x, kernel, g = arrays(shape, clients=(CLIENTS,))
    axes = None if shared == "images" else 0, None if shared == "kernel" else 0
    x, kernel = (a if axis == 0 else a[0] for a, axis in zip((x, kernel), axes, strict=True))
    clients = [a if axis == 0 else (a,) for a, axis in zip((x, kernel), axes, strict=True)]
    out, *gradients = looped(with_gradients(reference, stride), *clients, g)
    step = jax.jit(jax.vmap(with_gradients(depthwise_conv, stride), (*axes, 0)))
    assert_close(step(x, kernel, g), (out, *gradients))

    def batched(x, kernel):
        return jax.vmap(lambda x, k: depthwise_conv(x, k, stride), axes)(x, kernel)

    summed = [d if axis == 0 else d.sum(0) for d, axis in zip(gradients, axes, strict=True)]
    assert_close(jax.jit(with_gradients(batched))(x, kernel, g), (out, *summed))


def test_no_convolution_is_left(form):
    client = arrays(SHAPES[2], clients=(CLIENTS,))
    text = jax.jit(jax.vmap(with_gradients(depthwise_conv, 2))).lower(*client).as_text()
    assert "stablehlo.convolution" not in text
    assert ("stablehlo.while" in text) == (form == "cpu")


def test_training_inside_a_scan_is_a_loop_of_steps(form):
    x, kernel, _ = arrays(SHAPES[2], clients=(CLIENTS,))
    batches = [x, x + 1, x * 2]

    def updated(f: Callable, kernel, x):
        return kernel - 0.01 * jax.grad(lambda k: jnp.sum(jnp.sin(f(x, k, 2))))(kernel)

    own = jax.vmap(functools.partial(updated, depthwise_conv))
    actual, _ = jax.jit(lambda kernel, xs: lax.scan(lambda k, x: (own(k, x), None), kernel, xs))(
        kernel, jnp.stack(batches)
    )
    for batch in batches:
        (kernel,) = looped(lambda k, x: (updated(reference, k, x),), kernel, batch)
    assert_close(actual, kernel)


def test_shard_map_sums_the_gradient_of_a_common_kernel(form):
    mesh = Mesh(np.array(jax.devices()[:2]), ("d",))
    x, kernel, _ = arrays(SHAPES[2])

    def gradients(f, x, kernel):
        return jax.grad(lambda x, k: jnp.sum(jnp.sin(f(x, k, 2))), (0, 1))(x, kernel)

    own, oracle = (functools.partial(gradients, f) for f in (depthwise_conv, reference))
    images = jax.shard_map(own, mesh=mesh, in_specs=(P("d"), P()), out_specs=(P("d"), P()))
    assert_close(jax.jit(images)(x, kernel), jax.jit(oracle)(x, kernel))


def test_bfloat16_is_summed_in_float32(form):
    ones = [jnp.ones(size, jnp.bfloat16) for size in [(3, 24, 20, 2), (3, 3, 1, 2), (3, 24, 20, 2)]]
    out, dx, dkernel = jax.jit(with_gradients(depthwise_conv))(*ones)
    assert {a.dtype for a in (out, dx, dkernel)} == {jnp.dtype(jnp.bfloat16)}
    # A sum of ones in bfloat16 stops at 256.
    assert np.all(np.asarray(dkernel, np.float32)[1, 1] == 3 * 24 * 20)
    assert np.all(np.asarray(out, np.float32)[:, 1:-1, 1:-1] == 9)


def test_bfloat16_is_near_float32(form):
    exact = arrays(SHAPES[0])
    expected = jax.jit(with_gradients(reference))(*exact)
    actual = jax.jit(with_gradients(depthwise_conv))(*[a.astype(jnp.bfloat16) for a in exact])
    assert_close([a.astype(jnp.float32) for a in actual], expected, tolerance=2e-2)
