"""The hooks of a MocoSFL client: what it sends instead of latents, and a gradient of its own."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mocosfl_jax.data.augment import AugmentConfig
from mocosfl_jax.federated.contract import Batch, StepResult
from mocosfl_jax.federated.dispatch import Constants, Images, Program, run_dispatch
from mocosfl_jax.federated.placement import single_device
from mocosfl_jax.federated.state import PADDING, TrainState, begin_round, end_round
from mocosfl_jax.learning.ema import ema_update
from mocosfl_jax.learning.schedule import rate_schedule
from mocosfl_jax.learning.sgd import sgd_update
from mocosfl_jax.methods.mocosfl import client
from mocosfl_jax.methods.mocosfl.client import ClientSide, ClientState
from mocosfl_jax.methods.mocosfl.messages import LatentGradient, Latents
from mocosfl_jax.methods.mocosfl.method import MocoSFL
from mocosfl_jax.run.checkpoint import Checkpoints, Clock, Identity, find_newest
from mocosfl_jax.run.program import program_of
from mocosfl_jax.run.rounds import Rounds
from tests import tiny
from tests.test_sides import (
    BATCH,
    CLIENT_RATE,
    SGD,
    SIZE,
    assert_close,
    at,
    method_of,
    tiny_model,
)
from tests.toy_hooks import (
    CLIENTS,
    EMA,
    IDS,
    MASK,
    SLOTS,
    TEMPERATURE,
    Pull,
    Recorder,
    batch_of,
    doubled,
    hooked,
    identity,
    keys_of,
    pixels_of,
    pooled,
    started,
    step,
)

# -------------------------------------------------------------------------------------- the release


RECORDERS = {"one_way": Recorder(BATCH), "client": Recorder(2 * BATCH)}
clean_latents = jax.jit(tiny_model().latents)


@pytest.mark.parametrize("loss", ["one_way", "client"])
def test_what_is_sent_is_what_is_released(loss):
    method = hooked(doubled, RECORDERS[loss], loss)
    state, sent = started(RECORDERS[loss]), []
    for seed in (1, 2):
        batch = batch_of(seed)
        query, key = (np.asarray(view) for view in batch.views)
        if loss == "client":
            both = np.concatenate([query, key], axis=1), np.concatenate([key, query], axis=1)
            query, key = both
        messages = step(method, state.server, state.cohort, batch).messages
        for slot in range(SLOTS):
            one = at(state.cohort.client, slot)
            moved_params = ema_update(one.key_params, one.params, EMA)
            query_key, key_key, _ = keys_of(batch, slot)
            for params, images, rng, latents in (
                (one.params, query[slot], query_key, messages.latents.query[slot]),
                (moved_params, key[slot], key_key, messages.latents.key[slot]),
            ):
                clean = clean_latents(params, images)
                noise = jax.random.normal(rng, clean.shape)
                assert_close(latents, 2 * clean + noise)
                sent.append(np.asarray(latents - 2 * clean))
    assert len(sent) == 2 * SLOTS * 2
    pairs = [(x, y) for i, x in enumerate(sent) for y in sent[:i]]
    assert all(np.abs(x - y).mean() > 0.5 for x, y in pairs)  # no key is used twice


def test_the_gradient_goes_through_the_release():
    method = hooked(doubled)
    state, batch = started(), batch_of(1)
    result = step(method, state.server, state.cohort, batch)
    old = state.cohort.client
    loss, gradient = explicit_gradient(method, state, batch)
    assert_close(result.metrics["loss"].total / result.metrics["loss"].weight, loss)
    rate = jnp.float32(CLIENT_RATE * 0.5)
    expected, _ = jax.vmap(lambda p, o, g: sgd_update(SGD, p, o, g, rate))(
        old.params, old.opt_state, gradient
    )
    assert_close(result.cohort.client.params, expected)


def explicit_gradient(method: MocoSFL, state: TrainState, batch: Batch) -> tuple[Any, Any]:
    """Loss of a step and its gradient with respect to all clients' models, by autodiff alone."""
    model, clients, server = method.model, state.cohort.client, state.server.server
    key_server = ema_update(server.key_params, server.params, EMA)
    mask_R, queue = batch.mask.reshape(-1), state.server.queue.keys

    def embed(server_params: Any, params_C: Any, view: jax.Array, index: int) -> jax.Array:
        rows = []
        for slot in range(SLOTS):
            clean = model.latents(at(params_C, slot), view[slot])
            noise = jax.random.normal(keys_of(batch, slot)[index], clean.shape)
            rows.append(2 * clean + noise)
        features = model.features(server_params, jnp.concatenate(rows))
        out, _ = model.embed(server_params, {}, features, mask_R, train=True)
        return out / jnp.linalg.norm(out, axis=1, keepdims=True)

    @jax.jit
    @jax.value_and_grad
    def loss(params_C: Any) -> jax.Array:
        query = embed(server.params, params_C, batch.views[0], 0)
        key_params = ema_update(clients.key_params, clients.params, EMA)
        key = embed(key_server, key_params, batch.views[1], 1)
        positive = (query * key).sum(axis=1, keepdims=True)
        logits = jnp.concatenate([positive, query @ queue.T], axis=1) / TEMPERATURE
        losses = -jax.nn.log_softmax(logits)[:, 0]
        return losses.mean(where=mask_R)

    return loss(clients.params)


def test_a_release_may_change_the_shape():
    method = hooked(pooled)
    state, images = started(), jax.ShapeDtypeStruct((BATCH, SIZE, SIZE, 3), jnp.float32)
    result = jax.eval_shape(
        functools.partial(step, method), state.server, state.cohort, batch_of(1)
    )
    sent = (BATCH, SIZE // 2, SIZE // 2, 8)
    assert result.messages.gradient.query.shape == (SLOTS, *sent)
    traffic = {message.name: message.content for message in method.traffic(images)}
    for name in ("query latents", "key latents", "gradient of query latents"):
        assert traffic[name].shape == sent


# ------------------------------------------------------------------------------- the extra gradient


@pytest.mark.parametrize("loss", ["one_way", "client"])
def test_the_extra_gradient_is_given_pixels_and_what_was_sent(loss):
    method, rows = hooked(doubled, RECORDERS[loss], loss), RECORDERS[loss].rows
    state, batch, pixels = started(RECORDERS[loss]), batch_of(1), pixels_of(1)
    result = step(method, state.server, state.cohort, batch)
    seen = result.cohort.client.extra
    query = pixels[0] if loss == "one_way" else np.concatenate(pixels, axis=1)
    np.testing.assert_allclose(seen.pixels, query, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(seen.latents, result.messages.latents.query)
    np.testing.assert_array_equal(seen.mask, np.tile(MASK, rows // BATCH))
    bits = [jax.random.bits(keys_of(batch, slot)[2]) for slot in range(SLOTS)]
    np.testing.assert_array_equal(seen.bits, bits)
    np.testing.assert_array_equal(seen.progress, [0.25] * SLOTS)


def test_the_extra_gradient_is_added_before_the_backward_pass():
    """Two steps, by hand in NumPy but for the backward pass and the optimizer."""
    method = hooked(doubled, Pull())
    state = started(Pull())
    server, cohort = state.server, state.cohort
    for seed in (1, 2):
        batch, pixels = batch_of(seed), pixels_of(seed)[0]
        before = cohort
        server, cohort, metrics, messages = step(method, server, cohort, batch)
        brightness, energy = np.zeros(2), np.zeros(2)
        for slot in range(SLOTS):
            old, new = at(before.client, slot), at(cohort.client, slot)
            counts = np.float32(MASK[slot])
            latents = np.asarray(messages.latents.query[slot])
            shift = np.asarray(jax.random.normal(keys_of(batch, slot)[2]))
            own = 0.25 * (latents - np.asarray(old.extra.value) - shift)
            own = own * counts[:, None, None, None]
            bright = pixels[slot].mean(axis=(1, 2, 3))
            value = 0.5 * old.extra.value + 0.5 * (bright @ counts) / max(counts.sum(), 1)
            assert_close(new.extra.value, value)
            assert int(new.extra.steps) == int(old.extra.steps) + 1
            brightness += [bright @ counts, counts.sum()]
            energy += [np.square(latents).mean(axis=(1, 2, 3)) @ counts, counts.sum()]
            total = messages.gradient.query[slot] + own
            assert_close(new.params, params_after(old, batch, slot, total))
        assert_close(np.asarray(metrics["brightness"]), np.float32(brightness))
        assert_close(np.asarray(metrics["energy"]), np.float32(energy))
        assert set(metrics) == {"loss", "accuracy", "brightness", "energy"}


def params_after(old: ClientState, batch: Batch, slot: int, gradient: jax.Array) -> Any:
    """A client's model after a step with this gradient of its query latents."""

    @jax.grad
    def product(params: Any) -> jax.Array:
        sent = 2 * clean_latents(params, batch.views[0][slot])  # and noise, which is constant
        return (sent * gradient).sum()

    rate = jnp.float32(CLIENT_RATE * 0.5)
    return sgd_update(SGD, old.params, old.opt_state, product(old.params), rate)[0]


def test_the_server_does_not_learn_of_the_extra_gradient():
    """Neither the message to the client nor the server's update depends on it."""
    batch = batch_of(1)
    results = [
        step(hooked(doubled, extra), started(extra).server, started(extra).cohort, batch)
        for extra in (Pull(), None)
    ]
    assert_close(results[0].messages, results[1].messages)
    assert_close(results[0].server, results[1].server)
    leaves = [jax.tree.leaves(result.cohort.client.params) for result in results]
    assert any(np.abs(x - y).max() > 1e-3 for x, y in zip(*leaves, strict=True))


# ------------------------------------------------------------------------- state between the rounds


def test_the_state_of_the_hook_belongs_to_the_client():
    method = hooked(doubled, Pull())
    state, keys = started(Pull()), jax.random.split(jax.random.key(3), CLIENTS)
    drawn = jax.vmap(method.own, in_axes=(None, 0))(state.server, keys).extra.value
    assert len(set(drawn.tolist())) == CLIENTS
    first = np.asarray(state.population.extra.value)
    np.testing.assert_array_equal(state.cohort.client.extra.value[:3], first[IDS[:3]])
    for seed in (1, 2):
        result = step(method, state.server, state.cohort, batch_of(seed))
        state = state.replace(server=result.server, cohort=result.cohort)
    learned = np.asarray(state.cohort.client.extra.value)
    state = end_round(method, state)
    kept = state.population.extra
    np.testing.assert_array_equal(kept.steps, [2, 0, 0, 2, 2])
    np.testing.assert_array_equal(kept.value[jnp.asarray(IDS[:3])], learned[:3])
    np.testing.assert_array_equal(kept.value[jnp.asarray([1, 2])], first[[1, 2]])
    state = begin_round(method, state, jnp.asarray([1, 4, PADDING, PADDING], jnp.int32))
    np.testing.assert_array_equal(state.cohort.client.extra.steps[:2], [0, 2])
    np.testing.assert_array_equal(state.cohort.client.extra.value[:2], [first[1], learned[2]])


def test_the_state_of_the_hook_is_in_checkpoints(tmp_path):
    config, _ = tiny.load(tiny.write_npz(tmp_path / "images.npz"), cohort_size=3)
    program = program_of(config)
    side = dataclasses.replace(program.method.client, extra_gradient=Pull())
    method = dataclasses.replace(program.method, client=side, chunks=2)  # a slot of padding
    rounds = Rounds(config, single_device(), dataclasses.replace(program, method=method))
    assert rounds.slots.number == 4
    state = rounds.initial_state()
    extra = state.cohort.client.extra
    cohort = state.cohort.replace(
        client=state.cohort.client.replace(extra=extra.replace(steps=extra.steps + 7))
    )
    state = state.replace(cohort=cohort, step=jnp.int32(1))
    identity = Identity(config, data="")
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=1, identity=identity)
    saved = rounds.unpadded(state)
    checkpoints.save(1, saved, Clock(), lambda: None)
    checkpoints.close()
    found = find_newest(tmp_path / "checkpoints", rounds.abstract_unpadded(), identity)
    assert found.bad == {} and found.restored is not None
    jax.tree.map(np.testing.assert_array_equal, found.restored.state, saved)
    restored = rounds.padded(found.restored.state)
    np.testing.assert_array_equal(restored.cohort.client.extra.steps[:3], [7, 7, 7])
    np.testing.assert_array_equal(restored.population.extra.value, state.population.extra.value)


# --------------------------------------------------------------------------------------- both hooks


def test_keys_differ_by_client_and_step_but_not_by_slot():
    def bits_by_client(ids: list[int]) -> dict[int, list[int]]:
        method = hooked(doubled, RECORDERS["one_way"])
        schedule = rate_schedule("constant", 10)
        program = Program(method, AugmentConfig(size=SIZE), 0.1, schedule, total_steps=10)
        constants = Constants(batch_of(1).normalisation, jax.random.key(1), jax.random.key(2))
        state = begin_round(method, started(RECORDERS["one_way"]), jnp.asarray(ids, jnp.int32))
        run = jax.jit(run_dispatch, static_argnums=0)
        bits: dict[int, list[int]] = {i: [] for i in ids}
        for _ in range(3):
            inputs = Images(
                images=np.zeros((1, SLOTS, BATCH, SIZE, SIZE, 3), np.uint8),
                mask=np.asarray([MASK]),
                sync=np.asarray([False]),
                weight=np.float32([1, 1, 1, 0]),
            )
            state, _ = run(program, state, inputs, constants)
            for i, drawn in zip(ids, np.asarray(state.cohort.client.extra.bits), strict=True):
                bits[i].append(int(drawn))
        return bits

    drawn = bits_by_client(IDS)
    assert len({x for bits in drawn.values() for x in bits}) == 3 * SLOTS
    assert drawn == bits_by_client([4, 3, 0, PADDING])


def test_what_is_masked_weighs_nothing():
    """Masked rows and the padding slot with other images: nothing else changes."""
    method = hooked(doubled, Pull())
    state, pixels, other = started(Pull()), pixels_of(1), pixels_of(2)
    hidden = np.where(np.asarray(MASK)[None, :, :, None, None, None], pixels, other)
    assert not np.array_equal(hidden, pixels)
    results = [
        step(method, state.server, state.cohort, batch_of(1, images)) for images in (pixels, hidden)
    ]
    assert_close(results[0].server, results[1].server)
    assert_close(results[0].metrics, results[1].metrics)
    participants = [jax.tree.map(lambda x: x[:3], result.cohort) for result in results]
    assert_close(*participants)
    assert float(results[0].metrics["brightness"].weight) == np.sum(MASK)

    # A client without an image gets no gradient: weight decay and momentum alone move its model.
    old, new = (at(x.client, 3) for x in (state.cohort, results[0].cohort))
    still = jax.tree.map(jnp.zeros_like, old.params)
    rate = jnp.float32(CLIENT_RATE * 0.5)
    assert_close(new.params, sgd_update(SGD, old.params, old.opt_state, still, rate)[0])


def test_chunks_change_nothing():
    whole, parts = (hooked(doubled, Pull(), chunks=chunks) for chunks in (1, 2))
    state, batch = started(Pull()), batch_of(1)._replace(sync=jnp.asarray(True))
    expected = step(whole, state.server, state.cohort, batch)
    result = step(parts, state.server, state.cohort, batch)
    assert_close(result, expected)


def test_clients_that_keep_nothing_cannot_have_a_state():
    side = hooked(extra=Pull()).client
    method = method_of("client", align=True, private=False)
    dataclasses.replace(method, persistent=False)
    with pytest.raises(ValueError, match="stateless clients"):
        dataclasses.replace(method, client=side, persistent=False)


def test_a_frozen_client_cannot_have_an_extra_gradient():
    with pytest.raises(ValueError, match="frozen"):
        ClientSide(tiny_model().client, SGD, EMA, frozen=True, extra_gradient=Pull())
    assert ClientSide(tiny_model().client, SGD, EMA, frozen=True, release=doubled).needs_key


# ------------------------------------------------------------------------------------ without hooks


def bare_forward(side, state, query, key, mask, rng):
    """`client.forward` of one view each, as if there were no hooks."""
    latents, backward = jax.vjp(lambda p: side.net.apply({"params": p}, query), state.params)
    key_params = ema_update(state.key_params, state.params, side.ema)
    sent = Latents(latents, side.net.apply({"params": key_params}, key), mask)
    return state.replace(key_params=key_params), sent, backward


def bare_update(side, state, backward, gradient: LatentGradient, rate, to_pixels, rng, progress):
    """`client.update` in the same way."""
    (grad,) = backward(gradient.query)
    params, opt_state = sgd_update(side.optimizer, state.params, state.opt_state, grad, rate)
    return state.replace(params=params, opt_state=opt_state), {}


def lowered(method: MocoSFL) -> str:
    """The program of a step, as it is given to the compiler."""
    state = started()

    def one_step(server: Any, cohort: Any, batch: Batch) -> StepResult:
        return method.step(server, cohort, batch)

    return jax.jit(one_step).lower(state.server, state.cohort, batch_of(1)).as_text()


@pytest.mark.parametrize("chunks", [1, 2])
def test_unused_hooks_leave_no_trace_in_the_program(monkeypatch, chunks):
    unused, unchanged = lowered(hooked(chunks=chunks)), lowered(hooked(identity, chunks=chunks))
    used = lowered(hooked(doubled, chunks=chunks))
    monkeypatch.setattr(client, "forward", bare_forward)
    monkeypatch.setattr(client, "update", bare_update)
    bare = lowered(hooked(chunks=chunks))
    assert unused == bare
    assert unchanged == bare
    assert used != bare
