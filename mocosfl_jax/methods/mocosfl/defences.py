"""MocoSFL's use of the sections in `config/defences.py`: checks, extra gradients, the ledger."""

from collections.abc import Callable

from mocosfl_jax.config.defences import Noise, NoPeek, ResSFL, release_of
from mocosfl_jax.config.fields import Resolved
from mocosfl_jax.config.network import sent_shape
from mocosfl_jax.config.recipe import Facts
from mocosfl_jax.data.partition import ClientImages
from mocosfl_jax.errors import InputError
from mocosfl_jax.learning.losses import LOSSES
from mocosfl_jax.methods.mocosfl.client import ExtraGradient
from mocosfl_jax.models.decoder import doublings, parse_decoder
from mocosfl_jax.privacy import nopeek
from mocosfl_jax.privacy.accounting import epsilon_of
from mocosfl_jax.privacy.release import FULL_BITS, Release
from mocosfl_jax.privacy.simulated import SimulatedAttacker, simulated_decoder
from mocosfl_jax.privacy.together import Together

LATENTS_ONLY = "latents only, no guarantee for the run"
WHOLE_RUN = "whole run"


def check_defences(config: Resolved) -> None:
    """Raises: InputError: a defence that lacks what it needs, or has no effect."""
    _check_noise(config)
    _check_nopeek(config)
    _check_ressfl(config)


def _check_noise(config: Resolved) -> None:
    noise, release = config.section_or_default(Noise), release_of(config)
    if noise.multiplier > 0 and (release is None or release.clip_norm is None):
        allowed = "the noise and its epsilon are measured by config.clip.norm, which is off: set it"
        raise InputError("config.noise.multiplier", noise.multiplier, allowed)


def _check_nopeek(config: Resolved) -> None:
    weight = config.section_or_default(NoPeek).weight
    if not weight:
        return
    _check_trained(config, "config.nopeek.weight", weight)
    images = min(config.images_a_step, config.images_per_client or config.images_a_step)
    if images < nopeek.LEAST_IMAGES:
        allowed = f"a client has {images} images a step, and {nopeek.LEAST_IMAGES} are needed"
        raise InputError("config.nopeek.weight", weight, f"{allowed}: set config.batch_size")


def check_holdings(config: Resolved, partition: ClientImages) -> None:
    """Raises: InputError: a client that takes part has too few images for a defence."""
    weight = config.section_or_default(NoPeek).weight
    if not weight:
        return
    held = partition.sizes[partition.sizes > 0] + (config.mix_batch_size or 0)
    if (fewest := int(held.min())) < nopeek.LEAST_IMAGES:
        allowed = f"a client holds {fewest} images, and {nopeek.LEAST_IMAGES} are needed"
        raise InputError("config.nopeek.weight", weight, f"{allowed}: fewer config.num_clients")


def _check_ressfl(config: Resolved) -> None:
    section = config.section_or_default(ResSFL)
    try:
        parse_decoder(section.decoder)
        if section.alpha:
            doublings(sent_shape(config)[0], config.image_size)
    except ValueError as error:
        raise InputError("config.ressfl.decoder", section.decoder, str(error)) from None
    if not section.alpha:
        return
    _check_trained(config, "config.ressfl.alpha", section.alpha)
    if config.client_state == "stateless":
        lost = "a client's simulated attacker would be lost"
        allowed = f"{lost}: set 'persistent', or config.ressfl.alpha=0"
        raise InputError("config.client_state", config.client_state, allowed)


def _check_trained(config: Resolved, where: str, value: float) -> None:
    if config.client_learning_rate == 0:
        allowed = (
            "clients are frozen (config.client_learning_rate is 0), so it would change nothing"
        )
        raise InputError(where, value, allowed)


def extra_gradient_of(config: Resolved) -> ExtraGradient | None:
    """What a client adds to the gradient that it is sent; None: nothing."""
    parts: list[ExtraGradient] = []
    if weight := config.section_or_default(NoPeek).weight:
        parts.append(nopeek.NoPeek(weight))
    section = config.section_or_default(ResSFL)
    if section.alpha:
        shape, rows = parse_decoder(section.decoder), LOSSES[config.loss].rows
        attacker = SimulatedAttacker(
            decoder=simulated_decoder(shape, config.image_size, rows * config.images_a_step),
            latent_shape=sent_shape(config),
            alpha=section.alpha,
            threshold=section.threshold,
            learning_rate=section.learning_rate,
            warmup=section.warmup,
        )
        parts.append(attacker)
    return parts[0] if len(parts) == 1 else Together(tuple(parts)) if parts else None


def facts(config: Resolved, most_draws: Callable[[], int]) -> Facts:
    """The ledger of the noise, and what evaluation leaves out.

    While clients train, the models that they send at syncs depend on their images too, so epsilon
    says something of the run only where clients are frozen.
    """
    release, noise = release_of(config), config.section_or_default(Noise)
    if release is None:
        return Facts()
    notes = _of_accuracies(release)
    if not noise.multiplier:
        return Facts(notes=notes)
    norm = release.largest_norm()
    assert norm is not None, "there is no noise without clipping"
    released = most_draws() * 2 * LOSSES[config.loss].rows
    epsilon = epsilon_of(release.noise_std / norm, released, noise.delta)
    scope = WHOLE_RUN if config.client_learning_rate == 0 else LATENTS_ONLY
    values = {
        "epsilon": epsilon,
        "delta": noise.delta,
        "epsilon_scope": scope,
        "releases_of_an_image": released,
    }
    ledger = (
        f"epsilon {epsilon:.4g} at delta {noise.delta:g} for one image,"
        f" of which {released} latents are sent at most: {scope}"
    )
    return Facts(values, (ledger, *_not_covered(config), *notes))


def _of_accuracies(release: Release) -> tuple[str, ...]:
    """With which of the stages an encoder is evaluated."""
    stays, notes = release.deterministic(), []
    if stays is not None:
        stages = {
            "clipping": stays.clip_norm is not None,
            "pruning": stays.dropped > 0,
            "rounding": stays.bits < FULL_BITS,
        }
        named = " and ".join(name for name, is_on in stages.items() if is_on)
        notes.append(f"accuracies are of an encoder with {named} of its latents")
    if release.is_random:
        notes.append(
            "accuracies are without noise and random pruning, except where a line names them"
        )
    return tuple(notes)


def _not_covered(config: Resolved) -> tuple[str, ...]:
    """What the epsilon of a whole run leaves out."""
    if config.client_learning_rate != 0:
        return ()
    left_out = ["channel means and stds that are computed from them (set config.mean, config.std)"]
    if config.init_from is not None:
        left_out.append("what the network of config.init_from learned from them")
    return (f"it covers what is sent of the images, not {' or '.join(left_out)}",)
