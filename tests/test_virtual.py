"""On how many virtual devices a run on a CPU starts and goes on."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from mocosfl_jax.main import main
from mocosfl_jax.run import virtual
from mocosfl_jax.run.virtual import offer_devices, with_devices
from mocosfl_jax.run.workdir import Stored, read_stored
from tests import tiny

ROOT = Path(__file__).parent.parent


@pytest.fixture
def machine(monkeypatch):
    """A CPU with four cores on which JAX has not started; what it then starts with, by name."""
    begun = {}
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setattr(virtual, "_cores", lambda: 4)
    monkeypatch.setattr(jax.config, "update", begun.__setitem__)
    monkeypatch.setattr(jax, "device_count", lambda: begun["jax_num_cpu_devices"])
    return begun


def devices_of(npz, stored=None, **fields) -> int | None:
    config, _ = tiny.load(npz, **fields)
    if stored is not None:
        stored = Stored(tiny.load(npz, devices=stored.get("devices"))[0], None)
    return (with_devices(config, stored) if offer_devices(config, stored) else config).devices


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"devices": None}, 2),
        ({"devices": None, "num_clients": 5}, 1),  # a third of six slots would be padding
        ({"devices": None, "num_clients": 5, "cohort_size": 2}, 2),
        ({"devices": None, "num_clients": 1, "classes_per_client": None}, 1),
        ({"devices": None, "cohort_chunks": 2}, 2),
        ({"devices": None, "cohort_chunks": 4}, 1),  # four of eight slots would be padding
        ({"devices": None, "num_clients": 5, "cohort_chunks": 5}, 1),
        ({"devices": 1}, 1),
        ({"devices": 3}, 3),
        ({"devices": 4}, 4),
    ],
)
def test_a_run_starts_on_two_where_they_have_as_many_clients(npz, machine, fields, expected):
    assert devices_of(npz, **fields) == expected
    assert machine == {"jax_num_cpu_devices": fields["devices"] or 2}


def test_rich_clients_count_apart(npz, machine):
    rich = {"data": 0.5, "batch_factor": 2}
    for share, expected in ((0.5, 2), (0.25, 1)):  # of 4 clients
        config = {"devices": None, "queue_length": 64, "rich": {"clients": share, **rich}}
        assert devices_of(npz, **config) == expected


def test_no_core_has_two_devices(npz, machine):
    assert devices_of(npz, devices=5) == 5  # which `make_placement` refuses
    assert machine == {"jax_num_cpu_devices": 4}


def test_a_run_goes_on_with_the_devices_it_started_on(npz, machine):
    assert devices_of(npz, devices=None, stored={"devices": None}) == 1
    assert devices_of(npz, devices=None, stored={"devices": 1}) == 1
    assert devices_of(npz, devices=None, stored={"devices": 2}, num_clients=5) == 2
    assert devices_of(npz, devices=2, stored={"devices": 1}) == 2


def test_an_accelerator_keeps_all_its_devices(npz, machine, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert devices_of(npz, devices=None) is None


def test_who_has_set_their_number_or_started_jax_keeps_it(npz, machine, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
    assert devices_of(npz, devices=None) is None
    monkeypatch.setenv("XLA_FLAGS", "")
    with monkeypatch.context() as environment:
        environment.setenv("JAX_NUM_CPU_DEVICES", "1")
        assert devices_of(npz, devices=None) is None
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    assert devices_of(npz, devices=None) is None
    monkeypatch.undo()  # JAX has started here
    monkeypatch.setenv("XLA_FLAGS", "")
    assert devices_of(npz, devices=None) is None
    assert not machine


@pytest.mark.parametrize(
    ("flags", "planned"),
    [([], 2), (["--multihost"], None), (["--coordinator=host:1", "--num_processes=2"], None)],
)
def test_a_dry_run_of_one_of_several_processes_plans_no_virtual_devices(
    npz, machine, capsys, monkeypatch, flags, planned
):
    monkeypatch.chdir(ROOT)
    fields = tiny.flags(npz, devices=None)
    assert main(["main", "--config", "configs/cifar10_cpu.py", *fields, *flags, "--dry_run"]) == 0
    assert f"\ndevices: {planned}\n" in capsys.readouterr().out
    assert machine.get("jax_num_cpu_devices") == planned


def test_the_command_in_a_process_of_its_own(npz, tmp_path):
    """With a bottleneck, whose shapes are checked before the run, with JAX."""

    def run(name: str, **fields) -> dict:
        flags = tiny.flags(
            npz, **{"devices": None, "bottleneck": "C2S1", "probe_epochs": 0, **fields}
        )
        argv = ["--config", "configs/cifar10_cpu.py", "--workdir", str(tmp_path / name), *flags]
        command = [sys.executable, "-m", "mocosfl_jax.main", *argv]
        kept = [f for f in os.environ["XLA_FLAGS"].split() if "device_count" not in f]
        environment = {**os.environ, "XLA_FLAGS": " ".join(kept)}
        subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
        return json.loads((tmp_path / name / "summary.json").read_text())

    devices = min(2, virtual._cores())
    assert run("two")["devices"] == read_stored(tmp_path / "two").config.devices == devices
    assert run("one", devices=1)["devices"] == 1
    (tmp_path / "one" / "summary.json").unlink()
    assert run("one")["devices"] == 1
