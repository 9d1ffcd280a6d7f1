"""The two forms of a 3x3 convolution on a CPU: seconds of each product, and their errors.

    python -m benchmarks.conv [--images 20] [--repeats 9]

The forms are XLA's convolution and Winograd's (`mocosfl_jax/models/winograd.py`), for the shapes of
ResNet-18 and of the narrow network at 32 pixels, with so many images as a part of a step has. They
take turns. Seconds are those of all cores together (`process_time`), which other work on the
machine changes little, over the number of cores; medians. The error is the largest against float64,
over the largest value.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from mocosfl_jax.models import conv as conv_module

SHAPES = [(32, 64), (16, 128), (8, 256), (4, 512), (16, 32), (8, 64), (4, 128)]
"""Side of the map and channels."""
PRODUCTS = ("forward", "kernel gradient")
FORMS = {"direct": False, "winograd": True}


class Inputs(NamedTuple):
    """x: rectified, as a layer's input is. kernel. g: gradient of the output. float64."""

    x: np.ndarray
    kernel: np.ndarray
    g: np.ndarray


def inputs(size: int, channels: int, images: int) -> Inputs:
    rng = np.random.default_rng(0)
    shape = (images, size, size, channels)
    x = np.maximum(rng.normal(size=shape), 0)
    kernel = rng.normal(size=(3, 3, channels, channels)) / np.sqrt(9 * channels)
    arrays = (x, kernel, rng.normal(size=shape))
    return Inputs(*(a.astype(np.float32).astype(np.float64) for a in arrays))


def exact(product: str, x: np.ndarray, kernel: np.ndarray, g: np.ndarray) -> np.ndarray:
    """In float64, by the definition."""
    height, width = x.shape[1:3]
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    out = np.zeros_like(g if product == "forward" else kernel)
    for i, j in np.ndindex(3, 3):
        window = padded[:, i : i + height, j : j + width]
        if product == "forward":
            out += window @ kernel[i, j]
        else:
            out[i, j] = np.tensordot(window, g, ((0, 1, 2), (0, 1, 2)))
    return out


def compiled(product: str, winograd: bool, arrays: Inputs) -> Callable[[], jax.Array]:
    """The product by one form; the gradient of the images is a forward product."""
    x, kernel, g = (jnp.asarray(a, jnp.float32) for a in arrays)

    def forward(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return conv_module.conv(x, kernel)

    def kernel_gradient(x: jax.Array, g: jax.Array) -> jax.Array:
        return jax.vjp(lambda k: conv_module.conv(x, k), kernel)[1](g)[0]

    function, args = (forward, (x, kernel)) if product == "forward" else (kernel_gradient, (x, g))
    with mock.patch.object(conv_module, "_suits_winograd", lambda *_: winograd):
        program = jax.jit(function).lower(*args).compile()
    return lambda: program(*args)


def measure(size: int, channels: int, images: int, repeats: int) -> list[dict[str, object]]:
    """A row for each product."""
    arrays, rows = inputs(size, channels, images), []
    for product in PRODUCTS:
        expected = exact(product, *arrays)
        runs = {name: compiled(product, form, arrays) for name, form in FORMS.items()}
        row: dict[str, object] = {"product": product, "size": size, "channels": channels}
        for name, run in runs.items():
            error = np.abs(np.asarray(run()) - expected).max() / np.abs(expected).max()
            row[f"error_{name}"] = float(error)
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(repeats):
            for name, run in runs.items():
                started = time.process_time()
                jax.block_until_ready(run())
                seconds[name].append((time.process_time() - started) / (os.cpu_count() or 1))
        row |= {f"ms_{name}": 1e3 * statistics.median(taken) for name, taken in seconds.items()}
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    print("product, side, channels: ms direct, ms winograd, ratio; errors, ratio")
    for size, channels in SHAPES:
        for row in measure(size, channels, args.images, args.repeats):
            ms, errors = (
                [float(str(row[f"{kind}_{form}"])) for form in FORMS] for kind in ("ms", "error")
            )
            print(
                f"{row['product']}, {size}, {channels}: "
                f"{ms[0]:.2f}, {ms[1]:.2f}, {ms[1] / ms[0]:.2f}; "
                f"{errors[0]:.1e}, {errors[1]:.1e}, {errors[1] / errors[0]:.1f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
