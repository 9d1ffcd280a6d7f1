"""MoCo V1 and V2 augmentation on the device: jittable, vmappable, float32, no convolutions.

Drawing and applying are apart: `draw_params` makes the random numbers of one view, `apply` is a
deterministic function of image and numbers. The operations follow torchvision's on float tensors
(not on PIL images): RandomResizedCrop with antialiased bilinear filter, ColorJitter,
RandomGrayscale, GaussianBlur, RandomHorizontalFlip, Normalize, in this order.

Reference: Chen et al., "Improved Baselines with Momentum Contrastive Learning" (2020), the
augmentation of MoCo v2; without blur it is the one called V1 here.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from mocosfl_jax.errors import InputError

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)

# One number a channel.
ChannelValues = ArrayLike | Sequence[float]

_CROP_ATTEMPTS = 10
_RATIO_RANGE = (3 / 4, 4 / 3)
_GREY_WEIGHTS = (0.2989, 0.587, 0.114)
_ORDERS = np.array(list(itertools.permutations(range(4))), np.int32)
# Uniform numbers a view uses: area and aspect ratio of each attempt, then one for each other draw.
_OTHER_DRAWS = 12
# Otherwise GPUs multiply matrices in TF32, which has a 10-bit mantissa.
_EXACT = jax.lax.Precision.HIGHEST


@dataclasses.dataclass(frozen=True)
class AugmentConfig:
    """Static settings of the augmentation; hashable, so it can be a static argument of `jit`.

    Attributes:
      size: height and width of a view, pixels.
      min_scale: smallest area of the crop as a part of the image's area; the largest is 1.
      jitter: strengths of brightness, contrast, saturation (factors are uniform in
        [max(0, 1 - s), 1 + s]) and hue (shift uniform in [-s, s] turns, s <= 0.5).
      jitter_prob: probability of the colour jitter.
      grey_prob: probability of a grey view.
      blur_prob: probability of the blur; 0 leaves the blur out of the program.
      blur_sigma: least and greatest standard deviation of the blur, pixels.
      blur_kernel_size: taps of the blur's kernel, odd, at most 2 * size - 1 (reflect padding).
      flip_prob: probability of the horizontal flip.

    Raises:
      InputError: a field is out of its range.
    """

    size: int
    min_scale: float = 0.08
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.4, 0.1)
    jitter_prob: float = 0.8
    grey_prob: float = 0.2
    blur_prob: float = 0.5
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    blur_kernel_size: int = 13
    flip_prob: float = 0.5

    def __post_init__(self) -> None:
        _check("size", self.size, self.size >= 1, "a positive integer")
        _check("min_scale", self.min_scale, 0 < self.min_scale <= 1, "in (0, 1]")
        jitter_fits = len(self.jitter) == 4 and min(self.jitter) >= 0 and self.jitter[HUE] <= 0.5
        _check("jitter", self.jitter, jitter_fits, "four numbers >= 0, the last (hue) <= 0.5")
        for name in ("jitter_prob", "grey_prob", "blur_prob", "flip_prob"):
            value = getattr(self, name)
            _check(name, value, 0 <= value <= 1, "in [0, 1]")
        sigma_fits = len(self.blur_sigma) == 2 and 0 < self.blur_sigma[0] <= self.blur_sigma[1]
        _check("blur_sigma", self.blur_sigma, sigma_fits, "(low, high) with 0 < low <= high")
        kernel_fits = self.blur_kernel_size % 2 == 1 and 1 <= self.blur_kernel_size < 2 * self.size
        if self.blur_prob > 0:
            _check("blur_kernel_size", self.blur_kernel_size, kernel_fits, "odd, <= 2 * size - 1")

    @classmethod
    def for_version(cls, version: str, size: int) -> "AugmentConfig":
        """Settings of the paper: "v2", or "v1", which never blurs.

        The kernel reaches 3 standard deviations of the widest blur (13 taps), or across the view
        where that is smaller.

        Args: version: "v1" or "v2"; size: height and width of a view, pixels.
        Raises: InputError: `version` is neither, or `size` is not positive.
        """
        _check("version", version, version in ("v1", "v2"), '"v1" or "v2"')
        blur_prob = cls.blur_prob if version == "v2" else 0.0
        kernel_size = min(cls.blur_kernel_size, 2 * size - 1)
        return cls(size=size, blur_prob=blur_prob, blur_kernel_size=kernel_size)


class AugmentParams(NamedTuple):
    """Random numbers of one view; all are scalars but `order`."""

    crop_y: jax.Array  # int32, first row of the crop box, pixels
    crop_x: jax.Array  # int32, first column
    crop_h: jax.Array  # int32, rows of the box
    crop_w: jax.Array  # int32, columns of the box
    jitter: jax.Array  # bool, whether the colours are jittered
    order: jax.Array  # int32 (4,), BRIGHTNESS, CONTRAST, SATURATION and HUE in order of use
    brightness: jax.Array  # float32 factor, 1 changes nothing
    contrast: jax.Array  # float32 factor
    saturation: jax.Array  # float32 factor
    hue: jax.Array  # float32 shift, turns of the colour circle
    grey: jax.Array  # bool, whether the view is made grey
    blur: jax.Array  # bool, whether the view is blurred
    sigma: jax.Array  # float32, standard deviation of the blur, pixels
    flip: jax.Array  # bool, whether the view is mirrored


def draw_params(key: jax.Array, height: int, width: int, config: AugmentConfig) -> AugmentParams:
    """Draws the random numbers of one view, all of them from one uniform array.

    Args: key: PRNG key; height, width: of the stored image, pixels; config: static settings.
    Returns: the numbers; equal keys give equal numbers.
    Reference: `get_params` of torchvision's RandomResizedCrop and ColorJitter.
    """
    draws = jax.random.uniform(key, (2 * _CROP_ATTEMPTS + _OTHER_DRAWS,), jnp.float32)
    areas_A, ratios_A, others = jnp.split(draws, (_CROP_ATTEMPTS, 2 * _CROP_ATTEMPTS))
    y, x, brightness, contrast, saturation, hue, jitter, order, grey, blur, sigma, flip = others
    box = _draw_box(areas_A, ratios_A, y, x, height, width, config.min_scale)
    return AugmentParams(
        *box,
        jitter=jitter < config.jitter_prob,
        order=jnp.asarray(_ORDERS)[_below(order, len(_ORDERS))],
        brightness=_about_one(brightness, config.jitter[BRIGHTNESS]),
        contrast=_about_one(contrast, config.jitter[CONTRAST]),
        saturation=_about_one(saturation, config.jitter[SATURATION]),
        hue=_between(hue, -config.jitter[HUE], config.jitter[HUE]),
        grey=grey < config.grey_prob,
        blur=blur < config.blur_prob,
        sigma=_between(sigma, *config.blur_sigma),
        flip=flip < config.flip_prob,
    )


def apply(image_HWC: jax.Array, params: AugmentParams, config: AugmentConfig) -> jax.Array:
    """Makes one view of one image; deterministic.

    The crop is resized in float32 and not rounded back to uint8. The flip is part of the resize:
    it commutes with all that follows. Every operation is computed and its flag selects, so the
    time does not depend on the numbers.

    Args:
      image_HWC: uint8 (H, W, 3), any size.
      params: numbers of this view; the box lies inside the image.
      config: static settings.
    Returns: float32 (size, size, 3) in [0, 1] up to rounding.
    Raises: InputError: `image_HWC` is not uint8 (H, W, 3).
    """
    _check_image(image_HWC)
    planes_CHW = _resized_crop(image_HWC, params, config.size)
    planes_CHW = jnp.where(params.jitter, _colour_jitter(planes_CHW, params), planes_CHW)
    planes_CHW = jnp.where(params.grey, _grey(planes_CHW), planes_CHW)
    if config.blur_prob > 0:
        planes_CHW = _blur(planes_CHW, params, config.blur_kernel_size)
    return jnp.moveaxis(planes_CHW, 0, -1)


def normalise(image: jax.Array, mean: ChannelValues, std: ChannelValues) -> jax.Array:
    """Returns `(image - mean) / std` for each channel.

    Args: image: float32 (..., channels); mean, std: (channels,), in the image's unit.
    """
    per_channel = (1,) * (image.ndim - 1) + (-1,)
    centre = jnp.asarray(mean, jnp.float32).reshape(per_channel)
    scale = jnp.asarray(std, jnp.float32).reshape(per_channel)
    return (image - centre) / scale


def augment(
    key: jax.Array,
    image_HWC: jax.Array,
    config: AugmentConfig,
    mean: ChannelValues,
    std: ChannelValues,
) -> jax.Array:
    """Draws, applies and normalises: one random view of one image.

    Args: key: PRNG key; image_HWC: uint8 (H, W, 3); config: static settings; mean, std: (3,), for
      images in [0, 1].
    Returns: float32 (size, size, 3).
    Raises: InputError: `image_HWC` is not uint8 (H, W, 3).
    """
    _check_image(image_HWC)
    height, width, _ = image_HWC.shape
    params = draw_params(key, height, width, config)
    return normalise(apply(image_HWC, params, config), mean, std)


def two_views(
    keys_B: jax.Array,
    images_BHWC: jax.Array,
    config: AugmentConfig,
    mean: ChannelValues,
    std: ChannelValues,
) -> tuple[jax.Array, jax.Array]:
    """Makes two independent views of each image.

    A view depends on its own key and image only, not on the rest of the batch.

    Args: keys_B: one PRNG key an image; images_BHWC: uint8 (B, H, W, 3); config: static settings;
      mean, std: (3,), for images in [0, 1].
    Returns: the query views and the key views, each float32 (B, size, size, 3).
    Raises: InputError: `images_BHWC` is not uint8 (B, H, W, 3).
    """
    keys_2B = jax.vmap(jax.random.split, out_axes=1)(keys_B)
    views = jax.vmap(lambda key, image: augment(key, image, config, mean, std))
    views_2BHWC = jax.vmap(views, in_axes=(0, None))(keys_2B, images_BHWC)
    return views_2BHWC[0], views_2BHWC[1]


def _check(name: str, value: object, fits: bool, allowed: str) -> None:
    if not fits:
        raise InputError(f"augment.{name}", value, allowed)


def _check_image(image_HWC: jax.Array) -> None:
    found = f"{image_HWC.dtype} {image_HWC.shape}"
    fits = image_HWC.dtype == jnp.uint8 and image_HWC.ndim == 3 and image_HWC.shape[-1] == 3
    _check("image_HWC", found, fits, "one uint8 image of shape (H, W, 3)")


def _between(uniform: jax.Array, low: float, high: float) -> jax.Array:
    return low + (high - low) * uniform


def _about_one(uniform: jax.Array, strength: float) -> jax.Array:
    return _between(uniform, max(0.0, 1 - strength), 1 + strength)


def _below(uniform: jax.Array, bound: jax.Array | int) -> jax.Array:
    """An int32 in [0, bound): float32 uniforms end at 1 - 2^-23, so the product stays below."""
    return jnp.floor(uniform * bound).astype(jnp.int32)


def _draw_box(
    areas_A: jax.Array,
    ratios_A: jax.Array,
    uniform_y: jax.Array,
    uniform_x: jax.Array,
    height: int,
    width: int,
    min_scale: float,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """The crop box (y, x, h, w), int32: the first attempt that fits, else the central box."""
    target_A = height * width * _between(areas_A, min_scale, 1.0)
    aspect_A = jnp.exp(_between(ratios_A, *np.log(_RATIO_RANGE).tolist()))
    w_A = jnp.round(jnp.sqrt(target_A * aspect_A)).astype(jnp.int32)
    h_A = jnp.round(jnp.sqrt(target_A / aspect_A)).astype(jnp.int32)
    fits_A = (w_A > 0) & (w_A <= width) & (h_A > 0) & (h_A <= height)
    first, fits = jnp.argmax(fits_A), jnp.any(fits_A)
    central_h, central_w = _central_box_size(height, width)
    h = jnp.where(fits, h_A[first], central_h)
    w = jnp.where(fits, w_A[first], central_w)
    y = jnp.where(fits, _below(uniform_y, (height - h + 1).astype(jnp.float32)), (height - h) // 2)
    x = jnp.where(fits, _below(uniform_x, (width - w + 1).astype(jnp.float32)), (width - w) // 2)
    return y, x, h, w


def _central_box_size(height: int, width: int) -> tuple[int, int]:
    """torchvision's fallback: the whole image, its longer side cut to the nearest allowed ratio."""
    least, greatest = _RATIO_RANGE
    if width / height < least:
        return round(width / least), width
    if width / height > greatest:
        return height, round(height * greatest)
    return height, width


def _resize_weights(
    start: jax.Array, length: jax.Array, in_size: int, positions_O: jax.Array, out_size: int
) -> jax.Array:
    """(O, in_size) rows of the triangle filter over [start, start + length), each of sum 1.

    The filter is as wide as an output pixel where that is wider than an input pixel: torch's
    `interpolate(mode="bilinear", antialias=True)`.
    """
    pixels_I = jnp.arange(in_size, dtype=jnp.int32) - start
    scale = length.astype(jnp.float32) / out_size
    centres_O = scale * positions_O
    distances_OI = jnp.abs(pixels_I.astype(jnp.float32)[None, :] + 0.5 - centres_O[:, None])
    weights_OI = jnp.maximum(1 - distances_OI / jnp.maximum(scale, 1.0), 0.0)
    inside_I = (pixels_I >= 0) & (pixels_I < length)
    weights_OI = jnp.where(inside_I[None, :], weights_OI, 0.0)
    return weights_OI / jnp.sum(weights_OI, axis=1, keepdims=True)


def _resized_crop(image_HWC: jax.Array, params: AugmentParams, size: int) -> jax.Array:
    """Crops, resizes and flips; float32 (3, size, size) in [0, 1]."""
    height, width, _ = image_HWC.shape
    rows_Y = jnp.arange(size, dtype=jnp.float32) + 0.5
    columns_X = jnp.where(params.flip, size - rows_Y, rows_Y)
    weights_YH = _resize_weights(params.crop_y, params.crop_h, height, rows_Y, size)
    weights_XW = _resize_weights(params.crop_x, params.crop_w, width, columns_X, size)
    planes_CHW = jnp.moveaxis(image_HWC, -1, 0).astype(jnp.float32) / 255
    planes_CHX = jnp.einsum("chw,xw->chx", planes_CHW, weights_XW, precision=_EXACT)
    return jnp.einsum("yh,chx->cyx", weights_YH, planes_CHX, precision=_EXACT)


def _grey(planes_CHW: jax.Array) -> jax.Array:
    """(1, H, W): torchvision's `rgb_to_grayscale`."""
    red, green, blue = _GREY_WEIGHTS
    return (red * planes_CHW[0] + green * planes_CHW[1] + blue * planes_CHW[2])[None]


def _colour_jitter(planes_CHW: jax.Array, params: AugmentParams) -> jax.Array:
    """Brightness, contrast, saturation and hue in the order drawn.

    The hue costs most and is computed once: the three places before its last one and the three
    after its first one are blends, and those not due have the factor 1, which changes nothing.
    """
    hue_place = jnp.argmax(params.order == HUE)
    factors = jnp.stack([params.brightness, params.contrast, params.saturation, params.hue])
    factors = factors[params.order]
    for place in range(3):
        factor = jnp.where(place < hue_place, factors[place], 1.0)
        planes_CHW = _blend(planes_CHW, params.order[place], factor)
    planes_CHW = _shift_hue(planes_CHW, params.hue)
    for place in range(1, 4):
        factor = jnp.where(place > hue_place, factors[place], 1.0)
        planes_CHW = _blend(planes_CHW, params.order[place], factor)
    return planes_CHW


def _blend(planes_CHW: jax.Array, operation: jax.Array, factor: jax.Array) -> jax.Array:
    """Mixes in black, the mean grey or the grey image, for brightness, contrast or saturation."""
    grey_1HW = _grey(planes_CHW)
    mean_part = jnp.where(operation == CONTRAST, 1 - factor, 0.0) * jnp.mean(grey_1HW)
    grey_part_1HW = jnp.where(operation == SATURATION, 1 - factor, 0.0) * grey_1HW
    return jnp.clip(factor * planes_CHW + (mean_part + grey_part_1HW), 0.0, 1.0)


def _shift_hue(planes_CHW: jax.Array, shift: jax.Array) -> jax.Array:
    """Turns the hue by `shift` turns at equal HSV value and chroma.

    Which channel is the greatest is asked by inequalities: a compiler may round the operands of
    `value == red` differently, so that no channel equals the maximum.
    """
    red, green, blue = planes_CHW
    value = jnp.max(planes_CHW, axis=0)
    chroma = value - jnp.min(planes_CHW, axis=0)
    divisor = jnp.where(chroma == 0, 1.0, chroma)
    sixths = jnp.where(green >= blue, 2 + (blue - red) / divisor, 4 + (red - green) / divisor)
    sixths = jnp.where((red >= green) & (red >= blue), (green - blue) / divisor, sixths)
    sixths = sixths + 6 * shift
    return jnp.stack([_hsv_channel(offset, sixths, value, chroma) for offset in (5, 3, 1)])


def _hsv_channel(offset: int, sixths: jax.Array, value: jax.Array, chroma: jax.Array) -> jax.Array:
    """One colour of HSV to RGB: red, green and blue have the offsets 5, 3 and 1."""
    turned = sixths + offset
    place = turned - 6 * jnp.floor(turned / 6)
    return value - chroma * jnp.clip(jnp.minimum(place, 4 - place), 0.0, 1.0)


def _blur(planes_CHW: jax.Array, params: AugmentParams, kernel_size: int) -> jax.Array:
    """Separable Gaussian blur with reflect padding: torchvision's `gaussian_blur`."""
    size = planes_CHW.shape[-1]
    weights_OI = _blur_weights(params.sigma, size, kernel_size // 2)
    weights_OI = jnp.where(params.blur, weights_OI, jnp.eye(size, dtype=jnp.float32))
    planes_CHX = jnp.einsum("chw,xw->chx", planes_CHW, weights_OI, precision=_EXACT)
    return jnp.einsum("yh,chx->cyx", weights_OI, planes_CHX, precision=_EXACT)


def _blur_weights(sigma: jax.Array, size: int, radius: int) -> jax.Array:
    """(O, I) rows of the kernel, the taps beyond an edge folded back about the edge pixel."""
    pixels = jnp.arange(size, dtype=jnp.float32)
    outputs_O1, inputs_1I = pixels[:, None], pixels[None, :]
    last = size - 1
    weights_OI = jnp.zeros((size, size), jnp.float32)
    for place_1I, counts_1I in (
        (inputs_1I, inputs_1I >= 0),
        (-inputs_1I, inputs_1I > 0),
        (2 * last - inputs_1I, inputs_1I < last),
    ):
        offset_OI = jnp.abs(place_1I - outputs_O1)
        tap_OI = jnp.exp(-0.5 * jnp.square(offset_OI / sigma))
        weights_OI += jnp.where(counts_1I & (offset_OI <= radius), tap_OI, 0.0)
    return weights_OI / jnp.sum(weights_OI, axis=1, keepdims=True)
