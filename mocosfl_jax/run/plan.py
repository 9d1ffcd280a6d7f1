"""What a resolved config will take, by formula: for `--dry_run` and the summary."""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mocosfl_jax.config import Resolved
from mocosfl_jax.config.network import model_of
from mocosfl_jax.config.recipe import find_recipe
from mocosfl_jax.config.rich import blocks_of
from mocosfl_jax.config.stored import flat_fields, to_json
from mocosfl_jax.data.dataset import DatasetInfo
from mocosfl_jax.errors import InputError
from mocosfl_jax.evaluation.knn import CHUNK
from mocosfl_jax.evaluation.raw_pixels import BLOCK, SIDE
from mocosfl_jax.federated.axes import NO_MESH
from mocosfl_jax.federated.contract import Message, Method
from mocosfl_jax.federated.state import TrainState, create_state
from mocosfl_jax.models.split import Params, SplitModel, Variables, bytes_of
from mocosfl_jax.run.program import program_of

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
    device. others: what further virtual devices of a CPU hold in training, copies of the server
    among it.

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
    others: int = 0

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
        training = self._training + self.others
        return self._constant + self.state + max(training, self.encoded + self.evaluation)

    @property
    def _constant(self) -> int:
        return self.process + self.compiler + self.images

    @property
    def _training(self) -> int:
        return self.saved_copy + self.inputs + self.step


@dataclass(frozen=True)
class Plan:
    """Sizes of a run.

    client_params, server_params: numbers of parameters of one client and of the server
      (`Method.parameters`).
    bytes_up_per_client_round, bytes_down_per_client_round: what a participant sends and receives in
      a round of `steps_per_round` full batches (`Method.traffic`). bytes_down_per_client_once: what
      it receives before its first round.
    state_bytes: the training state. step_bytes: what exists beside it within a step.
    bytes_up_per_rich_client_round, bytes_down_per_rich_client_round: of a client that takes larger
      batches (`config.rich`); None: there are none.
    """

    client_params: int
    server_params: int
    bytes_up_per_client_round: int
    bytes_down_per_client_round: int
    bytes_down_per_client_once: int
    state_bytes: int
    step_bytes: int
    bytes_up_per_rich_client_round: int | None = None
    bytes_down_per_rich_client_round: int | None = None


def plan(config: Resolved) -> Plan:
    """Nothing is computed or compiled: shapes only."""
    method = program_of(config).method
    state = _state_shapes(config, method)
    parameters = jax.eval_shape(method.parameters, state.server)
    syncs = sum(config.sync_steps)
    a_round = {"step": config.steps_per_round, "sync": syncs, "round": 1, "once": 0}
    once = {"step": 0, "sync": 0, "round": 0, "once": 1}
    traffic = method.traffic(_images(config))
    rich_up = rich_down = None
    if method.batch_factor > 1:
        of_rich = method.traffic(_images(config, method.batch_factor))
        rich_up, rich_down = (_bytes_sent(of_rich, up, a_round) for up in (True, False))
    # A rich client counts as several others: its models are counted as often, which is too many.
    slots = -(-blocks_of(config) // method.chunks)
    return Plan(
        client_params=_count(parameters.client),
        server_params=_count(parameters.server),
        bytes_up_per_client_round=_bytes_sent(traffic, True, a_round),
        bytes_down_per_client_round=_bytes_sent(traffic, False, a_round),
        bytes_down_per_client_once=_bytes_sent(traffic, False, once),
        state_bytes=bytes_of(state),
        step_bytes=bytes_of(method.working_set(_images(config), slots)),
        bytes_up_per_rich_client_round=rich_up,
        bytes_down_per_rich_client_round=rich_down,
    )


def client_parameters(config: Resolved) -> int:
    """`Plan.client_params` alone."""
    method, key = program_of(config).method, jax.random.key(0)
    server = jax.eval_shape(method.init, key, key)
    return _count(jax.eval_shape(method.parameters, server).client)


def _bytes_sent(traffic: tuple[Message, ...], up: bool, times: dict[str, int]) -> int:
    """Of one direction. times: how often each is sent, by `Message.when`."""
    return sum(times[m.when] * bytes_of(m.content) for m in traffic if m.up == up)


def estimate_memory(config: Resolved, info: DatasetInfo, sizes: Plan) -> Memory:
    """The memory of a run on one device, from shapes; nothing is computed or compiled.

    Args:
      config: resolved.
      info: of its data set.
      sizes: `plan(config)`.
    """
    model = model_of(config)
    variables = model.shapes()
    pixels = 3 * info.image_size**2
    rows_a_dispatch = config.steps_per_dispatch * blocks_of(config) * config.images_a_step
    evaluated = info.labelled and info.num_test > 0
    encoded, evaluation = _evaluation_bytes(config, info, model, variables) if evaluated else (0, 0)
    return Memory(
        process=PROCESS,
        compiler=COMPILER + COMPILER_A_CONVOLUTION * _convolutions(variables),
        images=(info.num_train + info.num_test + info.num_mixed) * pixels,
        state=sizes.state_bytes,
        saved_copy=sizes.state_bytes,
        inputs=2 * rows_a_dispatch * pixels,
        step=sizes.step_bytes + 2 * blocks_of(config) * bytes_of(_images(config)),
        encoded=encoded,
        evaluation=evaluation,
        others=_bytes_of_others(config, sizes),
    )


def _bytes_of_others(config: Resolved, sizes: Plan) -> int:
    """Beyond what one device would hold: the server and its copy at a save, and their steps."""
    devices = config.devices or 1
    if devices == 1:
        return 0
    method = find_recipe(config.method).build(config, NO_MESH, devices)
    slots = -(-blocks_of(config) // (devices * method.chunks))
    server = bytes_of(_state_shapes(config, method).server)
    steps = devices * bytes_of(method.working_set(_images(config), slots))
    return 2 * (devices - 1) * server + max(0, steps - sizes.step_bytes)


def check_fits(config: Resolved, state_bytes: dict[str, int], memory_bytes: int) -> None:
    """Raises: InputError: the state and its copy at a save exceed the device's memory.

    Args: state_bytes: on one device, of each part of the state (`Rounds.bytes_a_device`).
    """
    needed = 2 * sum(state_bytes.values())
    if needed <= memory_bytes:
        return
    hints = {**_HINTS, **find_recipe(config.method).memory_hints}
    sizes: dict[str, int] = {}  # of what has a hint of its own, and of all else together
    for part, size in state_bytes.items():
        known = part if part in hints else part.partition(".")[0]
        sizes[known] = sizes.get(known, 0) + size
    part = max(sizes, key=lambda part: sizes[part])
    field, hint = hints[part]
    name = part.rpartition(".")[2].replace("_", " ")
    raise InputError(
        f"config.{field}",
        flat_fields(to_json(config))[field],
        f"the state and its copy at a save take {needed / 1e9:.1f} GB, the {name} alone"
        f" {2 * sizes[part] / 1e9:.1f} GB, and a device has {memory_bytes / 1e9:.1f} GB:"
        f" {hint}",
    )


_HINTS = {
    "population": ("num_clients", "fewer clients or more devices"),
    "cohort": ("cohort_size", "a smaller cohort or more devices"),
    "server": ("server_shards", "more shards or a smaller network"),
}
"""Which field to change where a part of the state is too large, and how."""


def check_clients_fit(config: Resolved, memory_bytes: int) -> None:
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


def _images(config: Resolved, batches: int = 1) -> jax.ShapeDtypeStruct:
    """Of a step of a client. batches: of `images_a_step`."""
    shape = (batches * config.images_a_step, config.image_size, config.image_size, 3)
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _state_shapes(config: Resolved, method: Method) -> TrainState:
    key = jax.random.key(0)
    return jax.eval_shape(
        lambda: create_state(method, key, key, config.num_clients, config.cohort_size)
    )


def _evaluation_bytes(
    config: Resolved, info: DatasetInfo, model: SplitModel, variables: Variables
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
        + bytes_of(variables),
        "knn": bank + max(bank, similarities),  # the bank, scaled from a copy
        "raw_pixels": 4 * block + BLOCK**2 * _FLOAT,  # queries and bank, and both scaled
        "probe": total * features if config.probe_epochs else 0,
    }
    return (total + train) * (features + embedding), max(pieces.values())


def _largest_map(model: SplitModel, variables: Variables, config: Resolved) -> int:
    """Bytes of the largest output of a layer, for one image."""

    def outputs(net: nn.Module, params: Params, x: Any) -> tuple[Any, Any]:
        apply = partial(net.apply, capture_intermediates=True, mutable="intermediates")
        return jax.eval_shape(apply, {"params": params}, x)

    latents, client = outputs(model.client, variables.client, _images(config))
    _, server = outputs(model.server, variables.server, latents)
    layers = jax.tree.leaves((client, server))
    return max(bytes_of(layer) for layer in layers) // config.images_a_step


def _convolutions(variables: Variables) -> int:
    """Layers with a kernel (height, width, in, out)."""
    return sum(x.ndim == 4 for x in jax.tree.leaves((variables.client, variables.server)))


def _count(tree: Any) -> int:
    return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))
