"""The project's convolution: own gradients and an own batching rule.

JAX's own convolution has two faults for split-federated training. Its gradients come in transposed
layouts, which XLA:CPU runs tens of times slower inside a loop; here they are written in the layout
of the forward pass. And `vmap` over kernels turns it into a grouped convolution, which is slow
everywhere; here it becomes plain convolutions, client after client, on a CPU, and a batched matrix
product of patches on an accelerator. On a CPU, 3x3 convolutions take half of the multiplications
(`winograd.py`) where that is faster.
"""

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from mocosfl_jax.models import winograd
from mocosfl_jax.models.winograd import largest_divisor

# Pixels of `x` in one convolution of the kernel gradient on a CPU. It keeps what the convolution
# reads in the cache; share of the float32 peak reached, whole batch of 100 / in chunks:
# 0.45 / 0.95 (64 channels, 32x32), 0.5 / 0.95 (128, 16x16), 0.65 / 0.98 (256, 8x8).
_CHUNK_PIXELS = 2048

# The same for Winograd's form.
_WINOGRAD_CHUNK_PIXELS = 1024

# Where Winograd's form is used: channels on both sides of the kernel, for the convolution (which
# the gradient of images is too) and for the gradient of kernels, and values of an image. Its time
# over that of the direct form, 20 images, two cores of an AMD EPYC, 2026-11-26
# (docs/results/step.md, `python -m benchmarks.conv`):
#   channels, map          32, 16x16   64, 32x32   128, 16x16   256, 8x8   512, 4x4
#   convolution               0.9         0.75        0.65        0.65        0.9
#   gradient of kernels        -          1.1         0.7         0.7         0.9
_WINOGRAD_CHANNELS = 64
_WINOGRAD_GRADIENT_CHANNELS = 128
_WINOGRAD_VALUES = 12_000  # 7x7 with 256 channels has 12,544

_convolve = functools.partial(
    lax.conv_general_dilated,
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
    preferred_element_type=jnp.float32,
)
_einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)

_Binary = Callable[[jax.Array, jax.Array], jax.Array]
_Pair = tuple[jax.Array, jax.Array]


def conv(x: jax.Array, kernel: jax.Array, stride: int = 1) -> jax.Array:
    """Convolves images with a square kernel of odd width k, padded by k // 2 on every side.

    Args:
        x: images `[B, H, W, I]`, float32 or bfloat16.
        kernel: `[k, k, I, O]`, same dtype.
        stride: 1 or 2.

    Returns:
        `[B, ceil(H / stride), ceil(W / stride), O]` in the dtype of `x`, summed in float32.

    Under `vmap` an unbatched kernel makes one larger batch, and batched kernels never make a
    grouped convolution. Differentiable once, in reverse mode, in both arguments.
    """
    return _conv(*same_manual_axes(x, kernel), stride)


def conv_transpose2x(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Transposed 3x3 convolution, stride 2, padding 1, output padding 1: doubles H and W.

    Args:
        x: `[B, H, W, I]`.
        kernel: `[3, 3, I, O]`; `out[2y+i-1, 2x+j-1, o] += x[y, x, c] * kernel[i, j, c, o]`.

    Returns:
        `[B, 2H, 2W, O]` in the dtype of `x`; batched and differentiable as `conv` is.
    """
    return _conv_transpose2x(*same_manual_axes(x, kernel))


def same_manual_axes(a: jax.Array, b: jax.Array) -> _Pair:
    """Inside `shard_map`: makes both vary over the same mesh axes, so that gradients are summed."""
    varying_a, varying_b = (jax.typeof(array).manual_axis_type.varying for array in (a, b))
    a = lax.pcast(a, tuple(varying_b - varying_a), to="varying")
    return a, lax.pcast(b, tuple(varying_a - varying_b), to="varying")


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _conv(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    return _forward(stride)(x, kernel)


def _conv_fwd(x: jax.Array, kernel: jax.Array, stride: int) -> tuple[jax.Array, _Pair]:
    return _forward(stride)(x, kernel), (x, kernel)


def _conv_bwd(stride: int, saved: _Pair, g: jax.Array) -> _Pair:
    x, kernel = saved
    dx = _input_gradient(stride, x.shape[1:3])(g, kernel)
    return dx, _kernel_gradient(stride, kernel.shape[0])(x, g)


_conv.defvjp(_conv_fwd, _conv_bwd)


@jax.custom_vjp
def _conv_transpose2x(x: jax.Array, kernel: jax.Array) -> jax.Array:
    size = (2 * x.shape[1], 2 * x.shape[2])
    return _input_gradient(2, size)(x, kernel.swapaxes(2, 3))


def _transpose_fwd(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, _Pair]:
    return _conv_transpose2x(x, kernel), (x, kernel)


def _transpose_bwd(saved: _Pair, g: jax.Array) -> _Pair:
    x, kernel = saved
    dx = _forward(2)(g, kernel.swapaxes(2, 3))
    return dx, _kernel_gradient(2, 3)(g, x).swapaxes(2, 3)


_conv_transpose2x.defvjp(_transpose_fwd, _transpose_bwd)


# The three products, each of one client (`one`) and of an accelerator's clients (`clients`).


@functools.cache
def _forward(stride: int) -> _Binary:
    def one(x: jax.Array, kernel: jax.Array) -> jax.Array:
        if _suits_winograd(x, kernel.shape, stride, _WINOGRAD_CHANNELS):
            return winograd.convolution(x, kernel)
        pad = kernel.shape[0] // 2
        return _convolve(x, kernel, (stride, stride), [(pad, pad)] * 2).astype(x.dtype)

    def clients(x: jax.Array, kernel: jax.Array) -> jax.Array:
        patches = _patches(x, kernel.shape[1], stride)
        return _einsum("cbhwijk,cijko->cbhwo", patches, kernel).astype(x.dtype)

    return _batchable(one, clients, folds=True)


@functools.cache
def _input_gradient(stride: int, size_HW: tuple[int, int]) -> _Binary:
    """From the output's gradient and the kernel to the gradient of images of `size_HW`."""

    def one(g: jax.Array, kernel: jax.Array) -> jax.Array:
        k = kernel.shape[0]
        mirrored = jnp.flip(kernel, (0, 1)).swapaxes(2, 3)
        if _suits_winograd(g, kernel.shape, stride, _WINOGRAD_CHANNELS):
            return winograd.convolution(g, mirrored)
        low = k - 1 - k // 2
        sizes = zip(size_HW, g.shape[1:3], strict=True)
        pads = [(low, n - (m - 1) * stride - 2 - low + k) for n, m in sizes]
        dx = _convolve(g, mirrored, (1, 1), pads, lhs_dilation=(stride, stride))
        return dx.astype(g.dtype)

    def clients(g: jax.Array, kernel: jax.Array) -> jax.Array:
        k, inputs = kernel.shape[1], kernel.shape[3]
        dpatches = _einsum("cbhwo,cijko->cbhwijk", g, kernel)
        zero, _ = same_manual_axes(jnp.zeros((*g.shape[:2], *size_HW, inputs)), g)
        _, pull = jax.vjp(lambda x: _patches(x, k, stride), zero)
        return pull(dpatches)[0].astype(g.dtype)

    return _batchable(one, clients, folds=True)


@functools.cache
def _kernel_gradient(stride: int, k: int) -> _Binary:
    pad = k // 2

    def product(
        a: jax.Array, b: jax.Array, pads: list[tuple[int, int]], dilation: int = 1
    ) -> jax.Array:
        """Sums over images and pixels: channels of `a` by offset by channels of `b`."""
        a_AHWN, b_HWNB = a.transpose(3, 1, 2, 0), b.transpose(1, 2, 0, 3)
        return _convolve(a_AHWN, b_HWNB, (1, 1), pads, rhs_dilation=(dilation, dilation))

    def whole(x: jax.Array, g: jax.Array) -> jax.Array:
        sizes = zip(x.shape[1:3], g.shape[1:3], strict=True)
        pads = [(pad, k + (m - 1) * stride - n - pad) for n, m in sizes]
        return product(x, g, pads, stride).transpose(1, 2, 0, 3)

    def swapped(x: jax.Array, g: jax.Array) -> jax.Array:
        """The same for stride 1, with the channels of the output in the first place: in the last
        one, few of them take many times as long on a CPU."""
        return jnp.flip(product(g, x, [(pad, pad)] * 2).transpose(1, 2, 3, 0), (0, 1))

    def one(x: jax.Array, g: jax.Array) -> jax.Array:
        inputs, outputs = x.shape[3], g.shape[3]
        if k == 1:
            total = _pointwise_gradient(x[:, ::stride, ::stride], g)
        elif _suits_winograd(x, (k, k, inputs, outputs), stride, _WINOGRAD_GRADIENT_CHANNELS):
            total = _sum_over_chunks(winograd.kernel_gradient, x, g, _WINOGRAD_CHUNK_PIXELS)
        elif on_cpu():
            few = stride == 1 and outputs < inputs
            total = _sum_over_chunks(swapped if few else whole, x, g, _CHUNK_PIXELS)
        else:
            total = whole(x, g)
        return total.astype(x.dtype)

    def clients(x: jax.Array, g: jax.Array) -> jax.Array:
        return _einsum("cbhwijk,cbhwo->cijko", _patches(x, k, stride), g).astype(x.dtype)

    return _batchable(one, clients, folds=False)


def _pointwise_gradient(x: jax.Array, g: jax.Array) -> jax.Array:
    """Gradient of a 1x1 kernel. A CPU copies the first factor of the product transposed."""
    if on_cpu() and 16 * g.shape[3] <= x.shape[3]:
        return _einsum("bhwo,bhwi->oi", g, x).T[None, None]
    return _einsum("bhwi,bhwo->io", x, g)[None, None]


def _suits_winograd(
    images: jax.Array, kernel_shape: tuple[int, ...], stride: int, least_channels: int
) -> bool:
    """The rule for all three products. `images`: those of the input or of the output."""
    k, _, *channels = kernel_shape
    return (
        on_cpu()
        and images.dtype == jnp.float32
        and (k, stride) == (3, 1)
        and min(channels) >= least_channels
        and math.prod(images.shape[1:]) >= _WINOGRAD_VALUES
        and -images.shape[1] % winograd.TILE <= images.shape[1] // 3
    )


def _sum_over_chunks(f: _Binary, x: jax.Array, g: jax.Array, pixels: int) -> jax.Array:
    """`f(x, g)`, which sums over images, as a sum of `f` over chunks of so many pixels."""
    images = largest_divisor(len(x), pixels // (x.shape[1] * x.shape[2]))
    if images == len(x):
        return f(x, g)
    chunks = tuple(array.reshape(-1, images, *array.shape[1:]) for array in (x, g))
    shape = jax.eval_shape(f, *(array[0] for array in chunks))
    zeros, _ = same_manual_axes(jnp.zeros(shape.shape, shape.dtype), x)
    total, _ = lax.scan(lambda total, chunk: (total + f(*chunk), None), zeros, chunks)
    return total


def _batchable(one: _Binary, clients: _Binary, folds: bool) -> _Binary:
    """`one` with a batching rule; `folds`: an axis of the first argument alone joins its batch.

    Where both arguments have the axis: on a CPU `one` client after another, which runs at the
    speed of a shared kernel and 2 to 4 times as fast as `clients`; elsewhere `clients`.
    """
    function = jax.custom_batching.custom_vmap(one)

    @function.def_vmap
    def rule(
        axis_size: int, batched: Sequence[bool], a: jax.Array, b: jax.Array
    ) -> tuple[jax.Array, bool]:
        if axis_size == 1:
            return function(a[0] if batched[0] else a, b[0] if batched[1] else b)[None], True
        if folds and not batched[1]:
            folded = function(a.reshape(-1, *a.shape[2:]), b)
            return folded.reshape(axis_size, -1, *folded.shape[1:]), True
        a = a if batched[0] else jnp.broadcast_to(a, (axis_size, *a.shape))
        b = b if batched[1] else jnp.broadcast_to(b, (axis_size, *b.shape))
        return lax.map(lambda ab: function(*ab), (a, b)) if on_cpu() else clients(a, b), True

    return function


def on_cpu() -> bool:
    return jax.default_backend() == "cpu"


def _patches(x: jax.Array, k: int, stride: int) -> jax.Array:
    """`[..., H, W, I]` to `[..., H', W', k, k, I]`, by k * k strided slices."""
    pad = k // 2
    x = jnp.pad(x, [*[(0, 0)] * (x.ndim - 3), (pad, pad), (pad, pad), (0, 0)])
    height, width = (n - k + 1 for n in x.shape[-3:-1])
    rows = [x[..., i : i + height : stride, :, :] for i in range(k)]
    windows = [row[..., j : j + width : stride, :] for row in rows for j in range(k)]
    stacked = jnp.stack(windows, axis=-2)
    return stacked.reshape(*stacked.shape[:-2], k, k, x.shape[-1])
