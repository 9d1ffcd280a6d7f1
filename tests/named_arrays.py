"""Pseudo-random arrays that are functions of their name: the inputs behind the golden files.

The golden files hold results only. Their weights and images are recomputed here from a name and a
shape, so any implementation that agrees on names starts from bit-identical numbers.
"""

import zlib

import numpy as np


def normal(name: str, shape: tuple[int, ...], scale: float = 1.0) -> np.ndarray:
    """float32 normal draws times `scale`, from PCG64 seeded with the CRC-32 of the name."""
    generator = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))
    return (scale * generator.standard_normal(shape)).astype(np.float32)


def parameter(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A weight: kernels have deviation 1/sqrt(fan_in), scales are near 1, biases near 0.

    Raises: ValueError: the name's last part is none of these.
    """
    kind = name.rpartition("/")[2]
    if kind == "kernel":
        return normal(name, shape, float(1.0 / np.sqrt(np.prod(shape[:-1]))))
    if kind == "scale":
        return (1 + normal(name, shape, 0.1)).astype(np.float32)
    if kind == "bias":
        return normal(name, shape, 0.1)
    raise ValueError(f"{name!r} is no kernel, scale or bias")
