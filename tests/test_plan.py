"""The estimate of a run's memory, against counts by hand and the arrays themselves."""

import dataclasses

import pytest

from mocosfl_jax.config import Config, check_types, default_config
from mocosfl_jax.config.resolve import resolve
from mocosfl_jax.data.dataset import DatasetInfo
from mocosfl_jax.errors import InputError
from mocosfl_jax.evaluation.raw_pixels import BLOCK
from mocosfl_jax.run.plan import Memory, check_clients_fit, estimate_memory, plan

INFO = DatasetInfo("images", num_train=700, num_test=90, image_size=12, num_classes=3)
PIXELS = 12 * 12 * 3
FIELDS = {
    "num_clients": 6,
    "cohort_size": 6,
    "batch_size": 5,
    "steps_per_round": 8,
    "steps_per_dispatch": 4,
    "rounds": 2,
    "width": 4,
    "blocks_per_stage": (1, 1),
    "stem": "3x3s1",
    "head_width": 16,
    "queue_length": 60,
    "probe_epochs": 2,
    "cohort_chunks": 1,
}
CLIENT, FEATURES, EMBEDDING = 3 * 3 * 3 * 4 + 2 * 4, 8, 16  # client: the stem and its GroupNorm


def resolved(info: DatasetInfo = INFO, **fields) -> Config:
    raw = default_config()
    raw.update({**FIELDS, **fields})
    return resolve(check_types(raw), info)


def memory(info: DatasetInfo = INFO, **fields) -> Memory:
    config = resolved(info, **fields)
    return estimate_memory(config, info, plan(config))


def with_images(train: int, test: int, **fields) -> DatasetInfo:
    return dataclasses.replace(INFO, num_train=train, num_test=test, **fields)


def test_what_the_run_holds_by_hand():
    found = memory()
    assert found.images == 790 * PIXELS
    assert found.inputs == 2 * (4 * 6 * 5) * PIXELS
    assert found.encoded == (790 + 700) * (FEATURES + EMBEDDING) * 4


def test_state_by_hand():
    """Models, momentum models and buffers; between rounds clients share one model."""
    config = resolved()
    sizes = plan(config)
    clients = 6 * 3 * CLIENT + (1 + 6 * 2) * CLIENT
    others = 3 * sizes.server_params + 60 * EMBEDDING
    integers = 6 + 2  # cohort ids; the queue's pointer and the step
    found = estimate_memory(config, INFO, sizes)
    assert found.state == found.saved_copy == 4 * (clients + others + integers)


def test_the_compiler_needs_more_for_more_convolutions():
    """A stage more: two convolutions, and a projected shortcut."""
    two, three = memory(), memory(blocks_per_stage=(1, 1, 1))
    assert three.compiler - two.compiler == 3 * 48_000_000
    assert two.compiler == (180 + 6 * 48) * 10**6
    assert two.process == three.process


@pytest.mark.parametrize("chunks", [1, 3])
def test_a_step_holds_what_one_part_needs(chunks):
    """That of a cohort as large as the part, and the gradient to which parts add theirs."""
    config = resolved(cohort_chunks=chunks)
    sizes, part = plan(config), plan(resolved(cohort_size=6 // chunks))
    added_up = 4 * sizes.server_params if chunks > 1 else 0
    assert sizes.step_bytes == part.step_bytes + added_up
    views = 2 * (6 * 5) * PIXELS * 4
    assert estimate_memory(config, INFO, sizes).step == sizes.step_bytes + views
    assert sizes.client_params == CLIENT


def test_a_step_holds_gradients_and_new_models_whatever_the_batch():
    """Of the clients a gradient each; of the server a gradient and two models."""
    two, four = (plan(resolved(batch_size=n)) for n in (2, 4))
    without_rows = 2 * two.step_bytes - four.step_bytes
    models = 4 * (6 * CLIENT + 3 * two.server_params)
    kernels = 4 * (6 * CLIENT + two.server_params)  # backward passes keep some, perhaps twice
    assert models + kernels / 2 < without_rows < models + 4 * kernels


def test_the_largest_piece_of_an_evaluation_counts():
    raw_pixels = 4 * BLOCK * PIXELS * 4 + BLOCK**2 * 4
    assert memory().evaluation == raw_pixels

    many = with_images(200_000, 90)
    assert memory(many).evaluation == 200_000 * EMBEDDING * 4 + 500 * 200_000 * 4

    sizes = plan(resolved())
    network = 4 * (sizes.client_params + sizes.server_params)
    batch = 2 * 30_000 * PIXELS + 4 * 30_000 * (12 * 12 * 4) * 4
    assert memory(eval_batch_size=30_000).evaluation == batch + network

    big = with_images(700, 90, image_size=96)  # compared at 32x32
    assert memory(big, eval_batch_size=1).evaluation == 4 * BLOCK * 3072 * 4 + BLOCK**2 * 4


def test_each_virtual_device_holds_the_server_and_its_new_models():
    """And the copy at a save. Rows are spread, so only what does not depend on them is more."""
    one, two = memory(devices=1), memory(devices=2)
    network = 4 * plan(resolved()).server_params
    state = 3 * network + 4 * (CLIENT + 60 * EMBEDDING + 1)
    gradient_and_new_models = 3 * network
    of_backward = two.others - 2 * state - gradient_and_new_models
    assert one.others == 0
    assert 0 <= of_backward < 4 * network
    assert two.device == one.device


@pytest.mark.parametrize("info", [with_images(700, 0), with_images(700, 90, num_classes=None)])
def test_no_evaluation_takes_no_memory(info):
    found = memory(info)
    assert found.encoded == found.evaluation == 0


def test_training_and_evaluation_take_turns():
    """Every part has a digit of its own."""
    parts = Memory(
        process=1,
        compiler=20,
        images=300,
        state=4_000,
        saved_copy=50_000,
        inputs=600_000,
        step=7_000_000,
        encoded=0,
        evaluation=0,
    )
    assert parts.total == 7_654_321
    assert dataclasses.replace(parts, others=80_000_000).total == 87_654_321
    assert parts.device == 7_654_000
    assert parts.host == 650_321

    evaluated = dataclasses.replace(parts, encoded=80_000_000, evaluation=900_000_000)
    assert evaluated.total == 980_004_321
    assert evaluated.device == 900_004_000
    assert evaluated.host == 80_000_321


def test_more_clients_than_the_host_can_list_are_refused():
    config = resolved(num_clients=1000, images_per_client=5)
    check_clients_fit(config, 40_000)
    with pytest.raises(InputError, match=r"num_clients = 1000: their ids and sizes alone"):
        check_clients_fit(config, 39_999)
