"""Decoders from latents back to images: what a model inversion attack trains.

`res_normN{n}C{c}`, of residual blocks, is the attacker of the MocoSFL paper and of ResSFL (Li et
al., CVPR 2022, "ResSFL: a resistance transfer framework"); `conv_normN{n}C{c}` is plain.
"""

import math
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from mocosfl_jax.models.conv import conv, conv_transpose2x
from mocosfl_jax.models.norms import MaskedBatchNorm
from mocosfl_jax.models.units import fan_in_uniform, standardize

Init = Callable[[jax.Array, Sequence[int]], jax.Array]
"""An initialiser, from a PRNG key and the shape of an HWIO kernel."""


class DecoderShape(NamedTuple):
    """The rule behind a decoder's name.

    kind: `res_norm` or `conv_norm`. blocks: n. channels: c, of all maps within.
    """

    kind: str
    blocks: int
    channels: int


def parse_decoder(text: str) -> DecoderShape:
    """`res_normN{n}C{c}` or `conv_normN{n}C{c}`, n from 0 and c from 1, each of at most 4 digits.

    Raises: ValueError: another text.
    """
    match = re.fullmatch(r"(res_norm|conv_norm)N(0|[1-9]\d{0,3})C([1-9]\d{0,3})", text)
    if match is None:
        names = "res_normN<blocks>C<channels> or conv_normN<blocks>C<channels>"
        raise ValueError(f"{names} with 0 to 9999 blocks and 1 to 9999 channels is needed")
    return DecoderShape(match[1], int(match[2]), int(match[3]))


def doublings(latent_size: int, image_size: int) -> int:
    """How often the side of a latent's maps is doubled to be that of the image.

    Raises: ValueError: no number of times makes it so.
    """
    times = (image_size // latent_size).bit_length() - 1
    if times < 0 or latent_size << times != image_size:
        allowed = f"maps of {latent_size} pixels cannot be doubled up to images of {image_size}"
        raise ValueError(allowed)
    return times


def fan_in_uniform_bias(key: jax.Array, kernel_shape: Sequence[int]) -> jax.Array:
    """U(-1/sqrt(fan_in), 1/sqrt(fan_in)), (O,), PyTorch's default."""
    bound = math.prod(kernel_shape[:-1]) ** -0.5
    return jax.random.uniform(key, (kernel_shape[-1],), jnp.float32, -bound, bound)


def zero_bias(key: jax.Array, kernel_shape: Sequence[int]) -> jax.Array:
    """Zeros, (O,)."""
    return jnp.zeros((kernel_shape[-1],), jnp.float32)


class Decoder(nn.Module):
    """From latents to images; see `parse_decoder` for the kinds.

    Layers, in order: the first one, from the latent's channels to c; n of c to c; two that double
    the map while it is smaller than the image, or are like the others; further ones that double it;
    one from c to 3. ReLU after each, and a sigmoid at the end. A layer is a residual block, or a
    convolution with its norm; one that doubles the map is a transposed convolution with its norm.
    Names: `layer{k}/{norm0,conv1,norm1,conv2,shortcut_conv,shortcut_norm}` of a block, else
    `layer{k}/{conv,norm}`.

    Attributes:
      shape: from the decoder's name. image_size: side of the images in pixels.
      norm: `batch`: BatchNorm, with running statistics in `batch_stats`. `group`, for batches too
        small for statistics: GroupNorm with max(1, channels // 4) groups, or the next smaller
        number that divides the channels, and weight-standardised convolutions, transposed ones
        excepted.
      kernel_init, bias_init: of all convolutions, both from the shape of the kernel.
      row_axes: mesh axes over which the rows of a batch are spread, for a BatchNorm.
    """

    shape: DecoderShape
    image_size: int
    norm: Literal["batch", "group"] = "batch"
    kernel_init: Init = fan_in_uniform
    bias_init: Init = fan_in_uniform_bias
    row_axes: tuple[str, ...] = ()

    @nn.compact
    def __call__(self, latents_BHWC: jax.Array, mask_B: jax.Array, train: bool) -> jax.Array:
        """Pixels in [0, 1], (B, S, S, 3) float32.

        Args:
          latents_BHWC: (B, h, w, c), of any float type.
          mask_B: bool, rows that enter the statistics of a BatchNorm in training.
          train: whether a BatchNorm takes those of the batch; then `batch_stats` is mutable.
        Raises: ValueError: the latents cannot be doubled up to the image.
        """
        style = _Style(self.norm, self.kernel_init, self.bias_init, self.row_axes)
        rows = _Rows(mask_B, train)
        doubled = doublings(latents_BHWC.shape[1], self.image_size)
        between = _Block if self.shape.kind == "res_norm" else _Plain
        kinds: list[Callable[..., nn.Module]] = [between] * (1 + self.shape.blocks)
        kinds += [partial(_Plain, doubles=True)] * doubled + [between] * max(0, 2 - doubled)
        x = latents_BHWC.astype(jnp.float32)
        for index, kind in enumerate(kinds):
            x = nn.relu(kind(self.shape.channels, style, name=f"layer{index}")(x, rows))
        return nn.sigmoid(between(3, style, name=f"layer{len(kinds)}")(x, rows))


class _Style(NamedTuple):
    """What the layers of a decoder have in common; see `Decoder`."""

    norm: str
    kernel_init: Init
    bias_init: Init
    row_axes: tuple[str, ...]


class _Rows(NamedTuple):
    """What a norm needs to know of a batch; see `Decoder.__call__`."""

    mask_B: jax.Array
    train: bool


class _Block(nn.Module):
    """Norm, ReLU, convolution, twice; plus the input, through a convolution if channels differ."""

    features: int
    style: _Style

    @nn.compact
    def __call__(self, x: jax.Array, rows: _Rows) -> jax.Array:
        y = nn.relu(_norm(self.style, x, rows, "norm0"))
        y = _Convolution(self.features, self.style, name="conv1")(y)
        y = nn.relu(_norm(self.style, y, rows, "norm1"))
        y = _Convolution(self.features, self.style, name="conv2")(y)
        if x.shape[-1] != self.features:
            x = _Convolution(self.features, self.style, size=1, name="shortcut_conv")(x)
            x = _norm(self.style, x, rows, "shortcut_norm")
        return x + y


class _Plain(nn.Module):
    """Convolution and norm; `doubles`: the convolution is transposed and doubles the map."""

    features: int
    style: _Style
    doubles: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, rows: _Rows) -> jax.Array:
        x = _Convolution(self.features, self.style, doubles=self.doubles, name="conv")(x)
        return _norm(self.style, x, rows, "norm")


class _Convolution(nn.Module):
    """3x3 with bias, or 1x1 without."""

    features: int
    style: _Style
    size: int = 3
    doubles: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (self.size, self.size, x.shape[-1], self.features)
        kernel = self.param("kernel", self.style.kernel_init, shape)
        if self.doubles:
            x = conv_transpose2x(x, kernel)
        else:
            x = conv(x, standardize(kernel) if self.style.norm == "group" else kernel)
        if self.size == 1:
            return x
        return x + self.param("bias", self.style.bias_init, shape).reshape(1, 1, 1, -1)


def _norm(style: _Style, x: jax.Array, rows: _Rows, name: str) -> jax.Array:
    if style.norm == "batch":
        return MaskedBatchNorm(style.row_axes, name=name)(x, rows.mask_B, rows.train)
    channels = x.shape[-1]
    groups = max(n for n in range(1, max(1, channels // 4) + 1) if channels % n == 0)
    return nn.GroupNorm(groups, epsilon=1e-5, use_fast_variance=False, name=name)(x)
