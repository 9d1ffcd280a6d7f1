"""The step spread over a mesh of devices, against the same step on one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from mocosfl_jax.data.augment import AugmentConfig
from mocosfl_jax.federated.axes import Axes
from mocosfl_jax.federated.contract import Batch, Normalisation
from mocosfl_jax.federated.dispatch import Constants, Images, Program, run_dispatch
from mocosfl_jax.federated.state import PADDING, TrainState, begin_round
from mocosfl_jax.learning.schedule import rate_schedule
from mocosfl_jax.methods.mocosfl.method import MocoSFL
from tests.tiny_method import (
    BATCH,
    SERVER_RATE,
    SIZE,
    STEP,
    StepOutput,
    assert_close,
    at,
    one_batch,
    slots_of,
    take_step,
    tiny_method,
    tiny_model,
    tiny_state,
)

AXIS = "clients"
SPLIT, REPLICATED = P(AXIS), P()
STATE = TrainState(
    step=REPLICATED, server=REPLICATED, population=REPLICATED, cohort_ids=SPLIT, cohort=SPLIT
)
TOLERANCE = 1e-4  # of the largest value: sums over rows are added in another order

CLIENTS = 9
IDS = [7, 2, 0, 8, 5, PADDING, 1, 3]  # clients 4 and 6 are absent, and a slot has no client
MASK = [[True, True], [True, False], [True, True], [False, True]] * 2
MASK[IDS.index(PADDING)] = [False, False]  # with 8 devices, one of them has no row that counts
WEIGHTS = (5.0, 1.0, 2.0, 4.0, 3.0, 0.0, 1.0, 7.0)


def both_methods(loss: str, shared: bool, aligned: bool, head: str) -> tuple[MocoSFL, MocoSFL]:
    """For one device and for a mesh."""
    shape = {"blocks_per_stage": (1,), "cut": 1}
    one = tiny_method(loss, shared, aligned, tiny_model(head, **shape))
    model = tiny_model(head, row_axes=(AXIS,), **shape)
    return one, tiny_method(loss, shared, aligned, model, Axes((AXIS,)))


def round_state(method: MocoSFL) -> TrainState:
    return begin_round(method, tiny_state(method, CLIENTS, len(IDS)), slots_of(*IDS))


def spread(function, devices: int, in_specs, out_specs):
    """The function on a mesh, its arguments spread as the specs say; mind the default checks."""
    mesh = Mesh(np.array(jax.devices("cpu")[:devices]), (AXIS,))
    return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs))


def assert_same_state(actual: TrainState, expected: TrainState) -> None:
    assert_close(actual.server, expected.server, "server", TOLERANCE)
    assert actual.step == expected.step
    for slot, client in enumerate(IDS):
        if client < CLIENTS:
            own, wanted = at(actual.cohort, slot), at(expected.cohort, slot)
            assert_close(own, wanted, f"client {client}", TOLERANCE)


@pytest.mark.parametrize(
    "loss, shared, aligned, head, devices",
    [
        ("server", True, True, "V2", 4),
        ("client", False, False, "V2", 8),
        ("server", True, False, "largeV2", 8),
    ],
)
def test_the_step_on_many_devices_is_the_step_on_one(loss, shared, aligned, head, devices):
    method, spread_method = both_methods(loss, shared, aligned, head)
    batch_specs = Batch(
        views=(SPLIT, SPLIT),
        labels=None,
        mask=SPLIT,
        weight=SPLIT,
        sync=REPLICATED,
        rate_factor=REPLICATED,
        progress=REPLICATED,
        keys=SPLIT,
        normalisation=REPLICATED,
    )
    step = spread(
        functools.partial(take_step, spread_method),
        devices,
        in_specs=(STATE, batch_specs),
        out_specs=(STATE, StepOutput(loss=REPLICATED, accuracy=REPLICATED, latent_grad=SPLIT)),
    )
    one = many = round_state(method)
    for t, sync in enumerate([False, True]):
        batch = one_batch(t, MASK, WEIGHTS, sync)
        one, expected = STEP(method, one, batch)
        many, output = step(many, batch)
        assert_close(output, expected, "output", TOLERANCE)
        assert_same_state(many, one)
    kernel = many.cohort.client.params["unit0"]["conv"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape)[0] == len(IDS) // devices


def test_a_dispatch_on_many_devices_is_the_dispatch_on_one():
    method, spread_method = both_methods("one_way", False, True, "V2")
    augment = AugmentConfig(size=SIZE, blur_prob=0.0)
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.integers(0, 256, (2, len(IDS), BATCH, 9, 10, 3)), jnp.uint8)
    mask = jnp.asarray([MASK, [*MASK[:6], *MASK[:2]]])
    inputs = Images(images, mask, jnp.asarray([True, True]), jnp.asarray(WEIGHTS))
    normalisation = Normalisation(jnp.asarray([0.4, 0.5, 0.6]), jnp.asarray([0.2, 0.3, 0.4]))
    constants = Constants(normalisation, jax.random.key(3), jax.random.key(4))
    state = round_state(method)

    def program(method: MocoSFL):
        schedule = rate_schedule("constant", total_steps=9)
        program = Program(method, augment, SERVER_RATE, schedule, total_steps=9)
        return functools.partial(run_dispatch, program)

    steps = P(None, AXIS)
    run = spread(
        program(spread_method),
        4,
        in_specs=(STATE, Images(steps, steps, REPLICATED, SPLIT), REPLICATED),
        out_specs=(STATE, REPLICATED),
    )
    expected_state, expected = jax.jit(program(method))(state, inputs, constants)
    actual_state, output = run(state, inputs, constants)
    assert_close(output, expected, "output", TOLERANCE)
    assert_same_state(actual_state, expected_state)
    assert output.finite
