"""The convolution against JAX's own and its autodiff, and against loops over clients."""

import functools
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from mocosfl_jax.models import conv as conv_module
from mocosfl_jax.models.conv import conv, conv_transpose2x

# width of kernel, stride, H, W, input channels, output channels
SHAPES = [
    (3, 1, 8, 6, 3, 5),
    (3, 1, 5, 4, 16, 16),
    (3, 2, 8, 6, 4, 3),
    (3, 2, 7, 5, 3, 16),
    (3, 2, 7, 5, 9, 2),
    (1, 1, 5, 6, 4, 2),
    (1, 2, 8, 6, 2, 3),
    (1, 2, 7, 5, 2, 3),
    (1, 2, 7, 5, 17, 1),
    (7, 1, 9, 8, 3, 2),
    (7, 2, 12, 9, 3, 4),
    (7, 2, 9, 12, 9, 2),
]
CLIENTS = 3


@pytest.fixture(params=["cpu", "accelerator"])
def form(request, monkeypatch) -> str:
    """The form for a CPU, or the one for accelerators, whatever the tests run on."""
    monkeypatch.setattr(conv_module, "on_cpu", lambda: request.param == "cpu")
    return request.param


def reference(x: jax.Array, kernel: jax.Array, stride: int = 1) -> jax.Array:
    pad = (kernel.shape[0] // 2,) * 2
    return lax.conv_general_dilated(
        x, kernel, (stride, stride), [pad, pad], dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def scattered_transpose2x(x: np.ndarray, kernel: np.ndarray, g: np.ndarray):
    """Value and both gradients, by the definition."""
    (_, height, width, _), (_, rows, columns, _) = x.shape, g.shape
    out, dx, dkernel = np.zeros_like(g), np.zeros_like(x), np.zeros_like(kernel)
    for y, z, i, j in np.ndindex(height, width, 3, 3):
        row, column = 2 * y + i - 1, 2 * z + j - 1
        if 0 <= row < rows and 0 <= column < columns:
            out[:, row, column] += x[:, y, z] @ kernel[i, j]
            dx[:, y, z] += g[:, row, column] @ kernel[i, j].T
            dkernel[i, j] += x[:, y, z].T @ g[:, row, column]
    return out, dx, dkernel


def arrays(shape: tuple[int, ...], batch: int = 2, clients: tuple[int, ...] = ()):
    """Images, kernel and gradient of the output."""
    k, stride, h, w, i, o = shape
    rng = np.random.default_rng(sum(shape))
    sizes = [(batch, h, w, i), (k, k, i, o), (batch, -(-h // stride), -(-w // stride), o)]
    return [jnp.asarray(rng.normal(size=clients + size), jnp.float32) for size in sizes]


def with_gradients(f: Callable, stride: int | None = None) -> Callable:
    """`(x, kernel, g)` to the value of `f` and both gradients under the output's gradient `g`."""
    options = () if stride is None else (stride,)

    def run(x, kernel, g):
        out, pull = jax.vjp(lambda x, kernel: f(x, kernel, *options), x, kernel)
        return out, *pull(g)

    return run


def looped(f: Callable, *args: jax.Array):
    """`f` client after client; an argument that all share comes alone in a tuple."""
    f = jax.jit(f)
    results = [f(*(a[0] if isinstance(a, tuple) else a[c] for a in args)) for c in range(CLIENTS)]
    return tuple(np.stack(parts) for parts in zip(*results, strict=True))


def assert_close(actual, expected, tolerance: float = 1e-5) -> None:
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max())


@pytest.mark.parametrize("shape", SHAPES)
def test_value_and_gradients_are_those_of_autodiff(shape, form):
    x, kernel, g = arrays(shape)
    expected = jax.jit(with_gradients(reference, shape[1]))(x, kernel, g)
    assert_close(jax.jit(with_gradients(conv, shape[1]))(x, kernel, g), expected)


@pytest.mark.parametrize(("batch", "chunks"), [(6, 3), (5, 5), (4, 1)])
def test_kernel_gradient_in_chunks_of_images(batch, chunks, monkeypatch):
    monkeypatch.setattr(conv_module, "on_cpu", lambda: True)
    monkeypatch.setattr(conv_module, "_CHUNK_PIXELS", 8 * 6 * max(2, batch // chunks) + 1)
    x, kernel, g = arrays(SHAPES[0], batch)
    step = jax.jit(with_gradients(conv))
    assert_close(step(x, kernel, g), jax.jit(with_gradients(reference))(x, kernel, g))
    assert ("stablehlo.while" in step.lower(x, kernel, g).as_text()) == (chunks > 1)


@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[3], SHAPES[4], SHAPES[7]])
@pytest.mark.parametrize("shared", ["nothing", "kernel", "images"])
def test_vmap_is_a_loop_over_clients(shape, shared, form):
    x, kernel, g = arrays(shape, clients=(CLIENTS,))
    x_axis, kernel_axis = None if shared == "images" else 0, None if shared == "kernel" else 0
    x, kernel = (x if x_axis == 0 else x[0]), (kernel if kernel_axis == 0 else kernel[0])
    clients = [a if axis == 0 else (a,) for a, axis in ((x, x_axis), (kernel, kernel_axis))]
    out, dx, dkernel = looped(with_gradients(reference, shape[1]), *clients, g)

    step = jax.jit(jax.vmap(with_gradients(conv, shape[1]), (x_axis, kernel_axis, 0)))
    assert_close(step(x, kernel, g), (out, dx, dkernel))

    def batched(x, kernel):
        return jax.vmap(lambda x, k: conv(x, k, shape[1]), (x_axis, kernel_axis))(x, kernel)

    dx, dkernel = dx if x_axis == 0 else dx.sum(0), dkernel if kernel_axis == 0 else dkernel.sum(0)
    expected = out, dx, dkernel
    assert_close(jax.jit(with_gradients(batched))(x, kernel, g), expected)


def test_vmap_of_one_client_and_of_vmap(form):
    x, kernel, g = arrays(SHAPES[2], clients=(CLIENTS,))
    expected = looped(with_gradients(reference, 2), x, kernel, g)
    nested = jax.jit(jax.vmap(jax.vmap(with_gradients(conv, 2))))
    for lead in [(CLIENTS, 1), (1, CLIENTS)]:
        batch = [a.reshape(*lead, *a.shape[1:]) for a in (x, kernel, g)]
        assert_close([a.reshape(CLIENTS, *a.shape[2:]) for a in nested(*batch)], expected)


def group_counts(f: Callable, *args: jax.Array) -> list[int]:
    """Of every convolution in the program: its two numbers of groups."""
    text = jax.jit(f).lower(*args).as_text()
    counts = re.findall(r"(?:batch|feature)_group_count = (\d+)", text)
    assert len(counts) == 2 * text.count("stablehlo.convolution")
    return [int(count) for count in counts]


@pytest.mark.parametrize("stride", [1, 2])
def test_own_kernels_make_no_grouped_convolution(stride, form):
    client = arrays((3, stride, 8, 6, 3, 5), clients=(CLIENTS,))
    assert CLIENTS in group_counts(jax.vmap(with_gradients(reference, stride)), *client)
    counts = group_counts(jax.vmap(with_gradients(conv, stride)), *client)
    assert set(counts) == ({1} if form == "cpu" else set())


def test_a_shared_kernel_makes_one_larger_convolution(form):
    x, kernel, _ = arrays(SHAPES[0], clients=(CLIENTS,))
    text = jax.jit(jax.vmap(conv, (0, None))).lower(x, kernel[0]).as_text()
    assert re.findall(r"stablehlo.convolution.*tensor<(\d+)x8x6x5xf32>", text) == ["6"]
    assert "stablehlo.while" not in text


@pytest.mark.parametrize("wrap", [lambda f: f, jax.checkpoint])
def test_training_inside_a_scan_is_a_loop_of_steps(wrap, form):
    x, kernel, _ = arrays(SHAPES[2], clients=(CLIENTS,))
    batches = [x, x + 1, x * 2]

    def updated(convolution, kernel, x):
        return kernel - 0.01 * jax.grad(lambda k: jnp.sum(jnp.sin(convolution(x, k, 2))))(kernel)

    own = jax.vmap(functools.partial(updated, lambda x, k, s: wrap(lambda k: conv(x, k, s))(k)))
    actual, _ = jax.jit(lambda kernel, xs: lax.scan(lambda k, x: (own(k, x), None), kernel, xs))(
        kernel, jnp.stack(batches)
    )
    for batch in batches:
        (kernel,) = looped(lambda k, x: (updated(reference, k, x),), kernel, batch)
    assert_close(actual, kernel)


@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map_over_clients_and_over_images(check_vma, form):
    mesh = Mesh(np.array(jax.devices()[:2]), ("d",))
    shard = functools.partial(jax.shard_map, mesh=mesh, check_vma=check_vma)
    x, kernel, _ = arrays(SHAPES[3], clients=(4,))

    def gradients(convolution, x, kernel):
        return jax.grad(lambda x, k: jnp.sum(jnp.sin(convolution(x, k, 2))), (0, 1))(x, kernel)

    own, oracle = (functools.partial(gradients, f) for f in (conv, reference))
    clients = shard(jax.vmap(own), in_specs=P("d"), out_specs=P("d"))
    assert_close(jax.jit(clients)(x, kernel), jax.jit(jax.vmap(oracle))(x, kernel))

    def replicated(x, kernel):
        dx, dkernel = own(x, kernel)
        return dx, dkernel if check_vma else lax.psum(dkernel, "d")  # checked: already summed

    images = shard(replicated, in_specs=(P("d"), P()), out_specs=(P("d"), P()))
    x, kernel = x.reshape(-1, *x.shape[2:]), kernel[0]
    assert_close(jax.jit(images)(x, kernel), jax.jit(oracle)(x, kernel))


@pytest.mark.parametrize("clients", [(), (2,)])
def test_bfloat16_is_summed_in_float32(clients, form):
    sizes = [(3, 24, 20, 256), (3, 3, 256, 2), (3, 24, 20, 2)]
    ones = [jnp.ones(clients + size, jnp.bfloat16) for size in sizes]
    step = with_gradients(conv)
    out, dx, dkernel = jax.jit(jax.vmap(step) if clients else step)(*ones)
    assert {a.dtype for a in (out, dx, dkernel)} == {jnp.dtype(jnp.bfloat16)}
    # A sum of ones in bfloat16 stops at 256.
    assert np.all(np.asarray(out, np.float32)[..., 1:-1, 1:-1, :] == 9 * 256)
    assert np.all(np.asarray(dx, np.float32)[..., 1:-1, 1:-1, :] == 9 * 2)
    assert np.all(np.asarray(dkernel, np.float32)[..., 1, 1, :, :] == 3 * 24 * 20)


def test_bfloat16_is_near_float32(form):
    exact = arrays(SHAPES[0])
    expected = jax.jit(with_gradients(reference))(*exact)
    actual = jax.jit(with_gradients(conv))(*[a.astype(jnp.bfloat16) for a in exact])
    assert_close([a.astype(jnp.float32) for a in actual], expected, tolerance=2e-2)


def test_transpose2x_is_a_scatter_and_its_gradients(form):
    rng = np.random.default_rng(0)
    sizes = [(2, 3, 4, 3), (3, 3, 3, 2), (2, 6, 8, 2)]
    x, kernel, g = (rng.normal(size=(CLIENTS, *size)).astype(np.float32) for size in sizes)
    loop = [scattered_transpose2x(*client) for client in zip(x, kernel, g, strict=True)]
    step = with_gradients(conv_transpose2x)
    assert_close(jax.jit(step)(x[0], kernel[0], g[0]), loop[0])
    expected = [np.stack(parts) for parts in zip(*loop, strict=True)]
    assert_close(jax.jit(jax.vmap(step))(x, kernel, g), expected)
