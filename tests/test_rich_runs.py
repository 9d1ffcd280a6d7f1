"""Whole runs with clients whose batches differ: devices, stopping, what is said of them."""

import json
import math
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from mocosfl_jax.config.data import partition_of, sampler_of
from mocosfl_jax.config.rich import groups_of
from mocosfl_jax.costs.communication import participation
from mocosfl_jax.costs.report import costs_of
from mocosfl_jax.federated.slots import Group, Slots, spread
from mocosfl_jax.main import main
from mocosfl_jax.run.feed import dispatches
from mocosfl_jax.run.plan import plan
from mocosfl_jax.train import Interrupted
from tests import tiny
from tests.test_devices import TOLERANCE
from tests.test_main import CONFIG, refused
from tests.test_train import lines, run, without_speed
from tests.tiny_method import assert_close

FACTOR, BATCH = 3, 2
SAVING = "config.rich.clients = 0.4: config.saving.threshold is set"
RICH = {"clients": 0.4, "data": 0.7, "batch_factor": FACTOR}
FIELDS = {  # 4 rich clients, of 10 or 11 images, and 6 others, of 3
    "num_clients": 10,
    "cohort_size": 5,  # 2 rich ones and 3 others, which fill no mesh
    "classes_per_client": None,
    "batch_size": BATCH,
    "blocks_per_stage": (1,),
    "queue_length": 40,
    "syncs_per_round": 1,
    "rounds": 2,
    "learning_rate": 0.003,
    "schedule": "constant",
    "augmentation": "v1",
    "knn_every": 0,
    "probe_epochs": 0,
    "rich": RICH,
}


@pytest.fixture(scope="module")
def npz(tmp_path_factory) -> Path:
    return tiny.write_npz(tmp_path_factory.mktemp("data") / "images.npz")


@pytest.fixture(scope="module")
def one(npz, tmp_path_factory) -> Path:
    """The folder of the run on one device."""
    folder = tmp_path_factory.mktemp("one")
    run(folder, npz, **FIELDS)
    return folder


def states(npz, *folders):
    return (tiny.saved_state(folder, npz, **FIELDS) for folder in folders)


def test_a_run_that_is_stopped_ends_bit_for_bit(npz, one, tmp_path, stop_at):
    """In the middle of the second round."""
    stop_at(6)
    with pytest.raises(Interrupted, match="stopped at step 9 of 12"):
        run(tmp_path, npz, **FIELDS)
    run(tmp_path, npz, **FIELDS)
    jax.tree.map(np.testing.assert_array_equal, *states(npz, tmp_path, one))
    assert without_speed(lines(tmp_path)) == without_speed(lines(one))


def test_devices_and_chunks_give_the_same_run(npz, one, tmp_path, stop_at):
    """Four devices, with two padding slots of rich clients and one of others, whose members are not
    in the order of the cohort; then, from the middle of a round, two devices with two chunks."""
    stop_at(6)
    with pytest.raises(Interrupted, match="stopped at step 9 of 12"):
        run(tmp_path, npz, **FIELDS, devices=4)
    (middle,) = states(npz, tmp_path)
    kernels = middle.cohort.client.params["unit0"]["conv"]["kernel"]
    assert len(kernels) == 5 and np.abs(kernels[0] - kernels[1]).max() > 0
    encoder = load_file(tmp_path / "encoder.safetensors")
    np.testing.assert_allclose(encoder["client/unit0/conv/kernel"], kernels.mean(0), atol=1e-6)

    run(tmp_path, npz, **FIELDS, devices=2, cohort_chunks=2)
    actual, wanted = states(npz, tmp_path, one)
    np.testing.assert_array_equal(actual.cohort_ids, wanted.cohort_ids)
    for name in ("server", "cohort", "population"):
        assert_close(getattr(actual, name), getattr(wanted, name), name, TOLERANCE)
    losses = ([line["loss"] for line in lines(folder)[1:]] for folder in (tmp_path, one))
    np.testing.assert_allclose(*losses, rtol=TOLERANCE)


def test_rich_clients_take_more_images(npz):
    """First in the cohort, in batches of their own; and no row is padding."""
    config, dataset = tiny.load(npz, **FIELDS)
    partition = partition_of(config, 60, dataset.train.labels)
    assert partition.sizes.tolist() == [10, 11, 10, 11, 3, 3, 3, 3, 3, 3]
    slots = Slots(groups_of(config))
    for dispatch in dispatches(config, partition, sampler_of(config, partition), slots, 0):
        assert (dispatch.cohort[:2] < 4).all() and (dispatch.cohort[2:] >= 4).all()
        assert dispatch.mask.shape == (3, 2 * FACTOR + 3, BATCH) and dispatch.mask.all()
        first, others = np.split(dispatch.image_ids, [2 * FACTOR], axis=1)
        batches = [*first.reshape(3, 2, -1).swapaxes(0, 1), *others.swapaxes(0, 1)]
        for client, ids in zip(dispatch.cohort, batches, strict=True):
            assert np.isin(ids, partition.client(client)).all()


# ----------------------------------------------------------------------------------------- slots


@pytest.mark.parametrize(
    ("groups", "parts"),
    [
        ((Group(5),), 1),
        ((Group(5),), 4),
        ((Group(2, 3), Group(3)), 1),
        ((Group(2, 3), Group(3)), 4),
        ((Group(4, 2), Group(7)), 2),
    ],
)
def test_every_part_has_slots_of_every_group(groups, parts):
    """By a plain loop: parts take their share of each group in turn."""
    slots, members, blocks = Slots(groups, parts), [], []
    for part in range(parts):
        first = first_block = 0
        for clients, size in groups:
            share = math.ceil(clients / parts)
            for i in range(part * share, (part + 1) * share):
                members.append(first + i if i < clients else -1)
                own = range(first_block + i * size, first_block + (i + 1) * size)
                blocks += own if i < clients else [-1] * size
            first, first_block = first + clients, first_block + clients * size
    assert (slots.clients.tolist(), slots.blocks.tolist()) == (members, blocks)
    assert slots.number == len(members)
    cohort = np.arange(10, 10 + sum(group.clients for group in groups))
    on_devices = spread(cohort, slots.clients, fill=-7)
    assert on_devices[slots.of_cohort].tolist() == cohort.tolist()
    assert sum(on_devices == -7) == slots.number - len(cohort)
    assert slots.in_order == (members[: len(cohort)] == list(range(len(cohort))))


# ------------------------------------------------------------------------------------ what is said


def test_bytes_and_memory_of_both_kinds_of_clients(npz, one, capsys):
    config, _ = tiny.load(npz, **FIELDS)
    sizes, latents, model = plan(config), 8 * 8 * 4 * 4, 116 * 4
    assert sizes.bytes_up_per_client_round == 6 * 2 * BATCH * latents + model
    assert sizes.bytes_up_per_rich_client_round == 6 * 2 * FACTOR * BATCH * latents + model
    assert sizes.bytes_down_per_rich_client_round == 6 * FACTOR * BATCH * latents + model
    summary = json.loads((one / "summary.json").read_text())
    for name in ("bytes_up_per_rich_client_round", "bytes_down_per_rich_client_round"):
        assert summary[name] == getattr(sizes, name)
    more = plan(tiny.load(npz, **{**FIELDS, "rich": {**RICH, "batch_factor": 2}})[0])
    assert sizes.step_bytes > more.step_bytes

    def costs(*kind: bool, **fields):
        return costs_of(tiny.load(npz, **{**FIELDS, **fields})[0], 4, False, *kind)

    # Those of clients alike with as large batches, who take part as often.
    large = {"rich": {}, "cohort_size": 2, "num_clients": 4, "batch_size": FACTOR * BATCH}
    assert costs(True) == costs(**large)
    often = participation(config, holders=6)
    assert (often.rounds, often.steps) == (2 * 3 / 6, 6 * 2 * 3 / 6)


def command(npz: Path, *options: str, **fields) -> list[str]:
    flat = {name: value for name, value in {**FIELDS, **fields}.items() if name != "rich"}
    rich = {**RICH, **fields.get("rich", {})}
    flat |= {f"rich.{name}": value for name, value in rich.items()}
    return ["main", "--config", CONFIG, *tiny.flags(npz, **flat), *options]


def test_a_dry_run_says_who_is_rich(npz, capsys):
    assert main(command(npz, "--dry_run")) == 0
    said = capsys.readouterr().out
    assert "cohort C = 5, images a client a step B = 2\n" in said
    assert "rich clients: 4 of 10, 2 a round, each 6 images a step\n" in said
    assert "sent by a rich client in a round: 0.07 MB\n" in said


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"rich": {"clients": 1.0}}, "config.rich.clients = 1.0: a number in [0, 1)"),
        ({"rich": {"clients": 0.04}}, "config.rich.clients = 0.04: of 10 clients no client is"),
        ({"rich": {"clients": 0.96}}, "config.rich.clients = 0.96: of 10 clients all are rich"),
        ({"rich": {"clients": 0.0}}, "config.rich.data = 0.7: config.rich.clients is 0"),
        (
            {"rich": {"clients": 0.0, "data": 0.0}},
            "config.rich.batch_factor = 3: config.rich.clients is 0",
        ),
        ({"rich": {"data": 0.0}}, "config.rich.data = 0.0: rich clients without images"),
        (
            {"rich": {"data": 0.04}},
            "config.rich.data = 0.04: the 4 rich clients share 2 of 60 images, and each needs",
        ),
        (
            {"rich": {"data": 0.95}},
            "config.rich.data = 0.95: the 6 other clients share 3 of 60 images, and each needs",
        ),
        (
            {"rich": {"data": 0.85}, "classes_per_client": 2},
            "config.rich.data = 0.85: the 6 other clients share 9 of 60 images, and each needs",
        ),
        ({"rich": {"batch_factor": 0}}, "config.rich.batch_factor = 0: a number from 1 to"),
        ({"rich": {"batch_factor": 2**31 - 1}}, "config.rich.batch_factor = 2147483647: at most"),
        ({"rich": {"batch_factor": 4}}, "config.queue_length = 40: a step brings 44 keys"),
        ({"cohort_size": 1}, "config.cohort_size = 1: 4 of 10 clients are rich"),
        ({"cohort_chunks": 3}, "config.cohort_chunks = 3: at least one client of either kind"),
        ({"feature_sharing": False}, "config.rich.clients = 0.4: with private queues"),
        ({"saving.threshold": 0.1, "saving.warmup_rounds": 0, "rounds": 9}, SAVING),
        (
            {"images_per_client": 6},
            "config.rich.clients = 0.4: with config.images_per_client all clients hold",
        ),
        (
            {"dirichlet_alpha": 0.1, "seed": 1, "cohort_size": 9, "queue_length": 80},
            "config.cohort_size = 9: 4 rich clients are drawn, and 3 have images",
        ),
        ({"nopeek": {"weight": 0.1}}, "config.nopeek.weight = 0.1: a client has 2 images a step"),
    ],
)
def test_values_that_cannot_hold_are_refused(npz, tmp_path, capsys, fields, words):
    section = fields.pop("nopeek", {})
    flags = [f"--config.nopeek.{name}={value}" for name, value in section.items()]
    line = refused(capsys, command(npz, *flags, f"--workdir={tmp_path / 'run'}", **fields))
    assert line.startswith(f"mocosfl_jax: {words}")
    assert not (tmp_path / "run").exists()


def test_local_training_has_no_rich_clients(npz, tmp_path, capsys):
    config = str(Path(CONFIG).with_name("baselines") / "fl_byol.py")
    argv = ["main", "--config", config, f"--workdir={tmp_path / 'run'}"]
    line = refused(capsys, [*argv, "--config.rich.clients=0.5"])
    assert "rich" in line
