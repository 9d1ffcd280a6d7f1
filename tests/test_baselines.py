"""The baselines of configs/baselines, as runs on tiny images."""

import functools
import json
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest

from mocosfl_jax.config import Resolved, check_types, resolve
from mocosfl_jax.config.stored import config_from_json, to_json
from mocosfl_jax.federated import placement
from mocosfl_jax.federated.placement import single_device
from mocosfl_jax.main import main
from mocosfl_jax.methods.local.merge import MERGES
from mocosfl_jax.methods.local.recipe import Local
from mocosfl_jax.run.checkpoint import Identity, data_digest, find_newest
from mocosfl_jax.run.program import program_of
from mocosfl_jax.run.rounds import Rounds
from mocosfl_jax.run.workdir import read_stored
from tests.test_config import CIFAR10
from tests.test_train import ROOT, lines, without_speed
from tests.tiny_method import assert_close

BASELINES = {path.stem: path for path in (ROOT / "configs" / "baselines").glob("*.py")}
QUEUES = ("fl_moco",)
FIELDS = {  # sizes differ, and a client may be absent in a round
    "num_clients": 5,
    "classes_per_client": None,
    "dirichlet_alpha": 1.0,
    "holdout_fraction": 0.0,
    "cohort_size": 3,
    "batch_size": 6,  # one client has 5 images
    "steps_per_round": 2,
    "learning_rate": 0.002,  # larger ones blow up what rounding makes
    "rounds": 3,
    "width": 4,
    "blocks_per_stage": (1,),
    "head_width": 4,
    "knn_every": 0,
    "probe_epochs": 0,
    "steps_per_dispatch": 1,
    "checkpoint_every": 1,
    "compilation_cache": "none",
    "tensorboard": False,
    "progress": False,
}
PADDING = (
    "padding: a step computes 4 batches, 3 of them of clients (1.33 times as many): 4 devices"
    " cannot share 3 clients evenly"
)
TOLERANCE = 1e-3  # of a leaf's largest value: sums are added in another order


@pytest.fixture(scope="module")
def npz(tmp_path_factory) -> Path:
    """Images of 4x4 pixels without a test split: nothing is evaluated."""
    rng, path = np.random.default_rng(1), tmp_path_factory.mktemp("data") / "images.npz"
    images = rng.integers(0, 256, (40, 4, 4, 3), dtype=np.uint8)
    np.savez(path, x_train=images, y_train=np.arange(40) % 3)
    return path


def command(name: str, folder: Path, npz: Path, *options: str, **fields) -> list[str]:
    values = {"dataset": f"npz:{npz}", "devices": 1, **FIELDS, **fields}
    if name in QUEUES:
        values["queue_length"] = 16
    flags = [f"--config.{field}={value}" for field, value in values.items()]
    return ["main", "--config", str(BASELINES[name]), "--workdir", str(folder), *flags, *options]


def saved_state(folder: Path):
    """State of the newest checkpoint, read with one device."""
    stored = read_stored(folder)
    rounds = Rounds(stored.config, single_device(), program_of(stored.config))
    identity = Identity(stored.config, data_digest(stored.data))
    return find_newest(folder / "checkpoints", rounds.abstract_unpadded(), identity).restored.state


def test_the_seven_are_there():
    assert {*BASELINES} == {
        *("fedavg", "fl_simclr", "fl_simsiam", "fl_moco", "fl_byol", "fedu", "fedema")
    }


@pytest.fixture(scope="module")
def whole(npz, tmp_path_factory) -> Callable[[str], Path]:
    """By name, the folder of a finished run on one device."""

    @functools.cache
    def run(name: str) -> Path:
        folder = tmp_path_factory.mktemp(name)
        assert main(command(name, folder, npz)) == 0
        return folder

    return run


@pytest.mark.parametrize("name", sorted(BASELINES))
def test_a_baseline_runs(name, whole):
    state, found = saved_state(whole(name)), lines(whole(name))
    assert int(state.step) == 6 and int(state.server.round) == 3
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state.server.model))
    for metric, steps in {"loss": [1, 2, 3, 4, 5, 6], "divergence": [2, 4, 6]}.items():
        assert [line["step"] for line in found if metric in line] == steps
    rates = [line["learning_rate"] for line in found]
    assert rates[0] == rates[1] > rates[2] == rates[3] > rates[4] == rates[5] > 0


@pytest.mark.parametrize("name", sorted(BASELINES))
def test_a_baseline_resumes_bit_for_bit(name, whole, npz, tmp_path, stop_at):
    """Stopped in the middle of its second round, and killed when it saves that round."""
    want = whole(name)
    stop_at(2)
    assert main(command(name, tmp_path, npz)) == 143
    fault = ("tests.broken_run", "kill=mocosfl_jax.train:save_encoder:1", "--")
    argv = [sys.executable, "-m", *fault, *command(name, tmp_path, npz)[1:]]
    killed = subprocess.run(argv, cwd=ROOT, capture_output=True, timeout=300, check=False)
    assert (killed.returncode, killed.stderr) == (-signal.SIGKILL, b"")
    assert lines(tmp_path)[-1]["step"] > 3
    assert int(saved_state(tmp_path).step) == 3
    assert main(command(name, tmp_path, npz)) == 0
    assert without_speed(lines(tmp_path)) == without_speed(lines(want))
    jax.tree.map(np.testing.assert_array_equal, saved_state(tmp_path), saved_state(want))


@pytest.mark.parametrize("name", sorted(BASELINES))
def test_a_baseline_runs_on_four_devices(name, whole, npz, tmp_path, monkeypatch, capsys):
    """3 slots are padded to 4, and 5 clients to 8, as the population is sharded there."""
    monkeypatch.setattr(placement, "SHARDED_FROM", 0)
    assert main(command(name, tmp_path, npz, devices=4)) == 0
    assert PADDING in capsys.readouterr().out.splitlines()
    spread, state = saved_state(tmp_path), saved_state(whole(name))
    assert_close(
        (spread.server, spread.population), (state.server, state.population), name, TOLERANCE
    )
    for metric in ("loss", "divergence"):
        got, want = (
            [x[metric] for x in lines(folder) if metric in x] for folder in (tmp_path, whole(name))
        )
        np.testing.assert_allclose(got, want, rtol=TOLERANCE, err_msg=metric)


@pytest.mark.parametrize("name", sorted(BASELINES))
def test_a_baseline_has_the_published_setting(name):
    config = resolve(check_types(runpy.run_path(str(BASELINES[name]))["get_config"]()), CIFAR10)
    assert (config.num_clients, config.cohort_size, config.batch_size) == (5, 5, 128)
    assert (config.rounds, config.steps_per_round) == (100, 5 * 10_000 // 128)
    assert (config.learning_rate, config.momentum, config.weight_decay) == (0.032, 0.9, 5e-4)
    assert (config.augmentation, config.schedule, config.sync_weights) == ("v1", "cosine", "size")
    if name != "fedavg":
        head = program_of(config).method.model.head
        assert (head.hidden, head.width, head.batch_norm) == (4096, 2048, True)


@pytest.mark.parametrize(
    ("name", "merge"),
    [
        *[(name, "fedema") for name in ("fedavg", "fl_simclr", "fl_simsiam", "fl_moco", "fl_byol")],
        *[(name, "fedu") for name in ("fl_simsiam", "fl_byol")],
    ],
)
def test_rules_go_with_objectives(name, merge):
    raw = runpy.run_path(str(BASELINES[name]))["get_config"]()
    raw.local.merge = merge
    rule = program_of(resolve(check_types(raw), CIFAR10)).method.merge
    assert type(rule) is MERGES[merge]


@pytest.mark.parametrize(
    ("name", "fields", "words"),
    [
        ("fl_byol", {"batch_size": 1}, "config.batch_size = 1: objective 'byol' compares images"),
        ("fl_simclr", {"num_clients": 21}, "config.num_clients = 21: objective 'simclr' compares"),
        (
            "fl_simclr",
            {"num_clients": 12, "dirichlet_alpha": 0.3},
            "config.dirichlet_alpha = 0.3: objective 'simclr' compares images of one client, but ",
        ),
        (
            "fl_simsiam",
            {"images_per_client": 1, "dirichlet_alpha": None},
            "config.images_per_client = 1: objective 'simsiam' compares images of one client",
        ),
        ("fedavg", {"head_width": 2}, "config.head_width = 2: one score a class is needed: at le"),
        ("fl_moco", {"local.merge": "fedu"}, "config.local.merge = 'fedu': objective 'moco' has n"),
        ("fl_simclr", {"local.merge": "fedu"}, "config.local.merge = 'fedu': objective 'simclr' "),
        (
            "fl_byol",
            {"client_state": "stateless"},
            "config.client_state = 'stateless': with 'byol'",
        ),
        (
            "fl_moco",
            {"client_state": "stateless"},
            "config.client_state = 'stateless': with 'moco'",
        ),
        (
            "fl_simsiam",
            {"client_state": "stateless", "local.merge": "fedema"},
            "config.client_state = 'stateless': 'fedema' needs what a client kept of its last",
        ),
        ("fl_byol", {"temperature": 0.1}, "config.temperature = 0.1: objective 'byol' does not re"),
        (
            "fl_simclr",
            {"ema": 0.9},
            "config.ema = 0.9: objective 'simclr' does not read it: leave it unset",
        ),
        ("fl_byol", {"queue_length": 9}, "config.queue_length = 9: objective 'byol' does not read"),
        ("fl_moco", {"batch_size": 9}, "config.queue_length = 16: a client brings 18 keys a step:"),
        ("fl_moco", {"syncs_per_round": 2}, "config.syncs_per_round = 2: method 'local' does not"),
        ("fl_moco", {"cohort_chunks": 4}, "config.cohort_chunks = 4: at most one client a chunk"),
        ("fl_moco", {"local.objective": "dino"}, "config.local.objective = 'dino': one of superv"),
        ("fedema", {"local.tau": 1.5}, "config.local.tau = 1.5: a number in (0, 1] is needed"),
        ("fedu", {"local.fedu_threshold": -1.0}, "config.local.fedu_threshold = -1.0: at least 0"),
    ],
)
def test_bad_input_is_refused_in_one_line(name, fields, words, npz, tmp_path, capsys):
    assert main(command(name, tmp_path / "run", npz, "--dry_run", **fields)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line


@pytest.mark.parametrize("name", ["fl_moco", "fl_byol"])  # without and with a predictor
def test_a_dry_run_leaves_out_what_is_not_read(name, npz, tmp_path, capsys, whole):
    """Clients train the whole network: there is no cut, and no server's share of the parameters."""
    folder = whole(name)
    capsys.readouterr()
    assert main(command(name, tmp_path / "run", npz, "--dry_run", devices=4)) == 0
    out = capsys.readouterr().out.splitlines()
    assert PADDING in out
    names = [line.partition(":")[0] for line in out]
    assert "queue_length" in names
    assert not {"cut", "loss", "client parameters", "server parameters"} & set(names)
    counted = sum(x.size for x in jax.tree.leaves(saved_state(folder).server.model.params))
    assert f"parameters: {counted:,}" in out


def test_supervised_training_needs_labels(tmp_path, capsys):
    path = tmp_path / "unlabelled.npz"
    np.savez(path, x_train=np.zeros((20, 4, 4, 3), np.uint8))
    fields = {"dirichlet_alpha": None}
    assert main(command("fedavg", tmp_path / "run", path, "--dry_run", **fields)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "config.local.objective = 'supervised': it takes labels" in line


@pytest.mark.parametrize(
    ("name", "temperature", "ema"),
    [("fl_simclr", 0.07, None), ("fl_moco", 0.1, 0.99), ("fl_byol", None, 0.99)],
)
def test_fields_follow_the_objective(name, temperature, ema):
    """And a stored config whose objective does not read a field is complete without it."""
    assert Local().tau == 0.7 and Local().fedu_threshold == 0.4
    raw = runpy.run_path(str(BASELINES[name]))["get_config"]()
    config = resolve(check_types(raw), CIFAR10)
    assert (config.temperature, config.ema) == (temperature, ema)
    stored = config_from_json(json.loads(json.dumps(to_json(config))), "config.json")
    assert stored == config and type(stored) is Resolved
