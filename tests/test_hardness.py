"""Similarity of queries and keys by the age of the key, against lists, loops and closed forms."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mocosfl_jax.federated.contract import Metrics
from mocosfl_jax.federated.state import PADDING, TrainState, begin_round, end_round
from mocosfl_jax.learning.hardness import Decay, extrapolate, fit_decay
from mocosfl_jax.learning.queue import enqueue, init_queue
from mocosfl_jax.methods.mocosfl.method import MocoSFL
from tests.tiny_method import (
    CLIENTS,
    at,
    new_state,
    one_batch,
    slots_of,
    tiny_method,
    tiny_model,
)

# ------------------------------------------------------------------------------- the ages of keys


def test_ages_count_the_writes_since_a_row_was_written():
    """Around the end of the ring, with rows that are padding; what the queue starts with has none.

    Private queues are written apart.
    """
    masks = [  # of each write: three rows to queue 0, three to queue 1
        [[True, True, True], [True, False, False]],
        [[True, False, True], [False, False, False]],
        [[False, True, True], [True, True, False]],
        [[True, True, True], [True, True, True]],
    ]
    queues = jax.vmap(functools.partial(init_queue, length=7, width=2, ages=True))(
        jax.random.split(jax.random.key(0))
    )
    np.testing.assert_array_equal(queues.age, np.zeros((2, 7)))
    written = [[None] * 7, [None] * 7]  # by row: the number of the write
    ptrs = [0, 0]
    for time, mask in enumerate(masks):
        queues = jax.vmap(enqueue)(queues, jnp.ones((2, 3, 2)), jnp.asarray(mask))
        for q in range(2):
            for kept in mask[q]:
                if kept:
                    written[q][ptrs[q]] = time
                    ptrs[q] = (ptrs[q] + 1) % 7
            ages = [0 if t is None else time + 1 - t for t in written[q]]
            np.testing.assert_array_equal(queues.age[q], ages)
    assert queues.age.dtype == jnp.int32
    np.testing.assert_array_equal(queues.age, [[1, 1, 1, 3, 3, 2, 2], [4, 2, 2, 1, 1, 1, 0]])


# ----------------------------------------------------------------------------- what a step measures

AGES = 3
IDS = [4, PADDING, 1, 3]
MASKS = [  # of each step: a row without an image here and there, a slot without a client
    [[True, True], [False, False], [True, False], [True, True]],
    [[True, False], [False, False], [True, True], [True, True]],
    [[True, True], [False, False], [True, True], [False, True]],
    [[True, True], [False, False], [True, True], [True, True]],
    [[False, True], [False, False], [True, False], [True, True]],
]
SYNCS = [False, True, False, True, True]


@functools.cache
def measuring(loss: str, shared: bool, chunks: int = 1, rows: int = 16) -> MocoSFL:
    method = tiny_method(loss, shared, model=tiny_model(blocks_per_stage=(1,), cut=1))
    server = dataclasses.replace(method.server, ages=AGES)
    return dataclasses.replace(method, server=server, queue_rows=rows, chunks=chunks)


@functools.partial(jax.jit, static_argnums=0)
def step(method: MocoSFL, state: TrainState, batch: Any) -> tuple[TrainState, Metrics, Any]:
    result = method.step(state.server, state.cohort, batch, messages=True)
    after = state.replace(step=state.step + 1, server=result.server, cohort=result.cohort)
    return after, result.metrics, result.messages


@functools.partial(jax.jit, static_argnums=0)
def unit_rows(method: MocoSFL, params: Any, latents: jax.Array) -> jax.Array:
    rows = latents.reshape(-1, *latents.shape[2:])
    features = method.model.features(params, rows)
    out, _ = method.model.embed(params, {}, features, jnp.ones(len(rows), bool), train=True)
    return out / jnp.linalg.norm(out, axis=1, keepdims=True)


def queries_of(method: MocoSFL, before: TrainState, messages: Any) -> list[tuple[int, np.ndarray]]:
    """Slot and unit query of every row that counts, from the latents that travelled."""
    latents, params = messages.latents, before.server.server.params
    views = [latents.query, latents.key] if method.server.loss.swapped else [latents.query]
    mask = np.asarray(latents.mask)
    slots = np.repeat(np.arange(len(mask)), mask.shape[1])
    found = []
    for view in views:
        rows = np.asarray(unit_rows(method, params, view), np.float64)
        found += [(s, q) for s, q, m in zip(slots, rows, mask.ravel(), strict=True) if m]
    return found


class Ring:
    """When each row of a queue was written, in steps in which its queue was open."""

    def __init__(self, rows: int):
        self.written: list[int | None] = [None] * rows
        self.ptr = self.time = 0

    def write(self, keys: int) -> None:
        for _ in range(keys):
            self.written[self.ptr] = self.time
            self.ptr = (self.ptr + 1) % len(self.written)
        self.time += 1

    def ages(self) -> list[int | None]:
        return [None if t is None else self.time - t for t in self.written]


@pytest.mark.parametrize(
    ("loss", "shared", "chunks", "rows"),
    [
        ("server", True, 2, 27),  # 10 keys a step or fewer: the ring wraps in the third
        ("client", False, 1, 10),  # 4 keys a step and client or fewer
        ("one_way", False, 2, 5),
    ],
)
def test_similarities_by_age_are_those_of_all_pairs(loss, shared, chunks, rows):
    method = measuring(loss, shared, chunks, rows)
    state = begin_round(method, new_state(method, CLIENTS, len(IDS)), slots_of(*IDS))
    rings = [Ring(rows) for _ in range(1 if shared else CLIENTS)]
    ids, seen = IDS, set()
    for t, (mask, sync) in enumerate(zip(MASKS, SYNCS, strict=True)):
        if t == 3:  # another round: client 0 is new, client 1 absent
            ids = [3, PADDING, 0, 4]
            state = begin_round(method, end_round(method, state), slots_of(*ids))
        before = state
        batch = one_batch(t, mask, (1.0, 0.0, 2.0, 3.0), sync)
        state, metrics, messages = step(method, state, batch)
        total, pairs = np.zeros(AGES), np.zeros(AGES)
        for slot, query in queries_of(method, before, messages):
            queue = before.server.queue if shared else at(before.cohort.queue, slot)
            ring = rings[0] if shared else rings[ids[slot]]
            for key, age in zip(np.asarray(queue.keys, np.float64), ring.ages(), strict=True):
                if age is not None and age <= AGES:
                    total[age - 1] += query @ key
                    pairs[age - 1] += 1
        found = [metrics[f"similarity_age_{i}"] for i in range(1, AGES + 1)]
        np.testing.assert_array_equal([x.weight for x in found], pairs if sync else np.zeros(AGES))
        if sync:
            np.testing.assert_allclose([x.total for x in found], total, rtol=1e-4, atol=1e-4)
            seen |= set(np.flatnonzero(pairs) + 1)
        keys = np.array(mask).sum(axis=1) * method.server.loss.keys
        for slot, i in enumerate(ids):
            if not shared and i < CLIENTS:
                rings[i].write(keys[slot])
        if shared:
            rings[0].write(keys.sum())
    assert seen == {1, 2, 3} and f"similarity_age_{AGES + 1}" not in metrics


def test_measuring_changes_nothing_else():
    method = measuring("server", True)
    plain = dataclasses.replace(method, server=dataclasses.replace(method.server, ages=0))
    states = []
    for m in (method, plain):
        state = begin_round(m, new_state(m, CLIENTS, 4), slots_of(*IDS))
        state, metrics, _ = step(m, state, one_batch(0, MASKS[0], (1.0, 0.0, 2.0, 3.0), True))
        states.append(state.server.replace(queue=state.server.queue.replace(age=None)))
    assert set(metrics) == {"loss", "accuracy"}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), *states)


# ------------------------------------------------------------------------------------- Equation 2


@pytest.mark.parametrize(("eta", "gamma"), [(0.8, 0.93), (0.3, 0.999), (-0.2, 0.5), (0.4, 1.0)])
def test_a_decay_is_found_again(eta, gamma):
    decay = fit_decay(eta * gamma ** np.arange(1, 11))
    assert decay == pytest.approx((eta, gamma), rel=1e-6)
    np.testing.assert_allclose(decay.similarity(np.array([0, 2])), [eta, eta * gamma**2], rtol=1e-6)


def test_noise_is_fitted_by_least_squares():
    """No pair of values near the fitted one leaves a smaller squared error."""
    rng = np.random.default_rng(0)
    values = 0.5 * 0.9 ** np.arange(1, 9) + 0.02 * rng.normal(size=8)

    def error(eta: float, gamma: float) -> float:
        return sum((v - eta * gamma**i) ** 2 for i, v in enumerate(values, start=1))

    found = fit_decay(values)
    nearby = [
        error(found.eta + a, found.gamma + b) for a in (-1e-3, 0, 1e-3) for b in (-1e-3, 0, 1e-3)
    ]
    assert min(nearby) == error(*found)
    assert fit_decay(np.arange(1.0, 6.0)).gamma == 1  # similarities that rise


@pytest.mark.parametrize(("eta", "gamma"), [(0.8, 0.93), (0.5, 1.0), (-0.1, 0.4), (0.3, 0.0)])
def test_hardness_in_closed_form_is_the_sum(eta, gamma):
    for first, last in ((1, 30), (11, 30), (4, 4)):
        expected = sum(200 * eta * gamma**age for age in range(first, last + 1))
        assert Decay(eta, gamma).hardness(200, first, last) == pytest.approx(expected)


def test_the_youngest_third_predicts_the_rest():
    values = np.array([0.4, 0.2, 0.1, 0.07, 0.05, 0.04, 0.03, 0.02])  # halves: 0.8 * 0.5^i at first
    decay, fitted, predicted, measured = extrapolate(values, keys=10)
    assert fitted == 2 and decay == pytest.approx((0.8, 0.5))
    assert predicted == pytest.approx(10 * sum(0.8 * 0.5**age for age in range(3, 9)))
    assert measured == pytest.approx(10 * (0.1 + 0.07 + 0.05 + 0.04 + 0.03 + 0.02))
    assert extrapolate(np.linspace(0.5, 0.1, 10), 1).fitted == 3
    with pytest.raises(ValueError, match="2 ages: at least 3"):
        extrapolate(values[:2], 10)


def test_one_age_determines_no_decay():
    with pytest.raises(ValueError, match="1 ages: at least 2"):
        fit_decay(np.array([0.5]))
