"""The bottleneck pair `C{c}S{s}`: the client shrinks its latents, the server grows them back.

Plain convolutions (no weight standardisation) with bias, ReLU after each. S1: one 3x3 convolution a
side; S2: one of stride 2 a side (transposed on the server); S4: two of them a side. Source: the
ResSFL bottleneck of the MocoSFL paper's code (Li et al., CVPR 2022 and ICLR 2023).
"""

import re
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from mocosfl_jax.models.conv import conv, conv_transpose2x


class BottleneckShape(NamedTuple):
    """Channels of the transmitted latent, and by how much each side of its maps shrinks."""

    channels: int
    stride: int

    @property
    def layers(self) -> int:
        """Convolutions a side."""
        return 2 if self.stride == 4 else 1


def parse_bottleneck(text: str) -> BottleneckShape | None:
    """`C{c}S{s}` with s in 1, 2, 4; `none` gives None.

    Raises: ValueError: another text.
    """
    if text.lower() == "none":
        return None
    match = re.fullmatch(r"C([1-9]\d*)S([124])", text)
    if match is None:
        raise ValueError("none or C<channels>S<1, 2 or 4>, for example C4S2, is needed")
    return BottleneckShape(int(match[1]), int(match[2]))


class _Layer(nn.Module):
    """One 3x3 convolution with bias and ReLU; `transposed` doubles the map, stride 2 halves it."""

    features: int
    stride: int
    transposed: bool
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        shape = (3, 3, x_BHWC.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.xavier_uniform(), shape, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
        kernel, bias = kernel.astype(self.dtype), bias.astype(self.dtype)
        x = x_BHWC.astype(self.dtype)
        y = conv_transpose2x(x, kernel) if self.transposed else conv(x, kernel, self.stride)
        return nn.relu(y + bias.reshape(1, 1, 1, -1))


class BottleneckEncoder(nn.Module):
    """Client side: (B, h, w, c) to (B, h/s, w/s, shape.channels)."""

    shape: BottleneckShape
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for index in range(self.shape.layers):
            stride = min(self.shape.stride, 2)
            x = _Layer(self.shape.channels, stride, False, self.dtype, name=f"conv{index + 1}")(x)
        return x


class BottleneckDecoder(nn.Module):
    """Server side: (B, h/s, w/s, shape.channels) to (B, h, w, features)."""

    shape: BottleneckShape
    features: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for index in range(self.shape.layers):
            features = self.features if index + 1 == self.shape.layers else self.shape.channels
            transposed = self.shape.stride > 1
            x = _Layer(features, 1, transposed, self.dtype, name=f"conv{index + 1}")(x)
        return x
