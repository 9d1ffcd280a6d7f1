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
from typing import Any

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
    ],
    np.float32,
)
KERNEL = np.array(
    [
        [1, 0, 0],
        [-2 / 3, -_R / 3, -1 / 3],
        [-2 / 3, _R / 3, -1 / 3],
        [1 / 6, _R / 6, 1 / 3],
        [1 / 6, -_R / 6, 1 / 3],
        [0, 0, 1],
    ],
    np.float32,
)
OUTPUT = np.array(
    [
        [1, 0, 0, 0],
        [1, 1 / _R, 1 / 2, _R / 4],
        [1, -1 / _R, 1 / 2, -_R / 4],
        [1, _R, 2, 2 * _R],
        [1, -_R, 2, -2 * _R],
        [0, 0, 0, 1],
    ],
    np.float32,
)

TILE = OUTPUT.shape[1]
"""Rows of the output that are computed together; the last ones may be cut off."""

# Values of images that are convolved at once, or as many as the kernel has: what lies between the
# steps then stays in the cache. A loop over groups also writes its result once; without one each
# operation that reads it repeats the last sum, in the forward and in the backward pass.
_GROUP_VALUES = 2**17

# Output channels from which the six products of a convolution run in a loop. It compiles in half of
# the time, but copies what each product reads, which takes too long where channels are few.
_LOOP_CHANNELS = 128

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
    most = max(_GROUP_VALUES, kernel.size) // math.prod(x.shape[1:])
    groups = -(-len(x) // max(1, most))
    if groups == 1:
        return convolve_group(x, kernel)
    images = -(-len(x) // groups)
    padded = jnp.pad(x, [(0, groups * images - len(x)), (0, 0), (0, 0), (0, 0)])
    y = lax.map(lambda x: convolve_group(x, kernel), padded.reshape(groups, images, *x.shape[1:]))
    return y.reshape(-1, *y.shape[2:])[: len(x)]


@jax.jit
def kernel_gradient(x: jax.Array, g: jax.Array) -> jax.Array:
    """Gradient of the kernel of `convolution`, (3, 3, I, O).

    Args: x: (B, H, W, I) float32. g: gradient of the output, (B, H, W, O) float32.
    """
    batch, height, width, inputs = x.shape
    x_IHV = x.transpose(3, 1, 2, 0).reshape(inputs, height, width * batch)
    g_HV = g.transpose(1, 2, 0, 3).reshape(height, -1)
    images_PITV = _combine(IMAGE, _image_rows(x_IHV))
    gradients_PTV = _combine(OUTPUT, _tile_rows(g_HV, axis=0))
    pairs = (
        images_PITV.reshape(len(IMAGE), inputs, -1, width, batch),
        gradients_PTV.reshape(len(OUTPUT), -1, width, batch, g.shape[-1]),
    )
    products_PI3O = lax.map(lambda pair: _along_rows(*pair), pairs)[:, :, 0]
    return _combine(KERNEL.T, list(products_PI3O)).swapaxes(1, 2)


def largest_divisor(number: int, most: int) -> int:
    """The largest divisor of `number` that is at most `most`, or 1."""
    return max(n for n in range(1, number + 1) if number % n == 0 and n <= max(1, most))


@jax.jit
def convolve_group(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`convolution` of all images at once."""
    batch, height, width, _ = x.shape
    images_P = _combine(IMAGE, _image_rows(x))
    if kernel.shape[3] < _LOOP_CHANNELS:
        rows_P = _combine(KERNEL, _kernel_rows(kernel))
        products = [_along_rows(image, row) for image, row in zip(images_P, rows_P, strict=True)]
    else:
        products = list(_product_loop(images_P, kernel))
    y = _combine(OUTPUT.T, products, axis=2)
    return y.reshape(batch, -1, width, y.shape[-1])[:, :height]


def _product_loop(images_P: jax.Array, kernel: jax.Array) -> jax.Array:
    """Each product takes the place of its images where it has as many channels."""
    weights_P = jnp.asarray(KERNEL)
    if kernel.shape[2] != kernel.shape[3]:
        return lax.map(lambda pair: _product(pair[0], pair[1], kernel), (images_P, weights_P))
    return lax.fori_loop(
        0,
        len(KERNEL),
        lambda p, buffer_P: buffer_P.at[p].set(_product(buffer_P[p], weights_P[p], kernel)),
        images_P,
    )


def _product(image: jax.Array, weights: jax.Array, kernel: jax.Array) -> jax.Array:
    """With the kernel transformed here, so that a program holds only one of the six at a time."""
    row = _weighted(_kernel_rows(kernel), [weights[k] for k in range(3)])
    return _along_rows(image, row)


def _kernel_rows(kernel: jax.Array) -> list[jax.Array]:
    return [kernel[k : k + 1] for k in range(3)]


def _image_rows(x: jax.Array) -> list[jax.Array]:
    """The six rows that a tile reads, of all tiles, along axis 1."""
    return _tile_rows(x, axis=1, margin=1)


def _tile_rows(x: jax.Array, axis: int, margin: int = 0) -> list[jax.Array]:
    """For each row of a tile, with so many rows more on both sides: that row of all tiles.

    What lies outside of x is zero.
    """
    pads = [(0, 0)] * x.ndim
    pads[axis] = (margin, margin + -x.shape[axis] % TILE)
    x = jnp.pad(x, pads)
    rows = TILE + 2 * margin
    return [
        lax.slice_in_dim(x, row, x.shape[axis] - rows + row + 1, TILE, axis) for row in range(rows)
    ]


def _combine(coefficients: np.ndarray, arrays: Sequence[jax.Array], axis: int = 0) -> jax.Array:
    """For each row of coefficients, the sum of the arrays times it; the rows are a new axis."""
    shape = [-1 if i == axis else 1 for i in range(arrays[0].ndim + 1)]
    expanded = [jnp.expand_dims(array, axis) for array in arrays]
    return _weighted(expanded, [column.reshape(shape) for column in coefficients.T])


def _weighted(arrays: Sequence[jax.Array], weights: Sequence[Any]) -> jax.Array:
    """The sum of the arrays, each times its weight."""
    terms = [weight * array for weight, array in zip(weights, arrays, strict=True)]
    return functools.reduce(jnp.add, terms)
