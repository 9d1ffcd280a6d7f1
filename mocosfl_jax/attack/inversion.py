"""Model inversion: a decoder learns to reconstruct images from their latents.

The attacker knows the client's model and what the client does to latents before they leave: the
client's forward pass is part of each step, on a batch of the attacker's own images. Noise is drawn
anew each time, as for the client's. Protocol: Li et al., "ResSFL: a resistance transfer framework",
CVPR 2022, as used for MocoSFL's privacy table (ICLR 2023).
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from numpy.typing import NDArray

from mocosfl_jax.attack.quality import Quality, joined, pixels, quality
from mocosfl_jax.data.augment import normalise
from mocosfl_jax.learning.adam import adam_update
from mocosfl_jax.models.decoder import Decoder
from mocosfl_jax.randomness import Stream, device_key, host_rng

Tree = Any
Send = Callable[[Tree, jax.Array, jax.Array], jax.Array | None]
"""From a participant, normalised images (B, S, S, 3) and a key to the latents that leave it: the
`sent` of a method whose clients do send some."""


@dataclass(frozen=True)
class Attack:
    """Who is attacked and how; hashable, and so is `send`.

    mean, std: of each channel, of pixels in [0, 1], that the client normalises with.
    epochs, batch_size, learning_rate, seed: see `Options`.
    """

    send: Send
    decoder: Decoder
    mean: tuple[float, ...]
    std: tuple[float, ...]
    epochs: int = 50
    batch_size: int = 32
    learning_rate: float = 1e-3
    seed: int = 0

    def latents(self, participant: Tree, pixels_BHWC: jax.Array, key: jax.Array) -> jax.Array:
        """What the server sees of images with pixels in [0, 1]."""
        mean, std = (jnp.asarray(x, jnp.float32) for x in (self.mean, self.std))
        return cast(jax.Array, self.send(participant, normalise(pixels_BHWC, mean, std), key))

    def key(self, purpose: int, *ids: int) -> jax.Array:
        key = device_key(self.seed, Stream.ATTACK)
        for number in (purpose, *ids):
            key = jax.random.fold_in(key, number)
        return key


_INIT, _TRAIN, _VALIDATE, _TARGETS = range(4)  # purposes of keys
_ORDER = 1  # of a host generator; 0 is for the choice of images


class Epoch(NamedTuple):
    """One pass: number, from 1; mean squared error of its steps, and on the validation images."""

    number: int
    train_mse: float
    validation_mse: float


class Trained(NamedTuple):
    """variables: of the decoder, `params` and `batch_stats`. epoch: that they are of."""

    variables: Tree
    epoch: Epoch


class DivergedError(ArithmeticError):
    """No epoch had a finite validation error."""


class _State(NamedTuple):
    variables: Tree
    opt_state: optax.OptState


class _Batches(NamedTuple):
    """T batches of an epoch: ids (T, B) int32, mask (T, B) bool, keys (T,)."""

    ids: jax.Array
    mask: jax.Array
    keys: jax.Array


def train_decoder(
    attack: Attack,
    participant: Tree,
    train_nHWC: NDArray[np.uint8],
    validate_nHWC: NDArray[np.uint8],
    report: Callable[[Epoch], None] = lambda epoch: None,
) -> Trained:
    """Trains the attacker's decoder: Adam on the squared error of pixels in [0, 1].

    Args:
      participant: the client's state, for `Attack.send`.
      train_nHWC, validate_nHWC: the auxiliary images, uint8 (n, S, S, 3).
      report: told of each epoch.
    Returns: the decoder of the epoch with the least mean error on the validation images, running
    statistics in place of a batch's; the first of equals.
    Raises: DivergedError.
    """
    state = _init(attack, participant, jnp.asarray(train_nHWC[:1]))
    images, best = jnp.asarray(train_nHWC), None
    for number in range(1, attack.epochs + 1):
        batches = _batches(attack, len(train_nHWC), number)
        state, train_mse = _train_epoch(attack, state, participant, images, batches)
        # The same noise each time: epochs are compared on the same latents.
        errors = evaluate(attack, state.variables, participant, validate_nHWC, _VALIDATE).mse
        epoch = Epoch(number, float(train_mse), float(errors.mean(dtype=np.float64)))
        report(epoch)
        if math.isfinite(epoch.validation_mse) and (
            best is None or epoch.validation_mse < best.epoch.validation_mse
        ):
            best = Trained(state.variables, epoch)
    if best is None:
        raise DivergedError("the decoder's error on the validation images is not finite")
    return best


def reconstruct(
    attack: Attack,
    variables: Tree,
    participant: Tree,
    images_nHWC: NDArray[np.uint8],
    purpose: int = _TARGETS,
) -> Iterator[jax.Array]:
    """The decoder's answers to the latents of these images, batch by batch, in order.

    Args: purpose: of the keys that the latents are drawn with.
    Returns: pixels in [0, 1], (B, S, S, 3) float32; the last batch may be smaller.
    """
    size = min(attack.batch_size, len(images_nHWC))
    for index, start in enumerate(range(0, len(images_nHWC), size)):
        batch = images_nHWC[start : start + size]
        padding = [(0, size - len(batch)), (0, 0), (0, 0), (0, 0)]
        key = attack.key(purpose, index)
        yield _answer(attack, variables, participant, np.pad(batch, padding), key)[: len(batch)]


def evaluate(
    attack: Attack,
    variables: Tree,
    participant: Tree,
    images_nHWC: NDArray[np.uint8],
    purpose: int = _TARGETS,
) -> Quality:
    """How near the reconstructions of these images come to them. Args: as `reconstruct`."""
    found, start = [], 0
    for answers in reconstruct(attack, variables, participant, images_nHWC, purpose):
        found.append(quality(answers, pixels(images_nHWC[start : start + len(answers)])))
        start += len(answers)
    return joined(found)


def _batches(attack: Attack, images: int, epoch: int) -> _Batches:
    """All images once, in random order; padding at the end of the last batch."""
    size = min(attack.batch_size, images)
    steps = -(-images // size)
    order = host_rng(attack.seed, Stream.ATTACK, _ORDER, epoch).permutation(images)
    ids = np.zeros(steps * size, np.int32)
    ids[:images] = order
    mask = np.arange(steps * size) < images
    keys = jax.random.split(attack.key(_TRAIN, epoch), steps)
    return _Batches(
        jnp.asarray(ids.reshape(steps, size)), jnp.asarray(mask.reshape(steps, size)), keys
    )


def _pixels(images: jax.Array) -> jax.Array:
    """float32 in [0, 1] of uint8."""
    return images.astype(jnp.float32) / 255


@partial(jax.jit, static_argnums=0)
def _init(attack: Attack, participant: Tree, image_1HWC: jax.Array) -> _State:
    """image_1HWC: any one, for its shape."""
    key = attack.key(_INIT)
    shape = jax.eval_shape(attack.latents, participant, _pixels(image_1HWC), key)
    latents = jnp.zeros(shape.shape, shape.dtype)
    variables = attack.decoder.init(key, latents, jnp.ones(1, bool), False)
    return _State(variables, optax.adam(attack.learning_rate).init(variables["params"]))


@partial(jax.jit, static_argnums=0)
def _train_epoch(
    attack: Attack, state: _State, participant: Tree, images: jax.Array, batches: _Batches
) -> tuple[_State, jax.Array]:
    """The state after all batches, and their mean squared error, () float32."""
    step = partial(_train_step, attack, participant, images)
    state, errors = jax.lax.scan(step, state, batches)
    return state, errors.sum() / batches.mask.sum(dtype=jnp.float32)


def _train_step(
    attack: Attack, participant: Tree, images: jax.Array, state: _State, batch: _Batches
) -> tuple[_State, jax.Array]:
    """One step of Adam on a batch (without the axis T), and the sum of its images' errors."""
    originals = _pixels(images[batch.ids])
    latents = attack.latents(participant, originals, batch.keys)
    params, rest = state.variables["params"], dict(state.variables)
    rest.pop("params")

    def loss(params: Tree) -> tuple[jax.Array, tuple[jax.Array, Tree]]:
        answers, updated = attack.decoder.apply(
            {"params": params, **rest}, latents, batch.mask, True, mutable=list(rest)
        )
        errors = jnp.square(answers - originals).mean(axis=(1, 2, 3)).sum(where=batch.mask)
        return errors / batch.mask.sum(dtype=jnp.float32), (errors, updated)

    grads, (errors, updated) = jax.grad(loss, has_aux=True)(params)
    adam = optax.adam(attack.learning_rate)
    params, opt_state = adam_update(adam, params, state.opt_state, grads)
    return _State({"params": params, **updated}, opt_state), errors


@partial(jax.jit, static_argnums=0)
def _answer(
    attack: Attack, variables: Tree, participant: Tree, images: jax.Array, key: jax.Array
) -> jax.Array:
    """The decoder in evaluation on the latents of images (B, S, S, 3) uint8."""
    latents = attack.latents(participant, _pixels(images), key)
    answers = attack.decoder.apply(variables, latents, jnp.ones(len(images), bool), False)
    return cast(jax.Array, answers)
