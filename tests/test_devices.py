"""Runs on several devices, against the same run on one."""

from pathlib import Path

import jax
import numpy as np
import pytest

from mocosfl_jax.build import program_of
from mocosfl_jax.checkpoint import Checkpoints
from mocosfl_jax.errors import InputError
from mocosfl_jax.placement import make_placement, single_device
from mocosfl_jax.progress import Progress
from mocosfl_jax.rounds import Cohort
from mocosfl_jax.train import Interrupted, train
from mocosfl_jax.workdir import WorkDir
from tests import tiny
from tests.test_step import assert_close
from tests.test_train import lines

TOLERANCE = 1e-3  # of the largest value, after 12 steps: sums over rows are added in another order
FIELDS = {  # a cohort of 3 clients fills no mesh; what clients keep matters
    "cohort_size": 3,
    "rounds": 2,
    "learning_rate": 0.003,
    "schedule": "constant",
    "augmentation": "v1",
}


@pytest.fixture(scope="module")
def npz(tmp_path_factory) -> Path:
    return tiny.write_npz(tmp_path_factory.mktemp("data") / "images.npz", train=67, test=21)


def run(folder: Path, npz: Path, **fields) -> dict:
    config, dataset = tiny.load(npz, **{**FIELDS, **fields})
    workdir = WorkDir(folder)
    try:
        return train(config, dataset, workdir)
    finally:
        workdir.close()


def saved_state(folder: Path, npz: Path):
    """The last checkpoint, read with one device."""
    config, _ = tiny.load(npz, **FIELDS)
    cohort = Cohort(config, single_device(), program_of(config))
    checkpoints = Checkpoints(folder / "checkpoints", 1)
    state, _ = checkpoints.restore(cohort.abstract_unpadded(cohort.initial_state()))
    checkpoints.close()
    return state


def assert_same_run(folder: Path, expected: Path, npz: Path) -> None:
    actual, wanted = saved_state(folder, npz), saved_state(expected, npz)
    np.testing.assert_array_equal(actual.cohort_ids, wanted.cohort_ids)
    for name in ("server", "population", "queue"):
        assert_close(getattr(actual, name), getattr(wanted, name), name, TOLERANCE)
    for name in ("loss", "knn_top1"):
        got, want = ([line[name] for line in lines(f) if name in line] for f in (folder, expected))
        np.testing.assert_allclose(got, want, rtol=TOLERANCE, err_msg=name)


@pytest.fixture(scope="module")
def one(npz, tmp_path_factory) -> Path:
    """The folder of the run on one device."""
    folder = tmp_path_factory.mktemp("one")
    run(folder, npz)
    return folder


@pytest.mark.parametrize(
    "fields",
    [{"devices": 8}, {"devices": 4, "server_shards": 2}, {"devices": 2, "cohort_chunks": 2}],
    ids=str,
)
def test_any_number_of_devices_gives_the_same_run(fields, npz, one, tmp_path):
    summary = run(tmp_path, npz, **fields)
    assert summary["devices"] == fields["devices"]
    assert_same_run(tmp_path, one, npz)


@pytest.mark.parametrize(("before", "after"), [(8, 2), (1, 4)])
def test_a_run_resumes_on_another_number_of_devices(before, after, npz, one, tmp_path, monkeypatch):
    """Stopped in the middle of a round, when the cohort's state counts."""
    advance = Progress.advance

    def advance_and_stop(self, steps, loss, images_per_second):
        advance(self, steps, loss, images_per_second)
        if self._step == 6:
            raise_signal()

    def raise_signal():
        import signal

        signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(Progress, "advance", advance_and_stop)
        with pytest.raises(Interrupted, match="stopped at step 9 of 12"):
            run(tmp_path, npz, devices=before)
    run(tmp_path, npz, devices=after)
    assert_same_run(tmp_path, one, npz)


@pytest.mark.parametrize(
    ("devices", "shards", "message"),
    [
        (9, 1, "config.devices = 9: there are 8: 1 to 8"),
        (6, 4, "config.server_shards = 4: a divisor of the 6 devices is needed"),
        (None, 3, "config.server_shards = 3: a divisor of the 8 devices is needed"),
    ],
)
def test_devices_that_do_not_exist_or_divide_are_refused(devices, shards, message):
    with pytest.raises(InputError) as error:
        make_placement(devices, shards)
    assert str(error.value) == message


def test_server_parameters_are_split_where_asked(npz):
    config, _ = tiny.load(npz, **FIELDS, server_shards=2)
    placement = make_placement(4, 2)
    state = Cohort(config, placement, program_of(config)).initial_state()
    kernel = state.server.params["unit1"]["conv1"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (3, 3, 4, 2)
    leaf = jax.tree.leaves(state.population)[0]
    assert leaf.sharding.is_fully_replicated
