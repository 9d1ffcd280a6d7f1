"""A dispatch of several steps, against its steps one by one; what changes over a run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mocosfl_jax.data.augment import AugmentConfig, two_views
from mocosfl_jax.federated.contract import Batch, Normalisation
from mocosfl_jax.federated.dispatch import Constants, Images, Program, run_dispatch
from mocosfl_jax.federated.state import begin_round
from mocosfl_jax.learning.schedule import rate_schedule
from mocosfl_jax.learning.sgd import sgd, sgd_update
from tests.tiny_method import (
    BATCH,
    SERVER_RATE,
    SIZE,
    STEP,
    assert_close,
    slots_of,
    tiny_method,
    tiny_state,
)


@pytest.mark.parametrize("poison", [False, True])
def test_a_dispatch_equals_its_steps_one_by_one(poison):
    method, ids = tiny_method("one_way"), [4, 1, 3]
    augment = AugmentConfig(size=SIZE, blur_prob=0.0)
    program = Program(method, augment, SERVER_RATE, rate_schedule("cosine", 5), total_steps=5)
    rng = np.random.default_rng(0)
    raw = jnp.asarray(rng.integers(0, 256, (3, 3, BATCH, 10, 9, 3)), jnp.uint8)
    mask = jnp.asarray(rng.random((3, 3, BATCH)) < 0.8).at[:, :, 0].set(True)
    inputs = Images(raw, mask, jnp.asarray([False, True, True]), jnp.asarray([1.0, 2.0, 3.0]))
    normalisation = Normalisation(jnp.asarray([0.4, 0.5, 0.6]), jnp.asarray([0.2, 0.3, 0.4]))
    key = jax.random.key(9)
    constants = Constants(normalisation, augment_key=key, method_key=jax.random.key(10))
    state = begin_round(method, tiny_state(method), slots_of(*ids))
    state = state.replace(step=jnp.int32(2))
    if poison:
        dense = state.server.server.params["head"]["dense2"]
        dense["bias"] = dense["bias"].at[0].set(np.nan)
    run = jax.jit(run_dispatch, static_argnums=0)
    after, output = run(program, state, inputs, constants)
    assert bool(output.finite) != poison
    if poison:
        return

    view = jax.jit(lambda keys, x: two_views(keys, x, augment, *normalisation))
    for s in range(3):
        step_key = jax.random.fold_in(key, 2 + s)
        views = [
            view(jax.random.split(jax.random.fold_in(step_key, i), BATCH), raw[s, slot])
            for slot, i in enumerate(ids)
        ]
        factor = (1 + np.cos(np.pi * (2 + s) / 5)) / 2
        batch = Batch(
            views=tuple(jnp.stack(view) for view in zip(*views, strict=True)),
            labels=None,
            mask=mask[s],
            weight=inputs.weight,
            sync=inputs.sync[s],
            rate_factor=jnp.float32(factor),
            progress=jnp.float32((2 + s) / 5),
            keys=jax.random.split(key, 3),  # the method draws nothing
            normalisation=normalisation,
        )
        state, expected = STEP(method, state, batch)
        for name, tolerance in (("loss", 1e-4), ("accuracy", 1e-5)):
            metric = output.metrics[name]
            mean = metric.total[s] / metric.weight[s]
            np.testing.assert_allclose(mean, getattr(expected, name), rtol=tolerance)
            assert int(metric.weight[s]) == int(mask[s].sum())
        np.testing.assert_allclose(output.learning_rate[s], SERVER_RATE * factor, rtol=1e-5)
    assert output.learning_rate.shape == (3,) and output.learning_rate.dtype == jnp.float32
    assert after.step == state.step == 5
    assert_close(after.replace(step=0), state.replace(step=0), "dispatch")


@pytest.mark.parametrize(
    "name, expected",
    [
        ("constant", [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]),
        ("step", [1, 1, 1, 1, 1, 1, 0.1, 0.1, 0.01, 0.01]),
        ("cosine", [(1 + np.cos(np.pi * t / 10)) / 2 for t in range(10)]),
    ],
)
def test_rate_schedules(name, expected):
    schedule = rate_schedule(name, total_steps=10)
    actual = [float(schedule(jnp.float32(t))) for t in range(10)]
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-7)


def test_a_rate_that_is_held_changes_between_rounds_only():
    schedule = rate_schedule("cosine", total_steps=12, hold=3)
    actual = [float(schedule(jnp.float32(t))) for t in range(12)]
    rounds = [(1 + np.cos(np.pi * r / 4)) / 2 for r in range(4)]
    np.testing.assert_allclose(actual, np.repeat(rounds, 3), rtol=1e-5)
    first_of_a_late_round = 4_999 * 997
    late = rate_schedule("cosine", total_steps=10_000 * 997, hold=997)
    assert float(late(jnp.float32(first_of_a_late_round))) == float(
        late(jnp.float32(first_of_a_late_round + 996))
    )


def test_sgd_is_pytorchs():
    """Trace = momentum * trace + gradient + decay * parameter; parameter -= rate * trace."""
    params, grads = {"a": jnp.asarray([1.0, -2.0])}, {"a": jnp.asarray([0.5, 4.0])}
    optimizer = sgd(0.9, 0.1)
    opt_state = optimizer.init(params)
    trace, value = np.zeros(2), np.array([1.0, -2.0])
    for rate in (0.1, 0.02, 0.3):
        params, opt_state = sgd_update(optimizer, params, opt_state, grads, jnp.float32(rate))
        trace = 0.9 * trace + np.array([0.5, 4.0]) + 0.1 * value
        value = value - rate * trace
        np.testing.assert_allclose(params["a"], value, rtol=1e-6)
