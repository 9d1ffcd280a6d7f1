"""From a resolved config to the method."""

import math

import jax

from mocosfl_jax.config.averaging import Averaging
from mocosfl_jax.config.defences import release_of
from mocosfl_jax.config.fields import Resolved
from mocosfl_jax.config.measure import Measure
from mocosfl_jax.config.network import model_of, network_of
from mocosfl_jax.config.resolve import largest_divisor
from mocosfl_jax.config.rich import blocks_of, groups_of
from mocosfl_jax.config.saving import Saving as SavingFields
from mocosfl_jax.federated.axes import NO_MESH, Axes
from mocosfl_jax.learning.losses import LOSSES
from mocosfl_jax.learning.sgd import sgd
from mocosfl_jax.methods.mocosfl.client import ClientSide
from mocosfl_jax.methods.mocosfl.defences import extra_gradient_of
from mocosfl_jax.methods.mocosfl.method import MocoSFL
from mocosfl_jax.methods.mocosfl.saving import Saving
from mocosfl_jax.methods.mocosfl.server import ServerSide
from mocosfl_jax.models.backbones import latent_shape
from mocosfl_jax.models.heads import HEADS

CPU_CHUNK = 25_000_000
"""Images of a chunk, times (width x side of the first features)^2, that a CPU runs at full speed:
more leave the cache and fault pages, fewer leave threads idle (docs/results/step.md)."""


def build(config: Resolved, axes: Axes = NO_MESH, devices: int = 1) -> MocoSFL:
    """MocoSFL on a mesh of so many `devices` with these `axes`."""
    model = model_of(config, axes.rows)
    loss, optimizer = LOSSES[config.loss], sgd(config.momentum, config.weight_decay)
    measure = config.section_or_default(Measure)
    return MocoSFL(
        model=model,
        client=ClientSide(
            net=model.client,
            optimizer=optimizer,
            ema=config.ema,
            both_views=loss.both_views,
            frozen=config.client_learning_rate == 0,
            release=release_of(config),
            extra_gradient=extra_gradient_of(config),
            tau=config.section_or_default(Averaging).tau,
        ),
        server=ServerSide(
            net=model,
            optimizer=optimizer,
            loss=loss,
            temperature=config.temperature,
            ema=config.ema,
            ages=queue_steps(config) if measure.hardness else 0,
        ),
        learning_rate=config.learning_rate,
        client_learning_rate=config.client_learning_rate,
        queue_rows=queue_rows(config),
        private_queues=not config.feature_sharing,
        align=config.align_momentum,
        persistent=config.client_state == "persistent",
        measures_divergence=measure.divergence,
        saving=_saving(config),
        chunks=config.cohort_chunks or _chunks(config, devices),
        axes=axes,
        batch_factor=groups_of(config)[0].blocks,
    )


def _saving(config: Resolved) -> Saving | None:
    fields = config.section_or_default(SavingFields)
    if not fields.threshold:
        return None
    trained, sampled = config.client_learning_rate != 0, config.cohort_size < config.num_clients
    return Saving(
        threshold=fields.threshold,
        warmup=fields.warmup_rounds,
        steps=config.steps_per_round,
        images=(config.images_a_step, config.image_size, config.image_size, 3),
        seed=config.seed,
        hands_out=trained and sampled,
    )


def queue_rows(config: Resolved) -> int:
    """Rows of the queue, or of each private one."""
    return config.queue_length // (1 if config.feature_sharing else config.num_clients)


def keys_per_step(config: Resolved) -> int:
    """Rows that one step writes to the queue, or to each private queue."""
    batches = blocks_of(config) if config.feature_sharing else 1
    return batches * config.images_a_step * LOSSES[config.loss].keys


def queue_steps(config: Resolved) -> int:
    """Steps whose keys a queue holds all of."""
    return queue_rows(config) // keys_per_step(config)


def _chunks(config: Resolved, devices: int) -> int:
    """Chunks of a device's cohort that suit it; they divide the slots of every group."""
    if jax.default_backend() != "cpu" or HEADS[config.head].batch_norm:
        return 1
    groups = groups_of(config)
    slots = [-(-group.clients // devices) for group in groups]
    blocks = sum(n * group.blocks for n, group in zip(slots, groups, strict=True))
    side, _, channels = latent_shape(network_of(config), config.image_size, 1)
    chunks = blocks * config.images_a_step * (channels * side) ** 2 // CPU_CHUNK
    return largest_divisor(math.gcd(*slots), max(1, chunks))
