"""Sections for what a client does so that its latents reveal less; all off by default.

The stages on what is sent follow one another: clip, prune, noise, quantize. Evaluation and the
exported encoder apply them too, but for noise and random pruning.
"""

from dataclasses import dataclass
from typing import Annotated

from mocosfl_jax.config.fields import Config
from mocosfl_jax.config.ranges import ABOVE_0, AT_LEAST_0, FROM_0_BELOW_1, Range, one_of
from mocosfl_jax.privacy.release import FULL_BITS, PRUNINGS, Release

OFF_OR_FINITE = Range(
    "0 (off), or a number from 1e-6 to 1e6, is needed", lambda x: x == 0 or 1e-6 <= x <= 1e6
)
BITS = Range("4, 8, 16 or 32 (off) is needed", lambda x: x in (4, 8, 16, FULL_BITS))
WITHIN_0_AND_1 = Range("a number above 0 and below 1 is needed", lambda x: 0 < x < 1)
SSIMS = Range("a number from 0 to 1 is needed", lambda x: 0 <= x <= 1)


@dataclass(frozen=True)
class Clip:
    """The fields `config.clip.NAME`."""

    # L2 norm to which the latents of an image are scaled down where theirs is larger. 0: off.
    norm: Annotated[float, OFF_OR_FINITE] = 0.0


@dataclass(frozen=True)
class Prune:
    """The fields `config.prune.NAME`."""

    # Which latents of an image are dropped: `top_k`, all but the largest in magnitude, of which a
    # bitmap is sent (with noise all are sent: it would show which ones they are); `random`, by a
    # mask whose key both sides know, the others divided by 1 - fraction.
    kind: Annotated[str, one_of(PRUNINGS)] = "top_k"
    # Share of an image's latents that is dropped, in [0, 1). 0: off.
    fraction: Annotated[float, FROM_0_BELOW_1] = 0.0


@dataclass(frozen=True)
class Noise:
    """The fields `config.noise.NAME`."""

    # Standard deviation of Gaussian noise on each latent that is sent, over `clip.norm`, which must
    # be set. 0: off.
    multiplier: Annotated[float, OFF_OR_FINITE] = 0.0
    # Delta at which a run's epsilon is reported where there is noise.
    delta: Annotated[float, WITHIN_0_AND_1] = 1e-5


@dataclass(frozen=True)
class Quantize:
    """The fields `config.quantize.NAME`."""

    # Bits of a latent on its way up: 4, 8 or 16, evenly spaced between the smallest and the largest
    # of an image, which are sent too. Gradients that come down are float32. 32: off.
    bits: Annotated[int, BITS] = FULL_BITS


@dataclass(frozen=True)
class NoPeek:
    """The fields `config.nopeek.NAME` (Vepakomma et al. 2020)."""

    # Weight in a client's loss of the distance correlation between its images and its query
    # latents; it takes at least 4 images a client and step. 0: off.
    weight: Annotated[float, AT_LEAST_0] = 0.0


@dataclass(frozen=True)
class ResSFL:
    """The fields `config.ressfl.NAME`: training against a simulated attacker (Li et al. 2022)."""

    # Weight of max(0, SSIM - threshold) in a client's loss (paper: 1 to 4), SSIM that of the images
    # which the client's own decoder makes of its query latents. 0: off.
    alpha: Annotated[float, AT_LEAST_0] = 0.0
    # SSIM of the attacker up to which the term is 0 (paper: 0.5 or 0.6).
    threshold: Annotated[float, SSIMS] = 0.6
    # The decoder: `res_normN{blocks}C{channels}` or `conv_normN{blocks}C{channels}`.
    decoder: str = "res_normN4C64"
    # Adam's rate at the start; it falls to a fifth at 30, 60 and 80 % of the training.
    learning_rate: Annotated[float, ABOVE_0] = 1e-3
    # Share of the training, from its start and in [0, 1), during which the term is left out: the
    # decoder already learns, and the network trains as it would without (not in the paper). For
    # pre-training, which may otherwise collapse; clients send unprotected latents in that time.
    warmup: Annotated[float, FROM_0_BELOW_1] = 0.0


DEFENCES = {
    "clip": Clip,
    "prune": Prune,
    "noise": Noise,
    "quantize": Quantize,
    "nopeek": NoPeek,
    "ressfl": ResSFL,
}
"""By name, the sections of a method whose clients send latents."""

EVALUATED = ("clip", "prune", "quantize")
"""Those on which an encoder's answers depend."""


def release_of(config: Config) -> Release | None:
    """What is done to latents before they are sent; None: nothing.

    Args: config: passed `check_fields`.
    """
    norm, bits = config.section_or_default(Clip).norm, config.section_or_default(Quantize).bits
    prune, noise = config.section_or_default(Prune), config.section_or_default(Noise)
    if not norm and not prune.fraction and bits == FULL_BITS:
        return None
    return Release(
        clip_norm=norm or None,
        dropped=prune.fraction,
        pruning=prune.kind,
        noise_std=noise.multiplier * norm,
        bits=bits,
    )
