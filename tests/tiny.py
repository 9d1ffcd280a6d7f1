"""A run small enough for tests: 8x8 images in an npz, a network of two blocks, four clients."""

from pathlib import Path

import numpy as np

from mocosfl_jax.config import Resolved, check_types, default_config, resolve
from mocosfl_jax.config.data import prepare
from mocosfl_jax.data.sources import Dataset
from mocosfl_jax.federated.placement import single_device
from mocosfl_jax.run.checkpoint import Identity, data_digest, find_newest
from mocosfl_jax.run.program import program_of
from mocosfl_jax.run.rounds import Rounds
from mocosfl_jax.run.workdir import read_stored

FIELDS = {
    "num_clients": 4,
    "classes_per_client": 2,
    "batch_size": 3,
    "steps_per_round": 6,
    "rounds": 3,
    "syncs_per_round": 2,
    "steps_per_dispatch": 3,
    "width": 4,
    "blocks_per_stage": (1, 1),
    "head_width": 8,
    "queue_length": 32,
    "knn_every": 1,
    "knn_k": 5,
    "checkpoint_every": 1,
    "probe_epochs": 2,
    "eval_batch_size": 16,
    "devices": 1,
    "compilation_cache": "none",
    "tensorboard": False,
    "progress": False,
}


def write_npz(path: Path, train: int = 60, test: int = 20) -> Path:
    """Random 8x8 RGB images of 3 classes, whose brightness tells the class."""
    rng = np.random.default_rng(1)
    arrays = {}
    for split, number in (("train", train), ("test", test)):
        labels = np.arange(number) % 3
        noise = rng.integers(0, 128, (number, 8, 8, 3))
        arrays[f"x_{split}"] = (noise + 40 * labels[:, None, None, None]).astype(np.uint8)
        arrays[f"y_{split}"] = labels
    np.savez(path, **arrays)
    return path


def write_unevaluated(path: Path, train: int = 60) -> Path:
    """The same training images without a test split: of a run that evaluates nothing, where
    `holdout_fraction` is 0."""
    with np.load(write_npz(path, train, test=3)) as both:
        arrays = {name: both[name] for name in ("x_train", "y_train")}
    np.savez(path, **arrays)
    return path


def flags(npz: Path, **fields) -> list[str]:
    """The tiny setting as command-line overrides of any config file."""
    values = {"dataset": f"npz:{npz}", **FIELDS, **fields}
    return [f"--config.{name}={value}" for name, value in values.items()]


def load(npz: Path, **fields) -> tuple[Resolved, Dataset]:
    """Resolved config and data."""
    raw = default_config()
    raw.update({"dataset": f"npz:{npz}", **FIELDS, **fields})
    config = check_types(raw)
    prepared = prepare(config)
    return resolve(config, prepared.info), prepared.load()


def saved_state(folder: Path, npz: Path, **fields):
    """State of the newest checkpoint of a run, read with one device; it must pass all checks."""
    config, _ = load(npz, **fields)
    rounds = Rounds(config, single_device(), program_of(config))
    stored = read_stored(folder)
    identity = Identity(stored.config, data_digest(stored.data))
    shapes = rounds.abstract_unpadded()
    found = find_newest(folder / "checkpoints", shapes, identity)
    assert not found.bad
    return found.restored.state
