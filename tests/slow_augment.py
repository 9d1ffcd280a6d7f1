"""The augmentation, slowly: float64 NumPy and Python loops, an image at a time."""

import colorsys
import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from mocosfl_jax.data import augment as aug

GREY = np.array([0.2989, 0.587, 0.114])


def resize_line(line: np.ndarray, size: int) -> np.ndarray:
    """Antialiased bilinear resize along axis 0, one output pixel at a time."""
    scale = len(line) / size
    support = max(scale, 1.0)
    out = []
    for o in range(size):
        centre = (o + 0.5) * scale
        weights = [max(0.0, 1 - abs(i + 0.5 - centre) / support) for i in range(len(line))]
        out.append(sum(w * x for w, x in zip(weights, line, strict=True)) / sum(weights))
    return np.array(out)


def crop_oracle(image: np.ndarray, y: int, x: int, h: int, w: int, size: int) -> np.ndarray:
    box = image[y : y + h, x : x + w].astype(np.float64) / 255
    return resize_line(resize_line(box, size).swapaxes(0, 1), size).swapaxes(0, 1)


def mix(image: np.ndarray, other: np.ndarray | float, factor: float) -> np.ndarray:
    return np.clip(factor * image + (1 - factor) * other, 0, 1)


def hue_oracle(image: np.ndarray, shift: float) -> np.ndarray:
    out = np.empty_like(image)
    for y, x in np.ndindex(image.shape[:2]):
        hue, saturation, value = colorsys.rgb_to_hsv(*image[y, x])
        out[y, x] = colorsys.hsv_to_rgb((hue + shift) % 1.0, saturation, value)
    return out


def jitter_oracle(
    image: np.ndarray,
    order: Sequence[int],
    brightness: float,
    contrast: float,
    saturation: float,
    hue: float,
) -> np.ndarray:
    for operation in order:
        grey = (image @ GREY)[..., None]
        if operation == aug.BRIGHTNESS:
            image = mix(image, 0.0, brightness)
        elif operation == aug.CONTRAST:
            image = mix(image, grey.mean(), contrast)
        elif operation == aug.SATURATION:
            image = mix(image, grey, saturation)
        else:
            image = hue_oracle(image, hue)
    return image


def blur_oracle(image: np.ndarray, sigma: float, kernel_size: int) -> np.ndarray:
    radius = kernel_size // 2
    taps = [math.exp(-0.5 * (t / sigma) ** 2) for t in range(-radius, radius + 1)]
    padded = np.pad(image, ((radius, radius), (radius, radius), (0, 0)), mode="reflect")
    out = np.zeros_like(image)
    for y, x in np.ndindex(image.shape[:2]):
        for dy, dx in itertools.product(range(kernel_size), repeat=2):
            out[y, x] += taps[dy] * taps[dx] * padded[y + dy, x + dx]
    return out / sum(taps) ** 2


def apply_oracle(
    image: np.ndarray, params: aug.AugmentParams, config: aug.AugmentConfig
) -> np.ndarray:
    """All of `apply`, step by step in torchvision's order."""
    p: Any = aug.AugmentParams(*(np.asarray(value).tolist() for value in params))
    view = crop_oracle(image, p.crop_y, p.crop_x, p.crop_h, p.crop_w, config.size)
    if p.jitter:
        view = jitter_oracle(view, p.order, p.brightness, p.contrast, p.saturation, p.hue)
    if p.grey:
        view = np.repeat((view @ GREY)[..., None], 3, axis=-1)
    if p.blur and config.blur_prob > 0:
        view = blur_oracle(view, p.sigma, config.blur_kernel_size)
    return view[:, ::-1] if p.flip else view


def box_oracle(
    rng: np.random.Generator, height: int, width: int, min_scale: float
) -> tuple[int, int, int, int]:
    """torchvision's ten attempts, with draws of NumPy; returns y, x, h, w."""
    for _ in range(10):
        area = height * width * rng.uniform(min_scale, 1)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(0, height - h + 1)), int(rng.integers(0, width - w + 1)), h, w
    h, w = height, width
    if width / height < 3 / 4:
        h = round(width / (3 / 4))
    elif width / height > 4 / 3:
        w = round(height * (4 / 3))
    return (height - h) // 2, (width - w) // 2, h, w
