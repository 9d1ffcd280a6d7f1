"""The step, against a slow reference: lists of clients, a loop, plain autodiff and NumPy queues."""

from dataclasses import dataclass, replace

import jax
import numpy as np
import pytest
from jax.extend.core import subjaxprs

from mocosfl_jax.federated.average import average
from mocosfl_jax.federated.state import PADDING, TrainState, begin_round, end_round
from mocosfl_jax.methods.mocosfl.client import upload
from mocosfl_jax.methods.mocosfl.method import MocoSFL
from tests.slow_reference import (
    assert_round_matches,
    assert_step_matches,
    reference_step,
    world_of,
)
from tests.tiny_method import (
    BATCH,
    CLIENTS,
    EQUAL,
    FULL,
    MASK,
    SIZES,
    STEP,
    StepOutput,
    assert_close,
    assert_equal,
    at,
    one_batch,
    slots_of,
    take_step,
    tiny_method,
    tiny_model,
    tiny_state,
)

# ------------------------------------------------------------------------------- step = reference


@dataclass(frozen=True)
class Case:
    loss: str
    shared: bool
    aligned: bool
    weights: tuple[float, ...]
    padded: bool  # one slot has no client
    head: str = "V2"

    def __str__(self) -> str:
        words = [self.loss, "shared" if self.shared else "private", self.head]
        return "-".join(words + [word for word in ("aligned", "padded") if getattr(self, word)])


CASES = [
    Case("one_way", shared=True, aligned=False, weights=SIZES, padded=False),
    Case("one_way", shared=False, aligned=True, weights=EQUAL, padded=True),
    Case("server", shared=True, aligned=True, weights=SIZES, padded=True),
    Case("server", shared=False, aligned=False, weights=EQUAL, padded=False),
    Case("client", shared=True, aligned=False, weights=EQUAL, padded=False),
    Case("client", shared=False, aligned=True, weights=SIZES, padded=True),
    Case("server", shared=True, aligned=False, weights=EQUAL, padded=False, head="largeV2"),
]
ROUNDS = [  # clients, and for each step whether it syncs and the factor on its rates
    ([4, 1, 3], [(False, 1.0), (True, 0.5)]),
    ([0, 4, 2], [(True, 2.0), (True, 1.5)]),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_steps_equal_the_reference(case):
    model = tiny_model(case.head)
    method = tiny_method(case.loss, case.shared, case.aligned, model)
    mask, weights = MASK, case.weights
    if case.padded:
        mask, weights = [*mask[:1], [False] * BATCH, *mask[1:]], (weights[0], 0.0, *weights[1:])
    state = tiny_state(method, slots=len(mask))
    world = world_of(state)
    step = 0
    for ids, steps in ROUNDS:
        ids = [ids[0], PADDING, *ids[1:]] if case.padded else ids
        state = begin_round(method, state, slots_of(*ids))
        for sync, factor in steps:
            batch = one_batch(step, mask, weights, sync, factor)
            state, output = STEP(method, state, batch)
            expected = reference_step(model, case.loss, case.aligned, world, ids, batch)
            assert_output(output, expected, batch.mask)
            assert_step_matches(state, world, ids)
            step += 1
        assert state.step == step
        state = end_round(method, state)
        assert_round_matches(state, world)


def assert_output(output: StepOutput, expected, mask: jax.Array) -> None:
    loss, accuracy, latent_grad = expected
    np.testing.assert_allclose(output.loss, loss, rtol=1e-4)
    np.testing.assert_allclose(output.accuracy, accuracy, rtol=1e-5)
    mask = np.asarray(mask)
    both = np.concatenate([mask] * (output.latent_grad.shape[1] // BATCH), axis=1)
    actual = np.asarray(output.latent_grad)
    assert_close(actual[both], latent_grad, "latent_grad")
    np.testing.assert_array_equal(actual[~both], 0)


# ------------------------------------------------------------------------------- who is touched


def begun(method: MocoSFL) -> TrainState:
    """Three of the five clients at the start of a round."""
    return begin_round(method, tiny_state(method), slots_of(4, 1, 3))


def test_participants_train_and_absent_clients_keep_what_is_theirs():
    method, ids = tiny_method("one_way"), [4, 1, 3]
    start = tiny_state(method)
    state = begin_round(method, start, slots_of(*ids))
    assert_equal(state.population, start.population)
    for step, sync in enumerate([False, True]):
        state, _ = STEP(method, state, one_batch(step, FULL, (1.0, 2.0, 3.0), sync))
        assert_equal(state.population, start.population)
    after = end_round(method, state).population
    for i in range(CLIENTS):
        for name in ("key_params", "opt_state"):
            now, before = (at(getattr(p, name), i) for p in (after, start.population))
            if i not in ids:
                assert_equal(now, before)
            else:
                for a, b in zip(jax.tree.leaves(now), jax.tree.leaves(before), strict=True):
                    assert np.abs(a - b).max() > 1e-5
    for slot in range(3):
        assert_equal(state.server.client.params, at(state.cohort.client.params, slot))


def test_without_a_sync_clients_part_and_with_one_they_agree():
    method = tiny_method("one_way")
    state = begun(method)
    for sync in (False, True):
        after, _ = STEP(method, state, one_batch(0, FULL, EQUAL, sync))
        for x in jax.tree.leaves(after.cohort.client.params):
            assert (np.abs(x[0] - x[2]).max() == 0) == sync
        for x in jax.tree.leaves(after.cohort.client.key_params):
            assert np.abs(x[0] - x[2]).max() > 0


@pytest.mark.parametrize("aligned", [False, True])
def test_a_sync_averages_models_and_key_encoders_only_when_aligned(aligned):
    """The same step with and without a sync differs in what the sync does, and in that alone."""
    method, weights = tiny_method("one_way", shared=False, aligned=aligned), (5.0, 1.0, 2.0)
    state = begun(method)
    alone, synced = (STEP(method, state, one_batch(0, FULL, weights, s))[0] for s in (False, True))
    before, after = alone.cohort.client, synced.cohort.client
    assert_averaged(after.params, before.params, weights)
    assert_equal(synced.server.client.params, at(after.params, 0))
    if aligned:
        assert_averaged(after.key_params, before.key_params, weights)
        assert_equal(synced.server.client.key_params, at(after.key_params, 0))
    else:
        assert_equal(after.key_params, before.key_params)
        assert synced.server.client.key_params is None
    assert_equal(alone.server.client, state.server.client)
    assert_equal(after.opt_state, before.opt_state)
    assert_equal(synced.cohort.queue, alone.cohort.queue)
    assert_equal(synced.server.server, alone.server.server)


def assert_averaged(actual, start, weights: tuple[float, ...]) -> None:
    """Every slot has the mean over the slots, in float64."""
    for a, s in zip(jax.tree.leaves(actual), jax.tree.leaves(start), strict=True):
        mean = np.tensordot(np.array(weights) / sum(weights), np.asarray(s, np.float64), axes=1)
        np.testing.assert_allclose(a, np.broadcast_to(mean, a.shape), rtol=1e-5, atol=1e-6)


# --------------------------------------------------------------------------------- frozen clients


def products(jaxpr) -> int:
    """Convolutions and matrix products in a program, those of inner programs included."""
    inner = (products(sub) for sub in subjaxprs(jaxpr))
    names = [equation.primitive.name for equation in jaxpr.eqns]
    return sum(name in ("conv_general_dilated", "dot_general") for name in names) + sum(inner)


def test_frozen_clients_have_no_backward_pass_and_stay():
    method = replace(tiny_method("server", aligned=True), client_learning_rate=0.0)
    frozen = replace(method, client=replace(method.client, frozen=True))
    state, batch = begun(method), one_batch(0, FULL, EQUAL, sync=True)
    clients, latents = state.cohort.client, jax.vmap(method.model.latents)

    def count(function, *arguments):
        return products(jax.make_jaxpr(function)(*arguments).jaxpr)

    def forward_and_backward(params, images):
        value, pull = jax.vjp(lambda p: latents(p, images), params)
        return pull(value)

    forward = count(latents, clients.params, batch.views[0])
    backward = count(forward_and_backward, clients.params, batch.views[0]) - forward
    averages = count(lambda c: average(upload(c, aligned=True), batch.weight), clients)
    trained, untrained = (
        count(lambda s, m=m: m.step(s.server, s.cohort, batch), state) for m in (method, frozen)
    )
    assert forward == 3 and backward == 6  # a kernel's and an input's gradient for each forward one
    assert trained - untrained == backward + averages

    after, _ = STEP(frozen, state, batch)
    expected, _ = STEP(method, state, batch)
    assert_equal(after.cohort.client.params, clients.params)
    assert_equal(after.cohort.client.opt_state, clients.opt_state)
    key_params = after.cohort.client.key_params
    assert_close(key_params, expected.cohort.client.key_params, "key_params", 1e-6)
    assert_close(after.server.server, expected.server.server, "server", 1e-5)
    assert_close(after.server.queue, expected.server.queue, "queue", 1e-5)


# ------------------------------------------------------------------------ the same, run otherwise


def test_jit_equals_eager():
    model = tiny_model("V1", blocks_per_stage=(), width=4, cut=1)
    method = tiny_method("one_way", aligned=True, model=model)
    arguments = (method, begun(method), one_batch(0, MASK, (1.0, 2.0, 3.0), sync=True))
    assert_close(STEP(*arguments), take_step(*arguments), "jit", 1e-5)


@pytest.mark.parametrize(
    ("loss", "shared", "aligned"),
    [("server", True, True), ("client", False, False), ("one_way", True, False)],
)
def test_chunks_of_the_cohort_give_the_whole_step(loss, shared, aligned):
    whole, mask = tiny_method(loss, shared, aligned), [*MASK, [False, False]]
    state = begin_round(whole, tiny_state(whole, slots=4), slots_of(4, 1, 3, PADDING))
    expected = state
    for step, sync in enumerate([False, True]):
        batch = one_batch(step, mask, (*SIZES, 0.0), sync)
        state, output = STEP(replace(whole, chunks=2), state, batch)
        expected, wanted = STEP(whole, expected, batch)
        assert_close(output, wanted, "output", 3e-5)
        assert_close(state, expected, "state", 3e-5)


def test_a_batch_norm_head_allows_no_chunks():
    method = tiny_method("server", model=tiny_model("largeV2"))
    assert method.chunks == 1
    with pytest.raises(ValueError, match=r"chunks = 2.*BatchNorm"):
        replace(method, chunks=2)
