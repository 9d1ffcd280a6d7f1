"""The stored form of a config: it comes back, and tells what a run is made of."""

import dataclasses
import json

import pytest

from mocosfl_jax.config import Config, Resolved
from mocosfl_jax.config.fields import EXECUTION_FIELDS
from mocosfl_jax.config.stored import config_from_json, differences, to_json
from mocosfl_jax.errors import InputError
from tests.test_config import resolved


def as_json(config: Config) -> dict:
    return json.loads(json.dumps(to_json(config)))


def test_a_stored_config_comes_back():
    config = resolved(blocks_per_stage=(1, 2), mean=(0.5, 0.25, 0.125), data_dir="here")
    assert config_from_json(as_json(config), "config.json") == config


def test_what_a_stored_config_lacks_means_what_its_version_did():
    stored = as_json(resolved(holdout_fraction=0.25))
    del stored["holdout_fraction"], stored["client_state"], stored["method"]
    config = config_from_json(stored, "config.json")
    assert (config.holdout_fraction, config.client_state) == (0.1, "persistent")
    assert config.method == "mocosfl"


@pytest.mark.parametrize("missing", [None, "rounds", "temperature", "mean", "devices", "stem"])
def test_a_stored_config_is_resolved_if_it_is_complete(missing):
    stored = as_json(resolved(mean=(0.5, 0.25, 0.125)))
    stored.pop(missing, None)
    config = config_from_json(stored, "config.json")
    assert type(config) is (Config if missing in ("rounds", "temperature") else Resolved)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"cut": "one"}, "runs/a/config.json: config.cut = 'one'"),
        ({"cut": [1]}, "runs/a/config.json: config.cut = [1]"),
        ({"mean": {"red": 0.5}}, "runs/a/config.json: config.mean = {'red': 0.5}"),
        ({"mean": [0.5, None, 0.5]}, "runs/a/config.json: config.mean = None"),
        ({"momentum": None}, "runs/a/config.json: config.momentum = None"),
        ({"method": None}, "runs/a/config.json: config.method = None"),
        ({"method": "moco"}, "runs/a/config.json: config.method = 'moco'"),
        ({"toy": {"rate": 0.5}}, "runs/a/config.json: config.toy = {'rate': 0.5}"),
        ({"warp": 9, "shields": True}, "runs/a/config.json = 'shields, warp'"),
        ([1, 2], "runs/a/config.json = [1, 2]"),
    ],
)
def test_a_stored_config_that_cannot_be_read_is_named(values, words):
    with pytest.raises(InputError) as error:
        config_from_json(values, "runs/a/config.json")
    assert str(error.value).startswith(words)


def test_differences_leave_out_how_a_run_is_carried_out():
    stored = resolved()
    found = dataclasses.replace(stored, temperature=0.2, mean=(0.5, 0.5, 0.5), eval_batch_size=7)
    assert differences(stored, found) == [
        "mean None -> (0.5, 0.5, 0.5)",
        "temperature 0.1 -> 0.2",
    ]
    assert differences(stored, stored) == []


def test_what_resuming_may_change():
    """A new field is what a run is made of unless its marker says otherwise."""
    assert {
        "checkpoint_every",
        "cohort_chunks",
        "compilation_cache",
        "data_dir",
        "devices",
        "eval_batch_size",
        "init_from",
        "keep_checkpoints",
        "knn_every",
        "mix_dataset",
        "progress",
        "semi_supervised",
        "server_shards",
        "steps_per_dispatch",
        "tensorboard",
    } == EXECUTION_FIELDS
