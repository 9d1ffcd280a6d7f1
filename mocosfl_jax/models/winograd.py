"""Winograd's minimal filtering along the rows of 3x3 convolutions, float32, for a CPU.

F(4, 3) of Lavin & Gray 2015 (arXiv 1509.09308) in one dimension: four rows of the output are sums
of six products of transformed rows of images and kernel, where the definition takes twelve. Each
product is a convolution along the rows, left to XLA. In two dimensions there would be fewer
products still, but larger buffers and errors.

The points are 0, +-1/sqrt(2), +-sqrt(2) and infinity, with half the error of the usual 0, +-1, +-2
and infinity.
"""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

_R = math.sqrt(2)

# One row for each product p. Of output row a, kernel row k and image row i, the sum over p of
# OUTPUT[p, a] * KERNEL[p, k] * IMAGE[p, i] is 1 where i = a + k, and 0 elsewhere.
IMAGE = np.array(
    [
        [1, 0, -2.5, 0, 1, 0],
        [0, -_R, -2, 1 / _R, 1, 0],
        [0, _R, -2, -1 / _R, 1, 0],
        [0, -1 / _R, -0.5, _R, 1, 0],
        [0, 1 / _R, -0.5, -_R, 1, 0],
        [0, 1, 0, -2.5, 0, 1],
    ]
)
KERNEL = np.array(
    [
        [1, 0, 0],
        [-2 / 3, -_R / 3, -1 / 3],
        [-2 / 3, _R / 3, -1 / 3],
        [1 / 6, _R / 6, 1 / 3],
        [1 / 6, -_R / 6, 1 / 3],
        [0, 0, 1],
    ]
)
OUTPUT = np.array(
    [
        [1, 0, 0, 0],
        [1, 1 / _R, 1 / 2, _R / 4],
        [1, -1 / _R, 1 / 2, -_R / 4],
        [1, _R, 2, 2 * _R],
        [1, -_R, 2, -2 * _R],
        [0, 0, 0, 1],
    ]
)

TILE = OUTPUT.shape[1]
"""Rows of the output that are computed together; the last ones may be cut off."""

# Values of images that are convolved at once; buffers take about four times as many.
_GROUP_VALUES = 2**18

_along_rows = functools.partial(
    lax.conv_general_dilated,
    window_strides=(1, 1),
    padding=((0, 0), (1, 1)),
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
)


def convolution(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """The convolution with stride 1 and padding 1.

    Args: x: (B, H, W, I) float32. kernel: (3, 3, I, O) float32.
    Returns: (B, H, W, O).
    """
    images = largest_divisor(len(x), _GROUP_VALUES // math.prod(x.shape[1:]))
    if images == len(x):
        return _convolve_group(x, kernel)
    groups = x.reshape(-1, images, *x.shape[1:])
    y = lax.map(lambda x: _convolve_group(x, kernel), groups)
    return y.reshape(-1, *y.shape[2:])


@jax.jit
def kernel_gradient(x: jax.Array, g: jax.Array) -> jax.Array:
    """Gradient of the kernel of `convolution`, (3, 3, I, O).

    Args: x: (B, H, W, I) float32. g: gradient of the output, (B, H, W, O) float32.
    """
    batch, height, width, inputs = x.shape
    x_IHV = x.transpose(3, 1, 2, 0).reshape(inputs, height, width * batch)
    g_HV = g.transpose(1, 2, 0, 3).reshape(height, -1)
    images = _combine(IMAGE, _image_rows(x_IHV))
    gradients = _combine(OUTPUT, _every_tile(_padded(g_HV, 0, (0, 0)), 0, TILE))
    products = [
        _along_rows(
            image_ITV.reshape(inputs, -1, width, batch),
            gradient_TV.reshape(-1, width, batch, g.shape[-1]),
        )
        for image_ITV, gradient_TV in zip(images, gradients, strict=True)
    ]  # (I, 1, 3, O)
    return jnp.concatenate(_combine(KERNEL.T, [p.swapaxes(0, 1).swapaxes(1, 2) for p in products]))


def largest_divisor(number: int, most: int) -> int:
    """The largest divisor of `number` that is at most `most`, or 1."""
    return max(n for n in range(1, number + 1) if number % n == 0 and n <= max(1, most))


@jax.jit
def _convolve_group(x: jax.Array, kernel: jax.Array) -> jax.Array:
    batch, height, width, _ = x.shape
    kernels = _combine(KERNEL, [kernel[i : i + 1] for i in range(3)])
    images = _combine(IMAGE, _image_rows(x))
    products = [_along_rows(image, kernel) for image, kernel in zip(images, kernels, strict=True)]
    y = jnp.stack(_combine(OUTPUT.T, products), axis=2)
    return y.reshape(batch, -1, width, y.shape[-1])[:, :height]


def _image_rows(x: jax.Array) -> list[jax.Array]:
    """The six rows that each tile reads, along axis 1: the one before it comes first."""
    return _every_tile(_padded(x, 1, (1, 1)), 1, len(IMAGE))


def _padded(x: jax.Array, axis: int, pad: tuple[int, int]) -> jax.Array:
    """Zeros before and after an axis, and those that fill the last tile."""
    pads = [(0, 0)] * x.ndim
    pads[axis] = (pad[0], pad[1] + -x.shape[axis] % TILE)
    return jnp.pad(x, pads)


def _every_tile(x: jax.Array, axis: int, rows: int) -> list[jax.Array]:
    """For each of the first `rows` rows of a tile: that row of all tiles."""
    last = x.shape[axis] - rows
    return [lax.slice_in_dim(x, row, row + last + 1, TILE, axis) for row in range(rows)]


def _combine(coefficients: np.ndarray, arrays: Sequence[jax.Array]) -> list[jax.Array]:
    """For each row of coefficients, the sum of the arrays times it."""
    return [
        functools.reduce(
            jnp.add,
            [c * x for c, x in zip(map(float, row), arrays, strict=True) if c],
        )
        for row in coefficients
    ]
