"""Loss-based saving step by step: against plain loops, and the server's own functions."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mocosfl_jax.federated.state import PADDING, TrainState, begin_round, end_round
from mocosfl_jax.methods.mocosfl import saving, server
from mocosfl_jax.methods.mocosfl.messages import ClientModel, Latents
from mocosfl_jax.methods.mocosfl.method import MocoSFL
from mocosfl_jax.methods.mocosfl.saving import FULL, LATENTS_ONLY, SILENT, Saving
from mocosfl_jax.run.checkpoint import Clock
from mocosfl_jax.run.ledger import Ledger
from tests.test_hardness import step
from tests.test_sides import learn, move_key_encoder, update_server, write_keys, write_private_keys
from tests.tiny_method import (
    BATCH,
    EMA,
    SERVER_RATE,
    SIZE,
    assert_close,
    assert_equal,
    one_batch,
    slots_of,
    tiny_method,
    tiny_model,
    tiny_state,
)

STEPS = 3
SAVING = Saving(0.25, warmup=2, steps=STEPS, images=(BATCH, SIZE, SIZE, 3), seed=5)
IDS = [4, PADDING, 1, 3]
MASKS = [  # of each step; a padding slot has no image
    [[True, True], [False, False], [True, False], [True, True]],
    [[False, True], [False, False], [True, True], [True, True]],
    [[True, False], [False, False], [False, False], [False, True]],
]
WEIGHTS = (5.0, 0.0, 1.0, 3.0)


def method_of(loss: str, shared: bool = True, aligned: bool = False, tau: float = 0.0) -> MocoSFL:
    method = tiny_method(loss, shared, aligned, tiny_model(blocks_per_stage=(1,), cut=1))
    side = dataclasses.replace(method.client, tau=tau)
    return dataclasses.replace(method, client=side, saving=SAVING)


def first_round(method: MocoSFL) -> tuple[TrainState, list[Latents]]:
    """The state after a round in A, and the latents of its steps."""
    state, sent = begin_round(method, tiny_state(method, slots=len(IDS)), slots_of(*IDS)), []
    for index, mask in enumerate(MASKS):
        batch = one_batch(index, mask, WEIGHTS, sync=index == STEPS - 1)
        state, _, messages = step(method, state, batch)
        sent.append(messages.latents)
    return end_round(method, state), sent


# --------------------------------------------------------------------------------- which status


def statuses(means: list[float], threshold: float, warmup: int) -> list[int]:
    """Of the rounds with these mean losses, and of the next one."""
    found = [FULL]
    for number, mean in enumerate(means, start=1):
        compared = number > warmup and number > 1
        if compared and means[number - 2] - mean < threshold:
            found.append(min(found[-1] + 1, SILENT))
        else:
            found.append(FULL)
    return found


@pytest.mark.parametrize("warmup", [0, 1, 2, 4])
def test_the_status_follows_the_fall_of_the_mean_loss(warmup):
    """Means of four steps are exact, and so are falls: that of the threshold saves nothing."""
    means = [8.0, 7.75, 7.5, 7.5, 7.25, 7.25, 7.5, 7.25, 7.125, 7.125, 7.5, 7.0, 7.0, 7.0, 7.25]
    rule = dataclasses.replace(SAVING, warmup=warmup, steps=4)
    after_step = jax.jit(saving.after_step, static_argnums=0)
    state, found = saving.first_state(), [FULL]
    for number, mean in enumerate(means):
        for index, apart in enumerate((-0.5, 0.125, 0.375, 0.0)):
            assert (state.round, state.step, state.status) == (number, index, found[-1])
            state = after_step(rule, state, jnp.float32(mean + apart))
        found.append(int(state.status))
        assert (state.last_loss, state.loss) == (mean, 0)
    assert found == statuses(means, rule.threshold, warmup)
    assert set(found) == {FULL, LATENTS_ONLY, SILENT}


def test_the_order_of_stored_steps_is_one_of_seed_and_round():
    def order(steps: int, seed: int, round_: int) -> list[int]:
        rule = dataclasses.replace(SAVING, steps=steps, seed=seed)
        return saving.order(rule, jnp.int32(round_)).tolist()

    first = order(20, 5, 3)
    assert sorted(first) == list(range(20)) and first != list(range(20))
    assert first == order(20, 5, 3)
    assert len({tuple(order(20, *where)) for where in ((5, 3), (5, 4), (6, 3))}) == 3


# ------------------------------------------------------------------------------------- a round in B


@pytest.mark.parametrize(("loss", "aligned", "tau"), [("server", True, 0.0), ("client", True, 0.7)])
def test_in_b_the_server_learns_as_in_a_and_client_models_stay(loss, aligned, tau):
    method = method_of(loss, aligned=aligned, tau=tau)
    state, _ = first_round(method)
    state = begin_round(method, state, slots_of(*IDS))
    batch = one_batch(7, MASKS[1], WEIGHTS, sync=True)
    full, _, sent = step(method, state, batch._replace(sync=jnp.asarray(False)))
    after, metrics, messages = step(method.in_status(LATENTS_ONLY), state, batch)
    assert_equal(messages.latents, sent.latents)
    for name in ("server", "queue", "syncs"):
        assert_equal(getattr(after.server, name), getattr(full.server, name))
    moved = full.cohort.client.key_params
    assert_equal(after.cohort.client, state.cohort.client.replace(key_params=moved))
    assert_equal(after.cohort.synced, state.cohort.synced)
    assert "divergence" not in metrics
    params, key = state.server.client
    expected = jax.tree.map(lambda k, p: EMA * np.float64(k) + (1 - EMA) * p, key, params)
    assert_close(after.server.client, ClientModel(params, expected), "in common", 1e-5)
    if not tau:  # all clients have what they have in common
        client = jax.tree.map(lambda x: x[0], after.cohort.client)
        mine = ClientModel(client.params, client.key_params)
        assert_close(mine, after.server.client, "of a client", 1e-6)


def test_unaligned_key_encoders_move_in_b_and_nothing_is_common_of_them():
    method = method_of("one_way", shared=False)
    state, _ = first_round(method)
    state = begin_round(method, state, slots_of(*IDS))
    after, _, _ = step(
        method.in_status(LATENTS_ONLY), state, one_batch(7, MASKS[1], WEIGHTS, sync=True)
    )
    assert after.server.client.key_params is None
    before, now = state.cohort.client, after.cohort.client
    expected = jax.tree.map(
        lambda k, p: EMA * np.float64(k) + (1 - EMA) * p, before.key_params, before.params
    )
    assert_close(now.key_params, expected, "key encoders", 1e-5)
    kept = end_round(method, after).population.key_params
    assert_equal(jax.tree.map(lambda x: x[4], kept), jax.tree.map(lambda x: x[0], now.key_params))


# ------------------------------------------------------------------------------------- a round in C


def by_hand(method: MocoSFL, state: TrainState, latents: Latents, mask: Any) -> tuple[Any, ...]:
    """The server's models, the queues and the mean loss after a step on these latents."""
    side, models, rows = method.server, state.server.server, method.server.loss.rows
    models = models.replace(key_params=move_key_encoder(side, models))
    shared, private = state.server.queue, state.cohort.queue
    negatives = private.keys if shared is None else shared.keys[None]
    count = jnp.float32(np.sum(mask) * rows)
    learned = learn(side, models, server.join(latents), negatives, count)
    mask_R = jnp.concatenate([jnp.asarray(mask)] * rows, axis=1).reshape(-1)
    if shared is None:
        queues = write_private_keys(private, learned.keys, mask_R)
    else:
        queues = write_keys(shared, learned.keys, mask_R)
    rate = jnp.float32(SERVER_RATE)
    return update_server(side, models, learned.server_grad, learned, rate), queues, learned.loss


@pytest.mark.parametrize(
    ("loss", "shared", "chunks"), [("server", True, 2), ("client", False, 1), ("one_way", True, 1)]
)
def test_in_c_the_server_trains_on_stored_steps_and_clients_do_nothing(loss, shared, chunks):
    """The cohort is another one, and so are its images, masks and weights: none of them counts."""
    method = dataclasses.replace(method_of(loss, shared), chunks=chunks)
    state, sent = first_round(method)
    ids, masks = ([2, 0, 4, PADDING], MASKS[::-1]) if shared else (IDS, MASKS)
    state = begin_round(method, state, slots_of(*ids))
    before, silent = state, method.in_status(SILENT)
    order = saving.order(SAVING, jnp.int32(1)).tolist()
    assert order != list(range(STEPS))  # with this seed
    for index, stored in enumerate(order):
        models, queues, total = by_hand(method, state, sent[stored], MASKS[stored])
        batch = one_batch(50 + index, masks[index], WEIGHTS[::-1], sync=True)
        state, metrics, _ = step(silent, state, batch)
        assert_close(state.server.server, models, f"server, step {index}", 1e-5)
        written = state.server.queue if shared else state.cohort.queue
        assert_close(written, queues, f"queue, step {index}", 1e-5)
        rows = np.sum(MASKS[stored]) * method.server.loss.rows
        np.testing.assert_allclose(metrics["loss"], (total, rows), rtol=1e-5)
    assert_equal(state.server.client, before.server.client)
    assert_equal(state.cohort.client, before.cohort.client)
    assert_equal(state.cohort.stored_latents, before.cohort.stored_latents)
    assert_equal(end_round(method, state).population.opt_state, before.population.opt_state)
    assert (state.server.saving.round, state.server.saving.step) == (2, 0)


# ------------------------------------------------------------------------------------ what is sent


IMAGE = 4 * SIZE * SIZE * 8  # latents of the stem, 8 channels
MODEL = 4 * (3 * 3 * 3 * 8 + 2 * 8)


def dispatch(begins: bool, sync: list[bool]) -> SimpleNamespace:
    """Three steps of three clients and a slot of padding."""
    cohort, mask = np.array(IDS), np.array(MASKS)
    return SimpleNamespace(
        cohort=cohort, mask=mask, sync=np.array(sync), begins_round=begins, ends_round=True
    )


@pytest.mark.parametrize("hands_out", [False, True])
def test_bytes_by_hand(hands_out):
    """Of images that are no padding: 5, 5 and 2 in the three steps."""
    method, clock = method_of("client", aligned=True), Clock()
    rule = dataclasses.replace(SAVING, hands_out=hands_out)
    ledger = Ledger(dataclasses.replace(method, saving=rule), SIZE, clock)
    up, down, model = 4 * IMAGE, 2 * IMAGE, 3 * 2 * MODEL  # both views through both encoders
    full = [(5 * up, 5 * down), (10 * up + model, 10 * down + model)]
    full.append((12 * up + model, 12 * down + model))
    syncs, total = [False, True, False], np.zeros(2, int)
    for status, sent in (
        (FULL, full),
        (LATENTS_ONLY, [(n * up, model * hands_out) for n in (5, 10, 12)]),
        (SILENT, [(0, 0)] * 3),
    ):
        lines = ledger.add(dispatch(True, syncs), status)
        expected = total + np.array(sent)
        total = expected[-1]
        assert [line["status"] for line in lines] == [status] * 3
        np.testing.assert_array_equal([(x["bytes_up"], x["bytes_down"]) for x in lines], expected)
    values, notes = ledger.facts()
    assert values["rounds_by_status"] == {"A": 1, "B": 1, "C": 1}
    assert (values["bytes_up"], values["bytes_down"]) == tuple(total)
    unsaved = 3 * np.array(full[-1])
    assert (values["bytes_up_unsaved"], values["bytes_down_unsaved"]) == tuple(unsaved)
    percent = 100 * (1 - total.sum() / unsaved.sum())
    assert values["bytes_saved_percent"] == pytest.approx(percent)
    assert f"{percent:.1f} % less" in notes[0] and "1 in C (nothing is sent)" in notes[0]
