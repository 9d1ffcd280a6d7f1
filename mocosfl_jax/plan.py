"""What a resolved config will take, by formula: for `--dry_run` and the summary."""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from mocosfl_jax.build import initial_state, program_of
from mocosfl_jax.config import Config
from mocosfl_jax.core.client import client_forward
from mocosfl_jax.core.dispatch import Program
from mocosfl_jax.core.server import contrast
from mocosfl_jax.errors import InputError


@dataclass(frozen=True)
class Plan:
    """Sizes of a run.

    client_params, server_params: numbers of parameters, the head with the server.
    bytes_up_per_client_round, bytes_down_per_client_round: what a participant sends and receives in
      a round of `steps_per_round` full batches: latents of both views; the gradient of its query
      latents; at each sync its model up and the average down. Frozen clients exchange latents only.
    state_bytes: the train state. activation_bytes: what the backward pass of one step keeps.
    """

    client_params: int
    server_params: int
    bytes_up_per_client_round: int
    bytes_down_per_client_round: int
    state_bytes: int
    activation_bytes: int

    @property
    def memory_bytes(self) -> int:
        """Estimated peak on the device: state, its copy at a save, and one step."""
        return 2 * self.state_bytes + self.activation_bytes


def plan(config: Config) -> Plan:
    """Nothing is computed or compiled: shapes only."""
    program = program_of(config)
    state = jax.eval_shape(lambda: initial_state(config, program.method))
    client, server = state.population.params, state.server.params
    latents = jax.eval_shape(program.method.model.latents, client, _images(config))
    latent_bytes = _bytes(latents) * (2 if config.loss == "client" else 1)
    frozen = config.client_learning_rate == 0
    models = 2 if config.align_momentum else 1
    sync_bytes = 0 if frozen else config.syncs_per_round * models * _bytes(client)
    gradient_bytes = 0 if frozen else latent_bytes
    return Plan(
        client_params=_count(client),
        server_params=_count(server),
        bytes_up_per_client_round=config.steps_per_round * 2 * latent_bytes + sync_bytes,
        bytes_down_per_client_round=config.steps_per_round * gradient_bytes + sync_bytes,
        state_bytes=_bytes(state),
        activation_bytes=_activation_bytes(config, program, state),
    )


def check_fits(config: Config, state_bytes: dict[str, int], memory_bytes: int) -> None:
    """Raises: InputError: the state and its copy at a save exceed the device's memory.

    Args: state_bytes: of each part of the state on one device.
    """
    needed = 2 * sum(state_bytes.values())
    if needed <= memory_bytes:
        return
    part = max(state_bytes, key=lambda name: state_bytes[name])
    field, hint = {
        "population": ("client_state", "stateless clients (with align_momentum) keep nothing"),
        "queue": ("queue_length", "a shorter queue"),
        "cohort": ("cohort_size", "a smaller cohort or more devices"),
        "server": ("server_shards", "more shards or a smaller network"),
    }[part]
    raise InputError(
        f"config.{field}",
        getattr(config, field),
        f"the state and its copy at a save take {needed / 1e9:.1f} GB, the {part} alone"
        f" {2 * state_bytes[part] / 1e9:.1f} GB, and a device has {memory_bytes / 1e9:.1f} GB:"
        f" {hint}",
    )


def _images(config: Config) -> jax.ShapeDtypeStruct:
    shape = (config.batch_size, config.image_size, config.image_size, 3)
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _activation_bytes(config: Config, program: Program, state: Any) -> int:
    """Residuals that differentiation keeps between the forward and the backward pass."""
    method, images = program.method, _images(config)
    both_views = config.loss == "client"
    model = state.population.params

    def client(params, images):
        forward = client_forward(
            method.model,
            params,
            params,
            images,
            images,
            ema=method.ema,
            both_views=both_views,
            frozen=method.frozen_clients,
        )
        return forward.query, forward.backward

    latents, residuals = jax.eval_shape(client, model, images)
    rows = config.cohort_size * latents.shape[0]
    latents_R = jax.ShapeDtypeStruct((rows, *latents.shape[1:]), latents.dtype)
    views = 2 if config.loss == "server" else 1
    embedding = jax.ShapeDtypeStruct((rows, config.head_width), jnp.float32)

    def server(params, latents_R, embedding, queue_GKD):
        def loss(params):
            return contrast(
                method.model,
                params,
                state_stats,
                (latents_R,) * views,
                (embedding,) * views,
                queue_GKD,
                jnp.ones(rows, bool),
                method.temperature,
            ).loss

        state_stats = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), state.server.stats)
        return jax.vjp(loss, params)[1]

    queues = jax.eval_shape(lambda s: s.queue_groups(s.cohort), state)
    kept = jax.eval_shape(server, state.server.params, latents_R, embedding, queues)
    return (config.cohort_size * _bytes(residuals) + _bytes(kept)) // method.cohort_chunks


def _bytes(tree: Any) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _count(tree: Any) -> int:
    return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))
