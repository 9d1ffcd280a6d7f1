"""CIFAR-style ResNets with GroupNorm and weight standardisation, as lists of units.

A backbone is a tuple of unit constructors: unit 0 is the stem, every other unit one residual
block. Cutting the network at depth `cut` is `units[:cut]` for the client and `units[cut:]` for the
server; unit k keeps its name `unit{k}` on whichever side it runs.

Sources: He et al. 2016 (arXiv 1512.03385) for the blocks, Wu & He 2018 (arXiv 1803.08494) for
GroupNorm, Qiao et al. 2019 (arXiv 1903.10520) for weight standardisation; the stems without pooling
and 4 channels a group are those of the MocoSFL paper's code.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from mocosfl_jax.models.conv import conv

Unit = Callable[..., nn.Module]
"""Constructor of one unit; called with `name=`."""

CHANNELS_PER_GROUP = 4


class Architecture(NamedTuple):
    """Residual blocks a stage, and whether they are bottleneck blocks (expansion 4)."""

    blocks_per_stage: tuple[int, ...]
    bottleneck: bool

    @property
    def expansion(self) -> int:
        return BottleneckBlock.expansion if self.bottleneck else BasicBlock.expansion


class StemShape(NamedTuple):
    """Kernel size and stride of the first convolution."""

    kernel_size: int
    stride: int


ARCHITECTURES = {
    "resnet18": Architecture((2, 2, 2, 2), bottleneck=False),
    "resnet34": Architecture((3, 4, 6, 3), bottleneck=False),
    "resnet50": Architecture((3, 4, 6, 3), bottleneck=True),
    "resnet101": Architecture((3, 4, 23, 3), bottleneck=True),
    "resnet152": Architecture((3, 8, 36, 3), bottleneck=True),
}

STEMS = {
    "3x3s1": StemShape(3, 1),
    "3x3s2": StemShape(3, 2),
    "7x7s2": StemShape(7, 2),
}


def fan_in_uniform(key: jax.Array, shape: Sequence[int], dtype: DTypeLike = jnp.float32):
    """U(-1/sqrt(fan_in), 1/sqrt(fan_in)) for an HWIO kernel, PyTorch's default."""
    bound = math.prod(shape[:-1]) ** -0.5
    return jax.random.uniform(key, tuple(shape), dtype, -bound, bound)


def standardize(kernel_HWIO: jax.Array, epsilon: float = 1e-5) -> jax.Array:
    """Zero mean and unit sample deviation (ddof 1) per output channel, over (H, W, in)."""
    centred = kernel_HWIO - kernel_HWIO.mean(axis=(0, 1, 2), keepdims=True)
    deviation = jnp.std(kernel_HWIO, axis=(0, 1, 2), ddof=1, keepdims=True)
    return centred / (deviation + epsilon)


class StandardizedConv(nn.Module):
    """Weight-standardised convolution without bias, padding k // 2.

    Attributes: features: output channels; kernel_size: k, odd; stride: 1 or 2; dtype: of the
    computation (the kernel is float32 and is standardised in float32).
    """

    features: int
    kernel_size: int = 3
    stride: int = 1
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        shape = (self.kernel_size, self.kernel_size, x_BHWC.shape[-1], self.features)
        kernel = self.param("kernel", fan_in_uniform, shape)
        return conv(x_BHWC, standardize(kernel).astype(self.dtype), self.stride)


def group_norm(x_BHWC: jax.Array, name: str) -> jax.Array:
    """GroupNorm with 4 channels a group, computed in float32, given back in the dtype of x.

    The variance is that of the centred values. mean(x^2) - mean(x)^2 is a third faster on a CPU,
    but its rounding doubles the distance to the parity tests' float64 trajectories.
    """
    norm = nn.GroupNorm(
        num_groups=None,
        group_size=CHANNELS_PER_GROUP,
        use_fast_variance=False,
        epsilon=1e-5,
        dtype=jnp.float32,
        name=name,
    )
    return norm(x_BHWC.astype(jnp.float32)).astype(x_BHWC.dtype)


class Stem(nn.Module):
    """Unit 0: convolution, GroupNorm, ReLU; (B, H, W, 3) to (B, H/stride, W/stride, features)."""

    features: int
    kernel_size: int
    stride: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        x = StandardizedConv(self.features, self.kernel_size, self.stride, self.dtype, name="conv")(
            x_BHWC.astype(self.dtype)
        )
        return nn.relu(group_norm(x, "norm"))


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


def resnet_units(
    *,
    blocks_per_stage: Sequence[int],
    bottleneck: bool,
    width: int,
    stem: StemShape,
    dtype: DTypeLike = jnp.float32,
) -> tuple[Unit, ...]:
    """The backbone as unit constructors, in order.

    Args:
      blocks_per_stage: residual blocks of each stage; stage s has width * 2**s channels and starts
        with stride 2 (the first with 1).
      bottleneck: bottleneck blocks instead of basic ones.
      width: channels of the stem, a multiple of 4.
      stem: kernel size and stride of the stem.
      dtype: of the computation; parameters are float32.
    """
    block = BottleneckBlock if bottleneck else BasicBlock
    units: list[Unit] = [partial(Stem, width, stem.kernel_size, stem.stride, dtype)]
    for stage, blocks in enumerate(blocks_per_stage):
        for index in range(blocks):
            stride = 2 if stage > 0 and index == 0 else 1
            units.append(partial(block, width * 2**stage, stride, dtype))
    return tuple(units)
