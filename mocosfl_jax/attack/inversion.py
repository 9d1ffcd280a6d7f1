"""Model inversion: a decoder learns to reconstruct images from their latents.

The attacker knows the client's model and what the client does to latents before they leave: the
client's forward pass is part of each step, on a batch of the attacker's own images. Noise is drawn
anew each time, as for the client's. Protocol: Li et al., "ResSFL: a resistance transfer framework",
CVPR 2022, as used for MocoSFL's privacy table (ICLR 2023).

A batch may be spread over two devices, which is for CPUs: two virtual ones keep the cores busier
than one does (`run/virtual.py`).
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
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from numpy.typing import NDArray

from mocosfl_jax.attack.quality import Quality, joined, pixels, quality
from mocosfl_jax.data.augment import normalise
from mocosfl_jax.federated.axes import Axes
from mocosfl_jax.learning.adam import adam_update
from mocosfl_jax.models.conv import on_cpu
from mocosfl_jax.models.decoder import Decoder
from mocosfl_jax.randomness import Stream, device_key, host_rng

Tree = Any
Send = Callable[[Tree, jax.Array, jax.Array], jax.Array | None]
"""From a participant, normalised images (B, S, S, 3) and a key to the latents that leave it: the
`sent` of a method whose clients do send some."""

PARTS = 2
"""Parts of a batch with a key of their own, so that two devices draw the same noise as one."""


@dataclass(frozen=True)
class Attack:
    """Who is attacked and how; hashable, and so is `send`.

    mean, std: of each channel, of pixels in [0, 1], that the client normalises with.
    epochs, batch_size, learning_rate, seed: see `Options`.
    devices: over which the rows of a batch are spread, 1 or 2.
    """

    send: Send
    decoder: Decoder
    mean: tuple[float, ...]
    std: tuple[float, ...]
    epochs: int = 50
    batch_size: int = 32
    learning_rate: float = 1e-3
    seed: int = 0
    devices: int = 1

    @property
    def mesh(self) -> Mesh:
        return Mesh(np.array(jax.devices()[: self.devices]), _AXES.rows)

    @property
    def network(self) -> Decoder:
        """The decoder, of a batch on the mesh."""
        return self.decoder.clone(row_axes=_AXES.rows)

    def latents(self, participant: Tree, pixels_BHWC: jax.Array, keys: jax.Array) -> jax.Array:
        """What the server sees of images with pixels in [0, 1].

        Args: keys: one for each of as many equal parts of the batch.
        """
        mean, std = (jnp.asarray(x, jnp.float32) for x in (self.mean, self.std))
        parts = jnp.split(normalise(pixels_BHWC, mean, std), len(keys))
        sent = map(partial(self.send, participant), parts, keys)
        return jnp.concatenate(cast(list[jax.Array], list(sent)))

    def spread(self, function: Callable[..., Any], in_specs: Any, out_specs: Any) -> Any:
        """The function on the mesh; specs as for `jax.shard_map`."""
        return jax.shard_map(function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs)

    def replicate(self, tree: Tree) -> Tree:
        """The same arrays on every device of the mesh."""
        return jax.device_put(tree, NamedSharding(self.mesh, P()))

    def key(self, purpose: int, *ids: int) -> jax.Array:
        key = device_key(self.seed, Stream.ATTACK)
        for number in (purpose, *ids):
            key = jax.random.fold_in(key, number)
        return key


def suitable_devices() -> int:
    """For an attack: two on a CPU that has them (`use_virtual_devices`), otherwise one."""
    return min(PARTS, jax.device_count()) if on_cpu() else 1


_AXES = Axes(("rows",))
_ROWS, _STEPS_AND_ROWS = P(_AXES.rows), P(None, _AXES.rows)
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
    """T batches of an epoch: ids (T, B) int32, mask (T, B) bool, keys (T, PARTS)."""

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
    participant, images = attack.replicate((participant, train_nHWC))
    state, best = attack.replicate(_init(attack, participant, images[:1])), None
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
) -> Iterator[NDArray[np.float32]]:
    """The decoder's answers to the latents of these images, batch by batch, in order.

    Args: purpose: of the keys that the latents are drawn with.
    Returns: pixels in [0, 1], (B, S, S, 3) float32; the last batch may be smaller.
    """
    variables, participant = attack.replicate((variables, participant))
    count = len(images_nHWC)
    size = -(-count // -(-count // attack.batch_size))  # of all batches but the last, about equal
    for index, start in enumerate(range(0, count, size)):
        batch = images_nHWC[start : start + size]
        padding = [(0, _rows(size) - len(batch)), (0, 0), (0, 0), (0, 0)]
        keys = jax.random.split(attack.key(purpose, index), PARTS)
        answers = _answer(attack, variables, participant, np.pad(batch, padding), keys)
        yield np.asarray(answers)[: len(batch)]


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
    steps, rows = -(-images // size), _rows(size)
    ids, mask = np.zeros((steps, rows), np.int32), np.zeros((steps, rows), bool)
    order = host_rng(attack.seed, Stream.ATTACK, _ORDER, epoch).permutation(images)
    for step, batch in enumerate(np.split(order, range(size, images, size))):
        ids[step, : len(batch)], mask[step, : len(batch)] = batch, True
    keys = jax.random.split(attack.key(_TRAIN, epoch), (steps, PARTS))
    return _Batches(jnp.asarray(ids), jnp.asarray(mask), keys)


def _rows(size: int) -> int:
    """Of the arrays that hold a batch of this size: equal parts."""
    return -(-size // PARTS) * PARTS


def _pixels(images: jax.Array) -> jax.Array:
    """float32 in [0, 1] of uint8."""
    return images.astype(jnp.float32) / 255


@partial(jax.jit, static_argnums=0)
def _init(attack: Attack, participant: Tree, image_1HWC: jax.Array) -> _State:
    """image_1HWC: any one, for its shape."""
    key = attack.key(_INIT)
    shape = jax.eval_shape(attack.latents, participant, _pixels(image_1HWC), key[None])
    latents = jnp.zeros(shape.shape, shape.dtype)
    variables = attack.decoder.init(key, latents, jnp.ones(1, bool), False)
    return _State(variables, optax.adam(attack.learning_rate).init(variables["params"]))


@partial(jax.jit, static_argnums=0)
def _train_epoch(
    attack: Attack, state: _State, participant: Tree, images: jax.Array, batches: _Batches
) -> tuple[_State, jax.Array]:
    """The state after all batches, and their mean squared error, () float32."""

    def steps(
        state: _State, participant: Tree, images: jax.Array, batches: _Batches
    ) -> tuple[_State, jax.Array]:
        return jax.lax.scan(partial(_train_step, attack, participant, images), state, batches)

    spread = attack.spread(steps, (P(), P(), P(), _STEPS_AND_ROWS), (P(), P()))
    state, errors = spread(state, participant, images, batches)
    return state, errors.sum() / batches.mask.sum(dtype=jnp.float32)


def _train_step(
    attack: Attack, participant: Tree, images: jax.Array, state: _State, batch: _Batches
) -> tuple[_State, jax.Array]:
    """One step of Adam on a batch (without the axis T), and the sum of its images' errors."""
    originals = _pixels(images[batch.ids])
    latents = attack.latents(participant, originals, batch.keys)
    count = _AXES.sum(batch.mask.sum(dtype=jnp.float32))
    params, rest = state.variables["params"], dict(state.variables)
    rest.pop("params")

    def loss(params: Tree) -> tuple[jax.Array, tuple[jax.Array, Tree]]:
        answers, updated = attack.network.apply(
            {"params": params, **rest}, latents, batch.mask, True, mutable=list(rest)
        )
        errors = jnp.square(answers - originals).mean(axis=(1, 2, 3)).sum(where=batch.mask)
        return errors / count, (errors, updated)

    own, (errors, updated) = jax.grad(loss, has_aux=True)(_AXES.vary(params))
    adam = optax.adam(attack.learning_rate)
    params, opt_state = adam_update(adam, params, state.opt_state, _AXES.sum(own))
    return _State({"params": params, **updated}, opt_state), _AXES.sum(errors)


@partial(jax.jit, static_argnums=0)
def _answer(
    attack: Attack, variables: Tree, participant: Tree, images: jax.Array, keys: jax.Array
) -> jax.Array:
    """The decoder in evaluation on the latents of images (B, S, S, 3) uint8."""

    def answer(variables: Tree, participant: Tree, images: jax.Array, keys: jax.Array) -> jax.Array:
        latents = attack.latents(participant, _pixels(images), keys)
        rows = jnp.ones(len(images), bool)
        return cast(jax.Array, attack.network.apply(variables, latents, rows, False))

    spread = attack.spread(answer, (P(), P(), _ROWS, _ROWS), _ROWS)
    return cast(jax.Array, spread(variables, participant, images, keys))
