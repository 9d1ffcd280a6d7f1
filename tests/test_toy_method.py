"""A method that the package does not know, `tests/toy_method.py`, goes through all of it."""

import json
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from mocosfl_jax import load_encoder
from mocosfl_jax.config import Resolved
from mocosfl_jax.config.data import data_options, partition_of
from mocosfl_jax.config.network import model_of
from mocosfl_jax.data.augment import augment
from mocosfl_jax.data.cohort import CohortSampler, round_batches
from mocosfl_jax.data.sources import load_dataset
from mocosfl_jax.federated import placement
from mocosfl_jax.federated.placement import single_device
from mocosfl_jax.main import main
from mocosfl_jax.randomness import Stream, device_key
from mocosfl_jax.run.checkpoint import Identity, data_digest, find_newest
from mocosfl_jax.run.plan import plan
from mocosfl_jax.run.program import program_of
from mocosfl_jax.run.rounds import Rounds
from mocosfl_jax.run.workdir import read_stored
from mocosfl_jax.sweep.command import main as sweep_main
from tests import tiny
from tests.test_train import ROOT, lines, without_speed

NAME = "tests.toy_method:TOY"
NOT_READ = ("queue_length", "syncs_per_round")
FIELDS = {
    **{name: value for name, value in tiny.FIELDS.items() if name not in NOT_READ},
    "num_clients": 5,
    "classes_per_client": None,
    "dirichlet_alpha": 1.0,  # sizes differ
    "cohort_size": 3,
    "batch_size": 6,  # more than any client has
    "sync_weights": "size",
    "rounds": 2,
    "steps_per_round": 6,
    "steps_per_dispatch": 2,
    "learning_rate": 0.01,
    "schedule": "constant",
    "augmentation": "v1",
    "probe_epochs": 0,
    "toy.rate": 0.75,
}
TOLERANCE = 1e-5  # of a leaf's largest value: sums are added in another order

CONFIG = f"""
from mocosfl_jax.config import default_config

def get_config():
    return default_config("{NAME}")
"""
SWEEP = f"""
from mocosfl_jax.sweep.definition import default_sweep

def get_config():
    return default_sweep("{NAME}")
"""


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    """Processes of a sweep import the method from here."""
    monkeypatch.chdir(ROOT)


class Data(NamedTuple):
    """Files that a command names. config: of a run. sweep: of a sweep."""

    npz: Path
    config: Path
    sweep: Path


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Data:
    folder = tmp_path_factory.mktemp("data")
    paths = Data(*(folder / name for name in ("images.npz", "toy.py", "toy_sweep.py")))
    tiny.write_npz(paths.npz, train=24, test=20)
    paths.config.write_text(CONFIG)
    paths.sweep.write_text(SWEEP)
    return paths


def command(folder: Path, data: Data, *options: str, **fields) -> list[str]:
    values = {"dataset": f"npz:{data.npz}", **FIELDS, **fields}
    flags = [f"--config.{name}={value}" for name, value in values.items()]
    return ["main", "--config", str(data.config), "--workdir", str(folder), *flags, *options]


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory) -> Path:
    """The folder of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(ROOT)
        assert main(command(folder, data)) == 0
    return folder


def saved_state(folder: Path):
    """State of the newest checkpoint, read with one device."""
    stored = read_stored(folder)
    rounds = Rounds(stored.config, single_device(), program_of(stored.config))
    identity = Identity(stored.config, data_digest(stored.data))
    return find_newest(folder / "checkpoints", rounds.abstract_unpadded(), identity).restored.state


def assert_close(actual, expected) -> None:
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, e, rtol=0, atol=TOLERANCE * np.abs(e).max())


# ---------------------------------------------------------------------------------- the method


class ByHand(NamedTuple):
    """A run as it should be: parameters of networks as vectors (P,), in NumPy.

    common: of the last sync. networks, momenta: (N, P), what each client keeps. losses: of steps.
    """

    common: np.ndarray
    networks: np.ndarray
    momenta: np.ndarray
    losses: list[float]


def by_hand(config: Resolved) -> ByHand:
    """Plain loops over rounds, steps, clients and images."""
    dataset = load_dataset(config.dataset, **data_options(config))
    images, labels = dataset.train.images, dataset.train.labels
    partition = partition_of(config, len(images), labels)
    sampler = CohortSampler(partition, config.cohort_size, config.seed)
    common, loss_and_gradient = network_by_hand(config)
    share, rate = config.sections["toy"].rate, config.learning_rate
    networks = np.tile(common, (config.num_clients, 1))
    momenta, losses = np.zeros_like(networks), []
    for round_ in range(config.rounds):
        cohort = sampler.draw(round_)
        ids, mask = round_batches(
            partition, cohort, round_, config.seed, config.batch_size, config.steps_per_round
        )
        networks[cohort] = share * common + (1 - share) * networks[cohort]
        for step in range(config.steps_per_round):
            total = 0.0
            for slot, client in enumerate(cohort):
                gradient = config.weight_decay * networks[client]
                for place in np.flatnonzero(mask[step, slot]):
                    image = ids[step, slot, place]
                    loss, part = loss_and_gradient(
                        networks[client],
                        images[image],
                        labels[image],
                        (round_ * config.steps_per_round + step, client, place),
                    )
                    total, gradient = total + loss, gradient + part
                momenta[client] = config.momentum * momenta[client] + gradient
                networks[client] -= rate * momenta[client]
            losses.append(total / mask[step].sum())
        common = np.average(networks[cohort], axis=0, weights=partition.sizes[cohort])
    return ByHand(common, networks, momenta, losses)


def network_by_hand(config: Resolved):
    """The first parameters, and from parameters, image, label and place to loss and gradient.

    A place is step, client and position in its batch: what a view is drawn from.
    """
    model, settings = model_of(config), program_of(config).augment
    mean, std = np.float32(config.mean), np.float32(config.std)
    key = device_key(config.seed, Stream.AUGMENT)
    first, unravel = ravel_pytree(model.init(device_key(config.seed, Stream.INIT)))

    @jax.jit
    def loss_and_gradient(params, image, label, place):
        step, client, position = place
        client_key = jax.random.fold_in(jax.random.fold_in(key, step), client)
        view_key = jax.random.split(client_key, config.batch_size)[position]
        view = augment(view_key, image, settings, mean, std)

        def loss(params):
            scores = model.encode(unravel(params), view[None]).embedding[0]
            return -jax.nn.log_softmax(scores)[label]

        return jax.value_and_grad(loss)(params)

    def in_float64(params, *rest):
        loss, gradient = loss_and_gradient(params.astype(np.float32), *rest)
        return float(loss), np.asarray(gradient, np.float64)

    return np.asarray(first, np.float64), in_float64


def test_a_run_is_what_plain_loops_give(whole):
    """Client by client, image by image, in float64 where no network is applied."""
    state, wanted = saved_state(whole), by_hand(read_stored(whole).config)
    assert int(state.step) == 12
    networks, momenta = state.population
    vectors = jax.vmap(lambda tree: ravel_pytree(tree)[0])
    assert_close(ravel_pytree(state.server)[0], wanted.common)
    assert_close(vectors(networks), wanted.networks)
    assert_close(vectors(momenta), wanted.momenta)
    found = [line["loss"] for line in lines(whole)[1:]]
    np.testing.assert_allclose(found, wanted.losses, rtol=TOLERANCE)


def test_the_loss_falls(data, tmp_path):
    fields = {"rounds": 5, "knn_every": 0, "dirichlet_alpha": None, "cohort_size": 5}
    assert main(command(tmp_path, data, **fields)) == 0
    losses = [line["loss"] for line in lines(tmp_path)[1:]]
    assert np.mean(losses[-6:]) < 0.7 * np.mean(losses[:6])


# ------------------------------------------------------------------------------------ the house


def test_a_run_that_is_stopped_goes_on_bit_for_bit(data, whole, tmp_path, stop_at, capsys):
    """In the middle of a round: the dispatch behind still finishes."""
    stop_at(8)
    assert main(command(tmp_path, data)) == 143
    assert "stopped at step 10 of 12" in capsys.readouterr().err
    assert not (tmp_path / "summary.json").exists()
    assert main(command(tmp_path, data)) == 0
    assert without_speed(lines(tmp_path)) == without_speed(lines(whole))
    jax.tree.map(np.testing.assert_array_equal, saved_state(tmp_path), saved_state(whole))
    encoders = [(folder / "encoder.safetensors").read_bytes() for folder in (tmp_path, whole)]
    assert encoders[0] == encoders[1]


def test_four_devices_give_what_one_gives(data, whole, tmp_path, monkeypatch):
    """3 slots are padded to 4, and 5 clients to 8, as the population is sharded."""
    monkeypatch.setattr(placement, "SHARDED_FROM", 0)
    assert main(command(tmp_path, data, devices=4)) == 0
    assert json.loads((tmp_path / "summary.json").read_text())["devices"] == 4
    found, wanted = saved_state(tmp_path), saved_state(whole)
    assert_close((found.server, found.population), (wanted.server, wanted.population))
    losses, expected = ([line["loss"] for line in lines(f)[1:]] for f in (tmp_path, whole))
    np.testing.assert_allclose(losses, expected, rtol=TOLERANCE)


def test_a_sweep_over_the_section(data, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    fields = {"dataset": f"npz:{data.npz}", **FIELDS}
    del fields["toy.rate"]
    options = {
        "base": data.config,
        "grid.toy.rate": (0.25, 1.0),
        "columns": "toy.rate",
        "metrics": "('knn_top1',)",
        **{f"fixed.{name}": value for name, value in fields.items()},
    }
    flags = [f"--config.{name}={value}" for name, value in options.items()]
    folder = tmp_path / "sweep"
    argv = ["sweep", "--config", str(data.sweep), "--workdir", str(folder), *flags]
    assert sweep_main(argv) == 0
    runs = {path.name: path for path in (folder / "runs").iterdir()}
    assert sorted(runs) == ["toy.rate=0.25,seed=0", "toy.rate=1.0,seed=0"]
    accuracies = []
    for path, rate in zip(sorted(runs.values()), (0.25, 1.0), strict=True):
        assert json.loads((path / "config.json").read_text())["toy"] == {"rate": rate}
        accuracies.append(json.loads((path / "summary.json").read_text())["knn_top1"])
    table = [line for line in (folder / "report.md").read_text().splitlines() if "|" in line]
    assert "0.25" in table[0] and "1.0" in table[0]
    for accuracy in accuracies:
        assert f"{accuracy:.2f}" in table[-1]
    assert (folder / "report.png").stat().st_size > 0


def test_the_encoder_is_the_network_of_the_last_sync(data, whole):
    config = read_stored(whole).config
    state = saved_state(whole)
    images = load_dataset(config.dataset, **data_options(config)).test.images
    normalised = ((images / 255 - np.array(config.mean)) / np.array(config.std)).astype(np.float32)
    wanted = model_of(config).encode(state.server, normalised).features
    encoder = load_encoder(whole)
    assert encoder.step == 12
    np.testing.assert_allclose(encoder(images), wanted, rtol=1e-4, atol=1e-5)


def test_a_dry_run_counts_what_travels_and_what_a_step_takes(data, whole, tmp_path, capsys):
    assert main(command(tmp_path / "run", data, "--dry_run")) == 0
    out = capsys.readouterr().out.splitlines()
    assert f"method: {NAME}" in out and "toy.rate: 0.75" in out
    summary = json.loads((whole / "summary.json").read_text())
    parameters = sum(x.size for x in jax.tree.leaves(saved_state(whole).server))
    assert (summary["client_params"], summary["server_params"]) == (parameters, 0)
    for direction in ("up", "down"):
        assert summary[f"bytes_{direction}_per_client_round"] == 4 * parameters


def test_parameters_of_a_network_that_is_computed_are_counted(whole, monkeypatch):
    def mean_of_two(self, server, cohort):
        return jax.tree.map(lambda x: jnp.stack([x, x]).mean(axis=0), server)

    config = read_stored(whole).config
    before = plan(config)
    monkeypatch.setattr(type(program_of(config).method), "network", mean_of_two)
    assert plan(config) == before


def test_what_a_step_takes_grows_with_its_slots_and_images(whole):
    """Beside activations, each slot has a gradient and a new network."""
    method = program_of(read_stored(whole).config).method

    def size(images: int, slots: int) -> int:
        shape = jax.ShapeDtypeStruct((images, 8, 8, 3), np.float32)
        leaves = jax.tree.leaves(method.working_set(shape, slots))
        return sum(x.size for x in leaves)

    network = sum(x.size for x in jax.tree.leaves(saved_state(whole).server))
    assert size(2, 3) == 3 * size(2, 1)
    activations = size(2, 1) - size(1, 1)
    assert size(3, 1) - size(2, 1) == activations > 8 * 8 * 4  # at least the stem's output
    assert size(1, 1) - activations >= 2 * network


def test_the_section_is_set_on_the_command_line(data, tmp_path):
    """With rate 1 no client begins with anything of its own: FedAvg."""
    argv = command(tmp_path, data, "--config.toy.rate=1", rounds=1, knn_every=0)
    assert main(argv) == 0
    assert json.loads((tmp_path / "config.json").read_text())["toy"] == {"rate": 1.0}
    method, state = program_of(read_stored(tmp_path).config).method, saved_state(tmp_path)
    own = jax.tree.map(lambda x: x[0], state.population)
    network, momentum = method.join(state.server, own)
    jax.tree.map(np.testing.assert_array_equal, network, state.server)
    jax.tree.map(np.testing.assert_array_equal, momentum, own[1])


# ----------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("queue_length", 32, "config.queue_length = 32: method 'tests.toy_method:TOY' does not"),
        ("syncs_per_round", 2, "config.syncs_per_round = 2: method 'tests.toy_method:TOY'"),
        ("method", "toy", "config.method = 'toy': one of mocosfl, local, or package.module:NAME"),
        ("method", "tests.no_toy:TOY", "config.method = 'tests.no_toy:TOY': the module cannot be"),
        ("method", "tests.tiny:TOY", "config.method = 'tests.tiny:TOY': tests.tiny has no Recipe"),
        ("method", "mocosfl", "config.toy = {'rate': 0.75}: method 'mocosfl' has no such section"),
        ("toy.rate", 0, "config.toy.rate = 0.0: a number in (0, 1] is needed"),
        ("toy.rate", "fast", "config.toy.rate = 'fast': a number is needed"),
        ("toy.speed", 1, "config.toy.speed = '1': there is no such field"),
    ],
)
@pytest.mark.parametrize("options", [(), ("--dry_run",)])
def test_bad_input_is_refused_in_one_line(data, tmp_path, capsys, options, field, value, words):
    assert main(command(tmp_path / "run", data, *options, **{field: value})) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("options", [(), ("--dry_run",)])
def test_images_without_labels_are_refused(data, tmp_path, capsys, options):
    images = np.random.default_rng(0).integers(0, 256, (30, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "x.npz", x_train=images)
    fields = {"dataset": f"npz:{tmp_path / 'x.npz'}", "dirichlet_alpha": None}
    assert main(command(tmp_path / "run", data, *options, **fields)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"config.method = '{NAME}'" in line and "labels" in line
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_the_toy_is_small():
    assert len((ROOT / "tests" / "toy_method.py").read_text().splitlines()) <= 60
