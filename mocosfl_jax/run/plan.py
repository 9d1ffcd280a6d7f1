"""What a resolved config will take, by formula: for `--dry_run` and the summary."""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mocosfl_jax.config import Config
from mocosfl_jax.config.build import initial_state, program_of
from mocosfl_jax.data.dataset import DatasetInfo
from mocosfl_jax.errors import InputError
from mocosfl_jax.evaluation.knn import CHUNK
from mocosfl_jax.evaluation.raw_pixels import BLOCK, SIDE
from mocosfl_jax.federated.dispatch import Program
from mocosfl_jax.methods.mocosfl.client import client_forward
from mocosfl_jax.methods.mocosfl.server import contrast
from mocosfl_jax.models.split import Params, SplitModel, Variables

PROCESS = 270_000_000
"""Resident size of Python with JAX, Flax, Orbax and TFDS imported and the CPU backend started:
measured 269 MB (JAX 0.10.2, Linux)."""

COMPILER = 180_000_000
COMPILER_A_CONVOLUTION = 48_000_000
"""What compiling the programs of a run adds to that and never gives back: the growth of whole runs
up to their compiled dispatch, less their images and state. Measured with XLA for CPUs, an empty
compilation cache: 560 to 650 MB with 9 convolutions in the network, 1,130 MB with 20."""

_BYTES_A_CLIENT = 40
"""On the host: id, size, and the copies that drawing a cohort and describing them make."""

_FLOAT = 4


@dataclass(frozen=True)
class Memory:
    """Bytes behind the peak of a run on one device, by what holds them.

    process, compiler: measured constants, see above. images: both splits, uint8. state: the train
    state. saved_copy: of it, which a save writes while training goes on. inputs: the images of two
    dispatches, one running and one ahead. step: views, activations, gradients and new server models
    of a step. encoded: features and embeddings of both splits, and those of the train split once
    more while they are joined. evaluation: the largest that a piece of an evaluation has on the
    device.

    On a CPU `total` is the peak resident size of the process. Other devices hold `device`, and the
    process `host`.
    """

    process: int
    compiler: int
    images: int
    state: int
    saved_copy: int
    inputs: int
    step: int
    encoded: int
    evaluation: int

    @property
    def device(self) -> int:
        """Peak of an accelerator: training and evaluation take turns."""
        return self.state + max(self._training, self.evaluation)

    @property
    def host(self) -> int:
        """Peak of the process beside an accelerator, which hands it what it saves."""
        return self._constant + max(self.inputs + self.saved_copy, self.encoded)

    @property
    def total(self) -> int:
        """Peak where the device is the CPU."""
        return self._constant + self.state + max(self._training, self.encoded + self.evaluation)

    @property
    def _constant(self) -> int:
        return self.process + self.compiler + self.images

    @property
    def _training(self) -> int:
        return self.saved_copy + self.inputs + self.step


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


def estimate_memory(config: Config, info: DatasetInfo, sizes: Plan) -> Memory:
    """The memory of a run on one device, from shapes; nothing is computed or compiled.

    Args:
      config: resolved.
      info: of its data set.
      sizes: `plan(config)`.
    """
    model = program_of(config).method.model
    variables = jax.eval_shape(model.init, jax.random.key(0))
    pixels = 3 * info.image_size**2
    rows_a_dispatch = config.steps_per_dispatch * config.cohort_size * config.batch_size
    evaluated = info.labelled and info.num_test > 0
    encoded, evaluation = _evaluation_bytes(config, info, model, variables) if evaluated else (0, 0)
    return Memory(
        process=PROCESS,
        compiler=COMPILER + COMPILER_A_CONVOLUTION * _convolutions(variables),
        images=(info.num_train + info.num_test) * pixels,
        state=sizes.state_bytes,
        saved_copy=sizes.state_bytes,
        inputs=2 * rows_a_dispatch * pixels,
        step=_step_bytes(config, sizes, variables),
        encoded=encoded,
        evaluation=evaluation,
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


def check_clients_fit(config: Config, memory_bytes: int) -> None:
    """Raises: InputError: the host could not hold the ids and sizes of all clients.

    Args: memory_bytes: main memory.
    """
    needed = _BYTES_A_CLIENT * config.num_clients
    if needed > memory_bytes:
        raise InputError(
            "config.num_clients",
            config.num_clients,
            f"their ids and sizes alone take {needed / 1e9:.0f} GB, the machine has"
            f" {memory_bytes / 1e9:.0f}",
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


def _step_bytes(config: Config, sizes: Plan, variables: Variables) -> int:
    """Activations, both views, the gradients, and the server's new models beside the old ones.

    Parts of a cohort add up their gradients: the server's exists twice.
    """
    server_gradients = 2 if program_of(config).method.cohort_chunks > 1 else 1
    views = 2 * config.cohort_size * _bytes(_images(config))
    client_gradients = config.cohort_size * _bytes(variables.client)
    server = (server_gradients + 2) * _bytes(variables.server)
    return sizes.activation_bytes + views + client_gradients + server


def _evaluation_bytes(
    config: Config, info: DatasetInfo, model: SplitModel, variables: Variables
) -> tuple[int, int]:
    """Bytes of the encoded splits on the host, and of the largest piece of an evaluation."""
    train, total = info.num_train, info.num_train + info.num_test
    one = jax.eval_shape(model.encode, variables, _images(config))
    features, embedding = (_FLOAT * x.shape[1] for x in one)
    bank, similarities = train * embedding, CHUNK * train * _FLOAT
    block = BLOCK * 3 * min(info.image_size, SIDE) ** 2 * _FLOAT
    pieces = {
        # Two batches of images; a unit's input, shortcut, convolution and its normalised output;
        # the standardised kernels.
        "encode": 2 * config.eval_batch_size * 3 * info.image_size**2
        + 4 * config.eval_batch_size * _largest_map(model, variables, config)
        + _bytes(variables),
        "knn": bank + max(bank, similarities),  # the bank, scaled from a copy
        "raw_pixels": 4 * block + BLOCK**2 * _FLOAT,  # queries and bank, and both scaled
        "probe": total * features if config.probe_epochs else 0,
    }
    return (total + train) * (features + embedding), max(pieces.values())


def _largest_map(model: SplitModel, variables: Variables, config: Config) -> int:
    """Bytes of the largest output of a layer, for one image."""

    def outputs(net: nn.Module, params: Params, x: Any) -> tuple[Any, Any]:
        apply = partial(net.apply, capture_intermediates=True, mutable="intermediates")
        return jax.eval_shape(apply, {"params": params}, x)

    latents, client = outputs(model.client, variables.client, _images(config))
    _, server = outputs(model.server, variables.server, latents)
    layers = jax.tree.leaves((client, server))
    return max(_bytes(layer) for layer in layers) // config.batch_size


def _convolutions(variables: Variables) -> int:
    """Layers with a kernel (height, width, in, out)."""
    return sum(x.ndim == 4 for x in jax.tree.leaves((variables.client, variables.server)))


def _bytes(tree: Any) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _count(tree: Any) -> int:
    return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))
