"""Runs on several devices, against the same run on one."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from benchmarks.devices import collectives
from mocosfl_jax.config.data import partition_of
from mocosfl_jax.data.cohort import CohortSampler
from mocosfl_jax.errors import InputError
from mocosfl_jax.federated.placement import make_placement
from mocosfl_jax.run.feed import dispatches
from mocosfl_jax.run.program import program_of
from mocosfl_jax.run.rounds import Rounds, place_inputs, run_constants
from mocosfl_jax.run.workdir import WorkDir
from mocosfl_jax.train import Interrupted, train
from tests import tiny
from tests.test_train import ROOT, lines
from tests.tiny_method import assert_close

MAIN = ("mocosfl_jax.main",)
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
    return tiny.saved_state(folder, npz, **FIELDS)


def assert_same_run(folder: Path, expected: Path, npz: Path) -> None:
    actual, wanted = saved_state(folder, npz), saved_state(expected, npz)
    np.testing.assert_array_equal(actual.cohort_ids, wanted.cohort_ids)
    for name in ("server", "population"):
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
def test_a_run_resumes_on_another_number_of_devices(before, after, npz, one, tmp_path, stop_at):
    """Stopped in the middle of a round, when the cohort's state counts."""
    stop_at(2)
    with pytest.raises(Interrupted, match="stopped at step 4 of 12"):
        run(tmp_path, npz, devices=before, steps_per_dispatch=2)
    run(tmp_path, npz, devices=after)
    assert_same_run(tmp_path, one, npz)


@pytest.mark.parametrize(
    ("devices", "shards", "message"),
    [
        (9, 1, "config.devices = 9: at most 8, as many as there are"),
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
    state = Rounds(config, placement, program_of(config)).initial_state()
    kernel = state.server.server.params["unit1"]["conv1"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (3, 3, 4, 2)
    leaf = jax.tree.leaves(state.population)[0]
    assert leaf.sharding.is_fully_replicated


@pytest.mark.parametrize(("loss", "aligned"), [("server", True), ("one_way", False)])
def test_devices_exchange_gradients_keys_and_client_models_only(npz, loss, aligned):
    fields = {"loss": loss, "align_momentum": aligned, "cohort_size": 4, "mean": (0.5,) * 3}
    config, dataset = tiny.load(npz, **{**FIELDS, **fields, "std": (0.5,) * 3})
    placement = make_placement(4, 1)
    program = program_of(config, placement)
    rounds = Rounds(config, placement, program)
    partition = partition_of(config, len(dataset.train.images), dataset.train.labels)
    sampler = CohortSampler(partition, config.cohort_size, config.seed)
    first = next(dispatches(config, partition, sampler, rounds.slots, 0))
    _, _, inputs = place_inputs(placement, dataset, program.method.labels, first)
    arguments = (rounds.initial_state(), inputs, run_constants(config, placement))
    compiled = placement.dispatch(program, arguments[0]).lower(*arguments).compile()

    found = collectives(compiled.as_text())
    assert {c.operation for c in found} == {"all-reduce", "all-gather"}
    views = 2 if loss == "server" else 1
    keys_and_mask = 3 * (views * 4 * config.head_width + 1)  # one client of 3 images a device
    gathered = sum(c.operand_bytes for c in found if c.operation == "all-gather")
    assert gathered == keys_and_mask
    state = arguments[0]
    models = (state.server.server.params, state.server.client)  # key encoders too where aligned
    reduced = sum(c.operand_bytes for c in found if c.operation == "all-reduce")
    expected = sum(x.nbytes for x in jax.tree.leaves(models))
    same_gradient = 2 * 4 * 8  # shifts of norm2 and of the shortcut: XLA may send one of two
    assert expected - same_gradient <= reduced <= expected + 8 * 4  # and a few numbers


def test_collectives_are_read_from_a_program():
    """Operands on one device of each kind, in the notations of three versions."""
    hlo = """
  %a = (f32[3,3,4]{2,1,0}, f32[5]{0}) all-reduce(%x, %y), replica_groups={{0,1,2,3}}, to_apply=%s
  %b = f32[2,12,8]{2,1,0} all-gather(%k), channel_id=1, replica_groups=[1,4]<=[4], dimensions={1}
  %c = f32[6]{0} reduce-scatter(%g), replica_groups={{0,1},{2,3}}, dimensions={0}
  %d = pred[] all-reduce-start(%p), replica_groups=[2,2]<=[4]
  %e = pred[] all-reduce-done(%d)
  %f = f32[8,3]{1,0} all-gather(%p), replica_groups=mesh['a'=2,'b'=4] {'b'}, dimensions={0}
  %g = f32[8,3]{1,0} all-gather(%p), replica_groups=mesh['a'=2,'b'=4] {'a','b'}, dimensions={0}
"""
    assert collectives(hlo) == [
        ("all-reduce", 164),
        ("all-gather", 192),
        ("reduce-scatter", 48),
        ("all-reduce", 1),
        ("all-gather", 24),
        ("all-gather", 12),
    ]


def processes(
    folder: Path, npz: Path, number: int, broken: int = 0, fault: str = "", **fields
) -> list[subprocess.Popen]:
    """The command of one run as so many processes over loopback, two devices each.

    fault: of the process `broken`, see tests/broken_run.py.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=2")
    command = ["--config", "configs/cifar10.py"]
    command += [f"--workdir={folder}", *tiny.flags(npz, **{**FIELDS, **fields})]
    command.remove("--config.devices=1")
    command += [f"--coordinator=localhost:{port}", f"--num_processes={number}"]
    modules = [MAIN] * number
    if fault:
        modules[broken] = ("tests.broken_run", fault, "--")
    return [
        subprocess.Popen(
            [sys.executable, "-m", *modules[i], *command, f"--process_id={i}"],
            cwd=ROOT,
            env={**os.environ, "XLA_FLAGS": flags},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(number)
    ]


def test_two_processes_give_the_same_run_and_resume(npz, one, tmp_path):
    """SIGTERM of one process stops both at one step; one process alone goes on."""
    both = processes(tmp_path, npz, 2, rounds=200)
    metrics = tmp_path / "metrics.jsonl"
    while not list(tmp_path.glob("checkpoints/[0-9]*")):
        assert all(p.poll() is None for p in both), both[0].communicate()
        time.sleep(0.1)
    both[1].terminate()
    outputs = [p.communicate(timeout=100) for p in both]
    assert [p.returncode for p in both] == [143, 143], outputs
    assert "saved" in outputs[0][1]
    assert "kNN" in outputs[0][0] and "kNN" not in outputs[1][0]  # one process speaks
    assert metrics.exists()

    whole = tmp_path / "whole"
    both = processes(whole, npz, 2)
    outputs = [p.communicate(timeout=200) for p in both]
    assert [p.returncode for p in both] == [0, 0], outputs
    assert_same_run(whole, one, npz)
    assert json.loads((whole / "summary.json").read_text())["processes"] == 2


def test_a_refusal_of_one_process_reaches_the_other(npz, tmp_path):
    """Process 0 finds the folder in use; before, the other one waited for it in vain."""
    held = WorkDir(tmp_path)
    both = processes(tmp_path, npz, 2)
    outputs = [p.communicate(timeout=60) for p in both]
    held.close()
    assert [p.returncode for p in both] == [2, 2], outputs
    assert [len(err.splitlines()) for _, err in outputs] == [1, 1]
    assert "in use by a running process" in outputs[0][1]
    assert "process 0 refused: --workdir" in outputs[1][1]
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


@pytest.mark.parametrize(
    ("broken", "place", "words"),
    [
        (0, "run.metrics:MetricsFile.flush:2:100", "metrics.jsonl cannot be written"),
        (1, "run.checkpoint:digest:2:400", "checkpoints cannot be written"),
    ],
)
def test_a_full_disk_of_one_process_ends_the_other(broken, place, words, npz, tmp_path):
    """It would wait for the first one, for ever."""
    both = processes(tmp_path, npz, 2, broken, f"file_size=mocosfl_jax.{place}", rounds=40)
    outputs = [p.communicate(timeout=100) for p in both]
    assert [p.returncode for p in both] == [1, 1], outputs
    assert f"{words}: File too large; step 6 is saved" in outputs[broken][1]
    assert f"process {broken} failed: " in outputs[1 - broken][1]
