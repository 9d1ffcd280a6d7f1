"""Divergence at a sync, and averaging that heeds it, against NumPy and plain loops."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mocosfl_jax.federated.state import PADDING, begin_round, end_round
from mocosfl_jax.learning.divergence import divergence, own_share
from mocosfl_jax.methods.mocosfl.client import ClientSide
from mocosfl_jax.methods.mocosfl.method import MocoSFL
from tests.test_hardness import step
from tests.test_sides import SGD
from tests.tiny_method import (
    CLIENTS,
    assert_close,
    assert_equal,
    at,
    new_state,
    one_batch,
    slots_of,
    tiny_method,
    tiny_model,
    tiny_state,
)

TAU = 0.7
MASK = [[True, True], [False, False], [True, False], [True, True]]
WEIGHTS = (5.0, 0.0, 1.0, 3.0)


def method_of(aligned: bool = False, tau: float = 0.0, shared: bool = True) -> MocoSFL:
    model = tiny_model(blocks_per_stage=(1,), cut=1)
    method = tiny_method("one_way", shared, aligned, model)
    side = dataclasses.replace(method.client, tau=tau)
    return dataclasses.replace(method, client=side, measures_divergence=True)


# -------------------------------------------------------------------------------------- Equation 4


def norms(a: Any, b: Any) -> float:
    """Sum over arrays of the L2 norm of the difference, in float64."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return sum(float(np.sqrt(((np.float64(x) - np.float64(y)) ** 2).sum())) for x, y in pairs)


def mean_of(trees: list[Any], weights: list[float]) -> Any:
    shares = np.float64(weights) / sum(weights)
    return jax.tree.map(
        lambda *xs: sum(s * np.float64(x) for s, x in zip(shares, xs, strict=True)), *trees
    )


def test_divergence_adds_up_norms_of_arrays():
    a = {"x": jnp.asarray([[3.0, 0.0], [0.0, 4.0]]), "y": jnp.asarray([1.0])}
    b = {"x": jnp.zeros((2, 2)), "y": jnp.asarray([-1.0])}
    assert divergence(a, b) == 5 + 2
    assert divergence(a, a) == 0


def test_the_metric_is_the_mean_of_participants_before_they_get_the_average():
    method, ids = method_of(), [4, PADDING, 1, 3]
    state = begin_round(method, tiny_state(method, slots=4), slots_of(*ids))
    alone, unsynced, _ = step(method, state, one_batch(0, MASK, WEIGHTS, sync=False))
    _, metrics, _ = step(method, state, one_batch(0, MASK, WEIGHTS, sync=True))
    models = [at(alone.cohort.client.params, slot) for slot in (0, 2, 3)]
    mean = mean_of(models, [5.0, 1.0, 3.0])
    expected = np.mean([norms(model, mean) for model in models])
    total, weight = metrics["divergence"]
    assert weight == 3 and unsynced["divergence"].weight == 0
    np.testing.assert_allclose(total / weight, expected, rtol=1e-4)


# ----------------------------------------------------------------------- divergence-aware averaging


def test_the_share_of_its_own_is_tau_first_and_then_follows_divergence():
    share, scale = own_share(TAU, jnp.zeros(()), jnp.float32(4))
    np.testing.assert_allclose([share, scale], [TAU, TAU / 4], rtol=1e-6)
    share, kept = own_share(TAU, scale, jnp.float32(2))
    np.testing.assert_allclose([share, kept], [TAU / 2, TAU / 4], rtol=1e-6)
    assert own_share(TAU, scale, jnp.float32(1e3)) == (1, scale)
    assert own_share(TAU, jnp.zeros(()), jnp.zeros(())) == (0, 0)  # equal to the average: unset


ROUNDS = [  # clients, and for each step whether it syncs and the factor on its rates
    ([4, PADDING, 1, 3], [(False, 1.0), (True, 1.0)]),
    ([2, PADDING, 4, 3], [(True, 0.5), (True, 3.0)]),  # 1 is absent, 2 new
    ([1, PADDING, 2, 0], [(True, 0.25)]),  # 1 starts from the average, with its lambda
]


@pytest.mark.parametrize(("aligned", "shared"), [(True, True), (False, False)])
def test_rounds_equal_the_reference(aligned, shared):
    """The step without its sync is what `tests/test_step.py` checks; here is what the sync adds."""
    method = method_of(aligned, TAU, shared)
    state = new_state(method, CLIENTS, 4)
    scales: dict[int, float] = {}
    own: dict[int, Any] = {}  # models of those that took part in the last sync
    common, shares, count = state.server.client, [], 0
    for ids, steps in ROUNDS:
        members = [(slot, i) for slot, i in enumerate(ids) if i < CLIENTS]
        state = begin_round(method, state, slots_of(*ids))
        for slot, i in members:
            start = own.get(i, common)
            assert_close(models_of(method, state, slot), start, f"start of client {i}", 1e-5)
        for sync, factor in steps:
            batch = one_batch(count, MASK, WEIGHTS, sync, factor)
            alone, _, _ = step(method, state, batch._replace(sync=jnp.asarray(False)))
            state, _, _ = step(method, state, batch)
            count += 1
            if not sync:
                assert_equal(state, alone)
                continue
            ends = {i: models_of(method, alone, slot) for slot, i in members}
            common = mean_of(list(ends.values()), [WEIGHTS[slot] for slot, _ in members])
            assert_close(state.server.client, common, "average", 1e-5)
            own = {}
            for slot, i in members:
                distance = norms(ends[i].params, common.params)
                scales.setdefault(i, TAU / distance)
                mu = min(1.0, scales[i] * distance)
                shares.append(mu)
                own[i] = mix(mu, ends[i], common)
                assert_close(models_of(method, state, slot), own[i], f"client {i}", 1e-5)
                client = at(state.cohort.client, slot)
                np.testing.assert_allclose(client.scale, scales[i], rtol=1e-4)
                assert_equal(client.opt_state, at(alone.cohort.client.opt_state, slot))
        state = end_round(method, state)
        network = method.network(state.server, None)
        assert_equal(network.client, state.server.client.params)
    kinds = {"tau" if abs(mu - TAU) < 1e-6 else "one" if mu == 1 else "other" for mu in shares}
    assert kinds == {"tau", "one", "other"}
    np.testing.assert_array_equal(state.population.mixed.synced, [4, 4, 4, 3, 3])
    assert state.server.syncs == 4


def models_of(method: MocoSFL, state: Any, slot: int) -> Any:
    client = at(state.cohort.client, slot)
    common = state.server.client
    return type(common)(client.params, client.key_params if method.align else None)


def mix(mu: float, own: Any, average: Any) -> Any:
    return jax.tree.map(lambda x, mean: mu * np.float64(x) + (1 - mu) * mean, own, average)


def test_unaligned_key_encoders_stay():
    method, ids = method_of(tau=TAU), [4, PADDING, 1, 3]
    state = begin_round(method, tiny_state(method, slots=4), slots_of(*ids))
    alone, synced = (
        step(method, state, one_batch(0, MASK, WEIGHTS, sync))[0] for sync in (False, True)
    )
    assert_equal(synced.cohort.client.key_params, alone.cohort.client.key_params)
    kept = end_round(method, synced).population.mixed
    assert kept.model.key_params is None


def test_clients_that_keep_nothing_of_their_own_have_no_tau():
    method = method_of(aligned=True, tau=TAU)
    with pytest.raises(ValueError, match="stateless clients keep nothing"):
        dataclasses.replace(method, persistent=False)
    with pytest.raises(ValueError, match="frozen"):
        ClientSide(method.model.client, SGD, 0.9, frozen=True, tau=TAU)
