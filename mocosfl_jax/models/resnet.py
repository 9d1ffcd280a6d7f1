"""CIFAR-style ResNets with GroupNorm and weight standardisation.

Unit 0 is the stem, every other unit is one residual block.

Sources: He et al. 2016 (arXiv 1512.03385) for the blocks; the stems without pooling are those of
the MocoSFL paper's code.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from mocosfl_jax.models.contract import Backbone, Network, NetworkError, Unit
from mocosfl_jax.models.units import ConvUnit, StandardizedConv, check_width, group_norm

MOST_STAGES, MOST_BLOCKS = 8, 100
"""ResNet-152 has 4 and 50; each stage halves the image, and each block takes time to compile."""


class StemShape(NamedTuple):
    """Kernel size and stride of the first convolution."""

    kernel_size: int
    stride: int


STEMS = {
    "3x3s1": StemShape(3, 1),
    "3x3s2": StemShape(3, 2),
    "7x7s2": StemShape(7, 2),
}


class _Residual(nn.Module):
    """What both blocks share: the sum with a shortcut that is projected where the shape changes."""

    features: int
    stride: int
    dtype: DTypeLike
    expansion = 1

    def conv_norm(
        self, x: jax.Array, suffix: str, features: int, kernel_size: int, stride: int
    ) -> jax.Array:
        """Convolution and norm named `conv{suffix}` and `norm{suffix}`."""
        x = StandardizedConv(features, kernel_size, stride, self.dtype, name=f"conv{suffix}")(x)
        return group_norm(x, f"norm{suffix}")

    def add_shortcut(self, x: jax.Array, residual: jax.Array) -> jax.Array:
        """relu(residual + shortcut(x))."""
        if x.shape != residual.shape:
            x = StandardizedConv(
                residual.shape[-1], 1, self.stride, self.dtype, name="shortcut_conv"
            )(x)
            x = group_norm(x, "shortcut_norm")
        return nn.relu(residual + x)


class BasicBlock(_Residual):
    """Two 3x3 convolutions; (B, H, W, c) to (B, H/stride, W/stride, features)."""

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        y = nn.relu(self.conv_norm(x_BHWC, "1", self.features, 3, self.stride))
        y = self.conv_norm(y, "2", self.features, 3, 1)
        return self.add_shortcut(x_BHWC, y)


class BottleneckBlock(_Residual):
    """1x1, 3x3 (strided), 1x1 convolutions; output has 4 * features channels."""

    expansion = 4

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        y = nn.relu(self.conv_norm(x_BHWC, "1", self.features, 1, 1))
        y = nn.relu(self.conv_norm(y, "2", self.features, 3, self.stride))
        y = self.conv_norm(y, "3", self.features * self.expansion, 1, 1)
        return self.add_shortcut(x_BHWC, y)


def resnet(
    blocks_per_stage: tuple[int, ...], block: type[BasicBlock | BottleneckBlock]
) -> Backbone:
    """A row of the table of backbones.

    Args:
      blocks_per_stage: residual blocks of each stage where the config sets none.
      block: the class of all residual blocks.
    """
    return Backbone(
        units=partial(_units, block),
        defaults=partial(_defaults, blocks_per_stage),
        check=partial(_check, block.expansion),
        expansion=block.expansion,
    )


def _units(block: type[BasicBlock | BottleneckBlock], network: Network) -> tuple[Unit, ...]:
    """The stem and the blocks; `width` is a multiple of 4.

    Stage s has width * 2**s channels and starts with stride 2, the first stage with stride 1.
    """
    assert network.stem is not None and network.blocks_per_stage is not None
    dtype, stem = jnp.dtype(network.compute_dtype), STEMS[network.stem]
    units: list[Unit] = [ConvUnit(network.width, stem.kernel_size, stem.stride, dtype)]
    for stage, blocks in enumerate(network.blocks_per_stage):
        for index in range(blocks):
            stride = 2 if stage > 0 and index == 0 else 1
            units.append(block(network.width * 2**stage, stride, dtype))
    return tuple(units)


def _defaults(blocks_per_stage: tuple[int, ...], image_size: int) -> Mapping[str, Any]:
    return {"blocks_per_stage": blocks_per_stage, "stem": _default_stem(image_size)}


def _default_stem(image_size: int) -> str:
    if image_size >= 128:
        return "7x7s2"
    return "3x3s2" if image_size == 64 else "3x3s1"


def _check(expansion: int, network: Network) -> None:
    """Raises: NetworkError: widths that GroupNorm does not allow, or an absurdly large network."""
    assert network.blocks_per_stage is not None
    blocks = network.blocks_per_stage
    if len(blocks) > MOST_STAGES or sum(blocks) > MOST_BLOCKS:
        allowed = f"at most {MOST_STAGES} stages with {MOST_BLOCKS} blocks in all are needed"
        raise NetworkError("blocks_per_stage", allowed)
    check_width(network.width, 2 ** (len(blocks) - 1) * expansion)
