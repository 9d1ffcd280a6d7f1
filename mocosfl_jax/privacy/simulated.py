"""ResSFL's attacker, simulated by each client (Li et al., CVPR 2022, arXiv 2205.04007).

The client trains a decoder against its own latents, as a server that inverts them would, and moves
its model away from what that decoder sees.
"""

from dataclasses import dataclass
from typing import Any, Literal, cast

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax

from mocosfl_jax.learning.sgd import sgd_update
from mocosfl_jax.learning.ssim import ssim
from mocosfl_jax.models.decoder import Decoder, DecoderShape, zero_bias
from mocosfl_jax.models.split import bytes_of

LEAST_ROWS = 20
"""Rows of a client from which batch statistics make sense; below, a decoder has GroupNorm."""

MILESTONES, DROP = (0.3, 0.6, 0.8), 0.2
"""Shares of the training after which the attacker's learning rate falls by this factor."""

_ADAM = optax.scale_by_adam()
_XAVIER = nn.initializers.xavier_uniform()  # one object, so that equal decoders are equal

Params = Any
"""Pytree of float32 arrays."""


def simulated_decoder(shape: DecoderShape, image_size: int, rows: int) -> Decoder:
    """The decoder of one client, initialised as ResSFL does.

    Args: shape: of `parse_decoder`. image_size: side in pixels. rows: query latents a step.
    """
    norm: Literal["batch", "group"] = "batch" if rows >= LEAST_ROWS else "group"
    return Decoder(shape, image_size, norm, kernel_init=_XAVIER, bias_init=zero_bias)


class AttackerState(flax.struct.PyTreeNode):
    """One client's attacker.

    params, stats: of the decoder; stats: running statistics of its BatchNorm, else empty.
    opt_state: of Adam.
    """

    params: Params
    stats: Params
    opt_state: optax.OptState


@dataclass(frozen=True)
class SimulatedAttacker:
    """Adds alpha * max(0, SSIM - threshold) to a client's loss, SSIM that of its attacker's images.

    An `ExtraGradient` of MocoSFL's client. First the decoder, in training, takes a step of Adam
    that raises the SSIM; then, fixed and in evaluation, it gives the gradient by the latents.

    Metrics: `attacker_ssim`, of the second, the mean over images; `attacker_above_threshold`, the
    share of clients whose mean SSIM exceeds the threshold, whom the term changes. Both are measured
    during the warm-up, too.

    decoder: of `simulated_decoder`. latent_shape: (h, w, c). alpha: weight of the term. threshold:
    SSIM up to which it is 0. learning_rate: of Adam, at the start; see `MILESTONES`. warmup: share
    of the training, from its start, during which the term is left out.
    """

    decoder: Decoder
    latent_shape: tuple[int, int, int]
    alpha: float
    threshold: float
    learning_rate: float
    warmup: float = 0.0

    def init(self, key: jax.Array) -> AttackerState:
        latents = jnp.zeros((1, *self.latent_shape))
        variables = self.decoder.init(key, latents, jnp.ones(1, bool), False)
        params = variables["params"]
        return AttackerState(params, variables.get("batch_stats", {}), _ADAM.init(params))

    def __call__(
        self,
        state: AttackerState,
        pixels: jax.Array,
        latents: jax.Array,
        mask: jax.Array,
        key: jax.Array,
        progress: jax.Array,
    ) -> tuple[jax.Array, AttackerState, dict[str, tuple[jax.Array, jax.Array]]]:
        """The gradient by the latents; see `ExtraGradient`. Without a row the state stays."""
        rows = mask.sum(dtype=jnp.float32)
        learned = self._learn(state, pixels, latents, mask, progress)
        state = jax.tree.map(lambda new, old: jnp.where(rows > 0, new, old), learned, state)
        gradient, mean = jax.grad(self._term, has_aux=True)(latents, state, pixels, mask)
        gradient = jnp.where(progress < self.warmup, 0.0, gradient)
        counts = (rows > 0).astype(jnp.float32)
        above = jnp.where(mean > self.threshold, counts, 0.0)
        metrics = {
            "attacker_ssim": (mean * rows, rows),
            "attacker_above_threshold": (above, counts),
        }
        return gradient, state, metrics

    def working_set(self, pixels: jax.ShapeDtypeStruct, latents: jax.ShapeDtypeStruct) -> Any:
        """Shapes of what exists beside the state, see `ExtraGradient`: the attacker's gradient and
        next state, and what the larger of the two backward passes keeps, which follow each other.
        """

        def learning(state: AttackerState, pixels: jax.Array, latents: jax.Array) -> Any:
            rest = (state.stats, pixels, latents, jnp.ones(len(pixels), bool))
            return jax.vjp(lambda params: self._loss(params, *rest), state.params, has_aux=True)[1]

        def shown(state: AttackerState, pixels: jax.Array, latents: jax.Array) -> Any:
            rest = (state, pixels, jnp.ones(len(pixels), bool))
            return jax.vjp(lambda latents: self._term(latents, *rest), latents, has_aux=True)[1]

        state = jax.eval_shape(self.init, jax.random.key(0))
        kept = (jax.eval_shape(part, state, pixels, latents) for part in (learning, shown))
        return max(kept, key=bytes_of), state.params, state

    def _loss(
        self,
        params: Params,
        stats: Params,
        pixels: jax.Array,
        latents: jax.Array,
        mask: jax.Array,
    ) -> tuple[jax.Array, Params]:
        """Of the attacker in training, and its new running statistics."""
        images, updated = self.decoder.apply(
            _variables(params, stats), latents, mask, True, mutable=["batch_stats"]
        )
        return -_mean(ssim(images, pixels), mask), updated.get("batch_stats", {})

    def _term(
        self, latents: jax.Array, state: AttackerState, pixels: jax.Array, mask: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """What is added to the client's loss, and the mean SSIM."""
        variables = _variables(state.params, state.stats)
        images = cast(jax.Array, self.decoder.apply(variables, latents, mask, False))
        mean = _mean(ssim(images, pixels), mask)
        return self.alpha * jnp.maximum(mean - self.threshold, 0.0), mean

    def _learn(
        self,
        state: AttackerState,
        pixels: jax.Array,
        latents: jax.Array,
        mask: jax.Array,
        progress: jax.Array,
    ) -> AttackerState:
        """The attacker after its step."""
        gradient = jax.grad(self._loss, has_aux=True)
        grads, stats = gradient(state.params, state.stats, pixels, latents, mask)
        rate = self.learning_rate * _rate_factor(progress)
        # Adam's bias correction raises a float to an int32: not allowed where promotion is strict.
        with jax.numpy_dtype_promotion("standard"):
            params, opt_state = sgd_update(_ADAM, state.params, state.opt_state, grads, rate)
        return AttackerState(params, stats, opt_state)


def _rate_factor(progress: jax.Array) -> jax.Array:
    """Of the learning rate, () float32."""
    passed = sum((progress >= milestone).astype(jnp.float32) for milestone in MILESTONES)
    return jnp.power(DROP, passed)


def _variables(params: Params, stats: Params) -> dict[str, Params]:
    return {"params": params, "batch_stats": stats}


def _mean(x_B: jax.Array, mask_B: jax.Array) -> jax.Array:
    """Over the rows that count; 0 without any."""
    return x_B.sum(where=mask_B) / jnp.maximum(mask_B.sum(), 1).astype(x_B.dtype)
