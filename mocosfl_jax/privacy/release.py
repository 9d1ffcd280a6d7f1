"""What a client does to its latents before they leave it: clip, prune, noise, round, in that order.

Each is off unless it is asked for, and works on one image at a time, a row of latents. Sources:
Abadi et al. 2016 (arXiv 1607.00133) for clipping and noise, Bengio et al. 2013 (arXiv 1308.3432)
for the straight-through gradient.
"""

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp

PRUNINGS = ("top_k", "random")

FULL_BITS = 32
"""Bits of a value that is not rounded."""


class Sent(NamedTuple):
    """What the released latents of B images are on the wire; `jax.ShapeDtypeStruct`s.

    values: those that are not dropped, packed if they are rounded. kept: which ones these are, a
    bit each. limits: the smallest and the largest value of each image. None where nothing is sent.
    """

    values: jax.ShapeDtypeStruct
    kept: jax.ShapeDtypeStruct | None
    limits: jax.ShapeDtypeStruct | None


@dataclass(frozen=True)
class Release:
    """The stages that a client's latents pass; hashable.

    clip_norm: an image whose latents have a larger L2 norm is scaled down to this one; None: no
      clipping.
    dropped: share of an image's latents that are set to 0, in [0, 1).
    pruning: which ones. `top_k`: the smallest in magnitude. `random`: drawn for each image with a
      key that client and server share; the others are divided by 1 - dropped.
    noise_std: standard deviation of Gaussian noise on all that is sent, 0 for none. On latents of
      which the largest were kept it falls on the others too: which ones they are is no secret
      otherwise, so `top_k` saves no bytes with noise.
    bits: of a value. Below 32 an image's values are rounded to the nearest of 2**bits steps from
      the smallest to the largest; dropped ones stay 0. The gradient passes the rounding unchanged.
    """

    clip_norm: float | None = None
    dropped: float = 0.0
    pruning: str = "top_k"
    noise_std: float = 0.0
    bits: int = FULL_BITS

    @property
    def is_random(self) -> bool:
        """Whether what is released is random."""
        return self.noise_std > 0 or (self.dropped > 0 and self.pruning == "random")

    def deterministic(self) -> "Release | None":
        """The same without what is random, which is what evaluation applies; None: nothing."""
        prunes = self.dropped > 0 and self.pruning == "top_k"
        rest = replace(self, noise_std=0.0, dropped=self.dropped if prunes else 0.0)
        nothing = rest.clip_norm is None and not prunes and rest.bits == FULL_BITS
        return None if nothing else rest

    def largest_norm(self) -> float | None:
        """The L2 norm that no image exceeds before the noise; None: there is no such bound."""
        if self.clip_norm is None:
            return None
        scaled = self.dropped > 0 and self.pruning == "random"
        return self.clip_norm / (1 - self.dropped) if scaled else self.clip_norm

    def __call__(self, latents_BHWC: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """What the server gets instead of these latents, of the same shape and dtype.

        Args: key: needed where the release `is_random`.
        """
        prune_key, noise_key = (None, None) if key is None else jax.random.split(key)
        x_BF = latents_BHWC.reshape(len(latents_BHWC), -1).astype(jnp.float32)
        kept_BF = None
        if self.clip_norm is not None:
            x_BF = clip(x_BF, self.clip_norm)
        if self.dropped > 0:
            x_BF, kept_BF = self._prune(x_BF, prune_key)
        if self.noise_std > 0:
            assert noise_key is not None, "noise is drawn with a key"
            noise_BF = self.noise_std * jax.random.normal(noise_key, x_BF.shape)
            if self.pruning == "top_k":
                kept_BF = None
            x_BF += noise_BF if kept_BF is None else jnp.where(kept_BF, noise_BF, 0.0)
        if self.bits < FULL_BITS:
            x_BF = quantize(x_BF, self.bits, kept_BF)
        return x_BF.reshape(latents_BHWC.shape).astype(latents_BHWC.dtype)

    def _prune(self, x_BF: jax.Array, key: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        """The pruned rows, and which values were kept."""
        number = kept_values(x_BF.shape[1], self.dropped)
        if self.pruning == "top_k":
            kept_BF = largest(jnp.abs(jax.lax.stop_gradient(x_BF)), number)
            return jnp.where(kept_BF, x_BF, 0.0), kept_BF
        assert key is not None, "a random mask is drawn with a key"
        kept_BF = largest(jax.random.uniform(key, x_BF.shape), number)
        return jnp.where(kept_BF, x_BF / (1 - self.dropped), 0.0), kept_BF

    def on_wire(self, latents: jax.ShapeDtypeStruct) -> Sent:
        """Shapes of what travels for the latents (B, h, w, c) that `__call__` gives.

        A random mask does not travel: both sides know its key.
        """
        images, size = latents.shape[0], math.prod(latents.shape[1:])
        number, bitmap = size, False
        if self.dropped > 0 and (self.pruning == "random" or self.noise_std == 0):
            number, bitmap = kept_values(size, self.dropped), self.pruning == "top_k"

        def a_row(length: int, dtype: jax.typing.DTypeLike) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((images, length), dtype)

        rounds = self.bits < FULL_BITS
        packed = a_row(-(-number * self.bits // 8), jnp.uint8)
        return Sent(
            values=packed if rounds else a_row(number, latents.dtype),
            kept=a_row(-(-size // 8), jnp.uint8) if bitmap else None,
            limits=a_row(2, jnp.float32) if rounds else None,
        )


def kept_values(size: int, dropped: float) -> int:
    """How many of an image's latents are kept, at least one.

    Args: size: their number. dropped: the share that is not kept.
    """
    return max(1, round(size * (1 - dropped)))


def clip(x_BF: jax.Array, norm: float) -> jax.Array:
    """Rows scaled down to an L2 norm, where theirs is larger. Differentiable, at 0 as well."""
    squared_B1 = jnp.sum(jnp.square(x_BF), axis=1, keepdims=True)
    factor_B1 = norm * jax.lax.rsqrt(jnp.maximum(squared_B1, norm**2))
    return jnp.where(squared_B1 > norm**2, x_BF * factor_B1, x_BF)


def largest(score_BF: jax.Array, number: int) -> jax.Array:
    """Which values are among the so many largest of their row, (B, F) bool; of equal ones the
    first."""
    _, index_BK = jax.lax.top_k(score_BF, number)
    nothing_BF = jnp.zeros_like(score_BF, bool)
    return jnp.put_along_axis(nothing_BF, index_BK, True, axis=1, inplace=False)


def quantize(x_BF: jax.Array, bits: int, kept_BF: jax.Array | None = None) -> jax.Array:
    """Rows rounded to the nearest of 2**bits evenly spaced values between their smallest and their
    largest one; the gradient is that of no rounding.

    Args: kept_BF: bool, values that count, at least one a row; the others stay. None: all do.
    """
    exact_BF = jax.lax.stop_gradient(x_BF)
    counts_BF = jnp.ones_like(exact_BF, bool) if kept_BF is None else kept_BF
    low_B1 = jnp.min(exact_BF, axis=1, keepdims=True, where=counts_BF, initial=jnp.inf)
    high_B1 = jnp.max(exact_BF, axis=1, keepdims=True, where=counts_BF, initial=-jnp.inf)
    step_B1 = (high_B1 - low_B1) / (2**bits - 1)
    code_BF = jnp.round((exact_BF - low_B1) / jnp.where(step_B1 > 0, step_B1, 1.0))
    rounded_BF = jnp.where(counts_BF, low_B1 + code_BF * step_B1, exact_BF)
    return rounded_BF + (x_BF - exact_BF)  # the bracket is 0 and has the gradient of x
