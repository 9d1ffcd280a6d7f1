"""A procedural data set: ten classes of small RGB images, each filled with one motif.

An image is filled with rows of copies of its class's motif (discs, rings, bars, ...), light on
dark or dark on light, over a smooth field of colour, with noise. Only the shape of the motif tells
the class: colours, contrast, scale, position, tilt and noise are drawn alike for all classes. So
neighbours among raw pixels, or among features of an untrained network, say little about the class,
while crops of one image share little but the motif: contrastive learning finds it.

The images are part of the interface: they depend on nothing but the split and the size, and are
made with exactly rounded operations only, hence the same on every machine.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mocosfl_jax.data.dataset import Dataset, DatasetInfo, Prepared, Request, Split
from mocosfl_jax.data.fingerprint import fingerprint
from mocosfl_jax.randomness import Stream, host_rng

NUM_TRAIN = 10_000
NUM_TEST = 2_000
SIZE = 32
CLASS_NAMES = (
    "disc",
    "ring",
    "plus",
    "cross",
    "frame",
    "triangle",
    "horizontal bar",
    "vertical bar",
    "diagonal bar",
    "checker",
)

Array = NDArray[np.float32]
_F = np.float32
_SEED = 0  # of the data set, not of a run
_LATTICE = 8  # cells of the lattice each way; it repeats beyond, outside of the image
_COLOUR_GRID = 4  # knots of the colour field each way
_BATCH = 100  # images drawn at once: their arrays fit the cache


def prepare(request: Request) -> Prepared:
    """The data set at `image_size`, or at 32 pixels."""
    size = request.image_size or SIZE
    info = DatasetInfo(
        name=request.dataset,
        num_train=NUM_TRAIN,
        num_test=NUM_TEST,
        image_size=size,
        num_classes=len(CLASS_NAMES),
        class_names=CLASS_NAMES,
        fingerprint=fingerprint("synthetic", NUM_TRAIN, NUM_TEST, CLASS_NAMES),
    )

    def load() -> Dataset:
        train, test = (Split(*synthetic_split(name, size)) for name in ("train", "test"))
        return Dataset(train, test, CLASS_NAMES, info)

    return Prepared(info, load, lambda: _labels(NUM_TRAIN))


def synthetic_split(split: str, size: int = SIZE) -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
    """Draws a split; another size shows the same scenes at another resolution.

    Args:
        split: "train" (10,000 images) or "test" (2,000).
        size: side of the images in pixels.

    Returns:
        Images uint8 (n, size, size, 3) and labels int32 (n,): 0, 1, ..., 9, 0, 1, ...
    """
    num_images = {"train": NUM_TRAIN, "test": NUM_TEST}[split]
    split_id = ("train", "test").index(split)
    scene_rng = host_rng(_SEED, Stream.DATASET, split_id, 0)
    noise_rng = host_rng(_SEED, Stream.DATASET, split_id, 1)
    images = np.empty((num_images, size, size, 3), np.uint8)
    for class_id, motif in enumerate(_MOTIFS):
        of_class = images[class_id :: len(CLASS_NAMES)]
        for start in range(0, len(of_class), _BATCH):
            batch = of_class[start : start + _BATCH]
            batch[...] = _draw(_random_scenes(scene_rng, len(batch)), motif, size, noise_rng)
    return images, _labels(num_images)


def _labels(num_images: int) -> NDArray[np.int32]:
    return np.arange(num_images, dtype=np.int32) % len(CLASS_NAMES)


# ------------------------------------------------------------------------------------- motifs
# Signed distances to the outline (negative inside) on a square that reaches from -1 to 1.


def _box(x: Array, y: Array, half_width: float, half_height: float) -> Array:
    return np.maximum(np.abs(x) - _F(half_width), np.abs(y) - _F(half_height))


def _disc(x: Array, y: Array) -> Array:
    return np.sqrt(x * x + y * y) - _F(0.75)


def _ring(x: Array, y: Array) -> Array:
    return np.abs(np.sqrt(x * x + y * y) - _F(0.72)) - _F(0.2)


def _plus(x: Array, y: Array) -> Array:
    return np.minimum(_box(x, y, 0.95, 0.24), _box(x, y, 0.24, 0.95))


def _frame(x: Array, y: Array) -> Array:
    return np.abs(_box(x, y, 0.68, 0.68)) - _F(0.19)


def _triangle(x: Array, y: Array) -> Array:
    return np.maximum(np.abs(x) * _F(0.8660254) + y * _F(0.5), -y) - _F(0.5)


def _bar(x: Array, y: Array) -> Array:
    return _box(x, y, 1.0, 0.3)


def _checker(x: Array, y: Array) -> Array:
    near, far = np.minimum(np.abs(x), np.abs(y)), np.maximum(np.abs(x), np.abs(y))
    return np.maximum(far - _F(0.95), np.where(x * y > 0, -near, near))


def _turned(motif: Callable[[Array, Array], Array]) -> Callable[[Array, Array], Array]:
    """The motif turned by 45 degrees."""
    root = _F(0.70710678)
    return lambda x, y: motif((x + y) * root, (x - y) * root)


_MOTIFS: tuple[Callable[[Array, Array], Array], ...] = (
    _disc,
    _ring,
    _plus,
    _turned(_plus),
    _frame,
    _triangle,
    _bar,
    lambda x, y: _bar(y, x),
    _turned(_bar),
    _checker,
)

# ------------------------------------------------------------------------------------- scenes


class _Scenes(NamedTuple):
    """What is drawn at random for n images; lengths in 1/32 of the side, colours in [0, 1].

    cell: (n,) side of a lattice cell. turn: (n, 2) cosine and sine of the lattice's tilt.
    origin: (n, 2) column and row of the image's centre, in cells. slide: (n, rows) shift of each
      row of the lattice along itself, in cells.
    copies: (n, rows, columns, 8) of each copy: offset from the cell's centre in cells (x, y);
      cosine and sine of its tilt, over its radius in cells; that radius; what it adds to red, green
      and blue.
    field: (n, knots, knots, 3) colours. noise: (n,) amplitude.
    """

    cell: Array
    turn: Array
    origin: Array
    slide: Array
    copies: Array
    field: Array
    noise: Array


def _random_scenes(rng: np.random.Generator, n: int) -> _Scenes:
    def uniform(low: float, high: float, *shape: int) -> Array:
        return rng.random(shape, dtype=np.float32) * _F(high - low) + _F(low)

    def turn(half_tangent: float, *shape: int) -> tuple[Array, Array]:
        """Cosine and sine of angles up to 2 atan(half_tangent), without a transcendental."""
        t = uniform(-half_tangent, half_tangent, *shape)
        return (1 - t * t) / (1 + t * t), 2 * t / (1 + t * t)

    def tinted() -> Array:
        """A colour an image, half grey."""
        return uniform(0, 0.5, n, 1, 1, 3) + uniform(0, 0.5, n, 1, 1, 1)

    lattice = (n, _LATTICE, _LATTICE)
    radius = uniform(0.4, 0.5, *lattice)
    offset = uniform(-1, 1, *lattice, 2) * (_F(0.5) - radius)[..., None]
    cosine, sine = turn(0.1, *lattice)
    sign = np.where(uniform(0, 1, n, 1, 1, 1) < 0.5, _F(-1), _F(1))
    tint = _F(0.7) * tinted() + _F(0.3) * uniform(0, 1, *lattice, 3)
    shift = sign * uniform(0.45, 0.64, *lattice, 1) + _F(0.2) * tint
    polar = np.stack([cosine / radius, sine / radius, radius], axis=-1)
    knots = uniform(0, 1, n, _COLOUR_GRID, _COLOUR_GRID, 3)
    return _Scenes(
        cell=uniform(8, 14, n),
        turn=np.stack(turn(0.15, n), axis=-1),
        origin=uniform(0, 1, n, 2) + _F(_LATTICE // 2),
        slide=uniform(0, 1, n, _LATTICE),
        copies=np.concatenate([offset, polar, shift], axis=-1),
        field=_F(0.7) * tinted() + _F(0.3) * knots,
        noise=uniform(0, 0.1, n),
    )


def _draw(
    scenes: _Scenes,
    motif: Callable[[Array, Array], Array],
    size: int,
    noise_rng: np.random.Generator,
) -> NDArray[np.uint8]:
    """Renders the scenes, uint8 (n, size, size, 3)."""
    n = len(scenes.cell)
    cell = scenes.cell[:, None, None] * _F(size / SIZE)  # pixels
    cosine, sine = scenes.turn[:, 0, None, None], scenes.turn[:, 1, None, None]
    centred = np.arange(size, dtype=np.float32) - _F((size - 1) / 2)
    x, y = centred[None, None, :], centred[None, :, None]
    v = (x * sine + y * cosine) / cell + scenes.origin[:, 1, None, None]
    row = np.floor(v)
    row_id = np.arange(0, n * _LATTICE, _LATTICE)[:, None, None] + row.astype(np.int64) % _LATTICE
    u = (x * cosine - y * sine) / cell + scenes.origin[:, 0, None, None]
    u += scenes.slide.ravel()[row_id]
    column = np.floor(u)
    copy_id = row_id * _LATTICE + column.astype(np.int64) % _LATTICE
    copy = scenes.copies.reshape(-1, 8)[copy_id]
    u, v = u - column - _F(0.5) - copy[..., 0], v - row - _F(0.5) - copy[..., 1]
    cosine, sine = copy[..., 2], copy[..., 3]
    distance = motif(u * cosine - v * sine, u * sine + v * cosine)
    cover = np.clip(_F(0.5) - distance * copy[..., 4] * cell, 0, 1)[..., None]
    field = _interpolate(_interpolate(scenes.field, size, 1), size, 2)
    image = field + cover * (copy[..., 5:] - field * _F(0.2))
    noise = noise_rng.random(image.shape, dtype=np.float32) - _F(0.5)
    image += noise * scenes.noise[:, None, None, None]
    return np.clip(image * _F(255) + _F(0.5), 0, 255).astype(np.uint8)


def _interpolate(knots: Array, size: int, axis: int) -> Array:
    """Piecewise linear from the knots of an axis to `size` samples."""
    num_knots = knots.shape[axis]
    place = np.arange(size, dtype=np.float32) * _F((num_knots - 1) / max(size - 1, 1))
    left = np.minimum(place.astype(np.int32), num_knots - 2)
    part = np.expand_dims(place - left.astype(np.float32), tuple(range(1, knots.ndim - axis)))
    return knots.take(left, axis) * (1 - part) + knots.take(left + 1, axis) * part
