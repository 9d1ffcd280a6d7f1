"""VGG-11, 13, 16 and 19 with GroupNorm and weight standardisation, for small images.

Unit k is entry k of the configuration's list: a convolution, or a pooling without parameters. The
fully connected layers are left out: the features are the global average.

Source: Simonyan & Zisserman 2015 (arXiv 1409.1556), table 1, configurations A, B, D and E.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mocosfl_jax.models.contract import Backbone, Network, Unit
from mocosfl_jax.models.units import ConvUnit, check_width

_GROWTH = (1, 2, 4, 8, 8)
"""Channels of the five stages, over `width`; a pooling follows each stage."""


class MaxPool(nn.Module):
    """The largest of each 2x2 pixels; (B, H, W, c) to (B, ceil(H/2), ceil(W/2), c).

    An odd row or column at the end makes a window of its own, so that maps of one pixel stay. Equal
    largest pixels share the gradient; after a ReLU they are zeros, which pass none on.
    """

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        _, height, width, _ = x_BHWC.shape
        x = jnp.pad(x_BHWC, [(0, 0), (0, height % 2), (0, width % 2), (0, 0)], mode="edge")
        # Of four slices: the gradient of XLA's pooling takes a CPU three times as long.
        rows = jnp.maximum(x[:, 0::2], x[:, 1::2])
        return jnp.maximum(rows[:, :, 0::2], rows[:, :, 1::2])


def vgg(convs_per_stage: tuple[int, ...]) -> Backbone:
    """A row of the table of backbones. Args: convs_per_stage: convolutions of the five stages."""
    return Backbone(units=partial(_units, convs_per_stage), defaults=_defaults, check=_check)


def _units(convs_per_stage: tuple[int, ...], network: Network) -> tuple[Unit, ...]:
    dtype = jnp.dtype(network.compute_dtype)
    units: list[Unit] = []
    for growth, convs in zip(_GROWTH, convs_per_stage, strict=True):
        units += [ConvUnit(network.width * growth, 3, 1, dtype, use_bias=True)] * convs
        units.append(MaxPool())
    return tuple(units)


def _defaults(image_size: int) -> Mapping[str, Any]:
    """None of the optional fields is read."""
    return {}


def _check(network: Network) -> None:
    """Raises: NetworkError: the width is not allowed."""
    check_width(network.width, max(_GROWTH))
