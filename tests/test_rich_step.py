"""A step of clients whose batches differ, against the slow reference, and what it computes."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mocosfl_jax.config import Resolved, check_types, default_config, resolve
from mocosfl_jax.config.rich import blocks_of, groups_of
from mocosfl_jax.costs.flops import flops_of
from mocosfl_jax.data.dataset import DatasetInfo
from mocosfl_jax.federated.contract import Batch, Normalisation, Work
from mocosfl_jax.federated.slots import Slots, spread
from mocosfl_jax.federated.state import PADDING, TrainState, begin_round, create_state, end_round
from mocosfl_jax.methods.mocosfl.method import MocoSFL
from mocosfl_jax.run.program import program_of
from mocosfl_jax.run.progress import padding_line
from tests.slow_reference import (
    assert_round_matches,
    assert_step_matches,
    reference_step,
    world_of,
)
from tests.tiny_method import (
    BATCH,
    SIZE,
    assert_close,
    images,
    slots_of,
    tiny_method,
    tiny_model,
    tiny_state,
)

FACTOR = 3
RICH, OTHERS = 1, 2
WEIGHTS = (5.0, 1.0, 3.0)
MASKS = [np.array([1, 1, 0, 1, 1, 1], bool), np.array([0, 1], bool), np.array([1, 1], bool)]
ROUNDS = [  # clients, and for each step whether it syncs and the factor on its rates
    ([4, 1, 3], [(False, 1.0), (True, 0.5)]),
    ([0, 4, 2], [(True, 2.0)]),
]


@functools.partial(jax.jit, static_argnums=0)
def step(method: MocoSFL, state: TrainState, batch: Batch):
    result = method.step(state.server, state.cohort, batch, messages=True)
    metrics = {name: x.total / x.weight for name, x in result.metrics.items()}
    sent = result.messages.gradient
    return state.replace(server=result.server, cohort=result.cohort), metrics, sent


def ragged(seed: int, sync: bool, factor: float) -> Batch:
    """Images by client, each with a batch of its own size: what the reference takes."""
    views = tuple([images(100 * s + seed, len(mask))[:] for mask in MASKS] for s in (1, 2))
    for view in views:
        for slot, own in enumerate(view):
            own += 0.1 * slot  # else the first images of all clients are the same
    return Batch(
        views=views,
        labels=None,
        mask=MASKS,
        weight=jnp.asarray(WEIGHTS),
        sync=jnp.asarray(sync),
        rate_factor=jnp.float32(factor),
        progress=jnp.float32(0),
        keys=jax.random.split(jax.random.key(seed), len(MASKS)),
        normalisation=Normalisation(jnp.zeros(3), jnp.ones(3)),
    )


def in_blocks(batch: Batch) -> Batch:
    """The same rows as the method takes them: rich clients have blocks of B."""

    def blocks(by_client: list[np.ndarray]) -> jax.Array:
        return jnp.concatenate([x.reshape(-1, BATCH, *x.shape[1:]) for x in by_client])

    return batch._replace(views=tuple(map(blocks, batch.views)), mask=blocks(batch.mask))


@pytest.mark.parametrize(
    ("loss", "aligned", "head"), [("server", True, "largeV2"), ("client", False, "V2")]
)
def test_steps_equal_the_reference(loss, aligned, head):
    model = tiny_model(head)
    method = replace(tiny_method(loss, aligned=aligned, model=model), batch_factor=FACTOR)
    method = replace(method, queue_rows=24)
    state = tiny_state(method)
    world, seed = world_of(state), 0
    for ids, steps in ROUNDS:
        state = begin_round(method, state, slots_of(*ids))
        for sync, factor in steps:
            batch = ragged(seed, sync, factor)
            state, metrics, gradients = step(method, state, in_blocks(batch))
            value, accuracy, latent_grad = reference_step(model, loss, aligned, world, ids, batch)
            np.testing.assert_allclose(metrics["loss"], value, rtol=1e-4)
            np.testing.assert_allclose(metrics["accuracy"], accuracy, rtol=1e-5)
            masks = [np.tile(mask, 2 if loss == "client" else 1) for mask in MASKS]
            by_client = [gradients[0].query[0], *gradients[1].query]
            found = [np.asarray(x)[m] for x, m in zip(by_client, masks, strict=True)]
            assert_close(np.concatenate(found), latent_grad, "latent_grad")
            assert_step_matches(state, world, ids)
            seed += 1
        state = end_round(method, state)
        assert_round_matches(state, world)


def test_chunks_have_clients_of_both_kinds_and_give_the_whole_step():
    """Two parts of a rich client and two others, the last of them padding; keys in cohort order."""
    model = tiny_model("V1", blocks_per_stage=(), width=4, cut=1)
    whole = replace(tiny_method("server", model=model), batch_factor=FACTOR, queue_rows=40)
    members = [4, 1, 3, 0, 2]
    rng = np.random.default_rng(0)
    blocks = 2 * FACTOR + 3
    pixels = [rng.normal(size=(blocks, BATCH, SIZE, SIZE, 3)).astype(np.float32) for _ in "qk"]
    mask = rng.random((blocks, BATCH)) < 0.8

    def placed(method: MocoSFL) -> tuple[TrainState, Batch]:
        slots = Slots(groups, method.chunks)
        ids = spread(np.array(members), slots.clients, fill=PADDING)
        state = begin_round(method, tiny_state(method, slots=slots.number), slots_of(*ids))
        batch = ragged(0, True, 1.0)._replace(
            views=tuple(jnp.asarray(spread(x, slots.blocks)) for x in pixels),
            mask=jnp.asarray(spread(mask, slots.blocks)),
            weight=jnp.asarray(spread(np.array([5.0, 1, 2, 4, 3], np.float32), slots.clients)),
            keys=jax.random.split(jax.random.key(0), slots.number),
        )
        return state, batch

    groups = groups_of(config(num_clients=5, clients=0.4, data=0.5, batch_factor=FACTOR))
    ends = []
    for method in (whole, replace(whole, chunks=2)):
        state, batch = placed(method)
        after, metrics, _ = step(method, state, batch)
        kept = end_round(method, after)
        ends.append((kept.server, kept.population, metrics))
    assert_close(ends[1], ends[0], "chunks", 3e-5)


def test_private_queues_are_refused():
    with pytest.raises(ValueError, match="private queues"):
        replace(tiny_method("server", shared=False), batch_factor=2)


# ------------------------------------------------------------------------------- what is computed

INFO = DatasetInfo("images", 5_000, 0, 8, 10)
NARROW = {"width": 8, "blocks_per_stage": (1, 1), "head_width": 8, "cohort_chunks": 1}


def config(num_clients: int = 100, clients: float = 0.0, batch_size=1, **fields) -> Resolved:
    rich = {name: fields.pop(name) for name in ("data", "batch_factor") if name in fields}
    raw = default_config()
    raw.update({"num_clients": num_clients, "batch_size": batch_size, **NARROW, **fields})
    raw.update({"rich": {"clients": clients, **rich}})
    return resolve(check_types(raw), INFO)


@pytest.mark.parametrize(
    ("rich", "batch", "steps", "rounds"),
    [
        ({"clients": 0.2, "data": 0.8, "batch_factor": 16}, 1, 12, 200),  # 400 rows of 5,000 images
        ({"clients": 0.5, "data": 0.5, "batch_factor": 4}, 1, 20, 200),  # 250 rows
        ({"num_clients": 20, "clients": 0.2, "data": 0.8, "batch_factor": 2}, 4, 52, 200),  # 96
        ({"num_clients": 200, "clients": 0.1, "data": 0.3, "batch_factor": 5}, 1, 17, 400),
    ],
)
def test_rules_count_rows(rich, batch, steps, rounds):
    """A pass over the data is as many rows as there are images, whoever holds them."""
    found = config(**{"batch_size": None, **rich})
    assert (found.batch_size, found.steps_per_round, found.rounds) == (batch, steps, rounds)
    fewer = config(**{"batch_size": None, **rich}, steps_per_round=5)
    assert fewer.rounds == round(200 * 5_000 / (5 * blocks_of(fewer) * batch))


@pytest.mark.parametrize(("cohort", "rich"), [(100, 20), (50, 10), (48, 10), (7, 1), (3, 1)])
def test_a_cohort_has_the_share_of_rich_clients(cohort, rich):
    found = config(clients=0.2, data=0.8, batch_factor=16, cohort_size=cohort)
    assert groups_of(found) == ((rich, 16), (cohort - rich, 1))
    assert groups_of(config(clients=0.2, data=0.8, cohort_size=cohort)) == ((cohort, 1),)


def test_parts_that_stay_in_the_cache_have_clients_of_both_kinds():
    """4.2 parts of 25 million; 4 divides the 20 rich clients and the 80 others."""
    large = {"width": 16, "image_size": 32, "cohort_chunks": None}
    rich = {"clients": 0.2, "data": 0.8, "batch_factor": 16}
    assert program_of(config(**rich, **large)).method.chunks == 4
    few = config(50, 0.1, data=0.8, batch_factor=50, **large)  # 3.1 parts, of 5 rich clients
    assert program_of(few).method.chunks == 1


@pytest.mark.parametrize(
    ("clients", "data", "factor", "devices", "computed", "times"),
    [
        (0.2, 0.8, 16, 1, 400, None),
        (
            0.2,
            0.8,
            16,
            8,
            8 * (3 * 16 + 10),
            "464 batches, 400 of them of clients (1.16 times as many): 8 devices cannot share 20",
        ),
        (0.2, 0.8, 16, 10, 400, None),
        (0.5, 0.5, 4, 4, 4 * (13 * 4 + 13), None),  # 1.04 times
        (
            0.5,
            0.5,
            4,
            16,
            16 * (4 * 4 + 4),
            "320 batches, 250 of them of clients (1.28 times as many): 16 devices cannot share 50 ",
        ),
        (0.0, 0.0, 1, 8, 8 * 13, None),
    ],
)
def test_more_padding_than_a_tenth_is_said(clients, data, factor, devices, computed, times):
    """Whole clients of either kind are spread over the devices."""
    rich = {"data": data, "batch_factor": factor} if clients else {}
    slots = Slots(groups_of(config(clients=clients, **rich)), devices)
    assert len(slots.blocks) == slots.computed_blocks == computed
    line = padding_line(slots, devices)
    assert line is None if times is None else times in line


def products_of_a_step(settings: Resolved, parts: int = 1) -> int:
    """Multiply-adds of the traced step, padding included. parts: devices, one after another."""
    method, slots = program_of(settings).method, Slots(groups_of(settings), parts)
    shape = (len(slots.blocks), settings.batch_size, 8, 8, 3)
    key = jax.random.key(0)
    state = jax.eval_shape(
        lambda: create_state(method, key, key, settings.num_clients, slots.number)
    )
    batch = jax.eval_shape(
        lambda: Batch(
            views=(jnp.zeros(shape), jnp.zeros(shape)),
            labels=None,
            mask=jnp.ones(shape[:2], bool),
            weight=jnp.ones(slots.number),
            sync=jnp.bool_(False),
            rate_factor=jnp.float32(1),
            progress=jnp.float32(0),
            keys=jax.random.split(key, slots.number),
            normalisation=Normalisation(jnp.zeros(3), jnp.ones(3)),
        )
    )
    work = Work(method.step, (state.server, state.cohort, batch), replaces=False)
    return flops_of(work).products


@pytest.mark.parametrize(
    ("clients", "data", "factor", "rows"), [(0.2, 0.8, 16, 400), (0.5, 0.5, 4, 250)]
)
def test_padding_is_at_most_a_tenth_on_one_device_and_on_four(clients, data, factor, rows):
    """In the settings of the paper. Work in proportion to the true rows: that of as many clients
    alike with as many rows; all batches as large as the largest would take 4.0 and 1.6 of it."""
    rich = config(clients=clients, data=data, batch_factor=factor)
    assert blocks_of(rich) * rich.batch_size == rows
    alike = products_of_a_step(config(50, batch_size=rows // 50))
    for parts in (1, 4):
        assert alike <= products_of_a_step(rich, parts) <= 1.1 * alike
    assert products_of_a_step(config(batch_size=factor)) > 1.5 * alike
