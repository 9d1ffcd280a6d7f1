"""How near reconstructed images come to the originals."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from numpy.typing import NDArray

from mocosfl_jax.learning.ssim import ssim

_SMALLEST = 1e-10  # mean squared error that still counts in the PSNR, which is 100 dB there

_AT_ONCE = 256


class Quality(NamedTuple):
    """Of each image, (n,) float32, of pixels in [0, 1].

    mse: mean squared error. ssim: structural similarity. psnr: peak signal-to-noise ratio in dB,
    -10 log10(mse), at most 100.
    """

    mse: NDArray[np.float32]
    ssim: NDArray[np.float32]
    psnr: NDArray[np.float32]

    def summary(self) -> dict[str, dict[str, float]]:
        """Mean and standard deviation over the images, by name."""
        return {
            name: {
                "mean": float(np.mean(values, dtype=np.float64)),
                "std": float(np.std(values, dtype=np.float64)),
            }
            for name, values in self._asdict().items()
        }


def quality(answers_BHWC: ArrayLike, originals_BHWC: ArrayLike) -> Quality:
    """Args: both float32 in [0, 1]."""
    mse, similarity = jax.device_get(_errors(answers_BHWC, originals_BHWC))
    return Quality(mse, similarity, -10 * np.log10(np.maximum(mse, np.float32(_SMALLEST))))


def quality_of_one(answer_HWC: NDArray[np.float32], images_nHWC: NDArray[np.uint8]) -> Quality:
    """Of an attacker that gives one answer to all; a few images at a time."""
    starts = range(0, len(images_nHWC), _AT_ONCE)
    parts = [images_nHWC[start : start + _AT_ONCE] for start in starts]
    found = [quality(np.broadcast_to(answer_HWC, part.shape), pixels(part)) for part in parts]
    return joined(found)


def pixels(images_nHWC: NDArray[np.uint8]) -> NDArray[np.float32]:
    """In [0, 1]."""
    return images_nHWC.astype(np.float32) / np.float32(255)


def joined(parts: Sequence[Quality]) -> Quality:
    """Of all their images, in order."""
    return Quality(*map(np.concatenate, zip(*parts, strict=True)))


@jax.jit
def _errors(answers: jax.Array, originals: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jnp.square(answers - originals).mean(axis=(1, 2, 3)), ssim(answers, originals)
