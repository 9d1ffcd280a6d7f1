"""The state from round to round: who reads and writes which rows, and what is kept."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mocosfl_jax.config import check_types, default_config, resolve
from mocosfl_jax.data.dataset import DatasetInfo
from mocosfl_jax.federated.state import (
    PADDING,
    TrainState,
    begin_round,
    create_state,
    end_round,
)
from mocosfl_jax.methods.mocosfl.build import build
from mocosfl_jax.methods.mocosfl.method import MocoSFL
from tests.tiny_method import (
    CLIENTS,
    MASK,
    SIZES,
    STEP,
    assert_equal,
    at,
    different,
    new_state,
    one_batch,
    slots_of,
    tiny_method,
    tiny_state,
)

SLOTS = 3


@pytest.mark.parametrize("aligned", [False, True])
def test_a_new_state_has_clients_alike_and_key_encoders_equal_to_online_models(aligned):
    method = tiny_method("one_way", aligned=aligned)
    state = new_state(method, CLIENTS, SLOTS)
    client, server, stats = jax.jit(method.model.init)(jax.random.key(0))
    assert state.step == 0
    assert_equal(state.server.server.params, server)
    assert_equal(state.server.server.key_params, server)
    assert_equal((state.server.server.stats, state.server.server.key_stats), (stats, stats))
    assert_equal(state.server.client.params, client)
    for slot in range(SLOTS):
        assert_equal(at(state.cohort.client.params, slot), client)
        assert_equal(at(state.cohort.client.key_params, slot), client)
    traces = (state.server.server.opt_state, state.cohort.client.opt_state)
    assert not any(x.any() for x in jax.tree.leaves(traces))
    common, kept = state.server.client, state.population
    assert (common.key_params is None, kept.key_params is None) == (not aligned, aligned)
    key_params = common.key_params if aligned else at(kept.key_params, CLIENTS - 1)
    assert_equal(key_params, client)


def population_state(method: MocoSFL) -> TrainState:
    """A state in which no two clients have the same optimizer states, key encoders or queues."""
    state = tiny_state(method)
    return state.replace(population=different(state.population, 3))


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("ids", [[4, 0, 3], [2, 4, PADDING]])
def test_a_round_reads_and_writes_its_participants_only(aligned, shared, ids):
    method = tiny_method("one_way", shared, aligned)
    before = population_state(method)
    drawn = begin_round(method, before, slots_of(*ids))
    assert_equal((drawn.server, drawn.population), (before.server, before.population))
    assert drawn.cohort_ids.tolist() == ids
    members = [(slot, i) for slot, i in enumerate(ids) if i < CLIENTS]
    common, kept = before.server.client, before.population
    for slot, i in members:
        client = at(drawn.cohort.client, slot)
        assert_equal(client.params, common.params)
        assert_equal(client.key_params, common.key_params if aligned else at(kept.key_params, i))
        assert_equal(client.opt_state, at(kept.opt_state, i))
        assert_equal(at(drawn.cohort.queue, slot), at(kept.queue, i))

    trained = different(drawn.cohort, 8)
    after = end_round(method, drawn.replace(cohort=trained))
    assert_equal(after.server, before.server)
    slots = {i: slot for slot, i in members}
    for i in range(CLIENTS):
        now, index = at(after.population, i), slots.get(i)
        if index is None:
            assert_equal(now, at(kept, i))
            continue
        client = at(trained.client, index)
        assert_equal(now.opt_state, client.opt_state)
        assert_equal(now.queue, at(trained.queue, index))
        if not aligned:
            assert_equal(now.key_params, client.key_params)
    assert (after.population.key_params is None) == aligned


def test_stateless_clients_are_persistent_ones_with_zeroed_optimizer_state():
    """Aligned, as only then nothing else of a client outlives a round."""
    method = tiny_method("server", aligned=True)
    stateless = replace(method, persistent=False)
    kept, dropped = new_state(method, CLIENTS, SLOTS), new_state(stateless, CLIENTS, SLOTS)
    assert not jax.tree.leaves(dropped.population)
    step = 0
    for ids, syncs in [([4, 1, 3], [False, True]), ([0, 4, 2], [True, True])]:
        zeroed = jax.tree.map(jnp.zeros_like, kept.population.opt_state)
        kept = kept.replace(population=kept.population.replace(opt_state=zeroed))
        kept = begin_round(method, kept, slots_of(*ids))
        dropped = begin_round(stateless, dropped, slots_of(*ids))
        for sync in syncs:
            batch = one_batch(step, MASK, SIZES, sync)
            kept, dropped = STEP(method, kept, batch)[0], STEP(stateless, dropped, batch)[0]
            step += 1
        kept, dropped = end_round(method, kept), end_round(stateless, dropped)
        assert_equal(dropped.server, kept.server)
        assert_equal(dropped.cohort, kept.cohort)


def test_no_leaf_of_stateless_clients_grows_with_their_number():
    method = replace(tiny_method("server", aligned=True), persistent=False)

    def state(clients: int) -> TrainState:
        key = jax.random.key(0)
        return jax.eval_shape(lambda: create_state(method, key, key, clients, SLOTS))

    few, many = state(5), state(1_000_000)
    assert jax.tree.map(jnp.shape, few) == jax.tree.map(jnp.shape, many)


@pytest.mark.parametrize(("shared", "aligned"), [(False, True), (True, False)])
def test_stateless_clients_that_would_lose_something_are_refused(shared, aligned):
    method = tiny_method("server", shared, aligned)
    with pytest.raises(ValueError, match="stateless"):
        replace(method, persistent=False)


def test_private_queues_share_the_length_and_differ():
    raw = default_config()
    raw.update({"num_clients": 3, "batch_size": 2, "queue_length": 17, "feature_sharing": False})
    raw.update({"width": 4, "blocks_per_stage": (1,), "head_width": 6})
    info = DatasetInfo("cifar10", num_train=60, num_test=10, image_size=8, num_classes=10)
    state = new_state(build(resolve(check_types(raw), info)), 3, SLOTS)
    queues = state.population.queue
    assert queues.keys.shape == (3, 5, 6) and state.server.queue is None
    np.testing.assert_array_equal(queues.ptr, [0, 0, 0])
    np.testing.assert_allclose(np.linalg.norm(queues.keys, axis=-1), 1, rtol=1e-6)
    assert len(np.unique(np.asarray(queues.keys).reshape(-1, 6), axis=0)) == 15
