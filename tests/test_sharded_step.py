"""The step spread over a mesh of devices, against the same step on one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mocosfl_jax.core.state import TrainState, begin_round
from mocosfl_jax.core.step import Batch, Method, Rates, StepOutput, train_step
from tests.test_step import (
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
CLIENTS = 9
IDS = [7, 2, 0, 8, 5, CLIENTS, 1, 3]  # client 4 and client 6 are absent, and a slot has no client
MASK = [[True, True], [True, False], [True, True], [False, True]] * 2
MASK[IDS.index(CLIENTS)] = [False, False]  # with 8 devices, one of them has no row that counts
WEIGHTS = [5.0, 1.0, 2.0, 4.0, 3.0, 0.0, 1.0, 7.0]


def spread_step(method: Method, devices: int):
    """The step with cohort and batch split over the devices, all else replicated."""
    mesh = Mesh(np.array(jax.devices("cpu")[:devices]), (AXIS,))
    split, whole = P(AXIS), P()
    state = TrainState(
        step=whole, server=whole, population=whole, cohort_ids=split, cohort=split, queue=whole
    )
    batch = Batch(query=split, key=split, mask=split, sync_weight=split)
    output = StepOutput(loss=whole, accuracy=whole, latent_grad=split)
    step = jax.shard_map(
        functools.partial(train_step, method),
        mesh=mesh,
        in_specs=(state, batch, Rates(whole, whole), whole),
        out_specs=(state, output),
    )
    place = functools.partial(jax.tree.map, lambda x: jax.device_put(x, NamedSharding(mesh, whole)))
    return jax.jit(step), place


@pytest.mark.parametrize(
    "loss, shared, aligned, head, devices",
    [
        ("server", True, True, "V2", 4),
        ("client", False, False, "V2", 8),
        ("server", True, False, "largeV2", 8),
        ("one_way", False, True, "V2", 4),
    ],
)
def test_the_step_on_many_devices_is_the_step_on_one(loss, shared, aligned, head, devices):
    shape = {"blocks_per_stage": (1,), "cut": 1}
    method = tiny_method(loss, aligned, model=tiny_model(head, **shape))
    model = tiny_model(head, axis_name=AXIS, **shape)
    spread = tiny_method(loss, aligned, model=model, axis_name=AXIS)
    state = tiny_state(method, shared, CLIENTS, len(IDS))
    state = begin_round(state, jnp.asarray(IDS, jnp.int32), aligned)
    step, place = spread_step(spread, devices)
    one, many = state, place(state)
    for t, sync_now in enumerate([False, True]):
        batch = one_batch(t, MASK, WEIGHTS)
        one, expected = STEP(method, one, batch, rates(0.05, 0.02), sync_now)
        many, output = step(many, place(batch), rates(0.05, 0.02), jnp.asarray(sync_now))
        assert_close(output, expected, "output", 1e-5)
        assert_close(many.server, one.server, "server", 1e-5)
        assert_close(many.queue, one.queue, "queue", 1e-5)
        assert many.step == t + 1
        for slot, client in enumerate(IDS):
            if client < CLIENTS:
                expected_client = at(one.cohort, slot)
                assert_close(at(many.cohort, slot), expected_client, f"client {client}", 1e-5)
    kernel = many.cohort.params["unit0"]["conv"]["kernel"]
    assert len(kernel.sharding.device_set) == devices
    assert kernel.sharding.shard_shape(kernel.shape)[0] == len(IDS) // devices
