"""The two sides of MocoSFL, apart: parties that exchange nothing but bytes, against the step."""

import functools
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import serialization

from mocosfl_jax.federated.average import average
from mocosfl_jax.federated.contract import Batch, Normalisation
from mocosfl_jax.federated.state import TrainState, create_state
from mocosfl_jax.learning.losses import LOSSES
from mocosfl_jax.learning.queue import Queue
from mocosfl_jax.learning.sgd import sgd
from mocosfl_jax.methods.mocosfl import client, server
from mocosfl_jax.methods.mocosfl.client import ClientSide, ClientState
from mocosfl_jax.methods.mocosfl.messages import ClientModel, LatentGradient, Latents
from mocosfl_jax.methods.mocosfl.method import MocoSFL
from mocosfl_jax.methods.mocosfl.server import ServerSide, ServerState
from mocosfl_jax.methods.mocosfl.state import MocoState, Participant
from mocosfl_jax.models.contract import Network
from mocosfl_jax.models.split import SplitModel, build_model

CLIENTS, BATCH, SIZE = 3, 2, 8
MASKS = (  # of each step: every image counts, one does not, a client has none
    [[True, True], [True, True], [True, True]],
    [[True, True], [False, True], [True, False]],
    [[True, False], [False, False], [True, True]],
)
WEIGHTS = [0.5, 2.0, 1.25]
SYNCS = (False, True, False)
RATE, CLIENT_RATE, FACTORS = 0.1, 0.3, (1.0, 0.5, 0.25)
SGD = sgd(0.9, 5e-3)

forward = jax.jit(client.forward, static_argnums=0)
update = jax.jit(client.update, static_argnums=0)
move_key_encoder = jax.jit(server.move_key_encoder, static_argnums=0)
learn = jax.jit(server.learn, static_argnums=0)
write_keys = jax.jit(server.write_keys)
write_private_keys = jax.jit(server.write_private_keys)
update_server = jax.jit(server.update, static_argnums=0)


# ---------------------------------------------------------------------------------------- the wire


class Wire:
    """Carries messages as bytes. sent: name, size of all arrays in bytes, of each message."""

    def __init__(self):
        self.sent: list[tuple[str, int]] = []

    def carry(self, name: str, message: Any) -> Any:
        """The message as the other side has it: fresh arrays, read from bytes."""
        data = serialization.to_bytes(message)
        empty = jax.tree.map(lambda _: 0, message)
        received = serialization.from_bytes(empty, data)
        self.sent.append((name, sum(x.nbytes for x in jax.tree.leaves(received))))
        return received


# ------------------------------------------------------------------------------------- the parties


class OneClient:
    """A client: its state, and what it holds until a gradient arrives."""

    def __init__(self, side: ClientSide, state: ClientState):
        self.side, self.state = side, state
        self.pending: client.Pending | None = None

    def send_latents(self, query: np.ndarray, key: np.ndarray, mask: np.ndarray) -> Latents:
        self.state, latents, self.pending = forward(self.side, self.state, query, key, mask)
        return latents

    def learn(self, gradient: LatentGradient, rate: jax.Array) -> None:
        self.state, metrics = update(self.side, self.state, self.pending, gradient, rate)
        assert metrics == {}

    def send_model(self, aligned: bool) -> ClientModel:
        return client.upload(self.state, aligned)

    def take_model(self, model: ClientModel) -> None:
        self.state = client.receive(self.side, self.state, model)


class Server:
    """The server: its models, the queue or the clients' private ones, and the common client."""

    def __init__(self, side: ServerSide, state: MocoState, private: Queue | None):
        self.side, self.models, self.common = side, state.server, state.client
        self.queue, self.private = state.queue, private

    def learn(self, latents: list[Latents], rate: jax.Array) -> list[LatentGradient]:
        """One step on what the clients sent; the answer to each of them."""
        rows = server.join(jax.tree.map(lambda *x: jnp.stack(x), *latents))
        self.models = self.models.replace(key_params=move_key_encoder(self.side, self.models))
        negatives = self.queue.keys[None] if self.private is None else self.private.keys
        count = rows.mask.sum().astype(jnp.float32)
        learned = learn(self.side, self.models, rows, negatives, count)
        if self.private is None:
            self.queue = write_keys(self.queue, learned.keys, rows.mask)
        else:
            self.private = write_private_keys(self.private, learned.keys, rows.mask)
        self.models = update_server(self.side, self.models, learned.server_grad, learned, rate)
        return [LatentGradient(x) for x in server.split_groups(learned.latent_grad, len(latents))]

    def sync(self, models: list[ClientModel], weights: np.ndarray) -> ClientModel:
        stacked = jax.tree.map(lambda *x: jnp.stack(x), *models)
        self.common = average(stacked, weights)
        return self.common


def run_parties(
    method: MocoSFL, state: TrainState, batches: list[Batch], wire: Wire
) -> tuple[MocoState, Participant]:
    """All steps by a server and clients, in the order of docs/method.md."""
    common = Server(method.server, state.server, state.cohort.queue)
    clients = [OneClient(method.client, at(state.cohort.client, i)) for i in range(CLIENTS)]
    for batch in batches:
        latents = []
        for i, one in enumerate(clients):
            query, key = (np.asarray(view[i]) for view in batch.views)
            sent = one.send_latents(query, key, np.asarray(batch.mask[i]))
            latents.append(wire.carry("latents", sent))
        answers = common.learn(latents, method.learning_rate * batch.rate_factor)
        for one, answer in zip(clients, answers, strict=True):
            rate = method.client_learning_rate * batch.rate_factor
            one.learn(wire.carry("gradient", answer), rate)
        if batch.sync:
            models = [wire.carry("model", one.send_model(method.align)) for one in clients]
            mean = common.sync(models, batch.weight)
            for one in clients:
                one.take_model(wire.carry("average", mean))
    states = jax.tree.map(lambda *x: jnp.stack(x), *[one.state for one in clients])
    return (
        MocoState(common.models, common.common, common.queue),
        Participant(states, common.private),
    )


# ---------------------------------------------------------------------------------------- settings


@functools.cache
def tiny_model() -> SplitModel:
    return build_model(
        Network("resnet18", 8, (1, 1), "3x3s1"),
        cut=2,
        bottleneck=None,
        head="V2",
        head_width=8,
        image_size=SIZE,
    )


def method_of(loss: str, align: bool, private: bool) -> MocoSFL:
    model = tiny_model()
    return MocoSFL(
        model=model,
        client=ClientSide(model.client, SGD, 0.7, both_views=LOSSES[loss].both_views),
        server=ServerSide(model, SGD, LOSSES[loss], 0.2, 0.7),
        learning_rate=RATE,
        client_learning_rate=CLIENT_RATE,
        queue_rows=16,
        private_queues=private,
        align=align,
    )


@functools.cache
def started(align: bool, private: bool) -> TrainState:
    """Before the first step, but with key encoders, optimizer states and clients that differ."""
    method = method_of("one_way", align, private)  # the state is the same for every loss
    create = functools.partial(create_state, method, num_clients=CLIENTS, slots=CLIENTS)
    return moved(jax.jit(create)(jax.random.key(0), jax.random.key(1)))


def moved(tree: Any) -> Any:
    rng = np.random.default_rng(2)

    def leaf(x: jax.Array) -> jax.Array:
        if x.dtype != jnp.float32:
            return x
        return x + jnp.asarray(0.1 * rng.normal(size=x.shape), x.dtype)

    return jax.tree.map(leaf, tree)


def batch_of(step: int) -> Batch:
    """Images that do not count are there too, so that they show if they are counted."""
    rng = np.random.default_rng(step)
    views = rng.normal(size=(2, CLIENTS, BATCH, SIZE, SIZE, 3)).astype(np.float32)
    return Batch(
        views=(jnp.asarray(views[0]), jnp.asarray(views[1])),
        labels=None,
        mask=jnp.asarray(MASKS[step]),
        weight=jnp.asarray(WEIGHTS, jnp.float32),
        sync=jnp.asarray(SYNCS[step]),
        rate_factor=jnp.float32(FACTORS[step]),
        progress=jnp.float32(0),
        keys=jax.random.split(jax.random.key(step), CLIENTS),
        normalisation=Normalisation(jnp.zeros(3), jnp.ones(3)),
    )


def at(tree: Any, index: int) -> Any:
    return jax.tree.map(lambda x: x[index], tree)


def assert_close(actual: Any, desired: Any) -> None:
    """Every leaf within 1e-5 of its largest value."""
    assert jax.tree.structure(actual) == jax.tree.structure(desired)
    pairs = zip(jax.tree.leaves_with_path(actual), jax.tree.leaves(desired), strict=True)
    for (path, x), y in pairs:
        x, y = np.asarray(x), np.asarray(y)
        tolerance = 1e-5 * np.abs(y).max(initial=0)
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance, err_msg=jax.tree_util.keystr(path))


# ------------------------------------------------------------------------------------------- tests

CASES = [(loss, align, False) for loss in LOSSES for align in (False, True)]


@pytest.mark.parametrize(("loss", "align", "private"), [*CASES, ("server", False, True)])
def test_parties_that_exchange_bytes_are_the_step(loss, align, private):
    method = method_of(loss, align, private)
    state, batches = started(align, private), [batch_of(step) for step in range(3)]

    step = jax.jit(method.step)
    whole, cohort = state.server, state.cohort
    for batch in batches:
        whole, cohort, *_ = step(whole, cohort, batch)

    wire = Wire()
    apart, clients = run_parties(method, state, batches, wire)
    assert_close(apart, whole)
    assert_close(clients, cohort)
    assert_moved(apart.server, state.server.server)
    _check_sizes(method, wire)


def assert_moved(new: ServerState, old: ServerState) -> None:
    """The steps did something, or agreement would mean little."""
    pairs = zip(jax.tree.leaves(new.params), jax.tree.leaves(old.params), strict=True)
    assert all(float(np.abs(x - y).max()) > 1e-4 for x, y in pairs)


def _check_sizes(method: MocoSFL, wire: Wire) -> None:
    """What travelled is what `traffic` announces; a mask of one byte a row comes on top."""
    announced = {
        message.name: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(message.content))
        for message in method.traffic(jax.ShapeDtypeStruct((BATCH, SIZE, SIZE, 3), jnp.float32))
    }
    latents = announced["query latents"] + announced["key latents"]
    expected = {
        "latents": latents + BATCH * method.server.loss.rows,
        "gradient": announced["gradient of query latents"],
        "model": announced["client model"],
        "average": announced["average of client models"],
    }
    messages = {"latents": 3, "gradient": 3, "model": 1, "average": 1}
    assert sorted(wire.sent) == sorted(
        (name, expected[name]) for name, number in messages.items() for _ in range(number * CLIENTS)
    )


def test_a_frozen_client_needs_no_gradient():
    side = ClientSide(tiny_model().client, SGD, 0.7, frozen=True)
    state = started(align=True, private=False)
    one = OneClient(side, at(state.cohort.client, 0))
    before = one.state.params
    batch = batch_of(0)
    one.send_latents(*(view[0] for view in batch.views), batch.mask[0])
    assert one.pending == client.Pending(backward=None, sent=None)
    one.learn(LatentGradient(jnp.full((), jnp.nan)), jnp.float32(1.0))
    jax.tree.map(np.testing.assert_array_equal, one.state.params, before)


# ------------------------------------------------------------------------------ each module alone

SERVER_PARTS = {"mocosfl_jax.models.heads", "mocosfl_jax.models.server_net"}
CLIENT_PARTS = {"mocosfl_jax.methods.mocosfl.client", "mocosfl_jax.models.client_net"}
OUTSIDE = {"tensorflow", "tensorflow_datasets", "ml_collections", "orbax"}
NEITHER_NEEDS = {"mocosfl_jax.federated", "mocosfl_jax.config", "mocosfl_jax.run", *OUTSIDE}
BOTH = {"mocosfl_jax.methods.mocosfl.method", "mocosfl_jax.models.split"}


@pytest.mark.parametrize(
    ("imports", "unwanted"),
    [
        (
            ("methods.mocosfl.client", "models.client_net", "models.backbones"),
            {"mocosfl_jax.methods.mocosfl.server", *SERVER_PARTS, *BOTH, *NEITHER_NEEDS},
        ),
        (
            ("methods.mocosfl.server", "models.server_net", "models.heads", "models.backbones"),
            {*CLIENT_PARTS, *BOTH, *NEITHER_NEEDS},
        ),
    ],
    ids=["client", "server"],
)
def test_a_side_loads_nothing_of_the_other(imports, unwanted):
    """With its half of the network, which is more than its own module imports."""
    names = [f"mocosfl_jax.{name}" for name in imports]
    program = f"import sys, {', '.join(names)}; print(*sys.modules, sep='\\n')"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    loaded = set(result.stdout.split())
    assert set(names) <= loaded
    assert {x for x in loaded if any(x == y or x.startswith(f"{y}.") for y in unwanted)} == set()
