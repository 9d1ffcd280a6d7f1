"""Sweeps whose runs are jobs of a Slurm cluster."""

import json
import os
import subprocess
import threading
import time
from pathlib import Path

import pytest

from mocosfl_jax.errors import InputError
from mocosfl_jax.sweep import engines
from mocosfl_jax.sweep.command import main
from mocosfl_jax.sweep.definition import default_sweep
from mocosfl_jax.sweep.engines import RequeuedTask, SlurmEngine, Task
from mocosfl_jax.sweep.folder import SweepFolder
from tests.tiny_sweep import (
    FAKE,
    calls,
    command,
)

pytestmark = pytest.mark.usefixtures("no_gpu")


def test_slurm_jobs_run_the_same_commands(npz, tmp_path, monkeypatch):
    monkeypatch.setenv("FAKE_RUN", "4/0=fail")
    parameters = default_sweep().slurm.to_dict()
    engine = SlurmEngine(tmp_path / "slurm", None, {**parameters, "timeout_min": 5}, "local")
    monkeypatch.setattr("mocosfl_jax.sweep.command._engine", lambda *_: engine)
    assert main(command(npz), FAKE) == 1
    assert calls(npz) == {"num_clients=2,seed=0": 1, "num_clients=4,seed=0": 1}
    assert SweepFolder(npz.parent / "sweep").is_finished("num_clients=2,seed=0")


def test_a_preempted_slurm_job_saves_and_is_requeued(npz, tmp_path, monkeypatch):
    monkeypatch.setenv("FAKE_RUN", "4/0=wait")
    engine = SlurmEngine(tmp_path / "slurm", None, {"timeout_min": 5}, "local")
    log = tmp_path / "run" / "log.txt"
    arguments = ("--config.num_clients=4", "--config.seed=0", "--workdir", str(log.parent))
    (job,) = engine.start([Task("run", (*FAKE, *arguments), log)])
    while not (log.parent / "ready").exists():
        assert job.poll() is None
        time.sleep(0.05)
    preempt = ["pkill", "-USR2", "-P", job._job.job_id]  # the children of submitit's controller
    subprocess.run(preempt, check=True)
    while job.poll() is None:
        time.sleep(0.05)
    assert job.poll() == 0
    assert (log.parent / "saved").exists()
    assert json.loads((log.parent / "summary.json").read_text())["steps"] == 4
    assert len((log.parent / "calls").read_text().splitlines()) == 2


def test_a_checkpoint_in_the_middle_waits_for_the_child(tmp_path, monkeypatch):
    monkeypatch.setenv("FAKE_RUN", "4/0=wait")
    monkeypatch.setattr(engines.signal, "signal", lambda *_: None)  # only in the main thread
    arguments = ("--config.num_clients=4", "--config.seed=0", "--workdir", str(tmp_path))
    task = RequeuedTask(Task("run", (*FAKE, *arguments), tmp_path / "log.txt"))
    statuses = []
    thread = threading.Thread(target=lambda: statuses.append(task()))
    thread.start()
    while not (tmp_path / "ready").exists():
        time.sleep(0.05)
    again = task.checkpoint()
    assert (tmp_path / "saved").exists()
    thread.join()
    assert statuses == [143]
    assert again.function() == 0


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """Stand-ins for a cluster that takes jobs, or refuses them: returns the batch script."""
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    (tmp_path / "bin").mkdir()

    def make(sbatch: str) -> Path:
        for name, body in (("srun", "exit 0"), ("sbatch", f'cp "$1" {tmp_path}/batch\n{sbatch}')):
            (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{body}\n")
            (tmp_path / "bin" / name).chmod(0o755)
        return tmp_path / "batch"

    return make


def test_slurm_is_asked_for_what_the_config_says(tmp_path, cluster):
    batch = cluster("echo Submitted batch job 12")
    wanted = {"timeout_min": 90, "gpus_per_node": 2, "partition": "long", "account": None}
    engine = SlurmEngine(tmp_path / "slurm", None, {**default_sweep().slurm.to_dict(), **wanted})
    tasks = [Task(name, ("true",), tmp_path / name / "log.txt") for name in "abc"]
    assert [job._job.job_id for job in engine.start(tasks)] == ["12_0", "12_1", "12_2"]
    options = {line for line in batch.read_text().splitlines() if line.startswith("#SBATCH")}
    assert {
        "#SBATCH --array=0-2%3",
        "#SBATCH --cpus-per-task=8",
        "#SBATCH --gpus-per-node=2",
        "#SBATCH --partition=long",
        "#SBATCH --signal=USR2@120",
        "#SBATCH --time=90",
    } <= options
    assert not any("account" in option for option in options)


def test_a_cluster_that_refuses(tmp_path, cluster):
    cluster("echo sbatch: error: invalid partition >&2; exit 1")
    engine = SlurmEngine(tmp_path / "slurm", None, {"timeout_min": 5, "partition": "nowhere"})
    with pytest.raises(InputError, match=r"config\.slurm.*nowhere.*invalid partition"):
        engine.start([Task("a", ("true",), tmp_path / "log.txt")])


def test_no_cluster_here(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match="--engine = 'slurm'"):
        SlurmEngine(tmp_path, None, default_sweep().slurm.to_dict())
