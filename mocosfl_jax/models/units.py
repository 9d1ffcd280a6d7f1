"""Layers that the units of any backbone are made of: convolution and norm.

Sources: Wu & He 2018 (arXiv 1803.08494) for GroupNorm, Qiao et al. 2019 (arXiv 1903.10520) for
weight standardisation; 4 channels a group are those of the MocoSFL paper's code.
"""

import math
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from mocosfl_jax.models.conv import conv

CHANNELS_PER_GROUP = 4

MOST_CHANNELS = 2**31 - 1
"""That a unit may give its output: the largest size of an array's axis."""


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
    """GroupNorm with 4 channels a group, computed in float32; the output has the dtype of x.

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
