"""Runs of local training: what they evaluate, send, start from and are refused for."""

import dataclasses
import json
import math
import runpy
from pathlib import Path

import jax
import numpy as np
import pytest

from mocosfl_jax import load_encoder
from mocosfl_jax.config import check_types, resolve
from mocosfl_jax.errors import InputError
from mocosfl_jax.evaluate import command as evaluate
from mocosfl_jax.federated.placement import single_device
from mocosfl_jax.main import main
from mocosfl_jax.run.plan import check_fits
from mocosfl_jax.run.program import program_of
from mocosfl_jax.run.rounds import Rounds
from mocosfl_jax.run.source import load_source
from mocosfl_jax.run.workdir import read_stored
from tests import tiny
from tests.test_baselines import BASELINES, saved_state
from tests.test_config import CIFAR10
from tests.test_toy_method import NOT_READ
from tests.tiny_method import assert_equal

SHORT = {
    "rounds": 1,
    "steps_per_round": 2,
    "steps_per_dispatch": 1,
    "blocks_per_stage": (1,),
    "knn_every": 0,
}


@pytest.fixture(scope="module")
def npz(tmp_path_factory) -> Path:
    return tiny.write_npz(tmp_path_factory.mktemp("data") / "images.npz")


@pytest.fixture(scope="module")
def trained(npz, tmp_path_factory) -> Path:
    """The folder of a run of FL-BYOL."""
    folder = tmp_path_factory.mktemp("byol") / "run"
    fields = {name: x for name, x in {**tiny.FIELDS, **SHORT}.items() if name not in NOT_READ}
    flags = [f"--config.{name}={x}" for name, x in {"dataset": f"npz:{npz}", **fields}.items()]
    assert main(["main", f"--config={BASELINES['fl_byol']}", f"--workdir={folder}", *flags]) == 0
    return folder


def test_evaluate_reproduces_the_summary(trained):
    path = trained / "summary.json"
    before = json.loads(path.read_text())
    wrong = {"knn_top1": 1.0, "linear_top1": 2.0}
    path.write_text(json.dumps(before | wrong))
    argv = ["evaluate", "--workdir", str(trained), "--protocols=knn,linear"]
    assert evaluate.main(argv) == 0
    assert json.loads(path.read_text()) == before
    assert before.keys() >= wrong.keys()


def test_its_encoder_is_the_average_of_the_last_round(trained):
    images = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)
    encoder, model = load_encoder(trained), saved_state(trained).server.model
    method = program_of(read_stored(trained).config).method
    mean, std = (np.array(x, np.float32) for x in (encoder.mean, encoder.std))
    latents = method.model.latents(model.params["client"], (images / np.float32(255) - mean) / std)
    features = method.model.features(model.params["server"], latents)
    np.testing.assert_allclose(encoder(images), features, rtol=1e-4, atol=1e-5)


def test_parameters_and_running_statistics_travel_once_a_round(trained):
    summary, model = (
        json.loads((trained / "summary.json").read_text()),
        saved_state(trained).server.model,
    )
    params, stats = (
        sum(x.size for x in jax.tree.leaves(tree)) for tree in (*vars(model).values(),)
    )
    assert stats > 0 and "predictor" in model.params
    assert (summary["client_params"], summary["server_params"]) == (params, 0)
    for direction in ("up", "down"):
        assert summary[f"bytes_{direction}_per_client_round"] == 4 * (params + stats)


def test_it_starts_from_a_trained_network(trained):
    """Target networks too; the predictor, which no encoder has, and the rest are as ever."""
    stored = read_stored(trained).config
    config = dataclasses.replace(stored, init_from=str(trained), seed=5)
    rounds = Rounds(config, single_device(), program_of(config))
    state, fresh = (rounds.initial_state(x) for x in (load_source(config).variables, None))
    found, other, model = (x.server.model for x in (state, fresh, saved_state(trained)))
    assert_equal(found.network, model.network)
    assert_equal(jax.tree.map(lambda x: x[2], state.population.target), model.network)
    assert_equal(jax.tree.map(lambda x: x[1], state.cohort.model.params), found.params)
    assert_equal(found.stats["head"], model.stats["head"])
    for parts in ("params", "stats"):
        assert_equal(getattr(found, parts)["predictor"], getattr(other, parts)["predictor"])
    assert_equal(state.population.record, fresh.population.record)


def test_a_population_that_no_device_holds_is_refused_with_its_size():
    """A client of FedEMA keeps its model, its target network and three numbers."""
    raw = runpy.run_path(str(BASELINES["fedema"]))["get_config"]()
    raw.update({"num_clients": 3_000, "width": 16, "blocks_per_stage": (1, 1), "head_width": 64})
    config = resolve(check_types(raw), CIFAR10)
    program = program_of(config)
    rounds = Rounds(config, single_device(), program)
    model = jax.eval_shape(program.method.learner.init, jax.random.key(0))

    def count(tree) -> int:
        return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))

    kept = 3_000 * 4 * (count(model) + count(model.network) + 3)
    words = rf"num_clients = 3000: .* the population alone {2 * kept / 1e9:.1f} GB"
    with pytest.raises(InputError, match=words):
        check_fits(config, rounds.bytes_a_device(), 2 * kept)
