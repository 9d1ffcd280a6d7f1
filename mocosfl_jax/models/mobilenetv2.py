"""MobileNetV2 with GroupNorm and weight standardisation, for images of 32 pixels and more.

Unit 0 is the stem, units 1 to 17 are inverted residual blocks, unit 18 is the last convolution.
Three blocks have stride 2, so that a map has an eighth of the image's side at the end: the stem and
the first stage of 24 channels, of stride 2 on ImageNet, keep the size.

Source: Sandler et al. 2018 (arXiv 1801.04381), table 2; strides and the projected shortcuts of
blocks of stride 1 whose channels change are those of the MocoSFL paper's code.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from mocosfl_jax.models.contract import Backbone, Network, Unit
from mocosfl_jax.models.units import (
    ConvUnit,
    StandardizedConv,
    StandardizedDepthwiseConv,
    check_width,
    group_norm,
)

STEM, LAST = 32, 1280
"""Channels of the first and the last unit at width multiplier 1, at which `width` is 32."""


class Stage(NamedTuple):
    """A row of the paper's table: blocks of equal channels, the first of them with `stride`."""

    expansion: int
    channels: int
    blocks: int
    stride: int


STAGES = (
    Stage(1, 16, 1, 1),
    Stage(6, 24, 2, 1),
    Stage(6, 32, 3, 2),
    Stage(6, 64, 4, 2),
    Stage(6, 96, 3, 1),
    Stage(6, 160, 3, 2),
    Stage(6, 320, 1, 1),
)


class InvertedResidual(nn.Module):
    """1x1 convolution to `expansion` times the channels, 3x3 depthwise one, 1x1 to `features`.

    (B, H, W, c) to (B, ceil(H/stride), ceil(W/stride), features); no ReLU at the end. Where the
    stride is 1 the input is added, projected where channels change.
    """

    features: int
    expansion: int
    stride: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        def pointwise(x: jax.Array, features: int, conv: str, norm: str) -> jax.Array:
            return group_norm(StandardizedConv(features, 1, 1, self.dtype, name=conv)(x), norm)

        hidden = self.expansion * x_BHWC.shape[-1]
        y = nn.relu(pointwise(x_BHWC, hidden, "conv1", "norm1"))
        y = StandardizedDepthwiseConv(self.stride, self.dtype, name="conv2")(y)
        y = nn.relu(group_norm(y, "norm2"))
        y = pointwise(y, self.features, "conv3", "norm3")
        if self.stride > 1:
            return y
        if x_BHWC.shape[-1] == self.features:
            return y + x_BHWC
        return y + pointwise(x_BHWC, self.features, "shortcut_conv", "shortcut_norm")


def channels(base: int, width: int) -> int:
    """Channels of a block that has `base` of them at multiplier 1, where the multiplier is
    `width` / 32: the nearest multiple of 8, or the next one if that is below 0.9 of the product.

    Source: `_make_divisible` of the authors' code.
    """
    product = base * width
    nearest = max(8, (product + 4 * STEM) // (8 * STEM) * 8)
    return nearest + 8 if 10 * nearest * STEM < 9 * product else nearest


def _units(network: Network) -> tuple[Unit, ...]:
    width, dtype = network.width, jnp.dtype(network.compute_dtype)
    units: list[Unit] = [ConvUnit(width, 3, 1, dtype)]
    for stage in STAGES:
        for index in range(stage.blocks):
            stride = stage.stride if index == 0 else 1
            features = channels(stage.channels, width)
            units.append(InvertedResidual(features, stage.expansion, stride, dtype))
    units.append(ConvUnit(channels(LAST, max(width, STEM)), 1, 1, dtype))
    return tuple(units)


def _defaults(image_size: int) -> Mapping[str, Any]:
    """None of the optional fields is read."""
    return {}


def _check(network: Network) -> None:
    """Raises: NetworkError: the width is not allowed."""
    check_width(network.width, LAST // STEM)


MOBILENETV2 = Backbone(units=_units, defaults=_defaults, check=_check, width=STEM)
"""The row of the table of backbones."""
