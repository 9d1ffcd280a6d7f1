"""What the units of any backbone are made of: convolutions, norm, and the unit of one of each.

Sources: Wu & He 2018 (arXiv 1803.08494) for GroupNorm, Qiao et al. 2019 (arXiv 1903.10520) for
weight standardisation; 4 channels a group are those of the MocoSFL paper's code.
"""

import math
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from mocosfl_jax.models.contract import NetworkError
from mocosfl_jax.models.conv import conv
from mocosfl_jax.models.depthwise import depthwise_conv

CHANNELS_PER_GROUP = 4
_EPSILON = 1e-5

MOST_CHANNELS = 2**31 - 1
"""That a unit may give its output: the largest size of an array's axis."""


def check_width(width: int, growth: int) -> None:
    """Args: growth: channels of the widest unit's output, over `width`.

    Raises: NetworkError: a width that GroupNorm does not allow, or that is absurdly large.
    """
    if width % CHANNELS_PER_GROUP:
        raise NetworkError("width", f"a multiple of {CHANNELS_PER_GROUP} is needed")
    most = MOST_CHANNELS // growth
    if width > most:
        allowed = f"the widest unit has {growth} times as many channels: 4 to {most}"
        raise NetworkError("width", allowed)


def fan_in_uniform(
    key: jax.Array, shape: Sequence[int], dtype: DTypeLike = jnp.float32
) -> jax.Array:
    """U(-1/sqrt(fan_in), 1/sqrt(fan_in)) for an HWIO kernel, PyTorch's default."""
    bound = math.prod(shape[:-1]) ** -0.5
    return jax.random.uniform(key, tuple(shape), dtype, -bound, bound)


def standardize(kernel_HWIO: jax.Array, epsilon: float = 1e-5) -> jax.Array:
    """Zero mean and unit sample std (ddof 1) per output channel, over (H, W, in)."""
    centred = kernel_HWIO - kernel_HWIO.mean(axis=(0, 1, 2), keepdims=True)
    std = jnp.std(kernel_HWIO, axis=(0, 1, 2), ddof=1, keepdims=True)
    return centred / (std + epsilon)


class StandardizedConv(nn.Module):
    """Weight-standardised convolution, padding k // 2.

    Attributes: features: output channels; kernel_size: k, odd; stride: 1 or 2; dtype: of the
    computation (the kernel is float32 and is standardised in float32); use_bias: whether one is
    added to each channel.
    """

    features: int
    kernel_size: int = 3
    stride: int = 1
    dtype: DTypeLike = jnp.float32
    use_bias: bool = False

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        shape = (self.kernel_size, self.kernel_size, x_BHWC.shape[-1], self.features)
        kernel = self.param("kernel", fan_in_uniform, shape)
        y = conv(x_BHWC, standardize(kernel).astype(self.dtype), self.stride)
        if not self.use_bias:
            return y
        bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
        return y + bias.astype(self.dtype).reshape(1, 1, 1, -1)


DEPTHWISE_SIZE = 3
"""Side of the kernels of `StandardizedDepthwiseConv`."""


class StandardizedDepthwiseConv(nn.Module):
    """Weight-standardised 3x3 convolution of each channel by itself, without bias, padding 1.

    Its kernel is (3, 3, 1, C). Attributes: stride: 1 or 2; dtype: of the computation.
    """

    stride: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        shape = (DEPTHWISE_SIZE, DEPTHWISE_SIZE, 1, x_BHWC.shape[-1])
        kernel = self.param("kernel", fan_in_uniform, shape)
        return depthwise_conv(x_BHWC, standardize(kernel).astype(self.dtype), self.stride)


class ConvUnit(nn.Module):
    """Convolution, GroupNorm, ReLU; (B, H, W, c) to (B, ceil(H/stride), ceil(W/stride), features).

    Attributes: those of `StandardizedConv`.
    """

    features: int
    kernel_size: int
    stride: int
    dtype: DTypeLike
    use_bias: bool = False

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        conv = StandardizedConv(
            self.features, self.kernel_size, self.stride, self.dtype, self.use_bias, name="conv"
        )
        return nn.relu(group_norm(conv(x_BHWC.astype(self.dtype)), "norm"))


def group_norm(x_BHWC: jax.Array, name: str) -> jax.Array:
    """GroupNorm with 4 channels a group, computed in float32; the output has the dtype of x.

    The variance is that of the centred values. mean(x^2) - mean(x)^2 is a third faster on a CPU,
    but its rounding doubles the distance to the parity tests' float64 trajectories.
    """
    if jax.default_backend() == "cpu" and x_BHWC.dtype == jnp.float32:
        return _ChannelwiseGroupNorm(name=name)(x_BHWC)
    norm = nn.GroupNorm(
        num_groups=None,
        group_size=CHANNELS_PER_GROUP,
        use_fast_variance=False,
        epsilon=_EPSILON,
        dtype=jnp.float32,
        name=name,
    )
    return norm(x_BHWC.astype(jnp.float32)).astype(x_BHWC.dtype)


class _ChannelwiseGroupNorm(nn.Module):
    """The same as `flax.linen.GroupNorm`, with sums that a CPU runs fast.

    Pixels are summed channel by channel, along the innermost axis of the layout, and only those
    sums group by group. Flax sums over the pixels and the four channels of a group at once.
    """

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        channels = x_BHWC.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (channels,), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (channels,), jnp.float32)
        centred = x_BHWC - _group_mean(x_BHWC)
        factor = jax.lax.rsqrt(_group_mean(jnp.square(centred)) + _EPSILON)
        return centred * (factor * scale.reshape(1, 1, 1, -1)) + bias.reshape(1, 1, 1, -1)


GROUP_NORMS = (nn.GroupNorm, _ChannelwiseGroupNorm)
"""Modules that `group_norm` applies."""


def _group_mean(x_BHWC: jax.Array) -> jax.Array:
    """Mean over the pixels and channels of a group, for each of its channels, (B, 1, 1, C)."""
    by_channel_BC = x_BHWC.mean(axis=(1, 2))
    by_group_BG = by_channel_BC.reshape(len(x_BHWC), -1, CHANNELS_PER_GROUP).mean(axis=-1)
    return jnp.repeat(by_group_BG, CHANNELS_PER_GROUP, axis=-1)[:, None, None, :]
