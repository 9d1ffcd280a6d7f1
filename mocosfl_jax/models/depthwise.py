"""The depthwise convolution: each channel with a kernel of its own.

It is k * k shifted products, and so are both gradients. Elementwise products have no layout that is
slow in a loop, and `vmap` over kernels leaves them what they are, where XLA's own depthwise
convolution becomes a grouped one and its gradients in a loop take a CPU a thousand times as long
(docs/results/depthwise.md has the times).
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from mocosfl_jax.models.conv import on_cpu, same_manual_axes

_Pair = tuple[jax.Array, jax.Array]


def depthwise_conv(x: jax.Array, kernel: jax.Array, stride: int = 1) -> jax.Array:
    """Convolves each channel with its own kernel of odd width k, padded by k // 2 on every side.

    Args:
        x: images `[B, H, W, C]`, float32 or bfloat16.
        kernel: `[k, k, 1, C]`, same dtype.
        stride: 1 or 2.

    Returns:
        `[B, ceil(H / stride), ceil(W / stride), C]` in the dtype of `x`, summed in float32.

    Differentiable once, in reverse mode, in both arguments.
    """
    return _depthwise(*same_manual_axes(x, kernel), stride)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _depthwise(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    width = kernel.shape[0]
    weights = kernel.astype(jnp.float32).reshape(width * width, 1, 1, 1, -1)
    windows = _windows(x, width, stride)
    return sum(w * window for w, window in zip(weights, windows, strict=True)).astype(x.dtype)


def _fwd(x: jax.Array, kernel: jax.Array, stride: int) -> tuple[jax.Array, _Pair]:
    return _depthwise(x, kernel, stride), (x, kernel)


def _bwd(stride: int, saved: _Pair, g: jax.Array) -> _Pair:
    x, kernel = saved
    sizes = zip(x.shape[1:3], g.shape[1:3], strict=True)
    spread = [(0, n - 1 - (m - 1) * stride, stride - 1) for n, m in sizes]
    zero = jnp.zeros((), g.dtype)
    spaced = lax.pad(g, zero, [(0, 0, 0), *spread, (0, 0, 0)])
    dx = _depthwise(spaced, jnp.flip(kernel, (0, 1)), 1)
    each = _kernel_gradients(stride, kernel.shape[0])(x, g)
    return dx, each.sum(axis=0).reshape(kernel.shape).astype(x.dtype)


_depthwise.defvjp(_fwd, _bwd)


@functools.cache
def _kernel_gradients(stride: int, width: int) -> jax.custom_batching.custom_vmap:
    """From images and the output's gradient to the kernel gradient of each image, (B, k * k, C).

    On a CPU image after image, which stays in the cache: a third of the time. Clients' images join
    the batch, so that the same holds for clients of one image each.
    """

    def whole(x: jax.Array, g: jax.Array) -> jax.Array:
        windows, g = _windows(x, width, stride), g.astype(jnp.float32)
        return jnp.stack([jnp.sum(window * g, axis=(1, 2)) for window in windows], axis=1)

    @jax.custom_batching.custom_vmap
    def gradients(x: jax.Array, g: jax.Array) -> jax.Array:
        if not on_cpu():
            return whole(x, g)
        one = lambda image: whole(image[0][None], image[1][None])[0]  # noqa: E731
        return lax.map(one, (x, g))

    @gradients.def_vmap
    def rule(
        axis_size: int, batched: Sequence[bool], x: jax.Array, g: jax.Array
    ) -> tuple[jax.Array, bool]:
        x, g = (
            array if is_batched else jnp.broadcast_to(array, (axis_size, *array.shape))
            for array, is_batched in zip((x, g), batched, strict=True)
        )
        each = gradients(*(array.reshape(-1, *array.shape[2:]) for array in (x, g)))
        return each.reshape(axis_size, -1, *each.shape[1:]), True

    return gradients


def _windows(x: jax.Array, width: int, stride: int) -> list[jax.Array]:
    """For each entry of the kernel, row by row, the pixels it meets: (B, H', W', C), float32."""
    pad, (height, columns) = width // 2, x.shape[1:3]
    x = jnp.pad(x, [(0, 0), (pad, pad), (pad, pad), (0, 0)])
    # The padded images exist once, else each window would compute them with its bounds checks.
    x = lax.optimization_barrier(x).astype(jnp.float32)
    return [
        x[:, i : i + height : stride, j : j + columns : stride]
        for i in range(width)
        for j in range(width)
    ]
