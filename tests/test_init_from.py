"""Runs that start from a trained network: what they take and refuse, and what a restart needs."""

import functools
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save

from mocosfl_jax import load_encoder
from mocosfl_jax.config import Config, check_types, resolve
from mocosfl_jax.config.network import model_of
from mocosfl_jax.data.dataset import DatasetInfo
from mocosfl_jax.errors import InputError
from mocosfl_jax.federated.placement import make_placement
from mocosfl_jax.main import main
from mocosfl_jax.models.split import Variables
from mocosfl_jax.run.commandline import define_flags, parse
from mocosfl_jax.run.encoder_file import by_name, save_encoder, weights_digest
from mocosfl_jax.run.plan import plan
from mocosfl_jax.run.program import program_of
from mocosfl_jax.run.rounds import Rounds
from mocosfl_jax.run.source import load_source
from mocosfl_jax.train import Interrupted
from tests import tiny
from tests.test_main import CONFIG, refused
from tests.test_train import lines, run, without_speed
from tests.tiny_method import assert_equal

CLIENTS = 4
FIELDS = {
    "mean": (0.1, 0.2, 0.3),
    "std": (0.3, 0.2, 0.1),
    "blocks_per_stage": (1,),
    "cohort_size": 3,
    "rounds": 2,
    "knn_every": 0,
    "probe_epochs": 0,
    "schedule": "constant",
}
OLD_FILE = Path(__file__).with_name("version_0_1") / "persistent.safetensors"


@pytest.fixture(scope="module")
def npz(tmp_path_factory) -> Path:
    return tiny.write_npz(tmp_path_factory.mktemp("data") / "images.npz")


def trained(config: Config, seed: int = 1) -> Variables:
    """Parameters that no seed of a run gives."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(model_of(config).init, jax.random.key(1))
    return jax.tree.map(lambda x: rng.uniform(-0.8, 0.9, x.shape).astype(np.float32), shapes)


def write(file: Path, npz: Path, **fields) -> Path:
    """The encoder file of a network of the tiny setting, with these fields."""
    config = tiny.load(npz, **{**FIELDS, **fields})[0]
    file.parent.mkdir(exist_ok=True)
    save_encoder(file, config, trained(config), 17)
    return file


@pytest.fixture(scope="module")
def folder(npz) -> Path:
    """The folder of a run, as far as another one looks at it."""
    return write(npz.parent / "before" / "encoder.safetensors", npz).parent


def headless(file: Path, target: Path) -> Path:
    """The file without a head, or a word of it."""
    with safe_open(file, "numpy") as stored:
        description = json.loads(stored.metadata()["mocosfl_jax"])
    for name in ("head", "head_width"):
        del description["fields"][name]
    tensors = {
        name: x for name, x in load_file(file).items() if not name.startswith(("server/head", "st"))
    }
    target.write_bytes(save(tensors, {"mocosfl_jax": json.dumps(description)}))
    return target


@functools.cache
def started(npz: Path, devices: int = 1, shards: int = 1, **fields):
    """The state before the first step, without padding, and what is said of its source."""
    config, _ = tiny.load(npz, **{**FIELDS, **fields})
    placement = make_placement(devices, shards)
    rounds = Rounds(config, placement, program_of(config, placement))
    source = load_source(config) if config.init_from else None
    state = rounds.initial_state(source.variables if source else None)
    return jax.device_get(rounds.unpadded(state)), source


def every(tree) -> list[np.ndarray]:
    """What each of the clients has."""
    assert all(len(x) == CLIENTS for x in jax.tree.leaves(tree))
    return [jax.tree.map(lambda x, i=i: x[i], tree) for i in range(CLIENTS)]


# --------------------------------------------------------------------------------- what is taken


@pytest.mark.parametrize(
    ("parts", "aligned"), [("client", False), ("server", True), ("both", False), ("both", True)]
)
def test_the_parts_are_in_online_models_and_key_encoders(parts, aligned, npz, folder):
    """Fault 8 of the public code: key encoders kept their random parameters."""
    fields = {"align_momentum": aligned}
    fresh, _ = started(npz, **fields)
    state, source = started(npz, init_from=str(folder), init_parts=parts, **fields)
    before = trained(tiny.load(npz, **FIELDS)[0])
    taken = (parts != "server", parts != "client")
    client, server = (
        loaded if take else old
        for take, loaded, old in zip(
            taken, before[:2], (fresh.server.client.params, fresh.server.server.params), strict=True
        )
    )
    models, common = state.server.server, state.server.client
    assert_equal((models.params, models.key_params), (server, server))
    assert_equal(common.params, client)
    if aligned:
        assert_equal(common.key_params, client)
    else:
        for key_params in every(state.population.key_params):
            assert_equal(key_params, client)
    participant = state.cohort.client
    assert_equal(participant.params, participant.key_params)
    assert_equal(jax.tree.map(lambda x: x[2], participant.params), client)
    assert_equal(models.opt_state, fresh.server.server.opt_state)
    assert_equal(state.population.opt_state, fresh.population.opt_state)
    assert_equal(state.server.queue, fresh.server.queue)
    assert source.digest == weights_digest(folder / "encoder.safetensors")


def test_private_queues_and_a_head_with_statistics(npz, tmp_path):
    fields = {"head": "largeV2", "feature_sharing": False}
    file = write(tmp_path / "mine.safetensors", npz, **fields)
    fresh, _ = started(npz, **fields)
    state, source = started(npz, init_from=str(file), **fields)
    before = trained(tiny.load(npz, **FIELDS, **fields)[0])
    models = state.server.server
    assert_equal((models.stats, models.key_stats), (before.stats, before.stats))
    assert_equal(state.population.queue, fresh.population.queue)
    assert source.notes == (f"starts from {file} (client and server; weights {source.digest})",)


@pytest.mark.parametrize("head", ["V2", "largeV2"])
def test_a_missing_head_starts_anew(head, npz, folder, tmp_path):
    file = headless(folder / "encoder.safetensors", tmp_path / "headless.safetensors")
    fresh, _ = started(npz, head=head)
    state, source = started(npz, head=head, init_from=str(file))
    models, old = state.server.server, fresh.server.server
    for params in (models.params, models.key_params):
        assert_equal(params["head"], old.params["head"])
        assert_equal(params["unit1"], trained(tiny.load(npz, **FIELDS)[0]).server["unit1"])
    assert_equal(models.stats, old.stats)
    assert source.notes[1:] == ("the file has no head: that of this run starts anew",)
    assert len(started(npz, init_from=str(file), init_parts="client")[1].notes) == 1


@pytest.mark.parametrize(("devices", "shards"), [(4, 1), (4, 2)])
def test_any_number_of_devices_starts_alike(devices, shards, npz, folder):
    one, _ = started(npz, init_from=str(folder))
    many, _ = started(npz, devices, shards, init_from=str(folder))
    assert_equal(many, one)


def test_a_method_that_trains_the_whole_network_starts_from_it_too(npz, folder):
    unread = dict.fromkeys(("queue_length", "syncs_per_round"))
    fields = {"method": "tests.toy_method:TOY", **unread, "init_from": str(folder)}
    state, _ = started(npz, **fields)
    before = trained(tiny.load(npz, **FIELDS)[0])
    assert_equal(state.server, before)
    for network, _ in [jax.tree.map(lambda x, i=i: x[i], state.population) for i in range(CLIENTS)]:
        assert_equal(network, before)


def test_a_file_of_version_0_1_may_be_started_from(npz):
    fields = {"blocks_per_stage": (1, 1), "image_size": 16}  # another size, the same network
    config = tiny.load(npz, **{**FIELDS, **fields, "init_from": str(OLD_FILE)})[0]
    source = load_source(config)
    tensors = load_file(OLD_FILE)
    assert by_name(source.variables).keys() == tensors.keys()
    for name, leaf in by_name(source.variables).items():
        np.testing.assert_array_equal(leaf, tensors[name])
    assert [note.partition(" (")[0] for note in source.notes[1:]] == [
        *("its images had the mean", "its images had the std")
    ]


# -------------------------------------------------------------------------------- frozen clients


@pytest.fixture(scope="module")
def frozen(npz, folder, tmp_path_factory) -> tuple[Path, dict]:
    """The folder of a run of frozen clients, and its fields; the source is a copy that can go."""
    source = shutil.copytree(folder, tmp_path_factory.mktemp("source") / "run")
    fields = {**FIELDS, "init_from": str(source), "client_learning_rate": 0.0}
    workdir = tmp_path_factory.mktemp("frozen")
    run(workdir, npz, **fields)
    return workdir, fields


CLIENT_BYTES = 4 * (3 * 3 * 3 * 4 + 4 + 4)  # the stem and its GroupNorm


def test_frozen_clients_are_sent_their_model_once(npz, frozen, capsys):
    """And no gradients, and nothing is averaged."""
    workdir, fields = frozen
    sizes = plan(tiny.load(npz, **fields)[0])
    assert sizes.bytes_down_per_client_once == CLIENT_BYTES
    assert sizes.bytes_down_per_client_round == 0
    assert sizes.bytes_up_per_client_round == 6 * 2 * 3 * 8 * 8 * 4 * 4  # latents alone
    summary = json.loads((workdir / "summary.json").read_text())
    assert summary["bytes_down_per_client_once"] == CLIENT_BYTES
    assert plan(tiny.load(npz)[0]).bytes_down_per_client_once == 0
    assert main(["main", "--config", CONFIG, "--dry_run", *tiny.flags(npz, **fields)]) == 0
    assert "client once, before its first round: 0.00 MB" in capsys.readouterr().out


def test_the_published_setting_sends_what_the_paper_counts_and_the_keys(monkeypatch):
    """Table 1: 39.1 MB of query latents a client; with the key latents 78.1, and the model once."""
    monkeypatch.chdir(Path(CONFIG).parent.parent)
    argv = ["main", "--config", "configs/taressfl.py", "--config.num_clients=1000"]
    values = define_flags(argv)
    parse(values, argv)
    config = resolve(check_types(values.config), DatasetInfo("cifar10", 50_000, 10_000, 32, 10))
    images = jax.ShapeDtypeStruct((config.images_a_step, 32, 32, 3), jnp.float32)
    messages = program_of(config).method.traffic(images)
    sizes = {m.name: (m.when, m.up, tree_bytes(m.content)) for m in messages}
    latents = 16 * 16 * 4 * 4
    assert sizes == {
        "query latents": ("step", True, latents),
        "key latents": ("step", True, latents),
        "client model": ("once", False, 4 * (75_840 + 2_308)),
    }
    steps = config.total_steps * config.cohort_size // config.num_clients  # of one client
    assert 2 * latents * steps / 2**20 == pytest.approx(78.1, abs=0.05)


def tree_bytes(tree) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def test_frozen_clients_stay_as_they_were_loaded(folder, frozen):
    before, after = (load_file(f / "encoder.safetensors") for f in (folder, frozen[0]))
    for name, tensor in before.items():
        assert np.array_equal(after[name], tensor) == name.startswith("client"), name


# -------------------------------------------------------------------------------- other networks


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"width": 8}, "width 4 -> 8"),
        ({"cut": 2}, "cut 1 -> 2"),
        ({"bottleneck": "C2S1"}, "bottleneck 'none' -> 'C2S1'"),
        ({"stem": "3x3s2"}, "stem '3x3s1' -> '3x3s2'"),  # the same shapes
        ({"blocks_per_stage": (1, 1)}, "blocks_per_stage (1,) -> (1, 1)"),
        ({"head_width": 16}, "head_width 8 -> 16"),
        ({"head": "V1", "head_width": 8}, "head 'V2' -> 'V1'"),
    ],
    ids=str,
)
def test_another_network_is_refused_in_one_line(fields, words, npz, folder, tmp_path, capsys):
    argv = ["main", "--config", CONFIG, "--workdir", str(tmp_path / "run")]
    argv += tiny.flags(npz, **{**FIELDS, "init_from": str(folder), **fields})
    line = refused(capsys, argv)
    assert f"config.init_from = {str(folder)!r}: it holds another network" in line
    assert f"({words})" in line
    assert refused(capsys, [*argv, "--dry_run"]) == line
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_client_alone_does_not_need_the_head(npz, folder):
    state, _ = started(npz, init_from=str(folder), init_parts="client", head_width=16)
    assert_equal(state.server.client.params, trained(tiny.load(npz, **FIELDS)[0]).client)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"init_from": "/nowhere"}, ["/nowhere", "missing"]),
        ({"init_from": __file__}, [__file__, "unusable"]),
        ({"init_from": "FOLDER", "init_parts": "head"}, ["config.init_parts = 'head'"]),
        ({"init_from": "FOLDER", "init_digest": "0" * 16}, ["config.init_from", "0" * 16]),
        ({"init_digest": "0" * 16}, ["config.init_digest", "config.init_from"]),
        ({"init_parts": "client"}, ["config.init_parts", "config.init_from"]),
    ],
    ids=str,
)
def test_what_cannot_be_started_from_is_refused(fields, words, npz, folder, tmp_path, capsys):
    fields = {name: str(folder) if x == "FOLDER" else x for name, x in fields.items()}
    argv = ["main", "--config", CONFIG, "--workdir", str(tmp_path / "run")]
    line = refused(capsys, [*argv, *tiny.flags(npz, **{**FIELDS, **fields})])
    assert all(word in line for word in words), line


def test_a_headless_file_is_no_encoder(folder, tmp_path):
    file = headless(folder / "encoder.safetensors", tmp_path / "headless.safetensors")
    with pytest.raises(InputError, match="'head_width' is missing"):
        load_encoder(file)


# -------------------------------------------------------------------------------- what is stored


def test_a_run_resumes_without_its_source(npz, frozen, tmp_path, stop_at, capsys):
    whole, fields = frozen
    source = Path(fields["init_from"])
    digest = weights_digest(source / "encoder.safetensors")
    assert json.loads((whole / "config.json").read_text())["init_digest"] == digest
    stop_at(3)
    with pytest.raises(Interrupted, match="stopped at step 6 of 12"):
        run(tmp_path / "run", npz, **fields)
    assert f"starts from {source} (client and server; weights {digest})" in capsys.readouterr().out

    # Other weights, or none, are another run; a new run cannot begin without its source.
    other = write(tmp_path / "other.safetensors", npz)
    changed = load_file(other)
    changed["client/unit0/norm/bias"] = changed["client/unit0/norm/bias"] + 1
    with safe_open(other, "numpy") as stored:
        other.write_bytes(save(changed, stored.metadata()))
    for init_from, words in ((str(other), f"init_digest '{digest}' -> "), (None, "-> None")):
        with pytest.raises(InputError, match=words):
            run(tmp_path / "run", npz, **{**fields, "init_from": init_from})
    shutil.rmtree(source)
    with pytest.raises(InputError, match="missing"):
        run(tmp_path / "new", npz, **fields)

    # What lies at its path now does not matter, whole or not.
    source.mkdir()
    shutil.copy(other, source / "encoder.safetensors")
    run(tmp_path / "run", npz, **fields)
    assert without_speed(lines(tmp_path / "run")) == without_speed(lines(whole))
    (source / "encoder.safetensors").write_text("damaged")
    run(tmp_path / "run", npz, **fields)
    assert "this run is complete" in capsys.readouterr().out
