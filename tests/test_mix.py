"""A second data set beside the first: what is drawn, who trains on it, and what a restart needs."""

import json
from pathlib import Path

import numpy as np
import pytest

from mocosfl_jax.config import check_types, default_config
from mocosfl_jax.config.data import mixed_partition_of, partition_of, prepare
from mocosfl_jax.data.cohort import CohortSampler, round_batches
from mocosfl_jax.data.pixels import square_arrays
from mocosfl_jax.federated.placement import make_placement
from mocosfl_jax.federated.slots import Group, Slots
from mocosfl_jax.main import main
from mocosfl_jax.randomness import Stream, host_rng
from mocosfl_jax.run.feed import dispatches
from mocosfl_jax.run.plan import plan
from mocosfl_jax.run.rounds import place_inputs
from mocosfl_jax.train import Interrupted
from tests import tiny
from tests.data_files import numbered, random_images, write_npz
from tests.test_main import CONFIG, refused
from tests.test_train import lines, run, without_speed

SECOND = 21  # training images of the second data set, 10x10
CLIENTS, BATCH, ROWS = 4, 3, 2
MIX = {"mix_batch_size": ROWS, "mix_fraction": 0.5}
ONE = {
    "num_clients": 1,
    "classes_per_client": None,
    "rounds": 2,
    "blocks_per_stage": (1,),
    "knn_every": 0,
    "probe_epochs": 0,
    "mean": (0.1, 0.2, 0.3),
    "std": (0.3, 0.2, 0.1),
    **MIX,
}


@pytest.fixture(scope="module")
def npz(tmp_path_factory) -> Path:
    return tiny.write_npz(tmp_path_factory.mktemp("data") / "images.npz")


@pytest.fixture(scope="module")
def second(npz) -> str:
    images = numbered(random_images(SECOND, 10, 10, 3))
    return write_npz(npz.with_name("second.npz"), x_train=images, x_test=images[:2])


def loaded(npz: Path, second: str, **fields):
    return tiny.load(npz, mix_dataset=second, **{"queue_length": 48, **MIX, **fields})


# ------------------------------------------------------------------------------ what is drawn


def test_a_share_of_the_second_data_set_is_drawn_and_resized(npz, second):
    dataset = loaded(npz, second)[1]
    images = numbered(random_images(SECOND, 10, 10, 3))
    resized = square_arrays(images, 8)
    drawn = [
        next(i for i in range(SECOND) if np.array_equal(resized[i], x))
        for x in dataset.mixed.images
    ]
    assert len(set(drawn)) == len(drawn) == dataset.info.num_mixed == 10  # half of 21
    assert dataset.mixed.labels is None
    alone = tiny.load(npz)[1]
    np.testing.assert_array_equal(dataset.train.images, alone.train.images)
    np.testing.assert_array_equal(dataset.test.images, alone.test.images)
    again = loaded(npz, second)[1].mixed.images
    np.testing.assert_array_equal(again, dataset.mixed.images)
    other = loaded(npz, second, seed=3)[1].mixed.images
    assert not np.array_equal(other, dataset.mixed.images)


@pytest.mark.parametrize("labelled", [True, False])
def test_what_is_held_out_for_tests_is_not_mixed_in(labelled, tmp_path, npz):
    """What a run on that data set alone would be trained on may be drawn, and no more."""
    labels = {"y_train": np.arange(SECOND) % 2} if labelled else {}
    images = numbered(random_images(SECOND, 8, 8, 3))
    alone = write_npz(tmp_path / "alone.npz", x_train=images, **labels)
    raw = default_config()
    raw.update({"dataset": alone, "num_clients": 2})
    trained = prepare(check_types(raw)).load().train.images
    mixed = loaded(npz, alone, mix_fraction=1.0, holdout_fraction=0.4)[1].mixed.images
    assert len(trained) == (19 if labelled else 21)
    assert sorted(trained[:, 0, 0, 0]) == sorted(mixed[:, 0, 0, 0])
    assert not np.array_equal(trained, mixed)  # in random order


# ----------------------------------------------------------------------- who trains on what, when


def expected_round(config, dataset, cohort, round_):
    """Ids of the second data set and their mask, (steps, C, ROWS), by a plain loop."""
    ids = np.zeros((config.steps_per_round, len(cohort), ROWS), np.int32)
    mask = np.zeros(ids.shape, bool)
    bounds = [i * dataset.info.num_mixed // config.num_clients for i in range(CLIENTS + 1)]
    for slot, client in enumerate(cohort):
        own = list(range(bounds[client], bounds[client + 1]))
        taken = min(len(own), ROWS)
        walks = -(-config.steps_per_round * taken // len(own))
        rng = host_rng(config.seed, Stream.MIXTURE_ORDER, round_, client)
        walk = rng.permuted(np.array([own] * walks, np.int32), axis=1).reshape(-1)
        for step in range(config.steps_per_round):
            ids[step, slot] = own[0]
            ids[step, slot, :taken] = walk[step * taken : (step + 1) * taken]
            mask[step, slot, :taken] = True
    return ids, mask


@pytest.mark.parametrize("fraction", [0.5, 0.25])  # 2 or 3, or 1 or 2 of the second a client
def test_each_client_adds_rows_of_its_own_share(fraction, npz, second):
    config, dataset = loaded(npz, second, cohort_size=3, mix_fraction=fraction)
    partition = partition_of(config, 60, dataset.train.labels)
    mixed = mixed_partition_of(config, dataset.info)
    assert sorted(np.concatenate([mixed.client(i) for i in range(CLIENTS)])) == list(
        range(dataset.info.num_mixed)
    )
    sampler = CohortSampler(partition, 3, config.seed)
    feed = list(dispatches(config, partition, sampler, Slots((Group(3),), 4), 0, mixed))
    assert len(feed) == 6
    for first, last in zip(feed[::2], feed[1::2], strict=True):
        joined = [np.concatenate(pair) for pair in zip(first[3:6], last[3:6], strict=True)]
        image_ids, mixed_ids, mask = joined
        cohort = sampler.draw(first.round)
        sizes = (cohort, first.round, config.seed, BATCH, config.steps_per_round)
        ids_alone, mask_alone = round_batches(partition, *sizes)
        np.testing.assert_array_equal(image_ids[:, :3], ids_alone)
        np.testing.assert_array_equal(mask[:, :3, :BATCH], mask_alone)
        wanted_ids, wanted_mask = expected_round(config, dataset, cohort, first.round)
        np.testing.assert_array_equal(mixed_ids[:, :3], wanted_ids)
        np.testing.assert_array_equal(mask[:, :3, BATCH:], wanted_mask)
        assert not mask[:, 3].any()  # the padding slot


def test_weights_count_the_images_of_both(npz, second):
    config, dataset = loaded(npz, second, sync_weights="size")
    partition = partition_of(config, 60, dataset.train.labels)
    mixed = mixed_partition_of(config, dataset.info)
    sampler = CohortSampler(partition, CLIENTS, config.seed)
    first = next(dispatches(config, partition, sampler, Slots((Group(CLIENTS),)), 0, mixed))
    np.testing.assert_array_equal(first.weight, partition.sizes + np.array([2, 3, 2, 3]))


@pytest.mark.parametrize("devices", [1, 2])
def test_the_images_of_both_reach_the_devices(devices, npz, second):
    config, dataset = loaded(npz, second)
    placement = make_placement(devices, 1)
    partition = partition_of(config, 60, dataset.train.labels)
    mixed = mixed_partition_of(config, dataset.info)
    sampler = CohortSampler(partition, CLIENTS, config.seed)
    first = next(dispatches(config, partition, sampler, Slots((Group(CLIENTS),)), 0, mixed))
    _, _, inputs = place_inputs(placement, dataset, False, first)
    images = np.asarray(inputs.images)
    assert images.shape == (3, CLIENTS, BATCH + ROWS, 8, 8, 3)
    for step, slot, row in np.ndindex(3, CLIENTS, BATCH + ROWS):
        if row < BATCH:
            want = dataset.train.images[first.image_ids[step, slot, row]]
        else:
            want = dataset.mixed.images[first.mixed_ids[step, slot, row - BATCH]]
        np.testing.assert_array_equal(images[step, slot, row], want)


def test_rows_of_both_are_counted(npz, second):
    """5 rows a client: keys in the queue, latents on the wire, images in memory."""
    config = loaded(npz, second, queue_length=40)[0]
    latents = 4 * 8 * 8 * 4
    assert plan(config).bytes_up_per_client_round - 2 * 116 * 4 == 2 * 6 * 5 * latents
    assert loaded(npz, second, mix_batch_size=None)[0].images_a_step == 6


# -------------------------------------------------------------------------------------- the run


@pytest.fixture(scope="module")
def whole(npz, second, tmp_path_factory) -> Path:
    """The folder of an uninterrupted run of one client."""
    folder = tmp_path_factory.mktemp("whole")
    run(folder, npz, mix_dataset=second, **ONE)
    return folder


def test_a_run_on_two_data_sets_is_tested_on_the_first(whole, npz, second):
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["test_images"] == 20
    stored = json.loads((whole / "dataset.json").read_text())["fingerprint"]
    assert stored["images"] == {"train": 60, "test": 20}
    assert stored["mixed"]["images"] == {"train": SECOND, "test": 2}
    config = json.loads((whole / "config.json").read_text())
    assert config["mean"] == [0.1, 0.2, 0.3]  # of neither data set


def test_a_stopped_run_goes_on_with_the_same_rows(whole, npz, second, tmp_path, stop_at):
    stop_at(3)
    with pytest.raises(Interrupted, match="stopped at step 6 of 12"):
        run(tmp_path, npz, mix_dataset=second, **ONE)
    elsewhere = tmp_path / "elsewhere.npz"
    elsewhere.write_bytes(Path(second.removeprefix("npz:")).read_bytes())
    run(tmp_path, npz, mix_dataset=f"npz:{elsewhere}", **ONE)
    assert without_speed(lines(tmp_path)) == without_speed(lines(whole))


# ----------------------------------------------------------------------------------- bad input


def command(npz: Path, folder: Path, *overrides: str, **fields) -> list[str]:
    flags = tiny.flags(npz, **fields)
    return ["main", "--config", CONFIG, "--workdir", str(folder), *flags, *overrides]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"mix_dataset": "npz:/nowhere.npz"}, ["/nowhere.npz"]),
        ({"mix_dataset": "cifar11"}, ["config.mix_dataset = 'cifar11'"]),
        ({"mix_dataset": "npz:"}, ["config.mix_dataset = 'npz:'"]),
        ({"mix_fraction": 0.5}, ["config.mix_fraction = 0.5", "config.mix_dataset"]),
        ({"mix_batch_size": 5}, ["config.mix_batch_size = 5", "config.mix_dataset"]),
        ({"mix_dataset": "SECOND", "mix_fraction": 0.1}, ["config.mix_fraction = 0.1", "2 images"]),
        ({"mix_dataset": "SECOND", "mix_fraction": 0.0}, ["config.mix_fraction = 0.0"]),
        ({"mix_dataset": "SECOND", "mix_batch_size": 0}, ["config.mix_batch_size = 0"]),
        ({"mix_dataset": "SECOND", "mix_batch_size": 2}, ["queue_length = 32", "40 keys"]),
        ({"mix_dataset": "SECOND", "method": "tests.toy_method:TOY"}, ["config.mix_dataset"]),
    ],
    ids=str,
)
def test_what_cannot_be_mixed_is_refused(fields, words, npz, second, tmp_path, capsys):
    fields = {name: second if x == "SECOND" else x for name, x in fields.items()}
    unread = {"queue_length": None, "syncs_per_round": None} if "method" in fields else {}
    line = refused(capsys, command(npz, tmp_path / "run", **unread, **fields))
    assert all(word in line for word in words), line


def test_another_second_data_set_is_another_run(whole, npz, second, tmp_path, capsys):
    changed = write_npz(tmp_path / "changed.npz", x_train=random_images(20, 10, 10, 3))
    for fields, words in (
        ({"mix_dataset": changed}, "mixed in: array x_train"),
        (
            {"mix_dataset": None, "mix_batch_size": None, "mix_fraction": 1.0},
            "on other data: mixed",
        ),
        ({"mix_dataset": second, "mix_fraction": 0.4}, "mix_fraction 0.5 -> 0.4"),
    ):
        line = refused(capsys, command(npz, whole, **{**ONE, **fields}))
        assert words in line, line


def test_a_dry_run_says_what_is_mixed_in(npz, second, tmp_path, capsys):
    fields = {**ONE, "mix_dataset": second}
    assert main(command(npz, tmp_path / "run", "--dry_run", **fields)) == 0
    assert f"images a client a step B = 3 + 2 of {second}\n" in capsys.readouterr().out


def test_without_a_second_data_set_nothing_changes(npz):
    config, dataset = tiny.load(npz)
    assert (dataset.mixed, dataset.info.num_mixed, config.images_a_step) == (None, 0, 3)
    assert "mixed" not in dataset.info.fingerprint
    assert mixed_partition_of(config, dataset.info) is None
