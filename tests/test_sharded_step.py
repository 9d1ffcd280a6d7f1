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
from mocosfl_jax.federated.dispatch import (
    Images,
    Normalisation,
    Program,
    rate_schedule,
    run_dispatch,
)
from mocosfl_jax.federated.state import TrainState, begin_round
from mocosfl_jax.methods.mocosfl.step import Batch, Method, StepOutput, train_step
from tests.test_step import (
    BATCH,
    SIZE,
    STEP,
    assert_close,
    at,
    one_batch,
    rates,
    tiny_method,
    tiny_model,
    tiny_state,
)

AXIS = "clients"
SPLIT, WHOLE = P(AXIS), P()
STATE = TrainState(
    step=WHOLE, server=WHOLE, population=WHOLE, cohort_ids=SPLIT, cohort=SPLIT, queue=WHOLE
)
TOLERANCE = 3e-5  # of the largest value: sums over rows are added in another order

CLIENTS = 9
IDS = [7, 2, 0, 8, 5, CLIENTS, 1, 3]  # clients 4 and 6 are absent, and a slot has no client
MASK = [[True, True], [True, False], [True, True], [False, True]] * 2
MASK[IDS.index(CLIENTS)] = [False, False]  # with 8 devices, one of them has no row that counts
WEIGHTS = [5.0, 1.0, 2.0, 4.0, 3.0, 0.0, 1.0, 7.0]


def both_methods(loss: str, aligned: bool, head: str) -> tuple[Method, Method]:
    """For one device and for a mesh."""
    shape = {"blocks_per_stage": (1,), "cut": 1}
    one = tiny_method(loss, aligned, model=tiny_model(head, **shape))
    model = tiny_model(head, row_axes=(AXIS,), **shape)
    return one, tiny_method(loss, aligned, model=model, axes=Axes((AXIS,)))


def round_state(method: Method, shared: bool) -> TrainState:
    state = tiny_state(method, shared, CLIENTS, len(IDS))
    return begin_round(state, jnp.asarray(IDS, jnp.int32), method.align_momentum)


def spread(function, devices: int, in_specs, out_specs):
    """The function on a mesh, its arguments spread as the specs say; mind the default checks."""
    mesh = Mesh(np.array(jax.devices("cpu")[:devices]), (AXIS,))
    return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs))


def assert_same_state(actual: TrainState, expected: TrainState) -> None:
    assert_close(actual.server, expected.server, "server", TOLERANCE)
    assert_close(actual.queue, expected.queue, "queue", TOLERANCE)
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
    method, spread_method = both_methods(loss, aligned, head)
    batch_specs = Batch(query=SPLIT, key=SPLIT, mask=SPLIT, sync_weight=SPLIT)
    step = spread(
        functools.partial(train_step, spread_method),
        devices,
        in_specs=(STATE, batch_specs, WHOLE, WHOLE),
        out_specs=(STATE, StepOutput(loss=WHOLE, accuracy=WHOLE, latent_grad=SPLIT)),
    )
    one = many = round_state(method, shared)
    for t, sync_now in enumerate([False, True]):
        arguments = (one_batch(t, MASK, WEIGHTS), rates(0.05, 0.02), jnp.asarray(sync_now))
        one, expected = STEP(method, one, *arguments)
        many, output = step(many, *arguments)
        assert_close(output, expected, "output", TOLERANCE)
        assert_same_state(many, one)
    kernel = many.cohort.params["unit0"]["conv"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape)[0] == len(IDS) // devices


def test_a_dispatch_on_many_devices_is_the_dispatch_on_one():
    method, spread_method = both_methods("one_way", True, "V2")
    augment = AugmentConfig(size=SIZE, blur_prob=0.0)
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.integers(0, 256, (2, len(IDS), BATCH, 9, 10, 3)), jnp.uint8)
    mask = jnp.asarray([MASK, [*MASK[:6], *MASK[:2]]])
    inputs = Images(images, mask, jnp.asarray([True, True]), jnp.asarray(WEIGHTS))
    normalisation = Normalisation(jnp.asarray([0.4, 0.5, 0.6]), jnp.asarray([0.2, 0.3, 0.4]))
    state = round_state(method, shared=False)
    arguments = (inputs, normalisation, jax.random.key(3))

    def program(method: Method):
        schedule = rate_schedule("constant", total_steps=9)
        return functools.partial(run_dispatch, Program(method, augment, 0.05, 0.02, schedule))

    steps = P(None, AXIS)
    run = spread(
        program(spread_method),
        4,
        in_specs=(STATE, Images(steps, steps, WHOLE, SPLIT), WHOLE, WHOLE),
        out_specs=(STATE, WHOLE),
    )
    expected_state, expected = jax.jit(program(method))(state, *arguments)
    actual_state, output = run(state, *arguments)
    assert_close(output, expected, "output", TOLERANCE)
    assert_same_state(actual_state, expected_state)
    assert output.finite
